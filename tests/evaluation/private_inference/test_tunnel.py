"""Bytes through both tunnels and a server's one port: as a direct connection would carry them."""

import contextlib
import hashlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import pytest
import trustme

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.channel import Channel, Listener, TLSFiles, connect
from entropy_gpt.evaluation.private_inference.parties.tunnel import MAX_STREAMS, TO_CLIENT, ClientTunnel, ServerTunnel
from tests.waiting import eventually

from .test_channel import tls_files


MANY = 8 * 2**20 + 17
TOKEN = secrets.token_hex(32)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> TLSFiles:
    """Good for both sides."""
    return tls_files(tmp_path_factory.mktemp("tls"), "both", trustme.CA(), "127.0.0.1")


@dataclass
class Link:
    """Two tunnels, and where the two engines listen."""

    client: ClientTunnel
    server: ServerTunnel
    client_engine: socket.socket
    server_engine: socket.socket
    failures: list[str] = field(default_factory=list)
    streams: list[Channel] = field(default_factory=list)

    def pair(self, from_client: bool) -> tuple[socket.socket, socket.socket]:
        """An engine's connection, and what the other engine accepts."""
        tunnel, engine = (self.client, self.server_engine) if from_client else (self.server, self.client_engine)
        dialled = socket.create_connection(("127.0.0.1", tunnel.local_port), timeout=10)
        accepted = engine.accept()[0]
        accepted.settimeout(10)
        return dialled, accepted


@contextlib.contextmanager
def linked(files: TLSFiles | None) -> Iterator[Link]:
    engines = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    listener = Listener("127.0.0.1", 0, files)
    server = ServerTunnel(TOKEN, engines[1].getsockname()[1])
    streams: list[Channel] = []

    def greet(connection: socket.socket):
        channel = listener.welcome(connection)
        streams.append(channel)
        try:
            message = channel.receive(5, ("stream",))
            assert message["session"] == TOKEN
            server.attach(channel, message["direction"])
        except PrivateInferenceError as error:
            with contextlib.suppress(PrivateInferenceError):
                channel.send({"kind": "refusal", "reason": str(error)})
            channel.close()

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=greet, args=(listener.accept(),), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    client = ClientTunnel(partial(connect, *listener.address, files), TOKEN, engines[0].getsockname()[1])
    link = Link(client, server, *engines, streams=streams)
    client.on_failure = server.on_failure = link.failures.append
    yield link
    for ended in (client, server, listener, *engines):
        ended.close()


@pytest.fixture(params=["plain", "tls"])
def link(request, files) -> Iterator[Link]:
    with linked(files if request.param == "tls" else None) as made:
        yield made
        assert not made.failures


def read_all(connection: socket.socket) -> bytes:
    content = bytearray()
    while part := connection.recv(2**16):
        content += part
    return bytes(content)


def send_and_end(connection: socket.socket, content: bytes):
    connection.sendall(content)
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("from_client", [True, False])
def test_both_directions_at_once(link, from_client):
    contents = os.urandom(MANY), os.urandom(MANY)
    ends = link.pair(from_client)
    with ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(send_and_end, end, content) for end, content in zip(ends, contents, strict=True)]
        read = [pool.submit(read_all, end) for end in ends]
        hashes = [hashlib.sha256(done.result()).digest() for done in reversed(read)]
        assert [done.result() for done in sent] == [None, None]
    assert hashes == [hashlib.sha256(content).digest() for content in contents]
    for tunnel in (link.client, link.server):
        assert eventually(lambda tunnel=tunnel: (tunnel.sent_bytes, tunnel.received_bytes) == (MANY, MANY))
    assert link.client.failure is link.server.failure is None


@pytest.mark.parametrize("from_client", [True, False])
def test_an_end_is_carried_and_the_other_direction_goes_on(link, from_client):
    asking, answering = link.pair(from_client)
    send_and_end(asking, b"question")
    assert read_all(answering) == b"question"
    time.sleep(0.1)  # the end has arrived long ago
    send_and_end(answering, b"answer" * 100_000)
    assert read_all(asking) == b"answer" * 100_000


@pytest.mark.parametrize("from_client", [True, False])
def test_what_was_written_before_a_close_arrives(link, from_client):
    writing, reading = link.pair(from_client)
    writing.sendall(b"x" * MANY)
    writing.close()
    assert read_all(reading) == b"x" * MANY


