"""`entropy-gpt private`: a server keeps its weights secret, a client its prompt, and both compute the answer."""

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from entropy_gpt.conversion.early_checks import check_model, check_notation, check_place, is_model
from entropy_gpt.training.claims import refuse_claimed
from entropy_gpt.training.storage import check_file
from entropy_gpt.workflows.output_folder import BENCHMARK

from .paths import read_host, read_path
from .private_connection import (
    Authority,
    Certificate,
    Insecure,
    Key,
    ProtocolOption,
    Timeout,
    TwoPartyProtocol,
    read_public_checkpoint,
    with_connection,
    with_options,
)


private = typer.Typer(
    help="Answer a secret prompt with secret weights, by two-party computation, and measure the cost.",
    no_args_is_help=True,
)


@private.callback()
def end_in_order():
    """Lets a terminated party, or one whose terminal is closed, end what it has begun."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))


class Embedding(StrEnum):
    one_hot = "one_hot"
    client_table = "client_table"
    public = "public"


class DraftKeep(StrEnum):
    accepted = "accepted"
    prompt = "prompt"


class Learned(StrEnum):
    logits = "logits"
    token = "token"
    sampled = "sampled"


NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Tokens of the answer; their number is public.")
]
Networks = Annotated[
    list[str] | None,
    typer.Option(
        "--network",
        help="Estimate seconds for this network, not for LAN and WAN: loopback, or bandwidth and round trip, such as "
        "300Mbps,20ms.",
    ),
]
Served = Annotated[
    str,
    typer.Option(
        "--network",
        help="The network to clients: LAN, WAN, loopback, or bandwidth and round trip, such as 300Mbps,20ms. "
        "Operations take the forms that are fastest there.",
    ),
]
ChosenFor = Annotated[
    list[str] | None,
    typer.Option(
        "--network",
        help="Estimate seconds for this network, not for LAN and WAN: loopback, or bandwidth and round trip, such as "
        "300Mbps,20ms. Operations take the forms that are fastest on the first one named, or on a WAN.",
    ),
]
Layers = Annotated[int, typer.Option("--n-layer", min=1, help="Blocks.")]
Width = Annotated[int, typer.Option("--n-embd", min=1, help="Width.")]
Heads = Annotated[int | None, typer.Option("--n-head", min=1, help="Heads. Default: heads of about 64 dimensions.")]
Length = Annotated[int, typer.Option("--seq", min=1, help="Tokens of the prompt.")]
Vocabulary = Annotated[int, typer.Option("--vocab-size", min=2, help="Tokens of the vocabulary.")]
TokenizerPlace = Annotated[
    str | None, typer.Option(help="The tokenizer's folder or repository. Default: the model's.")
]
EmbeddingOption = Annotated[
    Embedding,
    typer.Option(
        help="one_hot: neither side learns anything, at the cost of a product with the whole vocabulary. "
        "client_table: the client gets the embeddings, weights of the model (and of its head, if tied). "
        "public: the client has them already, since they are those of --public-checkpoint, to the last bit."
    ),
]
PublicCheckpoint = Annotated[
    str | None,
    typer.Option(
        "--public-checkpoint",
        metavar="MODEL",
        callback=read_public_checkpoint,
        help="With --embedding public: the checkpoint that the embeddings come from, a folder or a repository on the "
        "Hub.",
    ),
]
DraftTokens = Annotated[int | None, typer.Option(min=1, help="The most drafts that are verified at once. Default: 8.")]
DraftKeeping = Annotated[
    DraftKeep,
    typer.Option(
        help="accepted: what is computed of right drafts stays, so the server learns how many were right. "
        "prompt: only what is computed of the prompt stays, and each pass computes the whole answer. The server "
        "learns the number of passes alone."
    ),
]
AnswerOption = Annotated[
    Learned,
    typer.Option(
        help="What the client learns of each new token: its logits; only the token that is most likely, by secure "
        "comparisons; or only a token that is sampled, by noise that the client adds before. Logits reveal more about "
        "the weights with each question. So does a client's noise, if it is chosen for that."
    ),
]
FractionBits = Annotated[
    int,
    typer.Option(
        help="Bits of a number behind the point, from 12 to 22, of 64. Fewer leave room for larger numbers, more for "
        "smaller ones."
    ),
]
AuditedText = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="A text that the audit of the model's numbers looks at too. It always looks at random tokens and at "
        "those with the largest and the smallest embeddings, at every position.",
    ),
]


LongestWait = Annotated[
    int,
    typer.Option(
        "--max-waiting-seconds", min=1, max=604_800, help="For how long each may wait; after that, it is refused."
    ),
]
PreparedFolder = Annotated[
    Path | None,
    typer.Option(
        "--prepared",
        callback=read_path,
        help="Folder of this side's halves of preparations (private prepare). They are secret.",
    ),
]


@private.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An EntropyGPT or GPT-2: a folder, or on the Hub.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT. Port 0 takes a free one.")] = "127.0.0.1:9000",
    certificate: Certificate = None,
    key: Key = None,
    authority: Authority = None,
    insecure: Insecure = False,
    protocol: ProtocolOption = TwoPartyProtocol.cheetah,
    embedding: EmbeddingOption = Embedding.one_hot,
    public_checkpoint: PublicCheckpoint = None,
    answer: AnswerOption = Learned.logits,
    fraction_bits: FractionBits = 18,
    network: Served = "WAN",
    text: AuditedText = None,
    tokenizer: TokenizerPlace = None,
    longest: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            min=1,
            help="The most answers of one request, with those of wrong drafts and those that are repeated.",
        ),
    ] = 256,
    requests: Annotated[
        int, typer.Option("--max-requests", min=1, help="The most requests of a client in a day.")
    ] = 256,
    positions: Annotated[
        int, typer.Option("--max-positions", min=1, help="The most positions answered to a client in a day.")
    ] = 512,
    seconds: Annotated[
        int, typer.Option("--max-seconds", min=1, help="The most seconds that a client may hold the engine in a day.")
    ] = 14_400,
    prepared: PreparedFolder = None,
    prepared_mb: Annotated[int, typer.Option(min=1, help="The most MB that preparations may take.")] = 4000,
    workers: Annotated[
        int, typer.Option(min=1, help="Clients that are answered at once; each takes an engine with all weights.")
    ] = 1,
    longest_line: Annotated[
        int,
        typer.Option("--max-waiting", min=0, help="Clients that may wait; further ones are refused."),
    ] = 16,
    longest_wait: LongestWait = 3600,
    drain_seconds: Annotated[
        int, typer.Option(min=0, help="For how long answers that have begun may go on after SIGTERM.")
    ] = 10,
    json_log: Annotated[bool, typer.Option("--json-log", help="Write all lines as JSON.")] = False,
    health_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Say at this port, by HTTP, whether the server lives."),
    ] = None,
    health_host: Annotated[str, typer.Option(callback=read_host, help="The host of --health-port.")] = "127.0.0.1",
    timeout: Timeout = 600,
):
    """
    Hold the weights, and answer clients, as many at once as there are workers. Others wait in a line.

    A client is known by its certificate, or without TLS by its address.

    The client learns the answer and what is public: architecture, sizes, settings, and a hash of the tokenizer. The
    server learns the lengths of the prompt and the answer, and with drafts where each pass begins. Both learn whether
    numbers were out of range. Both sides are assumed to follow the protocol (semi-honest). docs/private_inference.md
    lists what is not protected.

    Example: entropy-gpt private serve runs/proposal/model --listen 0.0.0.0:9000 --cert s.pem --key s.key --ca ca.pem
    """
    check_model(model)
    if tokenizer is not None:
        check_place(tokenizer)
    from entropy_gpt.terminal.private import serve as run

    run(
        model,
        listen,
        (certificate, key, authority),
        insecure=insecure,
        protocol=protocol.value,
        embedding=embedding.value,
        public_checkpoint=public_checkpoint,
        answer=answer.value,
        fraction_bits=fraction_bits,
        network=network,
        text=text,
        tokenizer=tokenizer,
        limits=(longest, requests, positions, seconds),
        prepared=prepared,
        prepared_mb=prepared_mb,
        workers=workers,
        longest_line=longest_line,
        longest_wait=longest_wait,
        drain_seconds=drain_seconds,
        json_log=json_log,
        health_port=health_port,
        health_host=health_host,
        timeout=timeout,
    )


def _read_generation(
    max_new_tokens: NewTokens = 1,
    temperature: Annotated[
        float, typer.Option(min=0, help="Draw tokens at this temperature; at 0, take the most likely ones.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw among this number of the most likely tokens. Needs logits.")
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(min=0, max=1, help="Draw among the most likely tokens with this share alone. Needs logits."),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of what is drawn.")] = None,
) -> dict[str, Any]:
    """The arguments of `PrivateClient.generate` that these options are."""
    return locals()


def _read_drafts(
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A causal language model of one's own, with the server's tokenizer: a folder, or on the Hub. It "
            "drafts tokens, and the server's model verifies several at once. The answer is the same.",
        ),
    ] = None,
    draft_tokens: DraftTokens = None,
    draft_keep: DraftKeeping = DraftKeep.accepted,
) -> dict[str, Any]:
    """The arguments of `PrivateClient` that these options are."""
    if draft is not None:
        check_model(draft)
    return {"draft": draft, "draft_tokens": draft_tokens, "draft_keep": draft_keep.value}


@private.command()
@with_connection
@with_options("drafts", _read_drafts)
@with_options("generation", _read_generation)
def ask(
    connection: dict[str, Any],
    drafts: dict[str, Any],
    generation: dict[str, Any],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="The text to continue, or - to read it from standard input. It stays on this machine, but other "
            "users of the machine can see a command line (ps) while the command runs: give a secret one by - or "
            "--prompt-file.",
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read the prompt from this file, in UTF-8.")
    ] = None,
    prepared: PreparedFolder = None,
    require_prepared: Annotated[
        bool, typer.Option("--require-prepared", help="Fail at once if no preparation fits.")
    ] = False,
    networks: Networks = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=read_path, help="Write the cost to this file, as JSON."),
    ] = None,
):
    """
    Hold the prompt, and ask a server to continue it. The server does not learn how tokens are chosen.

    Example: entropy-gpt private ask - --connect example.org:9000 --tokenizer DIR --cert c.pem --key c.key --ca ca.pem
    < prompt.txt
    """
    _check_files(output)
    from entropy_gpt.terminal.private import ask as run

    run(
        prompt,
        prompt_file,
        networks or [],
        output,
        generation,
        prepared=prepared,
        require_prepared=require_prepared,
        **drafts,
        **connection,
    )


@private.command()
@with_connection
def prepare(
    connection: dict[str, Any],
    prepared: Annotated[
        Path,
        typer.Option("--prepared", callback=read_path, help="Folder for this side's halves. They are secret."),
    ],
    tokens: Annotated[int, typer.Option(min=1, help="The most tokens of a prompt.")] = 128,
    new_tokens: NewTokens = 1,
    count: Annotated[int, typer.Option(min=1, help="How many to make; each serves one prompt.")] = 1,
):
    """
    Do with a server all of later answers that needs no prompt, so that `ask --prepared` takes less time.

    The server has to run with --prepared. What is whole stays if it is interrupted.

    Example: entropy-gpt private prepare --connect example.org:9000 --tokenizer DIR --prepared prepared --count 4
    --cert c.pem --key c.key --ca ca.pem
    """
    from entropy_gpt.terminal.private import prepare as run

    run(tokens, new_tokens, count, prepared=prepared, **connection)


@private.command()
def demo(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An EntropyGPT or GPT-2: a folder, or on the Hub.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "def main(",
    new_tokens: NewTokens = 1,
    protocol: ProtocolOption = TwoPartyProtocol.cheetah,
    embedding: EmbeddingOption = Embedding.one_hot,
    public_checkpoint: PublicCheckpoint = None,
    answer: AnswerOption = Learned.logits,
    fraction_bits: FractionBits = 18,
    text: AuditedText = None,
    tokenizer: TokenizerPlace = None,
    prepared: Annotated[
        bool, typer.Option("--prepared", help="Do first what needs no prompt, and show both phases.")
    ] = False,
    networks: ChosenFor = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=read_path, help="Write the cost of each step to this file, as JSON."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            callback=read_path, help="Write the total cost to this file, as a result for report, card and push."
        ),
    ] = None,
    timeout: Timeout = 600,
):
    """
    Run a server and a client on this machine, and compare their answer with the model's own in the clear.

    Example: entropy-gpt private demo model_cards/models/converted --max-new-tokens 3
    """
    _check_files(output, results)
    check_model(model)
    if tokenizer is not None:
        check_place(tokenizer)
    from entropy_gpt.terminal.private import demo as run

    run(
        model,
        prompt,
        networks or [],
        output,
        results,
        new_tokens=new_tokens,
        protocol=protocol.value,
        embedding=embedding.value,
        public_checkpoint=public_checkpoint,
        answer=answer.value,
        fraction_bits=fraction_bits,
        text=text,
        tokenizer=tokenizer,
        prepared=prepared,
        timeout=timeout,
    )


@private.command()
def cost(
    architectures: Annotated[
        list[str],
        typer.Argument(
            metavar="NOTATION|MODEL...",
            help="Architectures, such as 'SM+LN+G' and 'SM+ScFuFFN', and models: folders, or on the Hub.",
        ),
    ],
    n_layer: Annotated[int | None, typer.Option(min=1, help="Blocks. Default: those of the model, or 12.")] = None,
    n_embd: Annotated[int | None, typer.Option(min=1, help="Width. Default: the model's, or 768.")] = None,
    n_head: Heads = None,
    length: Length = 128,
    vocab_size: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the vocabulary. Default: the model's, or 50257.")
    ] = None,
    kept: Annotated[int, typer.Option(min=0, help="Earlier tokens, whose keys and values are cached.")] = 0,
    new_tokens: NewTokens = 1,
    acceptance: Annotated[
        float | None,
        typer.Option(
            "--draft-acceptance",
            min=0,
            max=1,
            help="Predict an answer with drafts (private ask --draft): each is right with this probability, if those "
            "before it are. docs/drafts.md shows what was seen.",
        ),
    ] = None,
    draft_tokens: DraftTokens = None,
    draft_keep: DraftKeeping = DraftKeep.accepted,
    all_positions: Annotated[
        bool, typer.Option("--all-positions", help="Compute the logits of every position, not only of the last one.")
    ] = False,
    embedding: EmbeddingOption = Embedding.one_hot,
    prepared: Annotated[
        bool, typer.Option("--prepared", help="Do before the prompt what needs none (private prepare).")
    ] = False,
    networks: ChosenFor = None,
):
    """
    Predict the traffic, the round trips and the time of a private inference, from architecture and sizes alone.

    The prices of Cheetah's primitives were measured once. docs/private_inference.md compares predictions with
    measurements. With drafts, they are of the answer to be expected, and also of a pass and of a token.

    Example: entropy-gpt private cost SM+LN+G SM+LN+R 'EReg(SM(t)+ScFuFFN)' --seq 256 --network 100Mbps,80ms

    Example: entropy-gpt private cost SM+ScFuFFN --max-new-tokens 16 --draft-acceptance 0.8
    """
    for architecture in architectures:
        (check_model if is_model(architecture) else check_notation)(architecture)
    from entropy_gpt.terminal.private_cost import run

    run(
        architectures,
        networks or [],
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        vocab_size=vocab_size,
        kept=kept,
        length=length,
        max_new_tokens=new_tokens,
        draft_acceptance=acceptance,
        draft_tokens=draft_tokens,
        draft_keep=draft_keep.value,
        all_positions=all_positions,
        embedding=embedding.value,
        prepared=prepared,
    )


@private.command()
def benchmark(
    notations: Annotated[
        list[str] | None, typer.Argument(metavar="NOTATION...", help="Architectures. Default: the paper's four.")
    ] = None,
    n_layer: Layers = 12,
    n_embd: Width = 768,
    n_head: Heads = None,
    length: Length = 128,
    vocab_size: Vocabulary = 50257,
    networks: Annotated[
        list[str] | None,
        typer.Option(
            "--network",
            help="Another network besides LAN and WAN: loopback, or bandwidth and round trip, such as 300Mbps,20ms. "
            "Operations take the forms that are fastest on the first one named, or on a WAN.",
        ),
    ] = None,
    whole: Annotated[
        bool,
        typer.Option("--full", help="Also run the cheapest architecture as a whole, to verify the sum of its parts."),
    ] = False,
    prepared: Annotated[
        bool,
        typer.Option("--prepared", help="Also measure each in two phases: before the prompt, and after it."),
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=read_path, help="Folder for measurements, table and picture.")
    ] = Path("private_benchmark_output"),
    timeout: Timeout = 1200,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be measured, with predicted MB, and measure nothing.")
    ] = False,
):
    """
    Measure the paper's table on this machine: the cost of each architecture between two processes.

    The first and the last block, one block of each kind in between, the embedding and the head are measured and added
    up. The baseline is SM+LN+G as it is run today. If interrupted, run the same command again to continue.

    Example: entropy-gpt private benchmark --full --network 300Mbps,20ms -o runs/private
    """
    for notation in notations or ():
        check_notation(notation, n_layer)
    BENCHMARK.is_in(output)  # before the imports, which take seconds
    if not dry_run:
        refuse_claimed(output)
    from entropy_gpt.terminal.private_table import run

    run(
        notations,
        dry_run,
        output=output,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        vocab_size=vocab_size,
        context=length,
        networks=networks or [],
        whole=whole,
        prepared=prepared,
        timeout=timeout,
    )


def _check_files(*files: Path | None):
    """Refuses files that can't be written, before the imports and the work, which take long."""
    for file in files:
        if file is not None:
            check_file(file)
