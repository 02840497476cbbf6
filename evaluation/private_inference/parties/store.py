"""
A folder of a party's halves of preparations, which are kept there until they are used, once.

A half is written whole or not at all, and is renamed, durably, before anything of it is used.
"""

import contextlib
import fcntl
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from entropy_gpt.evaluation.errors import MachineError, PrivateInferenceError

from .preparations import NAME, PART, Header, LostHalfError, parse_header, read_header, write_half
from .used_names import UsedNames, create, sync


HALF, TAKEN = ".half", ".taken"
# For which a server keeps the half of a preparation that nobody uses.
KEPT_DAYS = 30
DAY_SECONDS = 86_400


class Store:
    """
    A folder of halves of one party.

    Args:
        folder (`Path`): Made if it is not there; its owner alone may use it.
        rank (`int`): The party's.

    Attributes:
        used ([`UsedNames`]): Those of its preparations that were used.

    Raises:
        `MachineError`: If the folder or its list can't be used, or the list is not there.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self._rank = folder, rank
        self._locks: dict[Path, int] = {}
        try:
            _make_folder(folder)
            self.used = UsedNames(folder, rank)
            self._clear()
        except OSError as error:
            raise MachineError(f"{folder} can't hold preparations: {error.strerror}.") from error

    def _clear(self):
        """
        Deletes what killed processes have left: theirs are locked as long as they live. And used halves, which
        somebody has brought back.
        """
        used = {self.path(name).name for name in self.used.read()}
        for path in self.folder.iterdir():
            if (self._is_left(path.name) or path.name in used) and (lock := _lock(path)) is not None:
                path.unlink(missing_ok=True)
                os.close(lock)

    def _is_left(self, name: str) -> bool:
        """Whether a file is this store's, and no half that waits: a user's own files are not touched."""
        return re.fullmatch(f"{NAME.pattern}-{self._rank}({TAKEN}|{PART})", name) is not None

    def path(self, name: str) -> Path:
        """The file of a half."""
        return self.folder / f"{name}-{self._rank}{HALF}"

    def sizes(self) -> Counter[str]:
        """Bytes of all halves, by owner."""
        sizes: Counter[str] = Counter()
        for path in self.folder.glob(f"*-{self._rank}{HALF}"):
            with contextlib.suppress(PrivateInferenceError, FileNotFoundError):
                sizes[read_header(path).owner] += path.stat().st_size
        return sizes

    def delete_old(self, terms: str, weights: str):
        """Deletes what nobody can use, and what nobody has used for `KEPT_DAYS`; what is in use is left alone."""
        for path in self.folder.glob(f"*-{self._rank}{HALF}"):
            with contextlib.suppress(LostHalfError):
                if not self._is_current(path, terms, weights):
                    self.drop(self.take(path.name.removesuffix(f"-{self._rank}{HALF}")))

    @staticmethod
    def _is_current(path: Path, terms: str, weights: str) -> bool:
        try:
            header = read_header(path)
        except FileNotFoundError:  # it was used meanwhile
            return True
        except PrivateInferenceError:
            return False
        young = header.made > time.time() - KEPT_DAYS * DAY_SECONDS
        return young and (header.terms, header.weights) == (terms, weights)

    def headers(self) -> Iterator[Header]:
        """What is there, the smallest first; what can't be read is left out."""
        found = []
        for path in sorted(self.folder.glob(f"*-{self._rank}{HALF}")):
            with contextlib.suppress(PrivateInferenceError, OSError), path.open("rb") as file:
                found.append(parse_header(file, path))
        yield from sorted(found, key=lambda header: (header.length + header.new_tokens, header.answers))

    def put(self, header: Header, seed: bytes, shares: dict, agree: Callable[[], None] = lambda: None):
        """
        Writes a half, whole or not at all.

        Args:
            header ([`Header`]), seed (`bytes`), shares (`dict`): As of [`write_half`].
            agree (`Callable`): Called when it is written, before it counts: if it fails, there is none.

        Raises:
            `MachineError`: If it can't be written.
        """
        path = self.path(header.name)
        part = path.with_suffix(PART)
        try:
            with os.fdopen(create(part), "wb") as file:
                write_half(file, header, seed, shares)
                file.flush()
                os.fsync(file.fileno())
                agree()
                part.rename(path)
            sync(self.folder)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise MachineError(f"a preparation can't be written to {self.folder}: {error.strerror}.") from error
        finally:
            part.unlink(missing_ok=True)

    def take(self, name: str) -> Path:
        """
        Takes a half out of the store, durably, so that nobody uses it again. It is locked until [`Store.drop`] or
        [`Store.put_back`].

        Returns:
            `Path`: Its file, for [`read_half`].

        Raises:
            `LostHalfError`: If it is not there.
            `MachineError`: If it can't be taken.
        """
        path = self.path(name)
        taken = path.with_suffix(TAKEN)
        try:
            if (lock := _lock(path)) is None:
                raise LostHalfError(
                    "this preparation is not here: it was used, or its other half is lost. Prepare another one."
                )
            self._locks[taken] = lock
            path.rename(taken)
            sync(self.folder)
        except OSError as error:
            if taken in self._locks:
                self.drop(taken)
            raise MachineError(f"a preparation can't be taken from {self.folder}: {error.strerror}.") from error
        return taken

    def spend(self, taken: Path):
        """
        Notes, durably, that what [`Store.take`] has taken is about to be used: there is no way back.

        Raises:
            `LostHalfError`: If it was used before.
            `MachineError`: If that can't be written.
        """
        self.used.add(taken.name.removesuffix(f"-{self._rank}{TAKEN}"))

    def drop(self, taken: Path):
        """Deletes what [`Store.take`] has taken."""
        taken.unlink(missing_ok=True)
        os.close(self._locks.pop(taken))

    def put_back(self, taken: Path):
        """Undoes [`Store.take`], for a half of which nothing was used. Others may take it then."""
        lock = self._locks.pop(taken)
        try:
            taken.rename(taken.with_suffix(HALF))
            sync(self.folder)
        finally:
            os.close(lock)


def _make_folder(folder: Path):
    """
    Makes it durably, or takes one that its owner alone can use.

    Raises:
        `MachineError`: If others can read or change what is in it.
    """
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync(folder.parent)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise MachineError(f"{folder} can't hold preparations, which are secret: it is another user's.")
    if found.st_mode & 0o077:
        raise MachineError(
            f"{folder} can't hold preparations, which are secret: others can use it (chmod 700 {folder})."
        )


def _lock(path: Path) -> int | None:
    """A file with a lock that lasts as long as it is open; `None` if it is gone, or another process has locked it."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            return file
    except BlockingIOError:
        pass
    os.close(file)
    return None
