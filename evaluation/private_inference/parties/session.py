"""One party's side of a session: its engine's process, the peer's messages, and what becomes of both."""

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import TypeAdapter

from entropy_gpt.evaluation.errors import EngineError, PrivateInferenceError
from entropy_gpt.evaluation.origin import collect_origin
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost, StepCost
from entropy_gpt.evaluation.private_inference.program.program import ProgramConfig, Span, build_steps
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings

from .channel import Channel
from .engine import engine_versions
from .party_process import ALWAYS_OUT_OF_RANGE, REPEATS, Job
from .tunnel import Tunnel


# What the last messages of an inference may take.
FAREWELL_SECONDS = 60


@dataclass(frozen=True)
class Terms:
    """What a server sends a client at first, checked."""

    config: ProgramConfig
    notation: str
    settings: PrivateSettings
    tokenizer_hash: str


@dataclass
class Outcome:
    """What the client learned, what it cost by its count, and how often each token was computed anew."""

    tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    set_up: list[StepCost] = field(default_factory=list)
    steps: list[StepCost] = field(default_factory=list)
    repeats: Counter[int] = field(default_factory=Counter)

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
            seconds=sum(step.seconds for step in self.steps),
            **collect_origin(torch.device("cpu"), engine_versions()),
        )


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
            raise PrivateInferenceError(
                f"nothing was heard for {seconds:.0f} seconds, from the engine or from the peer: it hangs, or needs "
                "more time (--timeout)."
            ) from None
        if isinstance(event, Exception):
            raise event
        if event["event"] not in kinds:
            raise PrivateInferenceError(f"the peer or the engine said {event['event']!r} in the wrong place.")
        return event

    def rest(self) -> list[dict]:
        """What has happened and was not asked for yet, but for what broke."""
        left = []
        with contextlib.suppress(queue.Empty):
            while True:
                left.append(self.get_nowait())
        return [event for event in left if isinstance(event, dict)]


class EngineProcess:
    """The process of one party's engine; its events go to the queue."""

    def __init__(self, job: Job, events: Events):
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        # For what it leaves behind when it is killed.
        self._folder = tempfile.TemporaryDirectory(prefix="entropy-gpt-engine-", ignore_cleanup_errors=True)
        command = [sys.executable, "-P", "-m", "entropy_gpt.evaluation.private_inference.parties.party_process"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=os.environ | {"TMPDIR": self._folder.name},
        )
        self._events = events
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._say(TypeAdapter(Job).dump_json(job).decode())

    def start(self, own_port: int, peer_port: int):
        self._say(json.dumps({"own_port": own_port, "peer_port": peer_port}))

    def close(self):
        self._process.kill()
        self._process.wait()
        self._listener.join()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._stderr.close()
        self._folder.cleanup()

    def _say(self, line: str):
        with contextlib.suppress(BrokenPipeError):  # its end arrives as an event
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _listen(self):
        for line in self._process.stdout:
            if not line.endswith("\n"):  # it was killed while it wrote
                break
            event = json.loads(line)
            if event["event"] == "error":
                self._events.put(EngineError(f"this side's engine: {event['reason']}"))
                return
            self._events.put(event)
            if event["event"] == "done":
                return
        status = self._process.wait()
        self._events.put(EngineError(f"this side's engine ended with status {status}: {self._last_words()}"))

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = [line for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it left no message"


def listen_to_peer(channel: Channel, events: Events) -> threading.Thread:
    """
    Puts the peer's messages into the queue until its last one, or until it is gone. While the engines work it has
    nothing to say, however long that takes: a peer that hangs shows in the engine's events.
    """

    def listen():
        try:
            while True:
                message = channel.receive(None, ("program", "done"))
                events.put({**message, "event": f"peer's {message['kind']}"})
                if message["kind"] == "done":
                    return
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


def check_request(config: ProgramConfig, settings: PrivateSettings, length: int, new_tokens: int, answers: int):
    """
    Raises:
        `PrivateInferenceError`: If the model can't answer so much.
    """
    build_steps(config, settings, Span(0, length + new_tokens - 1))
    if answers > length or (answers > 1 and new_tokens > 1):
        raise PrivateInferenceError(f"answers={answers} positions are not possible with {length} tokens and more.")


def run_party(job: Job, channel: Channel, tunnel: Tunnel, own_port: int, on_event: Callable[[dict], None]) -> Outcome:
    """
    One party's part of an inference, from the comparison of programs to the farewell.

    Raises:
        `PrivateInferenceError`: If the programs differ, the engine fails, or the peer ends, hangs or breaks rules.
    """
    events, outcome = Events(), Outcome()
    tunnel.on_failure = lambda reason: events.put(PrivateInferenceError(reason))
    try:
        with contextlib.closing(EngineProcess(job, events)) as process:
            listen_to_peer(channel, events)
            _compare_programs(job, channel, events, on_event)
            process.start(own_port, tunnel.local_port)
            _follow(job, channel, events, outcome, on_event)
        return outcome
    except PrivateInferenceError as error:
        for event in events.rest():  # the peer's end may have been heard of before this side's last repeat
            if event["event"] == "repeat":
                _note(outcome, event)
                on_event(event)
        if REPEATS in outcome.repeats.values():
            raise PrivateInferenceError(ALWAYS_OUT_OF_RANGE) from error
        raise


def _compare_programs(job: Job, channel: Channel, events: Events, on_event: Callable[[dict], None]):
    digests = {}
    while len(digests) < 2:
        event = events.expect(job.timeout_seconds, "compiled", "program", "peer's program")
        if event["event"] == "compiled":
            continue
        digests[event["event"]] = event.get("digest")
        if event["event"] == "program":
            channel.send({"kind": "program", "digest": event["digest"]})
            on_event(event)
    if digests["program"] != digests["peer's program"]:
        raise PrivateInferenceError(
            "the two sides made different programs of the same terms: install the same versions "
            f"(here {engine_versions()})."
        )


def _follow(job: Job, channel: Channel, events: Events, outcome: Outcome, on_event: Callable[[dict], None]):
    """Notes what the engine does until both sides are done."""
    peer_done = False
    while True:
        event = events.expect(job.timeout_seconds, "set-up", "step", "token", "repeat", "done", "peer's done")
        if event["event"] == "peer's done":
            peer_done = True
            continue
        _note(outcome, event)
        on_event(event)
        if event["event"] == "done":
            break
    channel.send({"kind": "done"})
    if not peer_done:
        events.expect(FAREWELL_SECONDS, "peer's done")


def _note(outcome: Outcome, event: dict):
    if event["event"] == "token":
        outcome.tokens.append(event["token"])
    elif event["event"] == "repeat":
        outcome.repeats[event["index"]] += 1
    elif "cost" in event:
        (outcome.set_up if event["event"] == "set-up" else outcome.steps).append(StepCost(**event["cost"]))
