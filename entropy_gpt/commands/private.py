"""`entropy-gpt private`: a server keeps its weights secret, a client its prompt, and both compute the answer."""

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


private = typer.Typer(
    help="Answer a secret prompt with secret weights, by two-party computation, and measure the cost.",
    no_args_is_help=True,
)


@private.callback()
def end_in_order():
    """Lets a terminated party delete its temporary files."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


class TwoPartyProtocol(StrEnum):
    cheetah = "cheetah"
    semi2k = "semi2k"


class Embedding(StrEnum):
    one_hot = "one_hot"
    client_table = "client_table"


class Learned(StrEnum):
    logits = "logits"
    token = "token"


Certificate = Annotated[Path | None, typer.Option("--cert", help="This side's certificate, in PEM.")]
Key = Annotated[Path | None, typer.Option("--key", help="Its private key.")]
Authority = Annotated[
    Path | None,
    typer.Option("--ca", help="Certificates of the authorities that may sign the other side's certificate."),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure", help="Allow plain TCP beyond this machine's loopback. Use it only in a trusted network."
    ),
]
Timeout = Annotated[int, typer.Option(min=1, help="Seconds without any event after which a side gives up.")]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Tokens of the answer; their number is public.")
]
Networks = Annotated[
    list[str] | None,
    typer.Option(
        "--network",
        help="Estimate seconds for this network, not for LAN and WAN: bandwidth and round trip, such as 300Mbps,20ms.",
    ),
]
Layers = Annotated[int, typer.Option("--n-layer", min=1, help="Blocks.")]
Width = Annotated[int, typer.Option("--n-embd", min=1, help="Width.")]
Heads = Annotated[int | None, typer.Option("--n-head", min=1, help="Heads. Default: heads of 64 dimensions.")]
Length = Annotated[int, typer.Option("--seq", min=1, help="Tokens of the prompt.")]
Vocabulary = Annotated[int, typer.Option("--vocab-size", min=2, help="Tokens of the vocabulary.")]
TokenizerPlace = Annotated[
    str | None, typer.Option(help="The tokenizer's folder or repository. Default: the model's.")
]
ProtocolOption = Annotated[
    TwoPartyProtocol,
    typer.Option(
        help="cheetah: neither side learns anything from the messages it receives. semi2k: the server deals the "
        "random numbers that protect the prompt, so it could read the prompt; use it only for measurements."
    ),
]
EmbeddingOption = Annotated[
    Embedding,
    typer.Option(
        help="one_hot: neither side learns anything, at the cost of a product with the whole vocabulary. "
        "client_table: the client gets the embeddings. These are weights of the model (and of its head, if tied)."
    ),
]
AnswerOption = Annotated[
    Learned,
    typer.Option(
        help="What the client learns of each new token: its logits, or only the token, by a secure comparison. Logits "
        "reveal more about the weights with each question."
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
    answer: AnswerOption = Learned.logits,
    fraction_bits: FractionBits = 18,
    text: AuditedText = None,
    tokenizer: TokenizerPlace = None,
    longest: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="The most tokens that a client may ask for.")
    ] = 256,
    timeout: Timeout = 600,
):
    """
    Hold the weights, and answer one client after another.

    The client learns the answer and what is public: architecture, sizes, settings, and a hash of the tokenizer. The
    server learns the lengths of the prompt and the answer. Both learn whether numbers were out of range. Both sides
    are assumed to follow the protocol (semi-honest). docs/private_inference.md lists what is not protected.

    Example: entropy-gpt private serve runs/proposal/model --listen 0.0.0.0:9000 --cert s.pem --key s.key --ca ca.pem
    """
    from entropy_gpt.terminal.private import serve as run

    run(
        model,
        listen,
        (certificate, key, authority),
        insecure=insecure,
        protocol=protocol.value,
        embedding=embedding.value,
        answer=answer.value,
        fraction_bits=fraction_bits,
        text=text,
        tokenizer=tokenizer,
        longest=longest,
        timeout=timeout,
    )


@private.command()
def ask(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue. It stays on this machine.")],
    connect: Annotated[str, typer.Option(help="HOST:PORT of the server.")],
    tokenizer: Annotated[str, typer.Option(help="The server's tokenizer: a folder, or a repository on the Hub.")],
    certificate: Certificate = None,
    key: Key = None,
    authority: Authority = None,
    insecure: Insecure = False,
    new_tokens: NewTokens = 1,
    protocol: ProtocolOption = TwoPartyProtocol.cheetah,
    networks: Networks = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the cost to this file, as JSON.")
    ] = None,
    timeout: Timeout = 600,
):
    """
    Hold the prompt, and ask a server to continue it, always with the most likely token.

    Example: entropy-gpt private ask "def main(" --connect example.org:9000 --tokenizer DIR --cert c.pem --key c.key
    --ca ca.pem
    """
    from entropy_gpt.terminal.private import ask as run

    run(
        prompt,
        connect,
        (certificate, key, authority),
        networks or [],
        output,
        tokenizer=tokenizer,
        insecure=insecure,
        new_tokens=new_tokens,
        protocol=protocol.value,
        timeout=timeout,
    )


@private.command()
def demo(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An EntropyGPT or GPT-2: a folder, or on the Hub.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "def main(",
    new_tokens: NewTokens = 1,
    protocol: ProtocolOption = TwoPartyProtocol.cheetah,
    embedding: EmbeddingOption = Embedding.one_hot,
    answer: AnswerOption = Learned.logits,
    fraction_bits: FractionBits = 18,
    text: AuditedText = None,
    tokenizer: TokenizerPlace = None,
    networks: Networks = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the cost of each step to this file, as JSON.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Write the total cost to this file, as a result for report, card and push."),
    ] = None,
    timeout: Timeout = 600,
):
    """
    Run a server and a client on this machine, and compare their answer with the model's own in the clear.

    Example: entropy-gpt private demo model_cards/models/converted --max-new-tokens 3
    """
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
        answer=answer.value,
        fraction_bits=fraction_bits,
        text=text,
        tokenizer=tokenizer,
        timeout=timeout,
    )


@private.command()
def cost(
    notations: Annotated[
        list[str], typer.Argument(metavar="NOTATION...", help="Architectures, such as 'SM+LN+G' and 'SM+ScFuFFN'.")
    ],
    n_layer: Layers = 12,
    n_embd: Width = 768,
    n_head: Heads = None,
    length: Length = 128,
    vocab_size: Vocabulary = 50257,
    kept: Annotated[int, typer.Option(min=0, help="Earlier tokens, whose keys and values are cached.")] = 0,
    all_positions: Annotated[
        bool, typer.Option("--all-positions", help="Compute the logits of every position, not only of the last one.")
    ] = False,
    embedding: EmbeddingOption = Embedding.one_hot,
):
    """
    Predict the traffic and the round trips of a private inference from the architecture, without weights or engine.

    The prices of Cheetah's primitives were measured once. docs/private_inference.md compares predictions with
    measurements.

    Example: entropy-gpt private cost SM+LN+G SM+LN+R 'EReg(SM(t)+ScFuFFN)' --seq 256
    """
    from entropy_gpt.terminal.private_cost import run

    run(
        notations,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        vocab_size=vocab_size,
        kept=kept,
        length=length,
        all_positions=all_positions,
        embedding=embedding.value,
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
            "--network", help="Another network besides LAN and WAN: bandwidth and round trip, such as 300Mbps,20ms."
        ),
    ] = None,
    whole: Annotated[
        bool,
        typer.Option("--full", help="Also run the cheapest architecture as a whole, to verify the sum of its parts."),
    ] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for measurements, table and picture.")] = Path(
        "private_benchmark_output"
    ),
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
        timeout=timeout,
    )
