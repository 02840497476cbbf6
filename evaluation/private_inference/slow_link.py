"""A network's rate and delay between two parties on one machine."""

import contextlib
import math
import queue
import socket
import threading
import time

from .cost import Network


LOOPBACK = Network("loopback", math.inf, 0.0)
PART_BYTES = 2**14


class SlowLink:
    """
    What a client connects to in place of a server: what goes in one direction leaves at the network's rate, behind all
    that goes the same way, and arrives half a round trip later. Each part is under way while others leave.

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
        with contextlib.suppress(OSError):  # closed
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._target)
                for direction, source, sink in (("there", near, far), ("back", far, near)):
                    sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    under_way: queue.Queue[tuple[float, bytes]] = queue.Queue()
                    _start(self._send, direction, source, under_way)
                    _start(_deliver, under_way, sink)

    def _send(self, direction: str, source: socket.socket, under_way: queue.Queue):
        ended = False
        while not ended:
            part = b""
            with contextlib.suppress(OSError):  # broken off: for the other side an end
                part = source.recv(PART_BYTES)
            left = self._leave(direction, len(part))
            under_way.put((left + self.network.round_trip_seconds / 2, part))
            _sleep_until(left)
            ended = not part

    def _leave(self, direction: str, size: int) -> float:
        """The moment at which so many bytes have left."""
        with self._lock:
            begin = max(self._free_at[direction], time.monotonic())
            self._free_at[direction] = begin + size * 8 / self.network.bits_per_second
            return self._free_at[direction]


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
