"""Markdown that several pages have."""

from collections.abc import Iterable, Sequence


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """
    A table with its numbers to the right.

    Args:
        headings (`Sequence[str]`): Of the columns.
        rows (`Iterable[Sequence[str]]`): What stands in them, in Markdown.
        text_columns (`int`): How many columns, the first ones, hold text and stand to the left.
    """
    rule = ["---"] * text_columns + ["---:"] * (len(headings) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))
