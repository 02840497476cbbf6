"""Paths and texts as they are typed."""

from pathlib import Path

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.errors import UserError


def read_path(path: Path | None) -> Path | None:
    """For options that are paths: a leading `~` stands for the home folder."""
    return path and Path(expanded(path))


def read_host(host: str) -> str:
    """For options that are hosts: an address of IPv6 may stand in brackets, as in a URL."""
    return host.removeprefix("[").removesuffix("]")


def read_paths(paths: list[Path] | None) -> list[Path] | None:
    """The same for several."""
    return paths and [Path(expanded(path)) for path in paths]


def check_text(word: str):
    """
    Refuses an argument that is no text.

    Raises:
        `UserError`: If it is not.
    """
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{word!r} is not in UTF-8: give texts and names of files in UTF-8.") from error
