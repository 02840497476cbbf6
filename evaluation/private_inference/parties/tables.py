"""
The tables in which a client looks embeddings up: a public checkpoint's, or those that the server sends it.

Both sides know a table by the SHA-256 of its numbers. What a server has sent is kept under that name, so that it is
sent once.
"""

import contextlib
import functools
import hashlib
import logging
import math
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import StringConstraints
from pydantic.dataclasses import dataclass as record

from entropy_gpt.conversion.embeddings import FILES, find_folder, read_embeddings
from entropy_gpt.evaluation.errors import EmbeddingsError, PrivateInferenceError
from entropy_gpt.evaluation.json_records import RECORD


logger = logging.getLogger(__name__)

Tables = dict[str, np.ndarray]
Precision = Literal["float32", "float16", "bfloat16"]
# In which numbers are sent; of bfloat16, its bits.
DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
# The upper half of a number in single precision is one of bfloat16.
HALF_BITS = 16
# Tables that a client keeps; of more, those go that were not used for the longest time.
MOST_KEPT = 8


@record(config=RECORD, frozen=True)
class TableTerms:
    """
    What a client learns of a table at first.

    Args:
        hash (`str`): SHA-256 of its numbers in single precision, row by row, the lowest byte first.
        precision (`str`): In which it is sent, if it is: the shortest that keeps every number.
    """

    hash: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    precision: Precision

    @classmethod
    def of(cls, table: np.ndarray) -> "TableTerms":
        return cls(hash_table(table), _find_precision(table))


@record(config=RECORD, frozen=True)
class PublicCheckpoint:
    """
    Where a server has found its tables. To a client these are words: it loads nothing by them.

    Args:
        name (`str`): A repository on the Hub, or the name of a folder.
        revision (`str`, *optional*): The commit there, if it is known.
    """

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} (revision {self.revision})"


def hash_table(table: np.ndarray) -> str:
    return hashlib.sha256(_as_bytes(table, DTYPES["float32"])).hexdigest()


def count_bytes(shape: tuple[int, ...], precision: Precision) -> int:
    """What a table takes when it is sent."""
    return math.prod(shape) * DTYPES[precision].itemsize


def encode_table(table: np.ndarray, precision: Precision) -> memoryview:
    """Its numbers in their own precision, row by row, the lowest byte first."""
    return _as_bytes(_bits(table) >> HALF_BITS if precision == "bfloat16" else table, DTYPES[precision])


def decode_table(content: bytes, terms: TableTerms, shape: tuple[int, ...]) -> np.ndarray:
    """
    What [`encode_table`] wrote, in single precision.

    Raises:
        `PrivateInferenceError`: If it is not what the server has named.
    """
    table = np.frombuffer(content, DTYPES[terms.precision])
    if terms.precision == "bfloat16":
        table = (table.astype(np.uint32) << HALF_BITS).view(np.float32)
    table = table.astype(np.float32)
    if hash_table(table) != terms.hash:
        raise PrivateInferenceError("the server sends other embeddings than those that its terms name.")
    return table.reshape(shape)


@dataclass(frozen=True)
class PublicTables:
    """
    A client's copy of public embeddings.

    Args:
        tables (`dict`): Which nobody changes.
        hashes (`dict[str, str]`): SHA-256 of each.
    """

    tables: Tables
    hashes: dict[str, str]


def read_public(source: str | Path) -> PublicTables:
    """
    The embeddings of a checkpoint, read and hashed once a process as long as its files stay as they are.

    Raises:
        `ConversionError`: As [`read_embeddings`].
    """
    folder = find_folder(source).resolve()
    return _read_unchanged(folder, tuple(sorted(map(_describe_file, folder.glob(FILES)))))


@functools.lru_cache(maxsize=1)
def _read_unchanged(folder: Path, files: tuple) -> PublicTables:
    # Copies: what is read may be a map of the file, and change with it.
    tables = {name: np.array(table) for name, table in read_embeddings(folder).tables.items()}
    for table in tables.values():
        table.setflags(write=False)
    return PublicTables(tables, {name: hash_table(table) for name, table in tables.items()})


