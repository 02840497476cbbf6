"""Progress of long work: the interface that workflows report to, and a caller implements."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Stage(Protocol):
    """A part of the work, under way."""

    def say(self, status: str):
        """Reports a short text, such as the latest loss. It replaces the one before."""

    def advance(self, count: int = 1):
        """Reports that `count` more units are done."""

    def reach(self, completed: int, total: int | None = None):
        """Reports that `completed` units are done in all, and their total number if it is known only now."""


class Progress(Protocol):
    """The work as a whole. Pass an object of your own to follow a workflow, or [`SILENT`]."""

    def stage(self, description: str, total: int | None = None) -> AbstractContextManager[Stage]:
        """
        Begins a part of the work, which ends with the context.

        Args:
            description (`str`): What is being done.
            total (`int`, *optional*): The number of units, such as tokens or steps, if it is known.
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
