"""
A party's halves of preparations, kept in a folder until they are used, once.

A half is a seed, of which the party's parts of all masks are drawn, and its shares of the products. Both parties draw
a preparation's name. A half is written whole or not at all, and is renamed, durably, before anything of it is used.
Names of used ones are listed in a file next to the folder, by the identity that the folder's copies share: what a copy
brings back is refused.
"""

import base64
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.errors import MachineError, PrivateInferenceError
from entropy_gpt.evaluation.json_records import RECORD
from entropy_gpt.evaluation.private_inference.program.cost import StepCost
from entropy_gpt.evaluation.private_inference.program.counting import RING
from entropy_gpt.evaluation.private_inference.program.program import ProgramConfig, is_factor
from entropy_gpt.evaluation.private_inference.program.settings import SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from entropy_gpt.evaluation.private_inference.program.two_phases import Preparation
from entropy_gpt.evaluation.private_inference.program.variables import held_shapes

from .channel import NO_HALF
from .engine import engine_versions


# The version of a half's file, and of what its numbers mean.
FORMAT = 4
SEED_BYTES, NAME_BYTES, HASH_BYTES = 32, 16, 32
NAME = re.compile(f"[0-9a-f]{{{2 * NAME_BYTES}}}")
HALF, TAKEN, PART = ".half", ".taken", ".part"
MOST_HEADER_BYTES = 2**24
# Products that a header has room for, with what each took.
MOST_PRODUCTS = MOST_HEADER_BYTES // 512
# For which a server keeps the half of a preparation that nobody uses.
KEPT_DAYS = 30
DAY_SECONDS = 86_400


class LostHalfError(PrivateInferenceError):
    """Half of a preparation is not where it was, or was used before."""


def is_lost(error: BaseException) -> bool:
    """Whether an error says that a preparation has no other half, or one that nobody can use."""
    return isinstance(error, PrivateInferenceError) and error.code == NO_HALF


@dataclass(config=RECORD, frozen=True)
class Header:
    """
    What a half is for.

    Args:
        name (`str`): The preparation's, which both parties drew.
        rank (`int`): Whose half it is.
        terms (`str`): A hash of program, settings and versions.
        weights (`str`): A hash of the server's weights; empty in a client's half.
        store (`str`): That of the other half, by [`name_store`]; empty in that one.
        length, new_tokens, answers (`int`): The most that it serves.
        shares (`list[tuple[str, str, list[int]]]`): For each product its variable, the engine's description of the
            share, and the bytes of each of its parts.
        costs (`list[StepCost]`): What the first phase took.
        owner (`str`): The client, as [`Channel.peer`]; empty in its own half.
        made (`float`): When, in seconds since 1970.
        format (`int`): Version of the file.
    """

    name: str
    rank: int
    terms: str
    weights: str
    store: str
    length: int
    new_tokens: int
    answers: int
    shares: list[tuple[str, str, list[int]]]
    costs: list[StepCost]
    owner: str
    made: float
    format: int = FORMAT

    def spans(self) -> list[Span]:
        """Those of the passes that it was made for."""
        return pass_spans(self.length, self.new_tokens, self.answers)


def pass_spans(length: int, new_tokens: int, answers: int) -> list[Span]:
    """The prompt, then each new token except the last."""
    return [Span(0, length, answers), *(Span(length + index, 1) for index in range(new_tokens - 1))]


def hash_terms(config: ProgramConfig, settings: PrivateSettings) -> str:
    """Of all that decides about the programs of both phases."""
    terms = [asdict(ProgramConfig.of(config)), asdict(settings), engine_versions()]
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()


def hash_weights(weights: dict[str, np.ndarray], config: ProgramConfig, settings: PrivateSettings) -> str:
    """Of those that preparations contain: neither of what is added, nor of the check's bounds."""
    digest = hashlib.sha256()
    for name in filter(is_factor, held_shapes(config, settings, SERVER)):
        digest.update(np.ascontiguousarray(weights[name], np.float32).data.cast("B"))
    return digest.hexdigest()


