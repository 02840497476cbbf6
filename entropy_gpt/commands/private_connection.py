"""The options of a connection between two parties, and those that commands have in groups."""

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from entropy_gpt.conversion.early_checks import check_place

from .paths import read_path


class TwoPartyProtocol(StrEnum):
    cheetah = "cheetah"
    semi2k = "semi2k"


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
    TwoPartyProtocol,
    typer.Option(
        help="cheetah: neither side learns anything from the messages it receives. semi2k: the server deals the "
        "random numbers that protect the prompt, so it could read the prompt; use it only for measurements."
    ),
]


def read_public_checkpoint(value: str | None) -> str | None:
    """
    The value of `--public-checkpoint`.

    Raises:
        `ConversionError`: If it can be neither a folder nor a repository on the Hub.
    """
    if value is not None:
        check_place(value)
    return value


def _read_connection(
    connect: Annotated[str, typer.Option(help="HOST:PORT of the server.")],
    tokenizer: Annotated[str, typer.Option(help="The server's tokenizer: a folder, or a repository on the Hub.")],
    certificate: Certificate = None,
    key: Key = None,
    authority: Authority = None,
    insecure: Insecure = False,
    protocol: ProtocolOption = TwoPartyProtocol.cheetah,
    public_checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            callback=read_public_checkpoint,
            help="For a server with public embeddings: your copy of their checkpoint, a folder or a repository on the "
            "Hub. The server names one too, but its name loads nothing.",
        ),
    ] = None,
    timeout: Timeout = 600,
) -> dict[str, Any]:
    """The arguments of `open_client` that these options are."""
    check_place(tokenizer)
    return {
        "address": connect,
        "certificates": (certificate, key, authority),
        "tokenizer": tokenizer,
        "insecure": insecure,
        "protocol": protocol.value,
        "public_checkpoint": public_checkpoint,
        "timeout": timeout,
    }


def with_options(argument: str, read: Callable[..., dict[str, Any]]) -> Callable[[Callable], Callable]:
    """
    Gives a command the options of a group, after its own.

    Args:
        argument (`str`): The command's argument that they become.
        read (`Callable`): Has the options as its parameters, and returns the argument.
    """
    shared = inspect.signature(read).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters
        options = [option for name, option in (own | shared).items() if name != argument]
        options.sort(key=lambda option: option.default is not option.empty)  # those that have to be given come first

        @functools.wraps(command)
        def run(**values):
            command(**{argument: read(**{name: values.pop(name) for name in shared})}, **values)

        run.__signature__ = inspect.Signature(
            [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options], return_annotation=None
        )
        run.__annotations__ = {option.name: option.annotation for option in options}
        return run

    return decorate


with_connection = with_options("connection", _read_connection)
