"""Progress of long work, as whoever runs it wants to see it: what workflows report to."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Stage(Protocol):
    """One part of the work."""

    def say(self, status: str):
        """Reports a short text, such as the latest loss."""

    def advance(self, count: int = 1):
        """Reports that `count` more units are done."""

    def reach(self, completed: int, total: int | None = None):
        """Reports how many units are done in all, and of how many if that is known only now."""


class Progress(Protocol):
    """The whole work. Pass an object of your own to see what a workflow does, or [`SILENT`]."""

    def stage(self, description: str, total: int | None = None) -> AbstractContextManager[Stage]:
        """
        Begins a part of the work, which lasts as long as the context.

        Args:
            description (`str`): What is being done.
            total (`int`, *optional*): The number of units, if it is known.
        """


class _Silent:
    def say(self, status: str):
        pass

    def advance(self, count: int = 1):
        pass

    def reach(self, completed: int, total: int | None = None):
        pass

    @contextmanager
    def stage(self, description: str, total: int | None = None) -> Iterator[Stage]:
        yield self


SILENT: Progress = _Silent()
