"""Paths, models and texts as they are typed."""

from pathlib import Path

from entropy_gpt.conversion.early_checks import check_model, check_place, expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.training.storage import check_file


def read_path(path: Path | None) -> Path | None:
    """For options that are paths: a leading `~` stands for the home folder."""
    return path and Path(expanded(path))


def read_file(path: Path | None) -> Path | None:
    """For files that are written after the imports and the work, which take long: refuses one that can't be."""
    if (path := read_path(path)) is not None:
        check_file(path)
    return path


def read_model(source: str | None) -> str | None:
    """For models: refuses a folder that holds none, and what can be no repository on the Hub."""
    if source is not None:
        check_model(source)
    return source


def read_place(source: str | None) -> str | None:
    """For tokenizers and checkpoints: refuses what can be neither a folder nor a repository on the Hub."""
    if source is not None:
        check_place(source)
    return source


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
