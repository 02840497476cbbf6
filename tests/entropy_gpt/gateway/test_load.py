"""Many clients of one server with two workers: honest, silent, killed and hostile ones."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from entropy_gpt.evaluation.private_inference.parties.channel import LENGTH, Channel, TLSFiles, connect, parse_address
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.terms import PROTOCOL_VERSION
from entropy_gpt.workflows.certificates import make_certificates
from entropy_gpt.workflows.private_client import PrivateClient
from tests.waiting import eventually

from .conftest import SECONDS


pytest.importorskip("spu")
pytestmark = [pytest.mark.slow, pytest.mark.private]

COMMAND = Path(sys.executable).with_name("entropy-gpt")
# Each honest client has a prompt of its own, so that an answer to another one would be noticed.
PROMPT = "def main("
PROMPTS = (
    PROMPT,
    "import ",
    "class ",
    "return self",
    "for name in ",
    "if self.",
    "raise ",
    "    def ",
    "while ",
)
# The events at which clients are killed.
KILLED = ("accepted", "step", "token")
WORKERS, CLIENTS = 2, 20
# What the server may take more under load than its process before, and an engine for each worker; in bytes.
MORE_MEMORY = 2**27
ASK = """
import sys
from pathlib import Path
from entropy_gpt.evaluation.private_inference.parties.channel import TLSFiles
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.workflows.private_client import PrivateClient
address, model, *files = sys.argv[1:]
client = PrivateClient(address, tokenizer=model, tls=TLSFiles(*map(Path, files)))
question = Question(client.tokenizer("def main(")["input_ids"], 20)
client.ask(question, lambda event: print(event["event"], flush=True))
"""


def tls(folder: Path, name: str) -> TLSFiles:
    return TLSFiles(folder / f"{name}.pem", folder / f"{name}.key", folder / "ca.pem")


@pytest.fixture
def certificates(tmp_path) -> Path:
    names = [f"client-{number}" for number in range(CLIENTS)]
    make_certificates(["127.0.0.1"], tmp_path / "certificates", clients=names)
    return tmp_path / "certificates"


@contextlib.contextmanager
def serving(model: Path, certificates: Path, *options):
    """A server as a process of its own, its address, and the lines that it says later."""
    files = [f"--{option}={certificates / name}" for option, name in (("cert", "server.pem"), ("key", "server.key"))]
    words = [COMMAND, "private", "serve", model, "--listen", "127.0.0.1:0", *files, f"--ca={certificates / 'ca.pem'}"]
    with subprocess.Popen([*map(str, words), *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            address, lines = json.loads(process.stdout.readline())["event"].removeprefix("listening on "), []
            threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()
            yield process, address, lines
        finally:
            process.kill()


def state(lines: list[str]) -> dict:
    """What the server says at its port of health."""
    while not (found := [line for line in lines if "health: port " in line]):
        time.sleep(0.1)
    port = int(json.loads(found[0])["event"].rpartition(" ")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", "/")
        return json.loads(connection.getresponse().read())


class Memory:
    """
    What a process and all its children hold, looked at again and again.

    Attributes:
        peak (`int`): The most bytes at once.
        children (`int`): The most children at once.
    """

    def __init__(self, process: psutil.Process):
        self.process, self.peak, self.children = process, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._ended.set()
        self._thread.join()

    def _watch(self):
        while not self._ended.wait(0.1):
            children = self.process.children(recursive=True)
            self.children = max(self.children, len(children))
            self.peak = max(self.peak, sum(map(held, (self.process, *children))))


def held(process: psutil.Process) -> int:
    """Bytes in memory; none of one that has just ended."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def greet(address: str, files: TLSFiles) -> Channel:
    """A connection that has said hello."""
    channel = connect(*parse_address(address), files)
    channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
    channel.receive(SECONDS, ("terms",))
    return channel


def ask_and_stop(address: str, files: TLSFiles) -> Channel:
    """A connection that does nothing with the engine that it has asked for."""
    channel = greet(address, files)
    channel.send({"kind": "request", "length": 4, "new_tokens": 1, "answers": 1})
    return channel


def stop_before_tls(address: str, files: TLSFiles) -> socket.socket:
    return socket.create_connection(parse_address(address))


def ask_for_what_there_is_not(address: str, files: TLSFiles):
    with contextlib.closing(greet(address, files)) as channel:
        channel.send({"kind": "request", "length": 10**9, "new_tokens": -1, "answers": []})


def speak_no_tls(address: str, files: TLSFiles):
    with socket.create_connection(parse_address(address)) as raw, contextlib.suppress(OSError):
        raw.sendall(os.urandom(2**20))


def claim_a_stream(address: str, files: TLSFiles):
    with contextlib.closing(connect(*parse_address(address), files)) as channel:
        channel.send({"kind": "stream", "session": "0" * 64, "direction": "send"})


