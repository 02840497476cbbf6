"""The port that says whether a server lives: for monitors, and not for those who hold it."""

import contextlib
import http.client
import json
import socket
import time

import pytest

from entropy_gpt.evaluation.private_inference.parties import health
from entropy_gpt.evaluation.private_inference.parties.health import MOST_CONNECTIONS, Health


DEADLINE = 1.0


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(health, "DEADLINE_SECONDS", DEADLINE)
    with contextlib.closing(Health("127.0.0.1", 0, lambda: {"status": "ok"})) as found:
        yield found.address


def ask(address) -> dict:
    connection = http.client.HTTPConnection(*address, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/")
        return json.loads(connection.getresponse().read())


def test_who_holds_it_holds_it_for_a_bounded_time_and_number(address):
    assert ask(address) == {"status": "ok"}
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_connection(address, 10)) for _ in range(MOST_CONNECTIONS + 1)]
        began = time.monotonic()
        assert held[-1].recv(1) == b""  # one too many, while the others go on
        with pytest.raises(OSError, match=r"[Pp]ipe|reset"):
            while time.monotonic() - began < 10 * DEADLINE:  # a byte now and then makes it no longer
                held[0].sendall(b"G")
                time.sleep(0.05)
    time.sleep(DEADLINE / 2)  # the others are at their end too
    assert ask(address) == {"status": "ok"}
