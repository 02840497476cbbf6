"""Parties that are killed, stop, flood or close: the other one ends soon, and is ready again."""

import contextlib
import os
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.channel import connect
from entropy_gpt.evaluation.private_inference.parties.limits import UNLIMITED
from entropy_gpt.evaluation.private_inference.parties.memory import RESERVED_BYTES, machine_memory
from entropy_gpt.evaluation.private_inference.parties.session import SET_UP_ALLOWANCE, free_port
from entropy_gpt.evaluation.private_inference.parties.terms import PROTOCOL_VERSION
from entropy_gpt.evaluation.private_inference.parties.tunnel import ClientTunnel
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER
from tests.waiting import eventually

from .serving import (
    QUICK,
    SECONDS,
    ask,
    ask_aloud,
    ask_at,
    engines_here,
    greet,
    make_offer,
    run_here,
    serve_until_killed,
    serving,
    wait_for_line,
)


pytest.importorskip("spu")
pytestmark = [pytest.mark.private, pytest.mark.slow]


def test_a_client_that_is_killed_leaves_the_server_ready(served):
    client = run_here(ask_aloud, served.server.address[1])
    wait_for_line(client, "step")
    os.killpg(client.pid, signal.SIGKILL)
    client.communicate()
    assert served.said("ended early", 10)
    assert len([line for line in served.lines if "ended early" in line]) == 1
    assert eventually(lambda: not served.server.turns.active, 5)
    assert not engines_here()


def test_a_server_that_is_killed_ends_the_client_and_its_own_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other tests leave and clear theirs at the same time
    server = run_here(serve_until_killed)
    port = int(server.stdout.readline())
    engines: list[psutil.Process] = []

    def kill(event: dict):
        if event["event"] == "step" and not engines:
            engines.extend(psutil.Process(server.pid).children(recursive=True))
            server.kill()

    with pytest.raises(PrivateInferenceError) as failure:
        ask_at(("127.0.0.1", port), on_event=kill)
    assert "\n" not in str(failure.value)
    assert "peer" in str(failure.value) or "broke off" in str(failure.value)
    server.communicate()
    assert engines
    assert eventually(lambda: not any(engine.is_running() for engine in engines), 10)
    assert not engines_here()
    assert not list(tmp_path.iterdir())


def test_closing_the_server_ends_the_inference():
    with serving(*make_offer(protocol=QUICK)) as served, ThreadPoolExecutor(1) as pool:
        compiled = threading.Event()
        asked = pool.submit(ask, served, 1, on_event=lambda event: compiled.set())
        assert compiled.wait(SECONDS)
        start = time.monotonic()
        served.server.close()
        served.thread.join(20)
        assert not served.thread.is_alive()
        assert not served.server.turns.active
        with pytest.raises(PrivateInferenceError, match=r"peer|broke off"):
            asked.result()
        assert time.monotonic() - start < 30
    assert not engines_here()


@pytest.mark.parametrize(("stops_at", "seconds"), [("accepted", 5), ("program", 20)])
def test_a_client_that_stops_holds_the_engine_for_a_bounded_time(served, stops_at, seconds):
    with serving(served.server.offer, [], limits=replace(UNLIMITED, seconds=seconds)) as strict:
        started = time.monotonic()
        with contextlib.closing(greet(strict)) as channel:
            channel.receive(30, ("accepted",))
            if stops_at == "program":
                channel.send(channel.receive(seconds, ("program",)))
            assert strict.said(f"took {seconds} seconds, the most that this client has left here", 2 * seconds)
        assert time.monotonic() - started < seconds + 20
        assert eventually(lambda: not strict.server.turns.active, 10)
    assert not engines_here()


def flood_server(port: int):
    """A client whose engine sends what nobody has asked for."""

    def send():
        from spu import libspu

        description = libspu.link.Desc()
        description.throttle_window_size = 0  # an honest one waits until it is asked
        for name, its_port in (("server", tunnel.local_port), ("client", own_port)):
            description.add_party(name, f"127.0.0.1:{its_port}")
        link = libspu.link.create_brpc(description, CLIENT)
        print("flooding", flush=True)
        while True:
            link.send(SERVER, b"x" * 2**22)

    channel = connect("127.0.0.1", port, None)
    channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
    channel.receive(30, ("terms",))
    channel.send({"kind": "request", "length": 4, "new_tokens": 1, "answers": 1})
    token, own_port = channel.receive(30, ("accepted",))["session"], free_port()
    tunnel = ClientTunnel(lambda: connect("127.0.0.1", port, None), token, own_port)
    channel.send(channel.receive(60, ("program",)))
    threading.Thread(target=send, daemon=True).start()
    with contextlib.suppress(PrivateInferenceError):
        channel.receive(120, ("done",))


def test_a_flood_is_not_taken_into_memory():
    """Where counts, which are Cheetah's, say what belongs there."""
    with serving(*make_offer()) as served:
        client = run_here(flood_server, served.server.address[1])
        try:
            wait_for_line(client, "flooding")
            (engine,) = engines_here()
            begin, most = engine.memory_info().rss, 0
            assert engine.rlimit(psutil.RLIMIT_CORE) == (0, 0)
            assert engine.rlimit(psutil.RLIMIT_AS)[0] <= machine_memory() + RESERVED_BYTES * os.cpu_count()
            while not served.said("ended early", 0.2) and len(served.lines) < 2:
                with contextlib.suppress(psutil.NoSuchProcess):
                    most = max(most, engine.memory_info().rss)
        finally:
            os.killpg(client.pid, signal.SIGKILL)
            client.communicate()
        assert served.said("sends more than its program does", 5)
        assert most - begin < 3 * SET_UP_ALLOWANCE
