"""Tables in the terminal."""

from collections.abc import Collection, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
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


def break_path(name: str) -> str:
    """A path in lines of its parts, for a narrow column."""
    return name.replace("/", "/\n")


def print_side_by_side(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1
):
    """
    Prints a table with a column for each of several models: as many tables as it takes for none to be too wide.

    Args:
        console (`Console`): The console.
        headings (`Sequence[str]`): The columns' headings.
        rows (`Sequence[Sequence[str]]`): The cells of each row, shown without markup.
        text_columns (`int`): The number of columns at the left that every table repeats, aligned to the left.
    """
    unlimited = console.options.update(max_width=10_000)
    left, begin = [*range(text_columns)], text_columns
    while begin < len(headings):
        for end in range(len(headings), begin, -1):
            columns = [*left, *range(begin, end)]
            shown = ([cells[column] for column in columns] for cells in (headings, *rows))
            table = make_table(next(shown), shown, text_columns)
            if end == begin + 1 or console.measure(table, options=unlimited).maximum <= console.width:
                break
        console.print(table)
        begin = end