def test_an_engine_that_goes_while_it_is_written_to_is_heard_out(link):
    leaving, staying = link.pair(from_client=True)
    staying.sendall(b"never read" * 1000)
    leaving.sendall(b"last words" * 1000)
    assert eventually(lambda: link.client.received_bytes == 10_000)
    leaving.close()
    assert read_all(staying) == b"last words" * 1000


def test_one_side_that_does_not_read_stops_no_other(link):
    stuck, _ = link.pair(from_client=True)
    stuck.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            stuck.send(b"x" * 2**16)
    for from_client in (True, False):
        asking, answering = link.pair(from_client)
        asking.sendall(b"question")
        assert answering.recv(100) == b"question"


def test_many_connections_at_once_from_both_sides(link):
    def echo(engine: socket.socket):
        with contextlib.suppress(OSError):
            while True:
                accepted = engine.accept()[0]
                threading.Thread(target=lambda end=accepted: send_and_end(end, read_all(end)), daemon=True).start()

    for engine in (link.client_engine, link.server_engine):
        threading.Thread(target=echo, args=(engine,), daemon=True).start()

    def ask(number: int) -> bool:
        tunnel = (link.client, link.server)[number % 2]
        content = bytes([number]) * (1 + number * 5000)
        with socket.create_connection(("127.0.0.1", tunnel.local_port), timeout=10) as asking:
            send_and_end(asking, content)
            return read_all(asking) == content

    with ThreadPoolExecutor(10) as pool:
        assert all(pool.map(ask, range(MAX_STREAMS - 2)))


def test_an_engine_that_listens_late_is_waited_for(files):
    with linked(files) as link:
        address = link.server_engine.getsockname()
        link.server_engine.close()
        asking = socket.create_connection(("127.0.0.1", link.client.local_port), timeout=10)
        asking.sendall(b"question")
        time.sleep(0.2)
        with socket.create_server(address) as late:
            assert late.accept()[0].recv(100) == b"question"
        assert not link.failures


def test_a_connection_that_breaks_off_is_no_end_on_purpose(link):
    asking, answering = link.pair(from_client=True)
    link.client.on_failure = lambda reason: None  # the connection in reserve goes too
    asking.sendall(b"question")
    assert answering.recv(100) == b"question"
    for channel in list(link.streams):
        channel.close()
    assert eventually(lambda: link.client.failure)
    assert "broke off" in link.client.failure
    assert asking.recv(1) == b""


def test_a_stream_that_the_server_refuses_gives_the_engine_nothing(link):
    told: list[str] = []
    link.client.on_failure = told.append
    link.server.close()
    with socket.create_connection(("127.0.0.1", link.client.local_port), timeout=10) as asking:
        assert asking.recv(100) == b""
    assert eventually(lambda: any("refuses: a stream belongs to no inference" in reason for reason in told))


def test_a_direction_that_there_is_not_is_refused(link):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as raw:
        for direction in (None, "sideways", 1, ["to_server"]):
            with pytest.raises(PrivateInferenceError, match="direction"):
                link.server.attach(Channel(raw.dup()), direction)


def test_more_streams_than_an_inference_needs_are_refused():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as raw,
        contextlib.closing(ServerTunnel(TOKEN, 1)) as tunnel,
    ):
        for _ in range(MAX_STREAMS):
            tunnel.attach(Channel(raw.dup()), TO_CLIENT)
        with pytest.raises(PrivateInferenceError, match=f"no more than {MAX_STREAMS} streams"):
            tunnel.attach(Channel(raw.dup()), TO_CLIENT)


@pytest.mark.parametrize("side", ["client", "server"])
def test_closing_ends_everything_promptly(side, files):
    before = set(threading.enumerate())
    with linked(files) as link:
        ends = [*link.pair(True), *link.pair(False)]
        ends[0].setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ends[0].send(b"x" * 2**16)
        ends[0].settimeout(10)
        port = getattr(link, side).local_port
        start = time.monotonic()
        getattr(link, side).close()
        for end in ends:
            with contextlib.suppress(ConnectionError):
                read_all(end)
        with pytest.raises(ConnectionError):
            socket.create_connection(("127.0.0.1", port))
        assert time.monotonic() - start < 20
    assert eventually(lambda: not [thread for thread in set(threading.enumerate()) - before if thread.is_alive()])
