"""Writing files and folders whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


# The HF Trainer, which may send a run's folder to the Hub, leaves out what begins with an underscore.
UNFINISHED = "_unfinished-"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """
    Gives a temporary path next to `path` to write a file or folder to. It takes its place once the body is through. If
    the body fails, it is deleted, with the folders that were made for it. What a killed process left behind is deleted
    first.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{UNFINISHED}{path.name}")
    delete(temporary)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        delete(temporary)
        for folder in missing:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise


def is_finished(path: Path) -> bool:
    """Whether a file or folder is no temporary one of [`written_whole`]."""
    return not path.name.startswith(UNFINISHED)


def delete(path: Path):
    """Deletes a file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
