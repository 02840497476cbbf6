"""The list of used preparations, next to a folder of halves: what a copy of the folder brings back is refused."""

import fcntl
import os
import secrets
from pathlib import Path

from entropy_gpt.evaluation.errors import MachineError

from .preparations import NAME_BYTES, PART, LostHalfError, is_name


class UsedNames:
    """
    The names of a store's used preparations. The folder has a random identity, which its copies share, and the list is
    found by it.

    Args:
        folder (`Path`): The store's.
        rank (`int`): The party's.

    Attributes:
        identity (`str`): That of the folder, made if it has none.
        path (`Path`): The list.

    Raises:
        `MachineError`: If the list is not there, or can't be made.
        `OSError`: If the folder can't be used.
    """

    def __init__(self, folder: Path, rank: int):
        self._folder, self._rank = folder, rank
        place = folder / f"store-{rank}"
        if not place.exists():
            self._draw_identity(place)
        self.identity = place.read_text(encoding="ascii", errors="replace")
        if not is_name(self.identity):
            raise MachineError(f"{place} is damaged: delete {folder}, and prepare anew.")
        self.path = self._list_of(self.identity)
        if not self.path.exists():
            raise MachineError(
                f"{self.path} is not there, which lists the used preparations of {folder}: bring it back, or delete "
                f"{folder} and prepare anew."
            )

    def _list_of(self, identity: str) -> Path:
        return self._folder.resolve().with_name(f"{identity}.used-{self._rank}")

    def _draw_identity(self, place: Path):
        """Its list comes first: a store that has none has lost it."""
        identity = secrets.token_hex(NAME_BYTES)
        draft, used = self._folder / f"{identity}-{self._rank}{PART}", self._list_of(identity)
        try:
            used.touch(mode=0o600)
            sync(used.parent)
        except OSError as error:
            used.unlink(missing_ok=True)
            raise MachineError(
                f"{used} can't be made, which is to list the used preparations of {self._folder}: {error.strerror}."
            ) from error
        try:
            with os.fdopen(create(draft), "w", encoding="ascii") as file:
                file.write(identity)
                file.flush()
                os.fsync(file.fileno())
            place.hardlink_to(draft)
        except BaseException as error:
            used.unlink()
            if not isinstance(error, FileExistsError):  # another process was first
                raise
        finally:
            draft.unlink(missing_ok=True)
        sync(self._folder)

    def read(self) -> set[str]:
        """All of them."""
        return set(self.path.read_text(encoding="ascii", errors="replace").split("\n"))

    def add(self, name: str):
        """
        Notes one durably.

        Raises:
            `LostHalfError`: If it is there already.
            `MachineError`: If that can't be written.
        """
        try:
            with self.path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if name.encode() in file.read().split(b"\n"):
                    raise LostHalfError(
                        "this preparation was used before, and has come back from a copy: prepare another one."
                    )
                file.write(f"\n{name}\n".encode())  # what was cut off before does not matter
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MachineError(f"{self.path} can't be written, so nothing is used: {error.strerror}.") from error


def sync(folder: Path):
    """Makes what has become of names in a folder durable."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def create(path: Path) -> int:
    """A new file that its owner alone may read, locked while it is open."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file
