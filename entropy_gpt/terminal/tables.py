"""Tables in the terminal."""

from collections.abc import Collection, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table


def make_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1, folded: Collection[int] = ()
) -> Table:
    """
    A table as narrow as possible, with numbers aligned to the right.

    Args:
        headings (`Sequence[str]`): The columns' headings.
        rows (`Iterable[Sequence[str]]`): The cells of each row, shown without markup.
        text_columns (`int`): The number of columns at the left that hold text, aligned to the left.
        folded (`Collection[int]`): Columns whose cells may be broken into lines. Others are never broken.
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
