"""Processes that are killed in either phase: afterwards a preparation is whole or not there, and never used twice."""

import contextlib
import os
import random
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from entropy_gpt.evaluation.errors import PrivateInferenceError
from tests.architectures import make_model
from tests.slow import slow_but


pytest.importorskip("spu")

from entropy_gpt.evaluation.private_inference.parties import preparations
from entropy_gpt.evaluation.private_inference.parties.limits import UNLIMITED
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.server import Server
from entropy_gpt.evaluation.private_inference.parties.store import Store
from entropy_gpt.evaluation.private_inference.parties.terms import Offer
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from entropy_gpt.workflows.private_client import PrivateClient

from .serving import QUICK
from .warm_engines import start_warm_process


MOMENTS, SECONDS = 20, 300
PROMPT = [2, 3, 5, 7, 11]


class Process:
    """
    A process that can be killed: a fork of this one, which has the imports.

    Args:
        work (`Callable`): What it does; called with a function that says a line to this process.
    """

    def __init__(self, work: Callable[[Callable[[object], None]], None]):
        self._lines, sending = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            with contextlib.suppress(BaseException):
                work(lambda line: os.write(sending, f"{line}\n".encode()))
                status = 0
            os._exit(status)
        os.close(sending)

    def hear(self) -> str:
        """The next line, or nothing at the end."""
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self._lines], [], [], SECONDS)[0], "it hangs"
            if not (character := os.read(self._lines, 1)):
                return ""
            line += character
        return line.decode().strip()

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.end()

    def end(self):
        """Waits for it."""
        while self.hear():
            pass
        os.close(self._lines)
        os.waitpid(self.pid, 0)


class Pair:
    """A server's process, which is started anew when it was killed, and clients' processes."""

    def __init__(self, folder: Path):
        self.folders = folder / "server", folder / "client"
        self.seconds = {"prepare": 0.0, "ask": 0.0}
        torch.manual_seed(0)
        model = make_model("SM+ScFuFFN", n_layer=1)
        # Here, since a fork's threads may not compute with torch.
        self.offer = Offer(*prepare_weights(model), "SM+ScFuFFN", PrivateSettings(QUICK), "")
        self.server: Process | None = None
        start_warm_process()  # here, or each fork would start its own

    def serve(self, say: Callable[[object], None]):
        server = Server(
            self.offer, "127.0.0.1", 0, None, SECONDS, UNLIMITED, lambda line: None, prepared=self.folders[0]
        )
        say(server.address[1])
        server.serve_forever()

    def begin(self, what: str) -> Process:
        """A client that gets an answer, whatever has happened before, and then begins a phase."""
        if self.server is None:
            self.server = Process(self.serve)
            self.port = self.server.hear()

        def work(say: Callable[[object], None]):
            with PrivateClient(f"127.0.0.1:{self.port}", protocol=QUICK, prepared=self.folders[1]) as client:
                say(client.ask(Question(PROMPT)).tokens)
                if what == "ask":
                    client.prepare(len(PROMPT))
                say("begins")
                client.prepare(len(PROMPT)) if what == "prepare" else client.ask(Question(PROMPT))
                say("ends")

        client = Process(work)
        assert client.hear().startswith("[")
        assert client.hear() == "begins"
        return client

    def time(self, what: str):
        client, began = self.begin(what), time.monotonic()
        assert client.hear() == "ends"
        self.seconds[what] = time.monotonic() - began
        client.end()

    def kill_server(self):
        self.server.kill()
        self.server = None

    def check(self):
        """What a new process finds is whole, and nothing that is there was used."""
        for rank, folder in enumerate(self.folders):
            check_used(folder, rank)
            check_store(Store(folder, rank))
            for path in folder.glob("*.half"):
                copy = folder.parent / "copy"
                copy.write_bytes(path.read_bytes())
                preparations.read_half(copy)


def used_names(folder: Path, rank: int) -> list[str]:
    identity = (folder / f"store-{rank}").read_text()
    used = folder.with_name(f"{identity}.used-{rank}").read_text()
    return [name for name in used.split("\n") if len(name) == 32]


def check_used(folder: Path, rank: int):
    """Before a store is opened, which would delete what it finds to be used."""
    used = used_names(folder, rank)
    assert len(used) == len({*used})
    assert not {path.name.partition("-")[0] for path in folder.glob("*.half")} & {*used}


def check_store(store):
    halves = [path.name.partition("-")[0] for path in store.folder.glob("*.half")]
    assert {*halves} <= {header.name for header in store.headers()}


@pytest.mark.slow
@pytest.mark.private
def test_the_next_answer_comes_after_a_kill(tmp_path):
    """Each side is killed in each phase, at random moments."""
    pair = Pair(tmp_path)
    for what in (*pair.seconds, *pair.seconds):  # the first of each compiles what the others find
        pair.time(what)
    for moment in range(MOMENTS):
        what, side = ("prepare", "ask")[moment % 2], ("server", "client")[moment // 2 % 2]
        client = pair.begin(what)
        time.sleep(random.Random(moment).random() * pair.seconds[what])
        if side == "server":
            pair.kill_server()
            client.end()
        else:
            client.kill()
        pair.check()
    pair.time("ask")
    pair.kill_server()


@pytest.mark.parametrize("moment", slow_but([3], range(MOMENTS)))
def test_a_store_whose_process_is_killed_has_whole_halves_or_none(moment, tmp_path):
    """The same of the store alone: a process writes, takes and uses halves until it is killed."""
    folder, content = tmp_path / "halves", SimpleNamespace(meta=b"meta", share_chunks=[bytes(100_000)])
    shares = {"product": content}
    about = {"rank": 0, "terms": "t", "weights": "w", "store": "", "length": 8, "new_tokens": 2, "answers": 1}
    about |= {"owner": "one", "made": time.time(), "shares": preparations.describe_shares(shares), "costs": []}

    def work():
        store = Store(folder, 0)
        for number in range(10**6):
            names = [f"{2 * number + index:032x}" for index in range(2)]
            for name in names:
                store.put(preparations.Header(name=name, **about), bytes(32), shares)
            taken = store.take(names[0])
            store.spend(taken)
            store.drop(taken)

    Store(folder, 0)
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            work()
        os._exit(1)
    while not used_names(folder, 0):
        time.sleep(0.001)
    time.sleep(0.05 * random.Random(moment).random())
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    check_used(folder, 0)
    assert [*folder.glob("*.half")]
    store = Store(folder, 0)
    check_store(store)
    assert not [*folder.glob("*.taken"), *folder.glob("*.part")]
    for header in store.headers():
        preparations.read_half(store.take(header.name))
    for name in used_names(folder, 0):
        with pytest.raises(PrivateInferenceError):
            store.take(name)
