"""The options of a connection between two parties."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .paths import read_path, read_place
from .private_options import with_options


Certificate = Annotated[
    Path | None, typer.Option("--cert", callback=read_path, help="This side's certificate, in PEM.")
]
Key = Annotated[Path | None, typer.Option("--key", callback=read_path, help="Its private key.")]
Authority = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        callback=read_path,
        help="Certificates of the authorities that may sign the other side's certificate.",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure", help="Allow plain TCP beyond this machine's loopback. Use it only in a trusted network."
    ),
]
Timeout = Annotated[int, typer.Option(min=1, help="Seconds without any event after which a side gives up.")]
ProtocolOption = Annotated[
    Literal["cheetah", "semi2k"],
    typer.Option(
        help="cheetah: neither side learns anything from the messages it receives. semi2k: the server deals the "
        "random numbers that protect the prompt, so it could read the prompt; use it only for measurements."
    ),
]


def _read_connection(
    address: Annotated[str, typer.Option("--connect", help="HOST:PORT of the server.")],
    tokenizer: Annotated[
        str,
        typer.Option(callback=read_place, help="The server's tokenizer: a folder, or a repository on the Hub."),
    ],
    certificate: Certificate = None,
    key: Key = None,
    authority: Authority = None,
    insecure: Insecure = False,
    protocol: ProtocolOption = "cheetah",
    public_checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            callback=read_place,
            help="For a server with public embeddings: your copy of their checkpoint, a folder or a repository on the "
            "Hub. The server names one too, but its name loads nothing.",
        ),
    ] = None,
    timeout: Timeout = 600,
) -> dict[str, Any]:
    """The arguments of `open_client` that these options are."""
    return locals()


with_connection = with_options("connection", _read_connection)
