"""Who may use an engine of a server: some clients at once, others in a bounded line that they see their place in."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from entropy_gpt.evaluation.errors import PrivateInferenceError


# A client that waits hears of its place at least so often.
ANNOUNCE_SECONDS = 5
LONGEST_LINE, LONGEST_WAIT = 16, 3600


@dataclass(eq=False)
class Place:
    """A client's in the line, and the moment at which it gives that up."""

    client: str
    until: float
    lost: bool = False


class Turns:
    """
    Args:
        workers (`int`): Clients that may have an engine at once.
        longest (`int`): Clients that may wait.
        seconds (`float`): For which each may wait.
    """

    def __init__(self, workers: int = 1, longest: int = LONGEST_LINE, seconds: float = LONGEST_WAIT):
        self.workers, self.longest, self.seconds = workers, longest, seconds
        self._engines: Counter[str] = Counter()
        self._line: list[Place] = []
        self._changed = threading.Condition()
        self._closed = False

    @property
    def active(self) -> int:
        """Engines that clients have."""
        return self._engines.total()

    @property
    def waiting(self) -> int:
        """Clients in the line."""
        return len(self._line)

    @contextlib.contextmanager
    def turn(self, client: str, announce: Callable[[int, int], None]) -> Iterator[None]:
        """
        An engine for a client, as soon as it is its turn.

        Args:
            client (`str`): As [`Channel.peer`].
            announce (`Callable`):
                Receives how many wait before it, and how many seconds it may wait on, time and again. What it raises
                ends the waiting.

        Raises:
            `PrivateInferenceError`: If the line is full, no turn came in time, or the server is about to end.
        """
        place, before = self._enter(client), None
        try:
            while (before := self._wait(place, before)) is not None:
                announce(before, round(place.until - time.monotonic()))
        except BaseException:
            self._leave(place)
            raise
        try:
            yield
        finally:
            with self._changed:
                self._engines[client] -= 1
                self._engines += Counter()  # forgets who has none
                self._changed.notify_all()

    def close(self):
        """Nobody gets a turn any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait_until_idle(self, seconds: float) -> bool:
        """Whether no client has an engine any more, after at most so long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self.active, seconds)

    def _enter(self, client: str) -> Place:
        """
        A place at the end. If the line is full, the last place is taken from the client that has most of them, if that
        is more than this one has: who asks often keeps nobody else away.
        """
        with self._changed:
            free = self.workers - self.active
            if self.waiting - free >= self.longest and self._is_full_for(client):
                raise PrivateInferenceError(
                    f"the server is busy with other clients, and {self.waiting} wait already: try again later."
                )
            place = Place(client, time.monotonic() + self.seconds)
            self._line.append(place)
            return place

    def _is_full_for(self, client: str) -> bool:
        held = Counter(place.client for place in self._line)
        if not held:
            return True
        most, count = held.most_common(1)[0]
        if count <= held[client] + 1:
            return True
        last = next(place for place in reversed(self._line) if place.client == most)
        last.lost = True
        self._line.remove(last)
        self._changed.notify_all()
        return False

    def _wait(self, place: Place, last: int | None) -> int | None:
        """How many are before it, when that is not what it last was, or after a while; `None` if it has its turn."""
        end = min(time.monotonic() + ANNOUNCE_SECONDS, place.until)
        with self._changed:
            while True:
                if place.lost:
                    raise PrivateInferenceError("another client has this place: this one has asked too often at once.")
                if self._closed:
                    raise PrivateInferenceError("the server is about to end: try again later.")
                before = self._in_turn().index(place)
                if before < self.workers - self.active:
                    self._line.remove(place)
                    self._engines[place.client] += 1
                    self._changed.notify_all()
                    return None
                now = time.monotonic()
                if now >= place.until:
                    raise PrivateInferenceError(
                        f"no turn came in {self.seconds:g} s, the most that a client may wait here "
                        f"(--max-waiting-seconds); clients before this one: {before}. Try again later."
                    )
                left = end - now
                if before != last or left <= 0:
                    return before
                self._changed.wait(left)

    def _in_turn(self) -> list[Place]:
        """The line in the order of turns: who has fewest engines comes first, then who has waited longest."""
        left, engines, found = list(self._line), self._engines.copy(), []
        while left:
            place = min(left, key=lambda place: engines[place.client])
            left.remove(place)
            engines[place.client] += 1
            found.append(place)
        return found

    def _leave(self, place: Place):
        with self._changed:
            if place in self._line:
                self._line.remove(place)
                self._changed.notify_all()
