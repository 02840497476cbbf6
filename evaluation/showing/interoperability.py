"""
The table of docs/interoperability.md: what was compared with which tool. `pytest --record-comparisons` appends to the
record; `python -m entropy_gpt.evaluation.showing.interoperability` puts it in order and shows it on the page.
"""

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD as STRICT
from entropy_gpt.evaluation.origin import ROOT

from .markdown import markdown_table, replace_block


RECORD = ROOT / "model_cards" / "results" / "interoperability.jsonl"
PAGE = ROOT / "docs" / "interoperability.md"
BLOCK = "comparisons"
HEADINGS = ("tool", "version", "compared", "result")


@dataclass(config=STRICT, frozen=True)
class Comparison:
    """
    One line of the record.

    Args:
        tool (`str`): The distribution's name.
        version (`str`): The version of the tool, and of what else matters.
        compared (`str`): What was compared, in Markdown.
        result (`str`): What came of it, in Markdown.
        test (`str`): The test that compared it.
    """

    tool: str
    version: str
    compared: str
    result: str
    test: str


def load_comparisons(path: Path) -> list[Comparison]:
    """
    Reads a record, in an order that does not depend on that of the lines: by the tool and by what was compared. Of
    what the same test compared twice, the last line counts.

    Raises:
        `ValueError`: If a line is broken, with its number.
    """
    newest = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = TypeAdapter(Comparison).validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the line"
            raise ValueError(
                f"{path}:{number} is broken: {place}: {first['msg']}. Record the comparisons anew."
            ) from error
        newest[row.test, row.tool, row.compared] = row
    return sorted(newest.values(), key=lambda row: (row.tool.lower(), row.compared, row.test))


def comparisons_markdown(rows: list[Comparison]) -> str:
    """The table; tests that compared the same with the same result have one row of it."""
    cells = ([getattr(row, heading).replace("|", r"\|") for heading in HEADINGS] for row in rows)
    return markdown_table(HEADINGS, dict.fromkeys(map(tuple, cells)), text_columns=len(HEADINGS))


def write(record: Path = RECORD, page: Path = PAGE):
    """
    Puts the record in order and replaces the page's table.

    Raises:
        `ValueError`: If the record is broken, or the page has no place for the table.
    """
    rows = load_comparisons(record)
    replace_block(page, BLOCK, comparisons_markdown(rows))
    record.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write()
