"""Servers and connections without engines, and peers that speak for themselves."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from entropy_gpt.evaluation.private_inference.parties.channel import Channel, TLSFiles
from entropy_gpt.evaluation.private_inference.parties.server import Server
from entropy_gpt.evaluation.private_inference.parties.terms import Offer

from .serving import make_offer


# Seconds: far less than the deadlines of those who wait, on a machine that has other work too.
WITHOUT_WAITING = 5


@contextlib.contextmanager
def listening(
    report=lambda line: None, tls: TLSFiles | None = None, offer: Offer | None = None, **options
) -> Iterator[Server]:
    server = Server(offer or make_offer()[0], "127.0.0.1", 0, tls, report=report, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.close()


@contextlib.contextmanager
def channels() -> Iterator[tuple[Channel, Channel]]:
    """The two ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        with contextlib.closing(Channel(listener.accept()[0])) as one, contextlib.closing(Channel(theirs)) as other:
            yield one, other


@contextlib.contextmanager
def refusing(message: dict) -> Iterator[tuple[str, int]]:
    """A server that says one thing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            with contextlib.closing(Channel(listener.accept()[0])) as channel:
                channel.receive(WITHOUT_WAITING, ("hello",))
                channel.send(message)

        threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()