def send_more_than_belongs_there(address: str, files: TLSFiles):
    channel = greet(address, files)
    with contextlib.closing(channel), contextlib.suppress(OSError):
        for _ in range(256):
            channel.connection.sendall(LENGTH.pack(2**32 - 1) + bytes(2**20))


def connect_often(address: str, files: TLSFiles):
    connections = [socket.create_connection(parse_address(address)) for _ in range(200)]
    time.sleep(1)
    for connection in connections:
        connection.close()


SILENT = (stop_before_tls, greet, ask_and_stop)
ATTACKS = (
    ask_for_what_there_is_not,
    speak_no_tls,
    claim_a_stream,
    send_more_than_belongs_there,
    connect_often,
)


def ask_until(event: str, address: str, model: Path, files: TLSFiles):
    """A client that is killed when it hears of an event."""
    words = [address, model, files.certificate, files.key, files.authority]
    with subprocess.Popen([sys.executable, "-c", ASK, *map(str, words)], stdout=subprocess.PIPE, text=True) as client:
        assert event in (line.strip() for line in client.stdout)
        client.kill()


def test_every_honest_client_has_its_answer(model, certificates, clear):
    names = iter(range(CLIENTS))

    def files() -> TLSFiles:
        return tls(certificates, f"client-{next(names)}")

    waited = []

    def ask(prompt: str, given: TLSFiles) -> list[int]:
        with PrivateClient(address, tokenizer=model, tls=given, timeout=SECONDS) as client:
            tokens = client.tokenizer(prompt)["input_ids"]
            return client.ask(Question(tokens, 2), lambda event: waited.append(event["event"])).tokens

    options = (f"--workers={WORKERS}", "--max-waiting=32", "--json-log", "--health-port=0", "--timeout=240")
    with serving(model, certificates, *options) as (process, address, lines):
        server = psutil.Process(process.pid)
        with Memory(server) as alone:
            answers = [ask(PROMPTS[0], files())]
        engine = alone.peak - held(server)
        assert alone.children == 1
        assert engine > MORE_MEMORY  # so that one more than there may be would be noticed
        assert eventually(lambda: not server.children(), SECONDS)
        before, descriptors = held(server), server.num_fds()
        with Memory(server) as load, ThreadPoolExecutor(CLIENTS) as pool, contextlib.ExitStack() as stack:
            for stop in SILENT:
                stack.callback(stop(address, files()).close)
            killed = [pool.submit(ask_until, event, address, model, files()) for event in KILLED]
            asked = [pool.submit(ask, prompt, files()) for prompt in PROMPTS[1:]]
            hostile = [pool.submit(attack, address, files()) for attack in ATTACKS]
            answers += [each.result() for each in asked]
            for each in (*killed, *hostile):
                each.result()
        assert next(names, None) is None  # all clients were there
        assert answers == [clear(prompt, 2)[0][-2:] for prompt in PROMPTS]
        assert "waiting" in waited
        assert load.children == WORKERS
        assert before + engine < load.peak < before + WORKERS * engine + MORE_MEMORY  # not all are largest at once
        assert eventually(lambda: not server.children() and server.num_fds() <= descriptors, SECONDS)
        assert held(server) < before + MORE_MEMORY
        assert state(lines) == {"status": "ok", "workers": WORKERS, "active": 0, "waiting": 0}
        facts = [json.loads(line) for line in lines]
        assert sum("seconds" in each for each in facts) >= len(PROMPTS)
        assert all({"time", "client", "event"} <= {*each} for each in facts)
        assert not any(prompt in line for prompt in PROMPTS for line in lines)


def test_an_answer_that_has_begun_is_ended_before_the_server(model, certificates):
    options = ("--json-log", "--health-port=0", f"--drain-seconds={SECONDS}")
    with serving(model, certificates, *options) as (process, address, lines), ThreadPoolExecutor(2) as pool:
        begun = threading.Event()
        first = PrivateClient(address, tokenizer=model, tls=tls(certificates, "client-0"))
        tokens = first.tokenizer(PROMPT)["input_ids"]
        answer = pool.submit(first.ask, tokens, 4, 1, lambda event: event["event"] == "step" and begun.set())
        assert begun.wait(SECONDS)
        second = PrivateClient(address, tokenizer=model, tls=tls(certificates, "client-1"))
        waits = threading.Event()
        refused = pool.submit(second.ask, tokens, 1, 1, lambda event: waits.set())
        assert waits.wait(SECONDS)
        process.send_signal(signal.SIGTERM)
        assert "about to end" in str(refused.exception(SECONDS))
        assert state(lines) == {"status": "draining", "workers": 1, "active": 1, "waiting": 0}
        assert len(answer.result(SECONDS).tokens) == 4
        first.close()
        assert process.wait(SECONDS) == 128 + signal.SIGTERM
