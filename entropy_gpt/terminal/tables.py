"""Tables in the terminal."""

from collections.abc import Collection, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table


def make_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1, folded: Collection[int] = ()
) -> Table:
    """
    A table with its numbers to the right, as narrow as it can be.

    Args:
        headings (`Sequence[str]`): Of the columns.
        rows (`Iterable[Sequence[str]]`): What stands in them, as it is.
        text_columns (`int`): How many columns, the first ones, hold text and stand to the left.
        folded (`Collection[int]`): Columns that may be broken into lines; others are as wide as they need.
    """
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(
            escape(heading),
            justify="left" if index < text_columns else "right",
            no_wrap=index not in folded,
            overflow="fold" if folded else "ellipsis",
        )
    for row in rows:
        table.add_row(*map(escape, row))
    return table
