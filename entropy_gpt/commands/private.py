"""`entropy-gpt private`: two parties compute an answer, of whom one keeps its weights and the other its prompt."""

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


private = typer.Typer(
    help="Answer a secret prompt with secret weights: two-party inference, checked and measured.",
    no_args_is_help=True,
)


@private.callback()
def end_in_order():
    """Whoever ends a party gently lets it clear away what it keeps on disk."""
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
Authority = Annotated[Path | None, typer.Option("--ca", help="Certificates of those who may sign the other side's.")]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Plain TCP beyond this machine's loopback; only where the network is trusted."),
]
Timeout = Annotated[int, typer.Option(min=1, help="Seconds for which nothing may happen before a side gives up.")]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Tokens of the answer; their number is public.")
]
Networks = Annotated[
    list[str] | None,
    typer.Option(
        "--network",
        help="What to tell seconds for, in place of LAN and WAN: a bandwidth and a round trip, such as 300Mbps,20ms.",
    ),
]
Layers = Annotated[int, typer.Option("--n-layer", min=1, help="Blocks.")]
Width = Annotated[int, typer.Option("--n-embd", min=1, help="Width.")]
Heads = Annotated[int | None, typer.Option("--n-head", min=1, help="Heads; of 64 numbers each if not given.")]
Length = Annotated[int, typer.Option("--seq", min=1, help="Tokens of the prompt.")]
Vocabulary = Annotated[int, typer.Option("--vocab-size", min=2, help="Tokens of the vocabulary.")]
TokenizerPlace = Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the model.")]
ProtocolOption = Annotated[
    TwoPartyProtocol,
    typer.Option(
        help="cheetah: neither side can learn more from what it receives. semi2k: the server deals the random numbers "
        "that protect the prompt, so it could read it: for measuring alone."
    ),
]
EmbeddingOption = Annotated[
    Embedding,
    typer.Option(
        help="one_hot: neither side learns anything, for a product with the whole vocabulary. client_table: the "
        "client is given the embeddings, which are weights of the model, and of its head too where the two are tied."
    ),
]
AnswerOption = Annotated[
    Learned,
    typer.Option(
        help="What the client learns of each new token: its logits, or by a secure comparison the token alone. Logits "
        "tell more of the weights, the more is asked; of a token alone nobody can see that it was out of range."
    ),
]


@private.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An EntropyGPT or GPT-2: a folder, or on the Hub.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = "127.0.0.1:9000",
    certificate: Certificate = None,
    key: Key = None,
    authority: Authority = None,
    insecure: Insecure = False,
    protocol: ProtocolOption = TwoPartyProtocol.cheetah,
    embedding: EmbeddingOption = Embedding.one_hot,
    answer: AnswerOption = Learned.logits,
    tokenizer: TokenizerPlace = None,
    longest: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Answers that a client may ask for.")] = 256,
    timeout: Timeout = 600,
):
    """
    Hold the weights, and answer one client after another.

    The client learns the answer, and what is public: architecture, sizes, settings, a hash of the tokenizer, and a
    bound of the logits. The server learns how long the prompt and the answer are. Both are taken to follow the
    protocol (semi-honest); docs/private_inference.md says what is not protected.

    Example: entropy-gpt private serve runs/proposal/model --listen 0.0.0.0:9000 --cert s.pem --key s.key --ca ca.pem
    """
    from entropy_gpt.workflows.private import serve as run

    run(
        model,
        listen,
        (certificate, key, authority),
        insecure,
        {"protocol": protocol.value, "embedding": embedding.value, "answer": answer.value},
        tokenizer,
        longest,
        timeout,
    )


