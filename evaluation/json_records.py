"""Records on disk: dataclasses as JSON, with the kind and the version of what a file holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

from .errors import RecordError


# For `pydantic.dataclasses.dataclass`: no unknown fields, and numbers that are not finite as "NaN" and "Infinity".
RECORD = ConfigDict(extra="forbid", ser_json_inf_nan="strings", validate_assignment=True)


def save_record(content: object, type_: type, kind: str, version: int, path: Path):
    """
    Writes a dataclass, or a list of them, as JSON with one line for each field or record. Numbers that are not finite
    are written as words, and read back as numbers where a field's type says `float`; in a plain `dict` or `list` they
    stay words.

    Args:
        content: What to write.
        type_ (`type`): What it is, such as `list[ModelResult]`.
        kind (`str`): What it is, in words; [`load_record`] asks for it.
        version (`int`): Version of the kind's fields.
        path (`Path`): The file.
    """
    fields = json.loads(_adapter(type_).dump_json(content))
    header = {"kind": kind, "schema_version": version, "content": fields}
    path.write_text(_one_line_each(header, levels=3) + "\n", encoding="utf-8")


def load_record(type_: type, kind: str, version: int, path: Path, migrate: Callable[[Any, int], Any] | None = None):
    """
    Reads what [`save_record`] wrote.

    Args:
        type_ (`type`): What it was, such as `list[ModelResult]`.
        kind (`str`): What the file has to hold.
        version (`int`): The version that is read.
        path (`Path`): The file.
        migrate (`Callable`, *optional*): Takes content (from JSON) and its older version, and returns the content in
            this version, or `None` if that version can't be brought up to date.

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
    content, written = header.get("content"), header.get("schema_version")
    if written != version:
        is_older = isinstance(written, int) and written < version
        content = migrate(content, written) if is_older and migrate is not None else None
        if content is None:
            is_newer = isinstance(written, int) and written > version
            remedy = "update entropy-gpt" if is_newer else "make it anew"
            raise RecordError(f"{path} is of schema version {written}, where {version} is read: {remedy}.")
    try:
        return _adapter(type_).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise RecordError(f"{path} is broken: {place}: {first['msg']}. Make it anew.") from error


class StoredRecord:
    """
    The base of dataclasses that have a file of their own. `KIND` and `SCHEMA_VERSION` are written into the file.

    When the fields change, raise `SCHEMA_VERSION` and override [`StoredRecord.migrate`], so that what was measured
    before stays readable.
    """

    KIND: ClassVar[str]
    SCHEMA_VERSION: ClassVar[int]

    def save(self, path: Path):
        """Writes the record as JSON."""
        save_record(self, type(self), self.KIND, self.SCHEMA_VERSION, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what [`StoredRecord.save`] wrote; raises as [`load_record`] does."""
        return load_record(cls, cls.KIND, cls.SCHEMA_VERSION, path, cls.migrate)

    @classmethod
    def migrate(cls, content: Any, version: int) -> Any:
        """
        Brings content of an older version up to date.

        Args:
            content: The fields, as they are in the file.
            version (`int`): The version in which they were written.

        Returns:
            The fields in this version, or `None` if that can't be done: the file is refused then.
        """
        return None


def _adapter(type_: type) -> TypeAdapter:
    # A list has no configuration of its own, and without one what is not finite in a plain `dict` would become null.
    return TypeAdapter(type_, config=None if is_pydantic_dataclass(type_) else RECORD)


def _one_line_each(value: Any, levels: int) -> str:
    """JSON in which a container of containers, down to some levels, has a line for each item."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not levels or not any(isinstance(item, dict | list) for item in items):
        return json.dumps(value, allow_nan=False)
    if isinstance(value, list):
        return "[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"
    lines = [f"{json.dumps(name)}: {_one_line_each(item, levels - 1)}" for name, item in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}"