def draw_mask(seed: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A party's part of a mask: integers of the ring that look random to all who lack the seed."""
    size = int(np.prod(shape)) * np.dtype(RING).itemsize
    return np.frombuffer(hashlib.shake_256(seed + name.encode()).digest(size), RING).reshape(shape)


class Store:
    """
    A folder of halves of one party.

    Args:
        folder (`Path`): Made if it is not there; its owner alone may use it.
        rank (`int`): The party's.

    Attributes:
        identity (`str`): Random, for [`name_store`]; the same in copies of the folder.
        used (`Path`): The list of used names, next to the folder.

    Raises:
        `MachineError`: If the folder or its list can't be used, or the list is not there.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self._rank = folder, rank
        self._locks: dict[Path, int] = {}
        try:
            _make_folder(folder)
            self.identity = self._identify()
            self.used = self._list_of(self.identity)
            self._clear()
        except OSError as error:
            raise MachineError(f"{folder} can't hold preparations: {error.strerror}.") from error

    def _identify(self) -> str:
        path = self.folder / f"store-{self._rank}"
        if not path.exists():
            self._draw_identity(path)
        identity = path.read_text(encoding="ascii", errors="replace")
        if not is_name(identity):
            raise MachineError(f"{path} is damaged: delete {self.folder}, and prepare anew.")
        if not self._list_of(identity).exists():
            raise MachineError(
                f"{self._list_of(identity)} is not there, which lists the used preparations of {self.folder}: bring "
                f"it back, or delete {self.folder} and prepare anew."
            )
        return identity

    def _draw_identity(self, path: Path):
        """Its list comes first: a store that has none has lost it."""
        identity = secrets.token_hex(NAME_BYTES)
        draft, used = self.path(identity).with_suffix(PART), self._list_of(identity)
        try:
            used.touch(mode=0o600)
            _sync(used.parent)
        except OSError as error:
            used.unlink(missing_ok=True)
            raise MachineError(
                f"{used} can't be made, which is to list the used preparations of {self.folder}: {error.strerror}."
            ) from error
        try:
            with open(_create(draft), "w", encoding="ascii") as file:
                file.write(identity)
                file.flush()
                os.fsync(file.fileno())
            path.hardlink_to(draft)
        except BaseException as error:
            used.unlink()
            if not isinstance(error, FileExistsError):  # another process was first
                raise
        finally:
            draft.unlink(missing_ok=True)
        self._sync()

    def _list_of(self, identity: str) -> Path:
        return self.folder.resolve().with_name(f"{identity}.used-{self._rank}")

    def _clear(self):
        """
        Deletes what killed processes have left: theirs are locked as long as they live. And used halves, which
        somebody has brought back.
        """
        used = {self.path(name).name for name in self._used_names()}
        for path in self.folder.iterdir():
            if (self._is_left(path.name) or path.name in used) and (lock := _lock(path)) is not None:
                path.unlink(missing_ok=True)
                os.close(lock)

    def _is_left(self, name: str) -> bool:
        """Whether a file is this store's, and no half that waits: a user's own files are not touched."""
        return re.fullmatch(f"{NAME.pattern}-{self._rank}({TAKEN}|{PART})", name) is not None

    def _used_names(self) -> set[str]:
        return set(self.used.read_text(encoding="ascii", errors="replace").split("\n"))

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
                found.append(_parse_header(file, path))
        yield from sorted(found, key=lambda header: (header.length + header.new_tokens, header.answers))

    def put(self, header: Header, seed: bytes, shares: dict):
        """
        Writes a half, whole or not at all.

        Raises:
            `MachineError`: If it can't be written.
        """
        path = self.path(header.name)
        part = path.with_suffix(PART)
        try:
            with open(_create(part), "wb") as file:
                digest = hashlib.sha256()
                chunks = (chunk for share in shares.values() for chunk in share.share_chunks)
                line = TypeAdapter(Header).dump_json(header) + b"\n"
                if len(line) > MOST_HEADER_BYTES:
                    raise OSError(errno.EFBIG, "its header is too long")
                for content in (line, seed, *chunks):
                    digest.update(content)
                    file.write(content)
                file.write(digest.digest())
                file.flush()
                os.fsync(file.fileno())
                part.rename(path)
            self._sync()
        except OSError as error:
            for left in (part, path):
                left.unlink(missing_ok=True)
            raise MachineError(f"a preparation can't be written to {self.folder}: {error.strerror}.") from error

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
                    "this preparation is not here: it was used, or its other half is lost. Prepare another one.",
                    NO_HALF,
                )
            self._locks[taken] = lock
            path.rename(taken)
            self._sync()
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
        name = taken.name.removesuffix(f"-{self._rank}{TAKEN}")
        try:
            with self.used.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if name.encode() in file.read().split(b"\n"):
                    raise LostHalfError(
                        "this preparation was used before, and has come back from a copy: prepare another one.",
                        NO_HALF,
                    )
                file.write(f"\n{name}\n".encode())  # what was cut off before does not matter
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MachineError(f"{self.used} can't be written, so nothing is used: {error.strerror}.") from error

    def drop(self, taken: Path):
        """Deletes what [`Store.take`] has taken."""
        taken.unlink(missing_ok=True)
        os.close(self._locks.pop(taken))

    def put_back(self, taken: Path):
        """Undoes [`Store.take`], for a half of which nothing was used. Others may take it then."""
        lock = self._locks.pop(taken)
        try:
            taken.rename(taken.with_suffix(HALF))
            self._sync()
        finally:
            os.close(lock)

    def _sync(self):
        _sync(self.folder)


def _make_folder(folder: Path):
    """
    Makes it durably, or takes one that its owner alone can use.

    Raises:
        `MachineError`: If others can read or change what is in it.
    """
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sync(folder.parent)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise MachineError(f"{folder} can't hold preparations, which are secret: it is another user's.")
    if found.st_mode & 0o077:
        raise MachineError(
            f"{folder} can't hold preparations, which are secret: others can use it (chmod 700 {folder})."
        )


def _sync(folder: Path):
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _create(path: Path) -> int:
    """A new file that its owner alone may read, locked while it is open."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


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


def measure_half(config: ProgramConfig, settings: PrivateSettings, spans: list[Span]) -> tuple[int, int]:
    """
    About what a half takes on disk, and how many products it has. Both grow evenly from one further token to the next,
    so the first and the last of these are enough: a long answer is measured as soon as a short one.
    """
    further = spans[1:]
    parts = [(spans[:1], 1.0), *(([span], len(further) / 2) for span in (further[:1] + further[-1:]))]
    size = count = 0.0
    for some, times in parts:
        products = Preparation(config, settings, some).products
        size += times * sum(product.nbytes for product in products.values())
        count += times * len(products)
    return round(size), round(count)


def name_store(identity: str, weights: str) -> str:
    """By which a client knows where the other halves are: other weights in one folder have another name."""
    return hashlib.sha256(f"{identity} {weights}".encode()).hexdigest()


def is_name(text: object) -> bool:
    return isinstance(text, str) and NAME.fullmatch(text) is not None


def draw_name(parts: tuple[bytes, bytes]) -> str:
    """A preparation's name, of the random bytes of both parties."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[: 2 * NAME_BYTES]


def draw_bytes() -> bytes:
    return secrets.token_bytes(SEED_BYTES)


def describe_shares(shares: dict) -> list[tuple[str, str, list[int]]]:
    """As a [`Header`] has them."""
    return [
        (name, base64.b64encode(share.meta).decode(), [len(chunk) for chunk in share.share_chunks])
        for name, share in shares.items()
    ]


def read_half(path: Path) -> tuple[Header, bytes, dict]:
    """
    Reads a half that was taken, and deletes it.

    Returns:
        `tuple`: Its header, its seed, and its share of each product, by variable.

    Raises:
        `PrivateInferenceError`: If it is damaged, or of another version.
    """
    from spu import libspu

    try:
        with path.open("rb") as file:
            header = _parse_header(file, path)
            file.seek(0)
            content = file.read()
    except OSError as error:
        raise PrivateInferenceError(f"a preparation can't be read: {error.strerror}.") from error
    finally:
        path.unlink(missing_ok=True)
    if hashlib.sha256(content[:-HASH_BYTES]).digest() != content[-HASH_BYTES:]:
        raise _damaged(path)
    begin = content.index(b"\n") + 1
    seed, begin, shares = content[begin : begin + SEED_BYTES], begin + SEED_BYTES, {}
    for name, meta, sizes in header.shares:
        share, chunks = libspu.Share(), []
        for size in sizes:
            chunks.append(content[begin : begin + size])
            begin += size
        share.meta, share.share_chunks = base64.b64decode(meta), chunks
        shares[name] = share
    return header, seed, shares


def read_header(path: Path) -> Header:
    """
    What a half is for.

    Raises:
        `PrivateInferenceError`: If it is damaged, or of another version.
    """
    with path.open("rb") as file:
        return _parse_header(file, path)


def _parse_header(file, path: Path) -> Header:
    line = file.readline(MOST_HEADER_BYTES)
    try:
        header = TypeAdapter(Header).validate_json(line)
    except ValidationError as error:
        raise _damaged(path) from error
    if header.format != FORMAT:
        raise PrivateInferenceError(f"{path.name} is of another version of entropy-gpt: prepare another one.", NO_HALF)
    return header


def _damaged(path: Path) -> PrivateInferenceError:
    return PrivateInferenceError(f"{path.name} is damaged: prepare another one.", NO_HALF)
