"""
The engines' connections, carried from machine to machine.

Each engine listens on, and connects to, its own machine's loopback alone. A connection of the client's engine goes
over a new one to the server's port; for those of the server's engine, the client keeps one in reserve there.
"""

import contextlib
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable

from .channel import Channel
from .errors import PrivateInferenceError


TO_SERVER, TO_CLIENT = "to_server", "to_client"
BUFFER_BYTES = 2**18
# For which an engine is waited for that does not listen yet, and a connection in reserve.
PATIENCE_SECONDS = 60


class Tunnel:
    """
    One side.

    Args:
        session_token (`str`): Known to the two sides of an inference alone; streams begin with it.
        engine_port (`int`): Where this side's engine listens.

    Attributes:
        local_port (`int`): Where this side's engine reaches the other's.
        sent_bytes, received_bytes (`int`): Carried to and from the other side.
        on_failure (`Callable`): Told why a connection could not be carried.
    """

    def __init__(self, session_token: str, engine_port: int):
        self.session_token, self.engine_port = session_token, engine_port
        self.sent_bytes = self.received_bytes = 0
        self.on_failure: Callable[[str], None] = lambda reason: None
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._keep(self._listener)
        self.local_port = self._listener.getsockname()[1]
        self._start(self._accept)

    def close(self):
        """Ends all connections."""
        with self._lock:
            self._closed = True
            sockets, self._sockets = self._sockets, []
        for opened in sockets:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
            opened.close()

    def _open(self) -> Channel:
        """A connection to the other side's engine."""
        raise NotImplementedError

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._start(self._carry_out, connection)

    def _carry_out(self, connection: socket.socket):
        self._keep(connection)
        self._carry(connection, self._open())

    def _carry_in(self, channel: Channel):
        """Leads a connection of the other side's engine to this side's, as soon as that listens."""
        self._keep(channel.connection)
        limit = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", self.engine_port))
                break
            except OSError as error:
                if self._closed or time.monotonic() > limit:
                    raise PrivateInferenceError("this side's engine does not listen.") from error
                time.sleep(0.05)
        self._keep(connection)
        self._carry(connection, channel)

    def _carry(self, engine: socket.socket, channel: Channel):
        """Until one end closes; then so does the other: the engine never closes one direction alone."""
        peer = channel.connection
        self._keep(peer)
        engine.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for end in (engine, peer):
            end.setblocking(False)
        flows = [_Flow(engine, peer, self._count_sent), _Flow(peer, engine, self._count_received)]
        with contextlib.suppress(OSError):
            while not any(flow.ended for flow in flows):
                if not any([flow.move() for flow in flows]):
                    _wait(flows)
        for end in (engine, peer):
            end.close()

    def _count_sent(self, size: int):
        with self._lock:
            self.sent_bytes += size

    def _count_received(self, size: int):
        with self._lock:
            self.received_bytes += size

    def _keep(self, opened: socket.socket):
        with self._lock:
            if not self._closed:
                self._sockets.append(opened)
                return
        opened.close()

    def _start(self, work: Callable, *arguments):
        def run():
            try:
                work(*arguments)
            except (PrivateInferenceError, OSError) as error:
                if not self._closed:
                    self.on_failure(str(error))

        threading.Thread(target=run, daemon=True).start()


class ServerTunnel(Tunnel):
    """The server's side; the other side's connections are handed in by [`ServerTunnel.attach`]."""

    def __init__(self, session_token: str, engine_port: int):
        self._reserve: queue.Queue[Channel] = queue.Queue()
        super().__init__(session_token, engine_port)

    def attach(self, channel: Channel, direction: object):
        """
        Takes over a connection that the client made for a stream.

        Raises:
            `PrivateInferenceError`: If it has no such direction.
        """
        if direction == TO_SERVER:
            self._start(self._carry_in, channel)
        elif direction == TO_CLIENT:
            self._keep(channel.connection)
            self._reserve.put(channel)
        else:
            raise PrivateInferenceError("a stream has no direction.")

    def _open(self) -> Channel:
        try:
            channel = self._reserve.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            raise PrivateInferenceError("the client keeps no connection in reserve.") from None
        channel.send({"kind": "open"})
        return channel


class ClientTunnel(Tunnel):
    """
    The client's side.

    Args:
        connect (`Callable`): Makes a connection to the server's port.
        session_token, engine_port: As for [`Tunnel`].
    """

    def __init__(self, connect: Callable[[], Channel], session_token: str, engine_port: int):
        self._connect = connect
        super().__init__(session_token, engine_port)
        self._start(self._keep_reserve)

    def _open(self, direction: str = TO_SERVER) -> Channel:
        channel = self._connect()
        channel.send({"kind": "stream", "session": self.session_token, "direction": direction})
        return channel

    def _keep_reserve(self):
        while not self._closed:
            channel = self._open(TO_CLIENT)
            self._keep(channel.connection)
            channel.receive(None, ("open",))
            self._start(self._carry_in, channel)


class _Flow:
    """Bytes from one socket, neither of which blocks, to another; at most a buffer of them is on the way."""

    def __init__(self, source: socket.socket, target: socket.socket, count: Callable[[int], None]):
        self.source, self.target, self._count = source, target, count
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self.waiting = self._buffer[:0]
        self.ended = False

    def move(self) -> bool:
        """Whether anything was taken or given."""
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not self.waiting:
                size = self.source.recv_into(self._buffer)
                self.ended = size == 0
                self.waiting = self._buffer[:size]
                if self.ended:
                    return True
            sent = self.target.send(self.waiting)
            self._count(sent)
            self.waiting = self.waiting[sent:]
            return True
        return False


def _wait(flows: list[_Flow]):
    """Until a source can be read or a target written, whichever its flow needs next."""
    poll = select.poll()
    needs: dict[int, int] = {}
    for flow in flows:
        end, event = (flow.target, select.POLLOUT) if flow.waiting else (flow.source, select.POLLIN)
        needs[end.fileno()] = needs.get(end.fileno(), 0) | event
    for number, events in needs.items():
        poll.register(number, events)
    poll.poll()
