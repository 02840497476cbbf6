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

from entropy_gpt.evaluation.private_inference.parties.channel import TLSFiles, connect, parse_address
from entropy_gpt.evaluation.private_inference.parties.terms import PROTOCOL_VERSION
from entropy_gpt.workflows.certificates import make_certificates
from entropy_gpt.workflows.private_client import PrivateClient


pytest.importorskip("spu")
pytestmark = [pytest.mark.slow, pytest.mark.private]

COMMAND = Path(sys.executable).with_name("entropy-gpt")
HONEST, KILLED, SILENT, HOSTILE = 12, 2, 3, 3
PROMPT = "def main("
# What the server's own process may take more under load, in bytes; engines have theirs.
MORE_MEMORY = 2**28
ASK = """
import sys
from pathlib import Path
from entropy_gpt.evaluation.private_inference.parties.channel import TLSFiles
from entropy_gpt.workflows.private_client import PrivateClient
address, model, *files = sys.argv[1:]
client = PrivateClient(address, tokenizer=model, tls=TLSFiles(*map(Path, files)))
client.ask(client.tokenizer("def main(")["input_ids"], 20, on_event=lambda event: print(event["event"], flush=True))
"""


def tls(folder: Path, name: str) -> TLSFiles:
    return TLSFiles(folder / f"{name}.pem", folder / f"{name}.key", folder / "ca.pem")


@pytest.fixture
def certificates(tmp_path) -> Path:
    names = [f"client-{number}" for number in range(HONEST + KILLED + SILENT + HOSTILE)]
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
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/")
        return json.loads(connection.getresponse().read())


def say_nothing(address: str, files: TLSFiles):
    """One that has shaken hands and asked, and then does nothing with the engine that it gets."""
    channel = connect(*parse_address(address), files)
    channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
    channel.receive(60, ("terms",))
    channel.send({"kind": "request", "length": 4, "new_tokens": 1, "answers": 1})
    return channel


def attack(address: str, files: TLSFiles):
    """One that asks for what there is not, and one that speaks no TLS."""
    with contextlib.closing(connect(*parse_address(address), files)) as channel:
        channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
        channel.receive(60, ("terms",))
        channel.send({"kind": "request", "length": 10**9, "new_tokens": -1, "answers": []})
    with socket.create_connection(parse_address(address)) as raw:
        raw.sendall(os.urandom(2**16))


def test_every_honest_client_has_its_answer(model, certificates):
    names = iter(range(HONEST + KILLED + SILENT + HOSTILE))

    def files() -> TLSFiles:
        return tls(certificates, f"client-{next(names)}")

    options = ("--workers=2", "--max-waiting=32", "--json-log", "--health-port=0", "--timeout=60")
    with serving(model, certificates, *options) as (process, address, lines):
        with PrivateClient(address, tokenizer=model, tls=files()) as client:
            expected = client.generate(PROMPT, max_new_tokens=2).tokens
        before = psutil.Process(process.pid).memory_info().rss
        silent = [say_nothing(address, files()) for _ in range(SILENT)]
        killed = []
        for _ in range(KILLED):
            given = files()
            words = [address, model, given.certificate, given.key, given.authority]
            killed.append(subprocess.Popen([sys.executable, "-c", ASK, *map(str, words)], stdout=subprocess.PIPE))
        waited = []

        def ask(given: TLSFiles) -> list[int]:
            with PrivateClient(address, tokenizer=model, tls=given, timeout=900) as client:
                tokens = client.tokenizer(PROMPT)["input_ids"]
                return client.ask(tokens, 2, on_event=lambda event: waited.append(event["event"])).tokens

        with ThreadPoolExecutor(HONEST) as pool:
            answers = [pool.submit(ask, files()) for _ in range(HONEST - 1)]
            for _ in range(HOSTILE):
                attack(address, files())
            for client in killed:
                client.stdout.readline()
                client.kill()
                client.communicate()
            assert [answer.result() for answer in answers] == [expected] * len(answers)
        for channel in silent:
            channel.close()
        assert "waiting" in waited
        assert state(lines)["workers"] == 2
        assert psutil.Process(process.pid).memory_info().rss < before + MORE_MEMORY
        facts = [json.loads(line) for line in lines]
        assert sum("seconds" in each for each in facts) >= HONEST
        assert all({"time", "client", "event"} <= {*each} for each in facts)
        assert "main" not in "".join(lines)


def test_an_answer_that_has_begun_is_ended_before_the_server(model, certificates):
    options = ("--json-log", "--health-port=0", "--drain-seconds=300")
    with serving(model, certificates, *options) as (process, address, lines), ThreadPoolExecutor(2) as pool:
        begun = threading.Event()
        first = PrivateClient(address, tokenizer=model, tls=tls(certificates, "client-0"))
        tokens = first.tokenizer(PROMPT)["input_ids"]
        answer = pool.submit(first.ask, tokens, 4, 1, lambda event: event["event"] == "step" and begun.set())
        assert begun.wait(120)
        second = PrivateClient(address, tokenizer=model, tls=tls(certificates, "client-1"))
        waits = threading.Event()
        refused = pool.submit(second.ask, tokens, 1, 1, lambda event: waits.set())
        assert waits.wait(60)
        process.send_signal(signal.SIGTERM)
        assert "about to end" in str(refused.exception(60))
        assert state(lines) == {"status": "draining", "workers": 1, "active": 1, "waiting": 0}
        assert len(answer.result(300).tokens) == 4
        first.close()
        assert process.wait(60) == 128 + signal.SIGTERM
