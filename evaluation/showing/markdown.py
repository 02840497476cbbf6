"""Markdown that several pages have."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """
    A table with its numbers to the right.

    Args:
        headings (`Sequence[str]`): Headings of the columns.
        rows (`Iterable[Sequence[str]]`): What stands in them, in Markdown.
        text_columns (`int`): How many columns, the first ones, hold text and stand to the left.
    """
    rule = ["---"] * text_columns + ["---:"] * (len(headings) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))


def fold_away(title: str, items: Iterable[str]) -> str:
    """A list that a reader opens by its title, on GitHub and on the built pages."""
    lines = "\n".join(f"- {item}" for item in items)
    return f'<details markdown="1">\n<summary>{title}</summary>\n\n{lines}\n\n</details>'


def find_block(text: str, name: str) -> re.Match | None:
    """What stands between the two comments that enclose a generated part."""
    return re.search(f"(?<=<!-- {name}: begin -->\n).*?(?=<!-- {name}: end -->)", text, re.DOTALL)


def replace_block(page: Path, name: str, content: str):
    """
    Replaces a generated part of the README, or of another page.

    Raises:
        `ValueError`: If the page lacks the two comments that enclose it.
    """
    text = page.read_text(encoding="utf-8")
    block = find_block(text, name)
    if block is None:
        raise ValueError(f"{page} has no place for the part {name!r}: give it <!-- {name}: begin --> and end.")
    page.write_text(f"{text[: block.start()]}\n{content}\n{text[block.end() :]}", encoding="utf-8")
