"""`entropy-gpt private certificates`: what a server and its clients need for TLS, in one folder."""

from pathlib import Path
from typing import Annotated

import typer

from .paths import read_path


def certificates(
    names: Annotated[
        list[str],
        typer.Option(
            "--name", help="A name or an address by which clients reach the server. Give it again for others."
        ),
    ],
    clients: Annotated[
        list[str] | None, typer.Option("--client", help="A name for each client. Default: one, named client.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="For how long the certificates are valid.")] = 365,
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=read_path, help="Folder for the files. None is overwritten.")
    ] = Path("certificates"),
):
    """
    Make an authority, and certificates that it has signed: one for the server, and one for each client.

    Give the server server.pem, server.key and ca.pem, and a client its own pair and ca.pem. Keep ca.key apart: with
    it, further certificates could be signed.

    Example: entropy-gpt private certificates --name models.example.org --client ada --client grace
    """
    from entropy_gpt.terminal.private_certificates import run

    run(names, output, clients=clients or ["client"], days=days)
