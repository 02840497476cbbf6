"""Records on disk: dataclasses as JSON, with the kind and the version of what a file holds."""

import json
from pathlib import Path
from typing import ClassVar, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

from .errors import RecordError


# For `pydantic.dataclasses.dataclass`: no unknown fields, and numbers that are not finite as "NaN" and "Infinity".
RECORD = ConfigDict(extra="forbid", ser_json_inf_nan="strings", validate_assignment=True)


def save_record(content: object, type_: type, kind: str, version: int, path: Path):
    """
    Writes a dataclass, or a list of them. Numbers that are not finite are written as words, and read back as numbers
    where a field's type says `float`; in a plain `dict` or `list` they stay words.

    Args:
        content: What to write.
        type_ (`type`): What it is, such as `list[ModelResult]`.
        kind (`str`): What it is, in words; [`load_record`] asks for it.
        version (`int`): Of the kind's fields.
        path (`Path`): The file.
    """
    fields = json.loads(_adapter(type_).dump_json(content))
    header = {"kind": kind, "schema_version": version, "content": fields}
    path.write_text(json.dumps(header, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load_record(type_: type, kind: str, version: int, path: Path):
    """
    Reads what [`save_record`] wrote.

    Args:
        type_ (`type`): What it was, such as `list[ModelResult]`.
        kind (`str`): What the file has to hold.
        version (`int`): The version that is read.
        path (`Path`): The file.

    Raises:
        [`RecordError`]: If the file can't be read, is of another kind or version, or a field is wrong: with its name.
    """
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no JSON: {error}"
        raise RecordError(f"{path} can't be read: {reason}.") from error
    found = header.get("kind") if isinstance(header, dict) else None
    if found != kind:
        raise RecordError(f"{path} holds {found or 'something else'}, not {kind}: give another file.")
    if header.get("schema_version") != version:
        raise RecordError(
            f"{path} is of schema version {header.get('schema_version')}, where {version} is read: make it anew."
        )
    try:
        return _adapter(type_).validate_python(header.get("content"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise RecordError(f"{path} is broken: {place}: {first['msg']}. Make it anew.") from error


class StoredRecord:
    """What a dataclass inherits that has a file of its own: `KIND` and `SCHEMA_VERSION` are what the file says."""

    KIND: ClassVar[str]
    SCHEMA_VERSION: ClassVar[int]

    def save(self, path: Path):
        """Writes the record as JSON."""
        save_record(self, type(self), self.KIND, self.SCHEMA_VERSION, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what [`StoredRecord.save`] wrote; raises as [`load_record`] does."""
        return load_record(cls, cls.KIND, cls.SCHEMA_VERSION, path)


def _adapter(type_: type) -> TypeAdapter:
    # A list has no configuration of its own, and without one what is not finite in a plain `dict` would become null.
    return TypeAdapter(type_, config=None if is_pydantic_dataclass(type_) else RECORD)
