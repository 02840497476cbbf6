"""Progress bars of work in stages."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Stage:
    """One line of a progress display."""

    def __init__(self, progress: Progress, task: TaskID):
        self._progress = progress
        self._task = task

    def say(self, status: str):
        """Shows a text at the end of the line."""
        self._progress.update(self._task, status=status)

    def advance(self, count: int = 1):
        """So many more units are done."""
        self._progress.update(self._task, advance=count)

    def reach(self, completed: int, total: int | None = None):
        """So many units are done in all, of so many if that is known only now."""
        self._progress.update(self._task, completed=completed, total=total)


def progress_display(console: Console) -> Progress:
    """A display with a line for each stage: description, bar, time left (then taken), status."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TimeRemainingColumn(elapsed_when_finished=True, compact=True),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


@contextmanager
def stage(progress: Progress, description: str, total: int | None = None) -> Iterator[Stage]:
    """Adds a line for a stage of so many units, or of unknown length; a finished stage shows as full."""
    task = progress.add_task(escape(description), total=total, status="")
    yield Stage(progress, task)
    progress.update(task, total=total or 1, completed=total or 1)
