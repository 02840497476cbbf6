"""One command at a time in an output folder."""

import errno
import json
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from entropy_gpt.conversion.errors import UserError

from .files import UNFINISHED, delete, folder_made
from .storage import StorageError, storing


logger = logging.getLogger(__name__)

LOCK, HOLDER = f"{UNFINISHED}lock", f"{UNFINISHED}lock-holder.json"
GOES_ON = "The same command goes on from here."
# What a file system without locks says.
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def claimed(folder: Path, goes_on: Callable[[], bool] = lambda: False, output: Path | None = None) -> Iterator[None]:
    """
    Keeps other commands out of a folder while the body runs. The system ends the claim of a process that is killed.

    Args:
        folder (`Path`): The folder; it is made, and deleted again if the body fails and leaves it empty.
        goes_on (`Callable`): Whether the folder holds work that the same command goes on from. An error of the disk or
            an interruption gets a note that says so.
        output (`Path`, *optional*): What messages call the folder, if that is not its own name.

    Raises:
        `UserError`: If another process works in the folder.
        `StorageError`: If the folder can't be written to.
    """
    with ExitStack() as stack:
        with storing(folder):
            stack.enter_context(folder_made(folder))
            stack.enter_context(_locked(folder, output or folder))
        try:
            yield
        except (StorageError, KeyboardInterrupt) as error:
            if goes_on():
                error.add_note(GOES_ON)
            raise


def refuse_claimed(folder: Path, output: Path | None = None):
    """
    Refuses a folder in which another process works.

    Args:
        folder (`Path`): The folder.
        output (`Path`, *optional*): What messages call it, if that is not its own name.

    Raises:
        `UserError`: If one does.
    """
    if (folder / LOCK).exists() and os.access(folder / LOCK, os.W_OK):
        with _locked(folder, output or folder):
            pass


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        with warnings.catch_warnings():  # filelock's own words on a file system without locks
            warnings.simplefilter("ignore")
            lock.acquire()
    except Timeout as error:
        raise UserError(
            f"Another command is at work in {output}{_describe_holder(folder)}. Wait until it ends, or give another "
            "place."
        ) from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        logger.warning(f"The file system of {output} has no locks: start no second command there.")
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M}"}
        (folder / HOLDER).write_text(json.dumps(holder) + "\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            delete(folder / HOLDER)
            delete(folder / LOCK)  # while it is held: who opened it meanwhile sees that it is gone
        lock.release()


def _describe_holder(folder: Path) -> str:
    """The process that holds the lock, and since when, as far as it has written that down."""
    try:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        place = "" if holder["host"] == socket.gethostname() else f" on {holder['host']}"
        return f": process {holder['pid']}{place}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
