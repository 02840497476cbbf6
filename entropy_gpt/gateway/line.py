"""The line of requests: one after another is put to the private server, by one thread."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.workflows.private_client import PrivateClient

from .errors import ProtocolError, of_the_gateway, of_the_server


# A connection without requests is closed after `IDLE_SECONDS`: the server would end it, and other clients may wait.
IDLE_SECONDS, END_SECONDS = 25, 5


@dataclass(frozen=True)
class Waiting:
    """How many are before this request, in the line of the gateway or in that of the server, which ends in seconds."""

    before: int | str
    seconds: int | str
    what: str = "requests"

    def __str__(self) -> str:
        return f"{self.what} before this one: {self.before}; it is given up in {self.seconds} s"


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class Job:
    """
    A request in the line.

    Args:
        work (`Callable`): Answers it, by way of a client and the job.
        emit (`Callable`): Receives what there is to say: [`Waiting`], what `work` says, and last an error or `None`.

    Attributes:
        joined (`float`), alarm (`threading.Timer`): When it came into the line, and what ends its waiting.
    """

    joined: float
    alarm: threading.Timer

    def __init__(self, work: Callable[[PrivateClient, "Job"], None], emit: Callable[[object], None]):
        self.work, self.emit = work, emit
        self.cancelled = threading.Event()

    def check(self):
        """
        Raises:
            `Cancelled`: If nobody waits any more.
        """
        if self.cancelled.is_set():
            raise Cancelled


class Line:
    """
    Args:
        client ([`PrivateClient`]): Whom the requests are put to.
        longest (`int`): Requests that may wait.
        seconds (`float`): For which each may wait.
    """

    def __init__(self, client: PrivateClient, longest: int, seconds: float):
        self.client, self.longest, self.seconds = client, longest, seconds
        self.active: Job | None = None
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def length(self) -> int:
        """Requests that wait, without the one that is answered and those that nobody waits for any more."""
        return sum(not job.cancelled.is_set() for job in tuple(self._waiting))

    def join(self, job: Job):
        """
        Puts a request at the end.

        Raises:
            `ProtocolError`: If the line is full.
        """
        with self._changed:
            self._forget_cancelled()
            if self.length - (self.active is None) >= self.longest:  # one that finds nobody here does not wait
                raise ProtocolError(
                    429, f"{self.length} requests are waiting already, the most here: try again later.", code="busy"
                )
            self._waiting.append(job)
            job.joined, job.alarm = time.monotonic(), threading.Timer(self.seconds, self._give_up, [job])
            job.alarm.daemon = True
            job.alarm.start()
            before = self.length - 1 + (self.active is not None)
            if before:
                self._announce(job, before)
            self._changed.notify_all()

    def close(self):
        """Ends what goes on."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *filter(None, [self.active])):
                job.cancelled.set()
            self._changed.notify_all()
        self._thread.join(END_SECONDS)

    def _work(self):
        while (job := self._next()) is not None or not self._closed:
            if job is None:
                self._hang_up()
                continue
            job.emit(self._answer(job))
            with self._changed:
                self.active = None
        self._hang_up()

    def _hang_up(self):
        try:
            self.client.close()
        except Exception as error:  # a further request makes another connection
            of_the_gateway(error)

    def _forget_cancelled(self):
        cancelled = [job for job in self._waiting if job.cancelled.is_set()]
        self._waiting = deque(job for job in self._waiting if job not in cancelled)
        for job in cancelled:
            job.alarm.cancel()
            job.emit(None)

    def _next(self) -> Job | None:
        """The next request; `None` if there is none for a while, or at the end."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting or self._closed, IDLE_SECONDS):
                return None
            self._forget_cancelled()
            if not self._waiting:
                return None
            self.active = self._waiting.popleft()
            self.active.alarm.cancel()
            for before, job in enumerate(self._waiting, start=1):
                self._announce(job, before)
            return self.active

    def _announce(self, job: Job, before: int):
        job.emit(Waiting(before, round(job.joined + self.seconds - time.monotonic())))

    def _give_up(self, job: Job):
        """Refuses a request that still waits."""
        with self._changed:
            if job not in self._waiting:
                return
            before = self._waiting.index(job) + (self.active is not None)
            self._waiting.remove(job)
        message = (
            f"no turn came in {self.seconds:g} s, the most that a request may wait here (--max-waiting-seconds); "
            f"requests before this one: {before}. Try again later."
        )
        job.emit(ProtocolError(429, message, code="busy"))

    def _answer(self, job: Job) -> ProtocolError | None:
        try:
            job.check()
            job.work(self.client, job)
        except Cancelled:
            return None
        except ProtocolError as error:
            return error
        except PrivateInferenceError as error:
            return of_the_server(error)
        except Exception as error:  # the gateway goes on
            return of_the_gateway(error)
        return None
