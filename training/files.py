"""Writing files and folders whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .storage import storing


# The HF Trainer, which may send a run's folder to the Hub, leaves out what begins with an underscore.
UNFINISHED = "_unfinished-"
# The file system's own folder, in the folder where a disk is mounted.
OF_THE_DISK = "lost+found"
PRIVATE_MODE = 0o600


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """
    Gives a temporary path next to `path` to write a file or folder to. It takes its place once the body is through. If
    the body fails, it is deleted, with the folders that were made for it. What a killed process left behind is deleted
    first.

    Raises:
        `StorageError`: If it can't be written.
    """
    temporary = path.with_name(f"{UNFINISHED}{path.name}")
    with storing(path), folder_made(path.parent):
        delete(temporary)
        try:
            yield temporary
            give_usual_mode(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to mend
                delete(temporary)
            raise


@contextmanager
def folder_made(folder: Path) -> Iterator[None]:
    """Makes a folder with those above it. If the body fails, those that are empty are deleted again."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):  # it is not empty
                each.rmdir()
        raise


def put_in_place(content: Path, folder: Path, last: str):
    """
    Gives a folder a new content. A folder that is there stays, since it may be a mount point or a shell may be in it:
    its files are replaced by the new ones. If this is interrupted, a second call with the same arguments ends it.

    Args:
        content (`Path`): A folder with the files, on the disk of `folder`.
        folder (`Path`): Where they go.
        last (`str`): The name of the file that is moved last: without it, the folder is not complete.

    Raises:
        `StorageError`: If the folder can't be written to.
    """
    moving = begun_move(content)
    with storing(folder):
        if not folder.exists():
            content.replace(folder)
            return
        if content.exists():
            empty_folder(folder)
            delete(moving)
            content.replace(moving)
        for path in sorted(moving.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)
        moving.rmdir()


def begun_move(content: Path) -> Path:
    """What [`put_in_place`] calls the content while a part of it may be in its place already."""
    return content.with_name(f"{content.name}-moving")


def empty_folder(folder: Path):
    """Deletes all that is in a folder, except what [`is_finished`] leaves out."""
    for path in filter(is_finished, list(folder.iterdir())):
        delete(path)


def is_finished(path: Path) -> bool:
    """Whether a file or folder in an output folder is there to stay: neither temporary nor the disk's own."""
    return not path.name.startswith(UNFINISHED) and path.name != OF_THE_DISK


def give_usual_mode(path: Path):
    """Lets others read what a library left to its owner alone, a file or all files of a folder, as the umask says."""
    mask = os.umask(0)
    os.umask(mask)
    for file in (path, *path.rglob("*")):
        if file.is_file() and file.stat().st_mode & 0o777 == PRIVATE_MODE:
            file.chmod(0o666 & ~mask)


def delete(path: Path):
    """Deletes a file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
