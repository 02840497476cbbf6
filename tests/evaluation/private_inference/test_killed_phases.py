"""Processes that are killed in either phase: afterwards a preparation is whole or not there, and never used twice."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from entropy_gpt.evaluation.errors import PrivateInferenceError
from tests.slow import slow_but


ROOT = Path(__file__).parents[3]
MOMENTS, SECONDS = 20, 600
LENGTH = 5

SERVE = """
import sys
from pathlib import Path
import torch
from entropy_gpt.evaluation.private_inference.parties.limits import UNLIMITED
from entropy_gpt.evaluation.private_inference.parties.server import Server
from entropy_gpt.evaluation.private_inference.parties.terms import Offer
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from tests.architectures import make_model

torch.manual_seed(0)
model = make_model("SM+ScFuFFN", n_layer=1)
offer = Offer(*prepare_weights(model), "SM+ScFuFFN", PrivateSettings(), "")
server = Server(offer, "127.0.0.1", 0, None, 600, UNLIMITED, lambda line: None, prepared=Path(sys.argv[1]))
print(server.address[1], flush=True)
server.serve_forever()
"""
ASK = """
import contextlib, sys
from pathlib import Path
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.question import Question

with contextlib.closing(Client("127.0.0.1", int(sys.argv[2]), None, 600, prepared=Path(sys.argv[1]))) as client:
    print("ready", flush=True)
    if sys.argv[3] == "prepare":
        client.prepare(5)
    else:
        print("tokens", client.ask(Question([2, 3, 5, 7, 11])).tokens, flush=True)
"""


def start(code: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Pair:
    """A server's process, which is started anew when it was killed, and clients' processes."""

    def __init__(self, folder: Path):
        self.folders = folder / "server", folder / "client"
        self.server: subprocess.Popen | None = None
        self.seconds: dict[str, float] = {}

    def start_client(self, what: str) -> subprocess.Popen:
        if self.server is None:
            self.server = start(SERVE, self.folders[0])
            self.port = int(self.server.stdout.readline())
        client = start(ASK, self.folders[1], self.port, what)
        assert client.stdout.readline() == "ready\n"
        return client

    def finish(self, what: str) -> str:
        client, began = self.start_client(what), time.monotonic()
        said, errors = client.communicate(timeout=SECONDS)
        assert client.returncode == 0, errors
        self.seconds.setdefault(what, time.monotonic() - began)
        return said

    def kill_server(self):
        self.server.kill()
        self.server.communicate()
        self.server = None

    def check(self):
        """What a new process finds is whole, and nothing that is there was used."""
        from entropy_gpt.evaluation.private_inference.parties.preparations import Store, read_half

        for rank, folder in enumerate(self.folders):
            check_used(folder, rank)
            check_store(Store(folder, rank))
            for path in folder.glob("*.half"):
                copy = folder.parent / "copy"
                copy.write_bytes(path.read_bytes())
                read_half(copy)


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
    there = {header.name for header in store.headers()}
    assert len(there) == len([*store.folder.glob("*.half")])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pytest.importorskip("spu")
    pair = Pair(tmp_path_factory.mktemp("killed"))
    pair.finish("prepare")
    pair.finish("ask")
    yield pair
    pair.kill_server()


@pytest.mark.slow
@pytest.mark.private
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_the_next_answer_comes_after_a_kill(moment, pair):
    """Each side is killed in each phase, at random moments."""
    what, side = ("prepare", "ask")[moment % 2], ("server", "client")[moment // 2 % 2]
    if what == "ask":
        pair.finish("prepare")
    client = pair.start_client(what)
    time.sleep(random.Random(moment).random() * pair.seconds[what])
    if side == "server":
        pair.kill_server()
    else:
        client.kill()
    client.communicate(timeout=SECONDS)
    pair.check()
    assert "tokens" in pair.finish("ask")
    pair.check()


@pytest.mark.parametrize("moment", slow_but([3], range(MOMENTS)))
def test_a_store_whose_process_is_killed_has_whole_halves_or_none(moment, tmp_path):
    """The same of the store alone: a process writes, takes and uses halves until it is killed."""
    pytest.importorskip("spu")
    from entropy_gpt.evaluation.private_inference.parties import preparations

    folder, content = tmp_path / "halves", SimpleNamespace(meta=b"meta", share_chunks=[bytes(100_000)])
    shares = {"product": content}
    about = {"rank": 0, "terms": "t", "weights": "w", "store": "", "length": 8, "new_tokens": 2, "answers": 1}
    about |= {"owner": "one", "made": time.time(), "shares": preparations.describe_shares(shares), "costs": []}

    def work():
        store = preparations.Store(folder, 0)
        for number in range(10**6):
            names = [f"{2 * number + index:032x}" for index in range(2)]
            for name in names:
                store.put(preparations.Header(name=name, **about), bytes(32), shares)
            taken = store.take(names[0])
            store.spend(taken)
            store.drop(taken)

    preparations.Store(folder, 0)
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
    store = preparations.Store(folder, 0)
    check_store(store)
    assert not [*folder.glob("*.taken"), *folder.glob("*.part")]
    for header in store.headers():
        preparations.read_half(store.take(header.name))
    for name in used_names(folder, 0):
        with pytest.raises(PrivateInferenceError):
            store.take(name)
