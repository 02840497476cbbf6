"""Progress bars of work in stages."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bar:
    """One line of a progress display: a [`~entropy_gpt.training.progress.Stage`]."""

    def __init__(self, display: Progress, task: TaskID):
        self._display = display
        self._task = task

    def say(self, status: str):
        """Shows a text at the end of the line."""
        self._display.update(self._task, status=status)

    def advance(self, count: int = 1):
        """Moves the bar by `count` units."""
        self._display.update(self._task, advance=count)

    def reach(self, completed: int, total: int | None = None):
        """Moves the bar to `completed` units, of `total` if that is known only now."""
        self._display.update(self._task, completed=completed, total=total)


class Bars:
    """A display with one line for each stage: a [`~entropy_gpt.training.progress.Progress`]."""

    def __init__(self, display: Progress):
        self._display = display

    @contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Bar]:
        """Adds a line; a finished stage shows as full."""
        task = self._display.add_task(escape(description), total=total, status="")
        yield Bar(self._display, task)
        self._display.update(task, total=total or 1, completed=total or 1)


@contextmanager
def progress_display(console: Console, transient: bool = False) -> Iterator[Bars]:
    """
    Shows each stage on a line: description, bar, time left (then time taken), status.

    Args:
        console (`Console`): The console.
        transient (`bool`): Whether the lines disappear at the end; only terminals show them at all.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TimeRemainingColumn(elapsed_when_finished=True, compact=True),
        TextColumn("{task.fields[status]}"),
    )
    invisible = transient and not console.is_terminal  # otherwise, an empty line would remain
    with Progress(*columns, console=console, transient=transient, disable=invisible) as display:
        yield Bars(display)
