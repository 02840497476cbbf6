"""A tiny model that a server in this process serves, and clients that ask it."""

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

from entropy_gpt.evaluation.private_inference.parties.channel import Channel, TLSFiles, connect
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.limits import UNLIMITED, Limits
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.sampling import Sampling
from entropy_gpt.evaluation.private_inference.parties.server import Server
from entropy_gpt.evaluation.private_inference.parties.session import Outcome
from entropy_gpt.evaluation.private_inference.parties.terms import PROTOCOL_VERSION, Offer
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from tests.architectures import make_model
from tests.waiting import eventually


ROOT = Path(__file__).resolve().parents[3]
PROMPT = [17, 93, 5, 64]
SECONDS = 300
# Its keys take no time, unlike Cheetah's: where a test is of what is around the engine.
QUICK = "semi2k"
EIGHT_ANSWERS = replace(UNLIMITED, answers=8)


def make_offer(notation: str = "SM", protocol: str = "cheetah") -> tuple[Offer, list[int]]:
    """A tiny model as a server offers it, and what it generates in the clear after the prompt."""
    torch.manual_seed(0)
    model = make_model(notation, n_layer=1)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(2):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    offer = Offer(*prepare_weights(model), notation, PrivateSettings(protocol), "hash")
    return offer, tokens[0, len(PROMPT) :].tolist()


@dataclass
class Served:
    """A server that runs in this process, and what it said."""

    server: Server
    expected: list[int]
    thread: threading.Thread
    lines: list[str] = field(default_factory=list)

    def said(self, words: str, seconds: float) -> bool:
        return eventually(lambda: any(words in line for line in self.lines), seconds)


@contextlib.contextmanager
def serving(
    offer: Offer,
    expected: list[int],
    tls: TLSFiles | None = None,
    host: str = "127.0.0.1",
    limits: Limits = EIGHT_ANSWERS,
    prepared: Path | None = None,
) -> Iterator[Served]:
    lines: list[str] = []
    server = Server(offer, host, 0, tls, SECONDS, limits, lines.append, prepared=prepared)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Served(server, expected, thread, lines)
    server.close()


def engines_here() -> list[psutil.Process]:
    """Processes of engines that this one started; other tests have children of their own."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("party_process" in word for word in (child.name(), *child.cmdline()))]


def ask_at(address: tuple[str, int], new_tokens: int = 2, **options) -> Outcome:
    with contextlib.closing(Client(*address, None, SECONDS, QUICK)) as client:
        return client.ask(Question(PROMPT, new_tokens), **options)


def ask(served: Served, new_tokens: int = 2, **options) -> list[int]:
    return ask_at(served.server.address, new_tokens, **options).tokens


def greet(served: Served, **request) -> Channel:
    """A client that speaks for itself, up to its request."""
    channel = connect(*served.server.address, None)
    channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
    channel.receive(30, ("terms",))
    channel.send({"kind": "request", "length": 4, "new_tokens": 1, "answers": 1, **request})
    return channel


def run_here(function: Callable, *arguments, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """A function of a test in a process of its own, which leads a group; behind the words of another command."""
    code = f"from {function.__module__} import {function.__name__} as run; run(*{arguments!r})"
    return subprocess.Popen(
        [*before, sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def serve_until_killed(host: str = "127.0.0.1", protocol: str = QUICK):
    with serving(*make_offer(protocol=protocol), host=host) as served:
        print(served.server.address[1], flush=True)
        signal.pause()


def ask_aloud(port: int):
    ask_at(("127.0.0.1", port), on_event=lambda event: print(event["event"], flush=True))


def wait_for_line(process: subprocess.Popen, word: str):
    assert any(line.strip() == word for line in process.stdout)


@dataclass
class Oracle:
    """Drafts right tokens, but for some places."""

    right: list[int]
    wrong: set[int] = field(default_factory=set)

    def begin(self, prompt: list[int], sampling: Sampling, vocab_size: int) -> Callable:
        def draft(known: list[int], count: int) -> list[int]:
            places = range(len(known), len(known) + count)
            right = [*self.right, *[0] * count]  # beyond the answer, what is drafted is not used
            return [(right[place] + (place in self.wrong)) % vocab_size for place in places]

        return draft
