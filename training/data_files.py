"""Data files: JSON, JSON lines, CSV, TSV and Parquet, also compressed by gzip. A path is a path, never a pattern."""

import csv
import fnmatch
import functools
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import yaml
from huggingface_hub import metadata_load
from pyarrow import parquet

from entropy_gpt.conversion.foreign_files import BEGINNINGS, LFS_POINTER

from .errors import CorpusError


GZIP = ".gz"
ENCODING = "utf-8-sig"  # a byte order mark is not text
# Words of file names by the split that they stand for, as `datasets` takes them.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
CARD = "README.md"


def suffix_of(path: Path) -> str:
    """The suffix of a file in lower case, without that of gzip."""
    return Path(path.stem if _is_compressed(path) else path.name).suffix.lower()


def read_text_file(path: Path) -> str:
    """
    The text of a file, decompressed if its name ends in `.gz`, and without a byte order mark.

    Raises:
        `CorpusError`: If it can't be read, or is not UTF-8 text.
    """
    with _opened(path) as file:
        content = file.read()
    if b"\0" in content:
        raise CorpusError(_not_text(path))
    with _named_errors(path):
        return content.decode(ENCODING)


def read_rows(path: Path, column: str | None = None) -> Iterator[dict]:
    """
    The rows of a data file, each with its columns by their names; those other than `column` may lack if it is given.

    Raises:
        `CorpusError`: If it can't be read. The message names the file and, if there is one, the line.
    """
    with _opened(path) as file:
        yield from READERS[suffix_of(path)](file, column)


def read_column(files: Iterable[str], column: str) -> Iterator[dict]:
    """
    One column of the rows of data files: text or `None`.

    Raises:
        `CorpusError`: If a file can't be read, or a value is no text.
    """
    for name in files:
        for row in read_rows(Path(name), column):
            if not isinstance(text := row.get(column), str | None):
                raise CorpusError(f"{name} has a row whose text is a {type(text).__name__}: give another text_column.")
            yield {column: text and text.encode(errors="surrogatepass").decode(errors="replace")}


def split_files(folder: Path, files: list[Path], config: str | None) -> dict[str, list[Path]]:
    """
    The data files of a folder by split: as `configs` in its README.md says, else by words in their names. Without any
    such word, all of them are to train on.

    Args:
        folder (`Path`): The folder.
        files (`list[Path]`): Its data files.
        config (`str`, *optional*): One of the configurations in README.md.

    Raises:
        `CorpusError`: If there is no such configuration, or there are several and none is chosen.
    """
    names = {file: file.relative_to(folder).as_posix() for file in files}
    chosen = _find_configuration(folder, config)
    if inside := chosen.get("data_dir", "").strip("./"):
        names = {file: name for file, name in names.items() if name.startswith(f"{inside}/")}
    if patterns := chosen.get("data_files"):
        return _match(names, patterns)
    splits: dict[str, list[Path]] = {}
    for file, name in names.items():
        words = [word for word in re.split(r"[-._ 0-9/]+", name.lower()) if word in SPLIT_WORDS]
        splits.setdefault(SPLIT_WORDS[words[0]] if words else "", []).append(file)
    return {split: found for split, found in splits.items() if split} or {"train": [*names]}


def _find_configuration(folder: Path, config: str | None) -> dict:
    """The entry of a folder's README.md, or an empty one if none applies."""
    card, known = folder / CARD, {}
    if card.is_file():
        try:
            content = metadata_load(card) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CorpusError(f"The metadata of {card} can't be read: {error}. Mend it.") from error
        known = {entry.get("config_name", "default"): entry for entry in content.get("configs") or []}
    if config is None and len(known) == 1:
        return next(iter(known.values()))
    if config is None and known and "default" not in known:
        raise CorpusError(f"{folder} has several configurations. Choose one: {', '.join(known)}.")
    if config is not None and config not in known:
        there = f"It has {', '.join(known)}." if known else f"Its {CARD} would list it under configs."
        raise CorpusError(f"{folder} has no configuration {config}. {there}")
    return known.get(config or "default", {})


def _match(names: dict[Path, str], patterns: str | list) -> dict[str, list[Path]]:
    """The files by split, as `data_files` of a configuration says."""
    if not isinstance(patterns, list) or not all(isinstance(entry, dict) for entry in patterns):
        patterns = [{"split": "train", "path": patterns}]
    wanted = {entry["split"]: entry["path"] for entry in patterns}
    return {
        split: [file for file, name in names.items() if any(_fits(name, pattern) for pattern in _listed(paths))]
        for split, paths in wanted.items()
    }


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _fits(name: str, pattern: str) -> bool:
    pattern = pattern.removeprefix("./")
    return name == pattern or fnmatch.fnmatchcase(name, pattern.replace("**/", "*"))


def _read_json(file: BinaryIO, column: str | None) -> Iterator[dict]:
    """A list of rows, one row, or a row a line."""
    content = file.read().decode(ENCODING)
    try:
        rows = json.loads(content)
    except json.JSONDecodeError:
        yield from _read_lines(content.splitlines(keepends=True))
        return
    yield from map(_as_row, rows if isinstance(rows, list) else [rows])


def _read_json_lines(file: BinaryIO, column: str | None) -> Iterator[dict]:
    yield from _read_lines(io.TextIOWrapper(file, ENCODING))


def _read_lines(lines: Iterable[str]) -> Iterator[dict]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield _as_row(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _as_row(value) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"a row is a {type(value).__name__}, not named fields")
    return value


def _read_csv(file: BinaryIO, column: str | None, delimiter: str = ",") -> Iterator[dict]:
    csv.field_size_limit(sys.maxsize)  # documents are long
    yield from csv.DictReader(io.TextIOWrapper(file, ENCODING, newline=""), delimiter=delimiter)


def _read_parquet(file: BinaryIO, column: str | None) -> Iterator[dict]:
    table = parquet.ParquetFile(file)
    for batch in table.iter_batches(columns=[column] if column in table.schema_arrow.names else None):
        yield from batch.to_pylist()


READERS = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": functools.partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == GZIP


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with _named_errors(path), path.open("rb") as raw:
        if raw.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
            raise CorpusError(f"{path} is {BEGINNINGS[LFS_POINTER]}.")
        yield gzip.GzipFile(fileobj=raw) if _is_compressed(path) else raw


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Errors of reading, as one that names the file."""
    try:
        yield
    except CorpusError:
        raise
    except UnicodeDecodeError as error:
        raise CorpusError(_not_text(path)) from error
    except OSError as error:
        raise CorpusError(unreadable(path, error)) from error
    except (ValueError, EOFError, zlib.error, csv.Error, pa.ArrowException) as error:
        raise CorpusError(f"{path} is damaged: {error}. Mend it, or leave it out.") from error


def unreadable(path: Path, error: OSError) -> str:
    return f"{path} can't be read ({error.strerror or error}). Make it readable, or leave it out."


def _not_text(path: Path) -> str:
    return f"{path} is not UTF-8 text (is it binary?). Convert it, or leave it out."
