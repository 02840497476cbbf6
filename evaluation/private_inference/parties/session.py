"""One party's side of a connection: its engine's process, the peer's messages, and what becomes of both."""

import contextlib
import itertools
import json
import math
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import TypeAdapter

from entropy_gpt.evaluation.errors import EngineError, PrivateInferenceError
from entropy_gpt.evaluation.origin import collect_origin
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost, StepCost
from entropy_gpt.evaluation.private_inference.program.settings import SERVER
from entropy_gpt.evaluation.private_inference.program.variables import held_shapes

from .channel import Channel, ClosedError, RefusalError, one_line
from .engine import engine_versions
from .job import ALWAYS_OUT_OF_RANGE, REPEATS, Job, Request, read_array, write_arrays
from .terms import Terms
from .tunnel import Tunnel


# What the last messages of an inference may take.
FAREWELL_SECONDS = 60
# What an engine may be sent besides what its steps predict: the set-up, which depends on the number of processors, and
# the headers. A step may send more than its price by a share, and a peer may be steps ahead.
SET_UP_ALLOWANCE, STEP_ALLOWANCE, STEPS_AHEAD = 2**27, 1.25, 2
LAST_LINES, LINE_CHARACTERS = 20, 2000
# Messages of a peer that may wait to be asked for: more do not belong here.
MOST_MESSAGES = 4
# In which a client hears both why a server has ended an inference and what its own engine did at last.
REASON_SECONDS = 2


@dataclass
class Outcome:
    """
    What the client learned, what it cost by its count, and how often each pass was computed anew; with a preparation,
    what that took before, and of a preparation its name; of each pass over drafts, their number and how many were
    right.
    """

    tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    set_up: list[StepCost] = field(default_factory=list)
    steps: list[StepCost] = field(default_factory=list)
    repeats: Counter[int] = field(default_factory=Counter)
    before: list[StepCost] = field(default_factory=list)
    prepared: str | None = None
    verified: list[tuple[int, int]] = field(default_factory=list)

    def cost(self, terms: Terms, context: int, answers: int, network: str) -> InferenceCost:
        """The costs with their conditions; arguments as of [`InferenceCost`]."""
        sizes = {name: getattr(terms.config, name) for name in ("n_layer", "n_embd", "n_head", "vocab_size")}
        return InferenceCost(
            notation=terms.notation,
            **sizes,
            context=context,
            answers=answers,
            settings=terms.settings,
            network=network,
            set_up=self.set_up,
            steps=self.steps,
            before=self.before,
            seconds=sum(step.seconds for step in self.steps),
            **collect_origin(torch.device("cpu"), engine_versions()),
        )


# What an event begins with that is a message of the peer.
PEERS = "peer's "
PEER_ENDS = (RefusalError, ClosedError)


class SilenceError(PrivateInferenceError):
    """Neither the engine nor the peer was heard of for as long as one waits."""


class Events(queue.Queue):
    """What happens to a party: lines of its process, messages of the peer, and what breaks."""

    def expect(self, seconds: float, *kinds: str) -> dict:
        """
        The next event, which has to be of a kind.

        Raises:
            `PrivateInferenceError`: If something broke, another event came, or none came in time.
        """
        try:
            event = self.get(timeout=seconds)
        except queue.Empty:
            raise SilenceError(
                f"nothing was heard for {seconds:.0f} seconds, from the engine or from the peer: it hangs, or needs "
                "more time (--timeout)."
            ) from None
        if isinstance(event, Exception):
            raise event
        if event["event"] not in kinds:
            raise PrivateInferenceError(f"the peer or the engine said {event['event']!r} in the wrong place.")
        return event

    def hear(self, message: dict):
        """
        A message of the peer, to be asked for.

        Raises:
            `PrivateInferenceError`: If too many wait already.
        """
        with self.mutex:
            waiting = sum(isinstance(event, dict) and event["event"].startswith(PEERS) for event in self.queue)
        if waiting >= MOST_MESSAGES:
            raise PrivateInferenceError("the peer says more than belongs here.")
        self.put({**message, "event": PEERS + message["kind"]})

    def rest(self, first: Exception, seconds: float) -> list[dict | Exception]:
        """The first of two ends, the peer's and the engine's, and what happens in some seconds until the other."""
        left, until = [first], time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while len({isinstance(event, PEER_ENDS) for event in left if isinstance(event, Exception)}) < 2:
                left.append(self.get(timeout=max(0.0, until - time.monotonic())))
        return left