def _describe_file(path: Path) -> tuple[str, int, int, int]:
    """What changes with a file's content."""
    state = path.stat()
    return path.name, state.st_ino, state.st_size, state.st_mtime_ns


def check_public(
    public: PublicTables,
    place: str | Path,
    checkpoint: PublicCheckpoint,
    terms: dict[str, TableTerms],
    shapes: dict[str, tuple[int, ...]],
):
    """
    Compares a client's copy of public embeddings with the server's.

    Args:
        public ([`PublicTables`]): The copy.
        place (`str` or `Path`): Where that lies, by the client's word: a folder, or a repository on the Hub.
        checkpoint ([`PublicCheckpoint`]), terms (`dict`): What the server names.
        shapes (`dict`): Those of the model's tables.

    Raises:
        `EmbeddingsError`: If it is not what the server names, to the last bit.
    """
    for name, table in public.tables.items():
        if table.shape != shapes[name] or public.hashes[name] != terms[name].hash:
            raise EmbeddingsError(
                f"{name} of {place} is not the server's, which has the embeddings of {checkpoint}, {shapes[name]} "
                f"numbers with the SHA-256 {terms[name].hash}: name a copy of these with --public-checkpoint."
            )


class TableCache:
    """
    The tables that servers have sent, by their hashes: files that their owner alone can read, whole or not at all.

    Args:
        folder (`Path`, *optional*): Default: `entropy_gpt/tables` in the user's cache (XDG_CACHE_HOME).
    """

    def __init__(self, folder: Path | None = None):
        self._given = folder

    @property
    def folder(self) -> Path:
        """
        Raises:
            `OSError`: If none is given, and the user has no home.
        """
        return self._given or _user_cache() / "entropy_gpt" / "tables"

    def load(self, terms: dict[str, TableTerms], shapes: dict[str, tuple[int, ...]]) -> Tables | None:
        """The tables, if all are there, and are what their names say."""
        found = {name: self._read(table.hash, shapes[name]) for name, table in terms.items()}
        return None if any(table is None for table in found.values()) else found

    def keep(self, tables: Tables, terms: dict[str, TableTerms]):
        """
        Tables for the next connection, which have the hashes of their terms. Where they can't be kept, a line says so:
        they are sent again then.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, table in tables.items():
                self._write(table, terms[name].hash)
            for path in sorted(self.folder.iterdir(), key=_last_used)[:-MOST_KEPT]:
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning(
                "The server's embeddings can't be kept (%s): they are sent again with the next connection.", error
            )

    def _read(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        try:
            path = self.folder / name
            content = path.read_bytes()
        except OSError:
            return None
        if len(content) != count_bytes(shape, "float32") or hashlib.sha256(content).hexdigest() != name:
            return None
        with contextlib.suppress(OSError):  # which is then forgotten sooner
            os.utime(path)
        return np.frombuffer(content, DTYPES["float32"]).astype(np.float32).reshape(shape)

    def _write(self, table: np.ndarray, name: str):
        part = self.folder / f"{name}.{secrets.token_hex(8)}"
        try:
            part.touch(mode=0o600, exist_ok=False)
            with part.open("wb") as file:
                file.write(encode_table(table, "float32"))
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.folder / name)
        finally:
            part.unlink(missing_ok=True)


def _user_cache() -> Path:
    """As XDG's specification has it, by which a path that is not absolute does not count."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise OSError("there is no home directory: name a folder with XDG_CACHE_HOME") from error


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process was faster
        return 0.0


def _find_precision(table: np.ndarray) -> Precision:
    bits = _bits(table)
    if not (bits & (2**HALF_BITS - 1)).any():
        return "bfloat16"
    with np.errstate(over="ignore"):
        shorter = table.astype(np.float16)
    return "float16" if np.array_equal(_bits(shorter), bits) else "float32"


def _bits(table: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(table, np.float32).view(np.uint32)


def _as_bytes(table: np.ndarray, dtype: np.dtype) -> memoryview:
    return np.ascontiguousarray(table, dtype).reshape(-1).view(np.uint8).data
