"""What a server grants each client, by its certificate or address: requests, positions and seconds in a day."""

import sys
import threading
import time
from collections import deque
from dataclasses import dataclass

from entropy_gpt.evaluation.errors import PrivateInferenceError


DAY_SECONDS = 86_400
# Clients that are remembered; of more, the one that was idle for the longest time is forgotten.
MAX_CLIENTS = 4096


@dataclass(frozen=True)
class Limits:
    """
    What a client may ask for.

    Args:
        answers (`int`):
            New tokens, or positions of the prompt, of one request, with those of wrong drafts and repeats.
        requests (`int`): In a day.
        positions (`int`): Positions answered in a day, with the same.
        seconds (`int`): For which it may hold the engine in a day.
    """

    answers: int = 256
    requests: int = 256
    positions: int = 512
    seconds: int = 14_400


# What a server sets for its own process.
UNLIMITED = Limits(*[sys.maxsize] * 4)


@dataclass
class Use:
    """What a request took of its client's limits, and when; while it is answered, since when."""

    began: float
    positions: int
    seconds: float = 0.0
    kept_seconds: float = 0.0
    running_since: float | None = None
    computed: int = 0

    def note_pass(self, positions: int):
        self.computed += positions
        self.positions = max(self.positions, self.computed)

    def settle(self, least: int):
        """Gives back what was taken for drafts and not computed."""
        self.positions = max(least, self.computed)

    def taken(self) -> float:
        """Seconds of an engine so far."""
        running = 0.0 if self.running_since is None else time.monotonic() - self.running_since
        return self.seconds + self.kept_seconds + running


class Accounts:
    """
    Keeps what each client has used.

    Args:
        limits ([`Limits`]): What each is granted.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self._lock = threading.Lock()
        self._uses: dict[str, deque[Use]] = {}

    def open(self, client: str, positions: int, most_positions: int = 0, drafts: int = 0) -> tuple[Use, Limits]:
        """
        Begins a request.

        Args:
            client (`str`): As [`Channel.peer`].
            positions (`int`): That it takes at least.
            most_positions (`int`): That it may take, as far as the client has them left; they are taken until it ends.
            drafts (`int`): How many of those that it takes at least are for drafts.

        Returns:
            `tuple`: Where to note what it takes, and what the client has left: `answers` and `seconds` are those that
            this request may have.

        Raises:
            `PrivateInferenceError`: If the client has not so much left.
        """
        of_drafts = f", {drafts} of them for drafts (--draft, --draft-tokens)" if drafts else ""
        if positions > self.limits.answers:
            raise PrivateInferenceError(
                f"{positions} answers are asked for{of_drafts}; {self.limits.answers} is the most here "
                "(--max-new-tokens)."
            )
        with self._lock:
            uses = self._recent(client)
            left = Limits(
                answers=self.limits.answers,
                requests=self.limits.requests - len(uses),
                positions=self.limits.positions - sum(use.positions for use in uses),
                seconds=self.limits.seconds - round(sum(use.taken() for use in uses)),
            )
            for name, asked in (("requests", 1), ("positions", positions), ("seconds", 1)):
                if asked > getattr(left, name):
                    raise PrivateInferenceError(
                        f"this client has {max(0, getattr(left, name))} of {getattr(self.limits, name)} {name} a day "
                        f"left here, and asks for {asked}{of_drafts if name == 'positions' else ''} (--max-{name})."
                    )
            use = Use(time.monotonic(), max(positions, min(most_positions, left.answers, left.positions)))
            uses.append(use)
            return use, left

    def _recent(self, client: str) -> deque[Use]:
        uses = self._uses.pop(client, deque())
        while uses and uses[0].began < time.monotonic() - DAY_SECONDS:
            uses.popleft()
        self._uses[client] = uses
        if len(self._uses) > MAX_CLIENTS:
            del self._uses[next(iter(self._uses))]
        return uses
