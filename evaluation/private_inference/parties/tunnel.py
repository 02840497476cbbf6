"""
The engines' connections, carried from machine to machine.

Each engine listens on, and connects to, its own machine's loopback alone. A connection of the client's engine goes
over a new one to the server's port; for those of the server's engine, the client keeps one in reserve there.

Whoever leads a connection to his engine says "open" first. Then the bytes follow in frames, a length and its bytes; a
frame of none is the end of one direction, so that an end on purpose differs from a broken connection.
"""

import contextlib
import math
import queue
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator

from entropy_gpt.evaluation.errors import PrivateInferenceError

from .channel import Channel, shut_down, wait


TO_SERVER, TO_CLIENT = "to_server", "to_client"
BUFFER_BYTES = 2**18
# For which an engine is waited for that does not listen yet, and a connection in reserve.
PATIENCE_SECONDS = 60
# Streams that a client may open for an inference. Each engine needs one to the other, and one more is in reserve.
MAX_STREAMS = 16
# For which a peer may have more to send than this side's engine may be given yet. It is not read meanwhile.
EXCESS_SECONDS, EXCESS_CHECK_SECONDS = 10, 0.05
FRAME = struct.Struct(">I")
BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Tunnel:
    """
    One side.

    Args:
        session_token (`str`): Known to the two sides of an inference alone; streams begin with it.
        engine_port (`int`): Where this side's engine listens.

    Attributes:
        local_port (`int`): Where this side's engine reaches the other's.
        sent_bytes, received_bytes (`int`): The engines' bytes, carried to and from the other side.
        allowed_bytes (`float`): How many may be received: what the counts predict up to now. It may be raised.
        on_failure (`Callable`): Told why a connection could not be carried.
        failure (`str`, *optional*): How a connection broke off that neither engine had ended.
    """

    def __init__(self, session_token: str, engine_port: int):
        self.session_token, self.engine_port = session_token, engine_port
        self.sent_bytes = self.received_bytes = 0
        self.allowed_bytes = math.inf
        self.on_failure: Callable[[str], None] = lambda reason: None
        self.failure: str | None = None
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.local_port = self._listener.getsockname()[1]
        self._start(self._accept)

    def close(self):
        """Ends all connections; the threads that carry them close them."""
        with self._lock:
            self._closed = True
            for opened in (self._listener, *self._sockets):
                shut_down(opened)
        self._listener.close()

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
        with self._owned(connection):
            channel = self._open()
            with self._owned(channel.connection):
                self._carry(connection, channel.connection)

    def _carry_in(self, channel: Channel):
        """Leads a connection of the other side's engine to this side's, as soon as that listens."""
        with self._owned(channel.connection):
            connection = self._dial()
            with self._owned(connection):
                channel.send({"kind": "open"})
                self._carry(connection, channel.connection)

    def _dial(self) -> socket.socket:
        limit = time.monotonic() + PATIENCE_SECONDS
        while not self._closed and time.monotonic() < limit:
            with contextlib.suppress(OSError):
                connection = socket.create_connection(("127.0.0.1", self.engine_port))
                if connection.getsockname() != connection.getpeername():
                    return connection
                connection.close()  # while nobody listens on a port, a connection to it can meet itself
            time.sleep(0.05)
        raise PrivateInferenceError("this side's engine does not listen.")

    def _carry(self, engine: socket.socket, peer: socket.socket):
        """Until both directions have ended, or the connection breaks off."""
        engine.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        engine.setblocking(False)
        flows = [_Outward(engine, peer, self._count_sent), _Inward(peer, engine, self._count_received, self._left)]
        try:
            while flows := [flow for flow in flows if not flow.ended]:
                moved = [flow.move() for flow in flows]
                if not any(moved):
                    needs: dict[socket.socket, int] = {}
                    for flow in flows:
                        end, event = flow.need()
                        if event:
                            needs[end] = needs.get(end, 0) | event
                    wait(needs, EXCESS_CHECK_SECONDS if flows[-1].held_back else None)
        except OSError as error:
            if not self._closed:
                self.failure = f"a connection between the engines broke off: {error.strerror or error}"

    def _count_sent(self, size: int):
        with self._lock:
            self.sent_bytes += size

    def _count_received(self, size: int):
        with self._lock:
            self.received_bytes += size

    def _left(self) -> float:
        """Bytes that may be received now."""
        return self.allowed_bytes - self.received_bytes

    @contextlib.contextmanager
    def _owned(self, opened: socket.socket) -> Iterator[None]:
        """Within, [`Tunnel.close`] wakes whoever waits for a socket; in the end the thread that used it closes it."""
        with self._owned_if_it_fails(opened):
            yield
        self._end(opened)

    @contextlib.contextmanager
    def _owned_if_it_fails(self, opened: socket.socket) -> Iterator[None]:
        with self._lock:
            self._sockets.add(opened)
            if self._closed:
                shut_down(opened)
        try:
            yield
        except BaseException:
            self._end(opened)
            raise

    def _end(self, opened: socket.socket):
        with self._lock:
            self._sockets.discard(opened)
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
        self._reserve: queue.Queue[Channel | None] = queue.Queue()
        self._streams_left = MAX_STREAMS
        super().__init__(session_token, engine_port)

    def attach(self, channel: Channel, direction: object):
        """
        Takes over a connection that the client made for a stream.

        Raises:
            `PrivateInferenceError`: If it has no such direction, there were too many, or the tunnel was closed.
        """
        with self._lock:
            if self._closed:
                raise PrivateInferenceError("a stream belongs to no inference.")
            if not self._streams_left:
                raise PrivateInferenceError(f"an inference needs no more than {MAX_STREAMS} streams.")
            self._streams_left -= 1
            if direction == TO_CLIENT:
                self._reserve.put(channel)
                return
        if direction != TO_SERVER:
            raise PrivateInferenceError("a stream has no direction.")
        self._start(self._carry_in, channel)

    def close(self):
        super().close()
        with contextlib.suppress(queue.Empty):
            while left := self._reserve.get_nowait():
                left.close()
        self._reserve.put(None)  # for a thread that waits

    def _open(self) -> Channel:
        try:
            channel = self._reserve.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            raise PrivateInferenceError("the client keeps no connection in reserve.") from None
        if channel is None:
            self._reserve.put(None)
            raise PrivateInferenceError("the tunnel was closed.")
        with self._owned_if_it_fails(channel.connection):
            channel.send({"kind": "open"})
            channel.receive(PATIENCE_SECONDS, ("open",))
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

    def _open(self) -> Channel:
        channel = self._ask(TO_SERVER)
        with self._owned_if_it_fails(channel.connection):
            channel.receive(PATIENCE_SECONDS, ("open",))
        return channel

    def _ask(self, direction: str) -> Channel:
        channel = self._connect()
        channel.send({"kind": "stream", "session": self.session_token, "direction": direction})
        return channel

    def _keep_reserve(self):
        for _ in range(MAX_STREAMS):
            channel = self._ask(TO_CLIENT)
            with self._owned_if_it_fails(channel.connection):
                channel.receive(None, ("open",))
            self._start(self._carry_in, channel)


