"""A network's rate and delay between two parties on one machine."""

import contextlib
import queue
import socket
import threading
import time

from entropy_gpt.evaluation.private_inference.program.networks import LOOPBACK, Network


PART_BYTES = 2**14


class SlowLink:
    """
    What a client connects to in place of a server. What goes in one direction, over all connections together, leaves
    at the network's rate and arrives half a round trip later; meanwhile more leaves. Each direction has the rate.

    Args:
        target (`tuple[str, int]`): The server's host and port.
        network ([`Network`], *optional*): May be replaced at any time; not slow without.

    Attributes:
        address (`tuple[str, int]`): Where it listens.
    """

    def __init__(self, target: tuple[str, int], network: Network = LOOPBACK):
        self.network = network
        self._target = target
        self._lock = threading.Lock()
        self._free_at = {"there": 0.0, "back": 0.0}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        _start(self._accept)

    def close(self):
        """Ends the listening; connections go on to their end."""
        self._listener.close()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            _start(self._carry, near)

    def _carry(self, near: socket.socket):
        with near, contextlib.suppress(OSError), socket.create_connection(self._target) as far:
            directions = [
                threading.Thread(target=self._send, args=(direction, source, sink), daemon=True)
                for direction, source, sink in (("there", near, far), ("back", far, near))
            ]
            for direction in directions:
                direction.start()
            for direction in directions:
                direction.join()

    def _send(self, direction: str, source: socket.socket, sink: socket.socket):
        """All that comes, up to the end of the direction."""
        sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        under_way: queue.Queue[tuple[float, bytes]] = queue.Queue()
        delivery = threading.Thread(target=_deliver, args=(under_way, sink), daemon=True)
        delivery.start()
        part = b"-"
        while part and delivery.is_alive():
            part = _receive(source)
            left = self._leave(direction, len(part))
            under_way.put((left + self.network.round_trip_seconds / 2, part))
            _sleep_until(left)
        delivery.join()

    def _leave(self, direction: str, size: int) -> float:
        """The moment at which `size` more bytes have left."""
        with self._lock:
            begin = max(self._free_at[direction], time.monotonic())
            self._free_at[direction] = begin + size * 8 / self.network.bits_per_second
            return self._free_at[direction]


def _receive(source: socket.socket) -> bytes:
    """Some bytes, or none at the end; a connection that breaks off has ended too."""
    try:
        return source.recv(PART_BYTES)
    except OSError:
        return b""


def _deliver(under_way: queue.Queue, sink: socket.socket):
    with contextlib.suppress(OSError):  # the receiver is gone
        while True:
            arrival, part = under_way.get()
            _sleep_until(arrival)
            if not part:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(part)


def _sleep_until(moment: float):
    time.sleep(max(0.0, moment - time.monotonic()))


def _start(function, *arguments):
    threading.Thread(target=function, args=arguments, daemon=True).start()
