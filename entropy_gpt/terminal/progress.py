"""Progress of work in stages: bars on a terminal; elsewhere, such as in a log, a line now and then."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text


# Seconds between two lines about a stage, without a terminal.
INTERVAL = 60
BAR_WIDTH = 16
BYTE_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


class Line:
    """A stage under way: a [`~entropy_gpt.training.progress.Stage`]."""

    def __init__(self, description: str, total: int | None):
        self.description, self.total, self.status = description, total, ""
        self.completed, self._first = 0, None
        self._started = self._begun = self._reached = time.monotonic()

    def say(self, status: str):
        """Sets the text at the end of the line."""
        self.status = status

    def advance(self, count: int = 1):
        """Counts `count` more units as done."""
        self.reach(self.completed + count)

    def reach(self, completed: int, total: int | None = None):
        """Counts `completed` units as done, of `total` if that is known only now."""
        self.completed, self.total, self._reached = completed, total or self.total, time.monotonic()
        if self._first is None:  # earlier work, which says nothing about the pace of this one
            self._first, self._begun = completed, self._reached

    @property
    def duration(self) -> str:
        """The time taken so far."""
        return format_seconds(time.monotonic() - self._started)

    @property
    def time_left(self) -> str:
        """The time left at the pace so far; empty while it is not known."""
        if not self.total or self._first is None or self.completed <= self._first:
            return ""
        pace = (self._reached - self._begun) / (self.completed - self._first)
        left = pace * (self.total - self.completed) - (time.monotonic() - self._reached)
        return f"{format_seconds(max(0, left))} left"

    @property
    def state(self) -> str:
        """The line as text, while the stage is under way."""
        share = f"{min(1, self.completed / self.total):.0%}" if self.total else self.duration
        return f"{self.description}: {', '.join(filter(None, (share, self.time_left, self.status)))}"

    @property
    def summary(self) -> str:
        """The line as text, when the stage has ended."""
        return f"{': '.join(filter(None, (self.description, self.status)))} ({self.duration})"


class Display:
    """The stages under way: a [`~entropy_gpt.training.progress.Progress`]."""

    def __init__(self, console: Console, transient: bool, whole: Line | None):
        self._console, self._transient = console, transient
        self._lines: list[Line] = [whole] if whole else []

    @contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Line]:
        """Shows a line until the stage ends; then one of text stays, unless the stage failed."""
        line = Line(description, total)
        self._lines.append(line)
        try:
            yield line
        finally:
            self._lines.remove(line)
        if not self._transient:
            self._print(line.summary)

    def bars(self) -> Table:
        """A row for each stage: description, bar, time left, status. The texts are cut where they are too long."""
        fixed, cut = {"no_wrap": True}, {"overflow": "ellipsis"}
        table = Table.grid(Column(**cut), Column(**fixed), Column(**fixed), Column(**cut), padding=(0, 1, 0, 0))
        for line in list(self._lines):
            bar = ProgressBar(line.total, line.completed, BAR_WIDTH, pulse=not line.total)
            description, status = (Text(text, no_wrap=True, end="") for text in (line.description, line.status))
            table.add_row(description, bar, line.time_left or line.duration, status)
        return table

    @contextmanager
    def printing(self) -> Iterator[None]:
        """Prints the state of each stage every [`INTERVAL`] seconds."""
        ended = threading.Event()

        def print_states():
            while not ended.wait(INTERVAL):
                for line in list(self._lines):
                    self._print(line.state)

        thread = threading.Thread(target=print_states, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _print(self, text: str):
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_display(console: Console, transient: bool = False, whole: Line | None = None) -> Iterator[Display]:
    """
    Shows stages while they are under way, and leaves a line about each.

    A terminal shows bars. Elsewhere, each stage prints a line every minute, without control characters.

    Args:
        console (`Console`): The console.
        transient (`bool`): Whether stages leave nothing.
        whole ([`Line`], *optional*): The work of which the stages are parts, shown above them. It leaves nothing.
    """
    display = Display(console, transient, whole)
    with ExitStack() as stack:
        if console.is_interactive and console.file.isatty():  # CI may force colours without being a terminal
            stack.enter_context(Live(get_renderable=display.bars, console=console, transient=True))
        else:
            stack.enter_context(display.printing())
        yield display


def format_seconds(seconds: float) -> str:
    """A duration as people say it: `45 s`, `3 min 20 s`, `25 min` or `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 10:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def format_bytes(size: float) -> str:
    """A size in the unit that fits: `1.5 kB`, `45.3 MB` or `8.0 GB`."""
    scale, letter = next((unit for unit in BYTE_UNITS if size >= unit[0]), BYTE_UNITS[-1])
    return f"{size / scale:,.1f} {letter}B"


def format_count(number: float, noun: str, plural: str | None = None) -> str:
    """How many there are of something: `1 layer`, `2 layers`; `plural` where an s alone does not make it."""
    return f"{number:,.10g} {noun if number == 1 else plural or noun + 's'}"