class EngineProcess:
    """
    The process of one party's engine; its events go to the queue. Nothing that it is given lies in a file.

    Args:
        job ([`Job`]): What it does.
        held (`dict`): What this party has before any prompt, by the names of [`held_shapes`].
        events ([`Events`]): Where its events go.
    """

    def __init__(self, job: Job, held: dict[str, np.ndarray], events: Events):
        self._job, self._held, self._events, self._started = job, held, events, False
        command = [sys.executable, "-P", "-m", "entropy_gpt.evaluation.private_inference.parties.party_process"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._listen, self._listen_to_errors)]
        for thread in self._threads:
            thread.start()
        self._say(TypeAdapter(Job).dump_json(job))

    def prepare(self, request: Request):
        """Has a request compiled."""
        self._say(TypeAdapter(Request).dump_json(request))

    def give(self, asked: list[int] | str | None):
        """What the engine has asked for: drafts, or the file with this side's half of another preparation."""
        self._say(json.dumps(asked).encode())

    def start(self, own_port: int, peer_port: int):
        """Has the request answered. The first time it meets the peer before, and gets what it has."""
        self._say(json.dumps({"own_port": own_port, "peer_port": peer_port}).encode())
        if not self._started:
            self._threads.append(threading.Thread(target=self._give, daemon=True))
            self._threads[-1].start()
        self._started = True

    def close(self):
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _say(self, line: bytes):
        with contextlib.suppress(BrokenPipeError):  # its end arrives as an event
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()

    def _give(self):
        shapes = held_shapes(self._job.config, self._job.settings, self._job.rank)
        try:
            with contextlib.suppress(BrokenPipeError):
                write_arrays(self._held, shapes, self._process.stdin)
                self._process.stdin.flush()
        except (LookupError, ValueError) as error:
            self._events.put(EngineError(f"this side's weights are not those of its program: {one_line(error)}"))

    def _listen(self):
        for line in self._process.stdout:
            if not line.endswith(b"\n"):  # it was killed while it wrote
                break
            event = json.loads(line)
            if event["event"] == "error":
                may_be_told, reason = event["may_be_told"], event["reason"]
                failure = (
                    PrivateInferenceError(reason) if may_be_told else EngineError(f"this side's engine: {reason}")
                )
                self._events.put(failure)
                return
            self._events.put(event)
        status = self._process.wait()
        self._threads[1].join()
        last = self._last_lines[-1] if self._last_lines else "it left no message"
        self._events.put(EngineError(f"this side's engine ended with status {status}: {one_line(last)}"))

    def _listen_to_errors(self):
        while line := self._process.stderr.readline(LINE_CHARACTERS):
            if line.strip():
                self._last_lines.append(line.decode(errors="replace"))


def listen_to_peer(channel: Channel, events: Events) -> threading.Thread:
    """
    Puts the peer's messages into the queue until it is gone. While the engines work it has nothing to say, however
    long that takes: a peer that hangs shows in the engine's events.
    """

    def listen():
        try:
            while True:
                events.hear(channel.receive(None, ("program", "done", "request", "accepted", "another")))
        except PrivateInferenceError as error:
            events.put(error)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    return thread


