"""`entropy-gpt private gateway`: a private model for programs that speak OpenAI's protocol, and for a browser."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .paths import read_host, read_model, read_path
from .private_connection import with_connection
from .private_options import LongestWait, PreparedFolder


@with_connection
def gateway(
    connection: dict[str, Any],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where the gateway listens. 0 takes a free port.")
    ] = 8080,
    host: Annotated[
        str, typer.Option(callback=read_host, help="Where it listens. Beyond the loopback, it needs a token.")
    ] = "127.0.0.1",
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", callback=read_path, help="A file with the token (API key) that requests have to bring."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="The name of the model in requests.")] = "private",
    twin: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            callback=read_model,
            help="The model in the clear: the page shows what its heads do with the prompt.",
        ),
    ] = None,
    longest_line: Annotated[
        int, typer.Option("--max-waiting", min=0, help="Requests that may wait; further ones are refused.")
    ] = 16,
    longest_wait: LongestWait = 3600,
    wait: Annotated[int, typer.Option(min=0, help="Seconds to wait for a server that does not listen yet.")] = 300,
    prepared: PreparedFolder = None,
):
    """
    Speak OpenAI's protocol, and show a page, in front of a private server.

    Run it on the machine that may see the prompts. Programs use http://127.0.0.1:8080/v1 as their base URL; a browser
    opens http://127.0.0.1:8080. Prompts and answers leave this machine as secret shares alone.

    Example: entropy-gpt private gateway --connect example.org:9000 --tokenizer DIR --cert c.pem --key c.key
    --ca ca.pem
    """
    options = dict(locals())
    from entropy_gpt.terminal.private_gateway import run

    run(**options.pop("connection"), **options)
