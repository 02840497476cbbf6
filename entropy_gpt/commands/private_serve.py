"""`entropy-gpt private serve`: holds the weights, and answers clients."""

from typing import Annotated

import typer

from .paths import read_host
from .private_connection import Authority, Certificate, Insecure, Key, ProtocolOption, Timeout
from .private_options import (
    AnswerOption,
    AuditedText,
    EmbeddingOption,
    FractionBits,
    LongestWait,
    OfferedModel,
    PreparedFolder,
    PublicCheckpoint,
    TokenizerPlace,
)


def serve(
    model: OfferedModel,
    listen: Annotated[str, typer.Option(help="HOST:PORT. Port 0 takes a free one.")] = "127.0.0.1:9000",
    certificate: Certificate = None,
    key: Key = None,
    authority: Authority = None,
    insecure: Insecure = False,
    protocol: ProtocolOption = "cheetah",
    embedding: EmbeddingOption = "one_hot",
    public_checkpoint: PublicCheckpoint = None,
    answer: AnswerOption = "logits",
    fraction_bits: FractionBits = 18,
    network: Annotated[
        str,
        typer.Option(
            help="The network to clients: LAN, WAN, loopback, or bandwidth and round trip, such as 300Mbps,20ms. "
            "Operations take the forms that are fastest there.",
        ),
    ] = "WAN",
    text: AuditedText = None,
    tokenizer: TokenizerPlace = None,
    answers: Annotated[
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
    options = dict(locals())
    from entropy_gpt.terminal.private import serve as run

    run(**options)