def free_port() -> int:
    """A port of the loopback for an engine, which takes none that is open already."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Session:
    """
    One party's engine and the peer's messages, for one answer after another.

    Args:
        job ([`Job`]): What this party does.
        held (`dict`): What this party has before any prompt, by the names of [`held_shapes`].
        channel ([`Channel`]): To the peer. From now on a thread reads it.
        tunnel ([`Tunnel`]): Carries the engine's connections.
        own_port (`int`): Where the engine listens.
        set_up (`Sequence[StepCost]`): What was paid for the connection before.

    Attributes:
        events ([`Events`]): What happens to this party.
    """

    def __init__(
        self,
        job: Job,
        held: dict[str, np.ndarray],
        channel: Channel,
        tunnel: Tunnel,
        own_port: int,
        set_up: Sequence[StepCost] = (),
    ):
        self.events = Events()
        self._job, self._channel, self._tunnel, self._own_port = job, channel, tunnel, own_port
        self._set_up = [*set_up]
        self._allowance = Allowance(job, tunnel)
        tunnel.on_failure = lambda reason: self.events.put(PrivateInferenceError(reason))
        self._process = EngineProcess(job, held, self.events)
        listen_to_peer(channel, self.events)

    def close(self):
        self._process.close()

    def answer(
        self,
        request: Request,
        on_event: Callable[[dict], None] = lambda event: None,
        seconds: float = math.inf,
        draft: Callable[[list[int], int], list[int]] | None = None,
        take_another: Callable[[int], str | None] = lambda index: None,
    ) -> Outcome:
        """
        This party's part of an answer, from the comparison of programs to the farewell.

        Args:
            request ([`Request`]): As the peer's.
            on_event (`Callable`): Told what happens.
            seconds (`float`): That it may take in all.
            draft (`Callable`, *optional*): What a client's drafts come from, as of [`Drafter`].
            take_another (`Callable`): Called with the number of a token that has to be computed anew, if the answer
                was prepared; agrees with the peer on another preparation for the rest, and returns this party's half.

        Raises:
            `PrivateInferenceError`: If the programs differ, the engine fails, the peer ends, hangs or breaks rules, or
                it takes longer.
        """
        self._seconds, self._end, outcome = seconds, time.monotonic() + seconds, Outcome(set_up=self._set_up)
        try:
            self._process.prepare(request)
            self._compare_programs(on_event)
            self._process.start(self._own_port, self._tunnel.local_port)
            self._follow(outcome, on_event, draft, take_another)
            return outcome
        except PrivateInferenceError as error:
            rest = self.events.rest(error, 0 if self._job.rank == SERVER else REASON_SECONDS)
            for event in rest:  # the peer's end may have been heard of before this side's last repeat
                if isinstance(event, dict) and event["event"] == "repeat":
                    _note(outcome, event)
                    on_event(event)
            if REPEATS in outcome.repeats.values():
                raise PrivateInferenceError(ALWAYS_OUT_OF_RANGE) from error
            if refusal := next((event for event in rest if isinstance(event, RefusalError)), None):
                raise refusal from error
            raise

    def _expect(self, most_seconds: float, *kinds: str) -> dict:
        left = self._end - time.monotonic()
        try:
            return self.events.expect(max(0.0, min(most_seconds, left)), *kinds)
        except SilenceError as error:
            if left < most_seconds:
                raise PrivateInferenceError(
                    f"the answer took {self._seconds:,.0f} seconds, the most that this client has left here."
                ) from error
            raise

    def _compare_programs(self, on_event: Callable[[dict], None]):
        digests: dict[str, object] = {}
        while len(digests) < 2:
            missing = {"program", "peer's program"} - {*digests}
            event = self._expect(self._job.timeout_seconds, *missing)
            digests[event["event"]] = event.get("digest")
            if event["event"] == "program":
                self._channel.send({"kind": "program", "digest": event["digest"]})
                on_event(event)
        if digests["program"] != digests["peer's program"]:
            raise PrivateInferenceError(
                "the two sides made different programs of the same terms: install the same versions "
                f"(here {engine_versions()})."
            )

    def hear_of_another(self) -> str | None:
        """Which preparation the peer would use now, if any."""
        heard = self._early or self._expect(self._job.timeout_seconds, "peer's another")
        self._early = None
        return heard.get("preparation")

    def _follow(
        self,
        outcome: Outcome,
        on_event: Callable[[dict], None],
        draft: Callable | None,
        take_another: Callable[[int], str | None],
    ):
        """Notes what the engine does until both sides are done."""
        peer_done, self._early = False, None
        kinds = {"set-up", "pass", "step", "token", "repeat", "another", "prepared", "prepared before", "done"}
        kinds |= {"draft", "verified", "peer's done", "peer's another"}
        while True:
            event = self._expect(self._job.timeout_seconds, *kinds)
            if event["event"] == "peer's done":
                peer_done = True
                kinds.remove("peer's done")
                continue
            if event["event"] == "peer's another":  # before this side's engine has said so
                self._early = event
                kinds.remove("peer's another")
                continue
            if event["event"] == "another":
                self._process.give(take_another(event["index"]))
                kinds.add("peer's another")
                continue
            if event["event"] == "draft":
                self._process.give(draft(event["known"], event["count"]))
                continue
            self._allowance.note(event)
            _note(outcome, event)
            on_event(event)
            if event["event"] == "done":
                break
        self._channel.send({"kind": "done"})
        if not peer_done:
            self._expect(FAREWELL_SECONDS, "peer's done")


class Allowance:
    """
    Raises what a tunnel may carry to this side's engine: what the counts predict of the steps so far and of some more.
    A peer could fill this machine's memory otherwise, since the engine keeps what it is sent until it asks for it. The
    counts are Cheetah's: with another protocol there is no such limit.
    """

    def __init__(self, job: Job, tunnel: Tunnel):
        self._job, self._tunnel = job, tunnel
        self._steps: deque[float] = deque()
        self._steps_done, self._others = 0.0, float(SET_UP_ALLOWANCE)
        self._raise()

    def note(self, event: dict):
        """
        Args:
            event (`dict`): One of this side's engine.
        """
        if event["event"] == "pass":
            self._steps = deque(event["bytes"])
            self._others += event["answer_bytes"]
        elif event["event"] == "step":
            self._steps_done += self._steps.popleft()
        self._raise()

    def _raise(self):
        if self._job.settings.protocol != "cheetah":
            self._tunnel.allowed_bytes = math.inf
            return
        ahead = sum(itertools.islice(self._steps, STEPS_AHEAD))
        self._tunnel.allowed_bytes = self._others + STEP_ALLOWANCE * (self._steps_done + ahead)


def _note(outcome: Outcome, event: dict):
    if event["event"] == "token":
        outcome.tokens.append(event["token"])
        if "logits" in event:
            outcome.logits.append(read_array(event["logits"]))
    elif event["event"] == "repeat":
        outcome.repeats[event["index"]] += 1
    elif event["event"] == "verified":
        outcome.verified.append((event["drafts"], event["right"]))
    elif event["event"] == "prepared":
        outcome.prepared = event["name"]
    elif event["event"] == "prepared before":
        outcome.before += [StepCost(**cost) for cost in event["costs"]]
    elif "cost" in event:
        (outcome.set_up if event["event"] == "set-up" else outcome.steps).append(StepCost(**event["cost"]))