class _Outward:
    """Bytes from this side's engine to the other side, in frames; at most a buffer of them is on the way."""

    def __init__(self, engine: socket.socket, peer: socket.socket, count: Callable[[int], None]):
        self._engine, self._peer, self._count = engine, peer, count
        self._buffer = memoryview(bytearray(FRAME.size + BUFFER_BYTES))
        self._waiting = self._buffer[:0]
        self._size = 0
        self.ended = self.held_back = False

    def move(self) -> bool:
        """Whether anything was taken or given."""
        with contextlib.suppress(*BLOCKED):
            if not self._waiting:
                self._size = self._take()
                FRAME.pack_into(self._buffer, 0, self._size)
                self._waiting = self._buffer[: FRAME.size + self._size]
            self._waiting = self._waiting[self._peer.send(self._waiting) :]
            if not self._waiting:
                self._count(self._size)
                self.ended = self._size == 0
            return True
        return False

    def need(self) -> tuple[socket.socket, int]:
        return (self._peer, select.POLLOUT) if self._waiting else (self._engine, select.POLLIN)

    def _take(self) -> int:
        try:
            return self._engine.recv_into(self._buffer[FRAME.size :])
        except ConnectionError:  # an engine that ends with something unread
            return 0


class _Inward:
    """
    Bytes from the other side, out of their frames, to this side's engine: no more than are left, and the rest later.
    """

    def __init__(
        self, peer: socket.socket, engine: socket.socket, count: Callable[[int], None], left: Callable[[], float]
    ):
        self._peer, self._engine, self._count, self._left = peer, engine, count, left
        self._held_back_since: float | None = None
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._unread = self._buffer[:0]
        self._header = b""
        self._frame_left = 0
        self.ended = False

    @property
    def held_back(self) -> bool:
        return self._held_back_since is not None

    def move(self) -> bool:
        """
        Whether anything was taken or given.

        Raises:
            `PrivateInferenceError`: If the peer has had too much to send for too long.
        """
        with contextlib.suppress(*BLOCKED):
            if not self._unread:
                if self._hold_back():
                    return False
                size = self._peer.recv_into(self._buffer)
                if size == 0:
                    raise ConnectionResetError("without an end")
                self._unread = self._buffer[:size]
            while self._unread and not self.ended:
                if self._frame_left:
                    self._give()
                else:
                    self._begin_frame()
            return True
        return False

    def need(self) -> tuple[socket.socket, int]:
        if self._unread:
            return self._engine, select.POLLOUT
        return self._peer, 0 if self.held_back else select.POLLIN

    def _hold_back(self) -> bool:
        """Whether the peer has something to send that this side's engine may not be given yet."""
        if self._left() > 0 or not _can_be_read(self._peer):
            self._held_back_since = None
            return False
        now = time.monotonic()
        self._held_back_since = self._held_back_since or now
        if now - self._held_back_since > EXCESS_SECONDS:
            raise PrivateInferenceError("the peer's engine sends more than its program does.")
        return True

    def _give(self):
        part = self._unread[: self._frame_left]
        try:
            given = self._engine.send(part)
        except ConnectionError:  # it reads no more; what it wrote is still carried
            given = len(part)
        self._count(given)
        self._unread = self._unread[given:]
        self._frame_left -= given

    def _begin_frame(self):
        taken = FRAME.size - len(self._header)
        self._header += self._unread[:taken]
        self._unread = self._unread[taken:]
        if len(self._header) < FRAME.size:
            return
        (self._frame_left,), self._header = FRAME.unpack(self._header), b""
        if self._frame_left > BUFFER_BYTES:
            raise ConnectionAbortedError("it carries something else")
        if self._frame_left == 0:
            self.ended = True
            with contextlib.suppress(OSError):
                self._engine.shutdown(socket.SHUT_WR)


def _can_be_read(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0)) or (isinstance(connection, ssl.SSLSocket) and connection.pending() > 0)