@private.command()
def ask(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model is to go on from; it stays here.")],
    connect: Annotated[str, typer.Option(help="HOST:PORT of the server.")],
    tokenizer: Annotated[str, typer.Option(help="The server's tokenizer: a folder, or a repository on the Hub.")],
    certificate: Certificate = None,
    key: Key = None,
    authority: Authority = None,
    insecure: Insecure = False,
    new_tokens: NewTokens = 1,
    protocol: ProtocolOption = TwoPartyProtocol.cheetah,
    networks: Networks = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the costs go, as JSON.")] = None,
    timeout: Timeout = 600,
):
    """
    Hold the prompt, and ask a server to go on from it, most likely token by most likely token.

    Example: entropy-gpt private ask "def main(" --connect example.org:9000 --tokenizer DIR --cert c.pem --key c.key
    --ca ca.pem
    """
    from entropy_gpt.workflows.private import ask as run

    run(
        prompt,
        connect,
        tokenizer,
        (certificate, key, authority),
        insecure,
        new_tokens,
        protocol.value,
        output,
        timeout,
        networks or [],
    )


@private.command()
def demo(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An EntropyGPT or GPT-2: a folder, or on the Hub.")],
    prompt: Annotated[str, typer.Option(help="What the model is to go on from.")] = "def main(",
    new_tokens: NewTokens = 1,
    protocol: ProtocolOption = TwoPartyProtocol.cheetah,
    embedding: EmbeddingOption = Embedding.one_hot,
    answer: AnswerOption = Learned.logits,
    tokenizer: TokenizerPlace = None,
    networks: Networks = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the costs go, step by step, as JSON.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Where the sum of the costs goes, as a result that report, card and push read."),
    ] = None,
    timeout: Timeout = 600,
):
    """
    Start a server and a client on this machine, and compare their answer with the model's own in the clear.

    Example: entropy-gpt private demo model_cards/models/converted --max-new-tokens 3
    """
    from entropy_gpt.workflows.private import demo as run

    settings = {"protocol": protocol.value, "embedding": embedding.value, "answer": answer.value}
    run(model, prompt, new_tokens, settings, tokenizer, output, results, timeout, networks or [])


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
    kept: Annotated[int, typer.Option(min=0, help="Tokens before, whose keys and values are kept.")] = 0,
    all_positions: Annotated[
        bool, typer.Option("--all-positions", help="Logits of every position, not of the last one alone.")
    ] = False,
    embedding: EmbeddingOption = Embedding.one_hot,
):
    """
    Tell what a private inference would send and wait for, from the architecture alone: no weights, and no engine.

    Prices of Cheetah's parts were measured once; docs/private_inference.md says how near they come.

    Example: entropy-gpt private cost SM+LN+G SM+LN+R 'EReg(SM(t)+ScFuFFN)' --seq 256
    """
    from entropy_gpt.terminal.private_cost import run

    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "vocab_size": vocab_size}
    run(notations, sizes, kept, length, all_positions, embedding.value)


@private.command()
def benchmark(
    notations: Annotated[
        list[str] | None, typer.Argument(metavar="NOTATION...", help="Architectures, in place of the paper's four.")
    ] = None,
    n_layer: Layers = 12,
    n_embd: Width = 768,
    n_head: Heads = None,
    length: Length = 128,
    vocab_size: Vocabulary = 50257,
    networks: Annotated[
        list[str] | None,
        typer.Option("--network", help="Beside LAN and WAN: a bandwidth and a round trip, such as 300Mbps,20ms."),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--full", help="Run the cheapest architecture whole too, to prove the sum.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for what is measured, the table and the picture.")
    ] = Path("private_benchmark_output"),
    timeout: Timeout = 1200,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be measured and the MB predicted; measure nothing.")
    ] = False,
):
    """
    Measure the paper's table on this machine: what each architecture takes between two processes.

    The first and the last block, one of each kind between, the embedding and the head are measured, and added up. All
    is compared with SM+LN+G as it is run today. The same command goes on after an interruption.

    Example: entropy-gpt private benchmark --full --network 300Mbps,20ms -o runs/private
    """
    from entropy_gpt.workflows.private_table import run

    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "vocab_size": vocab_size}
    run(notations, sizes, length, networks or [], whole, output, timeout, dry_run)
