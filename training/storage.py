"""What libraries raise when a file can't be written, in words that name the file and say what to do."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from entropy_gpt.conversion.errors import UserError


# Stands for the number of an error that a library does not give.
CUT = -1
# Errors that only writing causes, and what to do about each.
OF_WRITING = {
    errno.ENOSPC: "the disk is full. Make room there, and try again.",
    errno.EDQUOT: "the disk quota is used up. Make room there, and try again.",
    errno.EFBIG: "files may not be so large here (see ulimit -f). Raise the limit, or write to another disk.",
    CUT: "the disk is full, or a quota or a limit (see ulimit -f) is reached. Make room there, and try again.",
    errno.EROFS: "the file system is read-only. Write to another place.",
}
# Errors that reading causes too. They are about writing if they name the place that is written to.
OF_A_PLACE = {
    errno.EACCES: "there is no permission to write there. Write to another place.",
    errno.EPERM: "there is no permission to write there. Write to another place.",
    errno.ENOTDIR: "a part of this path is a file. Write to another place.",
    errno.EEXIST: "a part of this path is a file. Write to another place.",
    errno.ENAMETOOLONG: "its name is too long. Give a shorter one.",
    errno.EIO: "the disk reports an error. Check it, or write to another place.",
}
# How safetensors and tokenizers give the number of an error.
NUMBER = re.compile(r"\(os error (\d+)\)")
# What torch and numpy say of a file that was cut, without a number.
CUT_BY_A_LIBRARY = re.compile(
    r"inline_container.*unexpected pos|failed writing file|iostream error|\d+ requested and \d+ written", re.DOTALL
)


# Bytes; with fewer left on a disk, it is taken for the one that is full.
LITTLE_ROOM = 2**20


class StorageError(UserError, OSError):
    """A file can't be written."""


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """
    Whatever a library raises in the body because it can't write becomes one error that names the file.

    Args:
        path (`Path`): The file or folder that is written.

    Raises:
        `StorageError`: If it can't be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (failure := find_storage_error(error, path)) is None:
            raise
        raise failure from error


def check_folder(folder: Path, option: str = "--output"):
    """
    Refuses a folder that can't be written to, or can't be made.

    Args:
        folder (`Path`): The folder.
        option (`str`): What messages call it.

    Raises:
        `StorageError`: If it can't.
    """
    _check_folder(folder, f"{option} {folder}", option)


def check_file(file: Path, option: str = "--output"):
    """
    Refuses a file that can't be written.

    Args:
        file (`Path`): The file.
        option (`str`): What messages call it.

    Raises:
        `StorageError`: If it can't.
    """
    if file.is_dir():
        raise StorageError(f"{option} {file} is a folder. Give the name of a file.")
    if os.path.lexists(file) and not os.access(file, os.W_OK):
        raise StorageError(f"{option} {file} can't be written: give another name.")
    _check_folder(file.parent, f"{option} {file}", option)


def _check_folder(folder: Path, named: str, option: str):
    place = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(f"{named}: {place} is not a writable folder. Give another {option}.")


def find_storage_error(error: Exception, path: Path | None = None) -> StorageError | None:
    """
    The error for the user, if this one was raised because something can't be written.

    Args:
        error (`Exception`): What a library raised, for any reason.
        path (`Path`, *optional*): What was to be written; it is named if the error names no file. Without it, the
            places are named where libraries write by themselves.
    """
    number, place = _find_cause(error)
    if number is None and CUT_BY_A_LIBRARY.search(str(error)):
        number = errno.ENOSPC if path is not None and _is_full(path.parent) else CUT
    if number in OF_WRITING:
        reason = OF_WRITING[number]
    elif number in OF_A_PLACE and None not in (place, path) and _is_near(place, path):
        reason = OF_A_PLACE[number]
    else:
        return None
    if path is not None and (place is None or path.absolute().parent in place.absolute().parents):
        place = path  # not one of the temporary files next to it
    return StorageError(f"{place or _list_library_places()} can't be written: {reason}")


def _is_full(folder: Path) -> bool:
    return folder.exists() and shutil.disk_usage(folder).free < LITTLE_ROOM


def _list_library_places() -> str:
    """The folders of libraries, or those of them whose disk is full."""
    cache = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    others = [os.environ[name] for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE") if os.environ.get(name)]
    places = [Path(place).expanduser() for place in (os.environ.get("TMPDIR") or "/tmp", cache, *others)]
    full = list(filter(_is_full, places))
    return " or ".join(map(str, full or places))


def _find_cause(error: BaseException | None) -> tuple[int | None, Path | None]:
    """The number of the system's error from which an error came, and the file that it names."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            name = error.filename2 or error.filename
            return error.errno, Path(os.fsdecode(name)) if isinstance(name, str | bytes | os.PathLike) else None
        if (match := NUMBER.search(str(error))) is not None:
            return int(match[1]), None
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None, None


def _is_near(place: Path, path: Path) -> bool:
    """Whether a place is above a path, or in the path's folder."""
    place, path = place.absolute(), path.absolute()
    return place in path.parents or path.parent in place.parents
