"""Records of benchmarks that name the commit they measured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from entropy_gpt.evaluation.json_records import StoredRecord
from entropy_gpt.evaluation.origin import git_revision
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost


Record = TypeVar("Record", bound=StoredRecord)


def find_record(
    type_: type[Record], path: Path, measure: Callable[[str], Record], *, remark: str | None, redraw: bool
) -> Record:
    """
    A record measured anew, or the kept one, which is saved with its remark.

    Args:
        type_ (`type`): With a field `remark`.
        path (`Path`): Its file.
        measure (`Callable`): Measures, given the commit.
        remark (`str`, *optional*): In place of the record's own.
        redraw (`bool`): Whether the kept record is taken.

    Raises:
        `ValueError`: If something would be measured that is not committed.
    """
    record = type_.load(path) if redraw else measure(clean_revision())
    record = replace(record, remark=remark or record.remark)
    record.save(path)
    return record


def describe_forms(cost: InferenceCost) -> str:
    """Of which time the operations of a cost are."""
    if cost.has_older_forms:
        return (
            "Operations had the forms of that commit, which is from before forms were chosen for a network.\n"
            "What today's take [is predicted](economies.md)."
        )
    return f"Operations had the forms of that commit for {cost.settings.network}."


def clean_revision() -> str:
    """The commit of this project; raises `ValueError` if there are changes that are not committed."""
    revision = git_revision()
    if revision is None or revision.endswith("+changes"):
        raise ValueError(f"revision {revision}: commit first, so that the record can name what was measured.")
    return revision
