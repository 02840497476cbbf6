"""Small messages between a client and a server: JSON after its length, over TLS with certificates on both sides."""

import contextlib
import errno
import functools
import getpass
import hashlib
import ipaddress
import json
import math
import re
import select
import socket
import ssl
import struct
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from entropy_gpt.evaluation.errors import MachineError, PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings

from .tls_advice import NO_TLS, explain


MAX_MESSAGE_BYTES = 2**16
MAX_REASON_CHARACTERS = 300
HANDSHAKE_SECONDS, PARTING_SECONDS = 10, 1
PART_BYTES = 2**20
# For which a peer may take nothing of what it is sent.
SEND_SECONDS = 60
LENGTH = struct.Struct(">I")
# The first bytes of TLS, where a message's length belongs.
TLS_HANDSHAKE = b"\x16\x03"
# A peer whose machine is gone is noticed after about a minute.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


@dataclass(frozen=True)
class TLSFiles:
    """
    What a side shows and whom it trusts, in PEM.

    Args:
        certificate (`Path`): This side's.
        key (`Path`): Its private key.
        authority (`Path`): Certificates of those who may sign the peer's.
    """

    certificate: Path
    key: Path
    authority: Path

    @functools.cached_property
    def client_context(self) -> ssl.SSLContext:
        """[`TLSFiles.context`] of a client, once for all its streams: the key's password is asked for once."""
        return self.context(server=False)

    def context(self, server: bool) -> ssl.SSLContext:
        """
        TLS 1.3, with the peer's certificate required; a client also compares the server's name.

        Raises:
            `PrivateInferenceError`: If a file is missing or wrong.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        for path in (self.certificate, self.key, self.authority):
            if not path.is_file():
                raise PrivateInferenceError(f"there is no file {path}: TLS needs --cert, --key and --ca.")
        try:
            context.load_cert_chain(self.certificate, self.key, self._ask_password)
        except (OSError, ssl.SSLError) as error:
            raise PrivateInferenceError(
                f"{self.certificate} and {self.key} are no certificate and its key."
            ) from error
        try:
            context.load_verify_locations(self.authority)
        except (OSError, ssl.SSLError) as error:
            raise PrivateInferenceError(f"{self.authority} holds no certificate in PEM.") from error
        return context

    def _ask_password(self) -> str:
        if not sys.stdin.isatty():
            raise PrivateInferenceError(
                f"{self.key} is encrypted, and there is no terminal to ask for its password: give a key that is not "
                f"(openssl pkey -in {self.key} -out plain.key), and let only its owner read it."
            )
        return getpass.getpass(f"password of {self.key}: ")


def parse_address(text: str) -> tuple[str, int]:
    """
    `HOST:PORT`, with an IPv6 address in brackets.

    Raises:
        `PrivateInferenceError`: If it is something else.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]]+)):(\d{1,5})", text, re.ASCII)
    if match is None or not int(match[3]) <= 65535:
        raise PrivateInferenceError(
            f"{text!r} is no address: write HOST:PORT, such as 127.0.0.1:9000 or [::1]:9000, with a port up to 65535."
        )
    return match[1] or match[2], int(match[3])


def show_address(host: str, port: int) -> str:
    """As [`parse_address`] reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_plain_allowed(host: str, insecure: bool, settings: PrivateSettings):
    """
    Raises:
        `PrivateInferenceError`: If a host beyond this machine is to be reached without TLS, and that is not said to be
            good enough, or can't be.
    """
    if host == "localhost":
        return
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if settings.needs_encryption:
        raise PrivateInferenceError(
            f"without TLS, what goes to and from {host} would show weights or prompt to whoever listens, with "
            f"protocol={settings.protocol} and embedding={settings.embedding}: give --cert, --key and --ca."
        )
    if insecure:
        return
    raise PrivateInferenceError(
        f"without TLS only this machine's loopback is used, and {host} is beyond it: give --cert, --key and --ca on "
        "both sides, or --insecure where the network itself is trusted."
    )


class ClosedError(PrivateInferenceError):
    """The peer has ended the connection between two messages."""


class NoServerError(PrivateInferenceError):
    """Nobody listens at the server's address."""


# Refusals after which another connection may well be answered: a client's turn is over between two prompts, or a half
# of a preparation is lost.
TURN_OVER, NO_HALF = "turn over", "no half"


class RefusalError(PrivateInferenceError):
    """The peer has said why it ends the connection."""


class Channel:
    """
    A connection that carries messages: JSON objects with a "kind".

    One thread may send while another receives: the socket never blocks, and a lock keeps the two from being inside of
    one TLS connection at once, which OpenSSL forbids.
    """

    def __init__(self, connection: socket.socket):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        connection.setblocking(False)
        self.connection = connection
        self._lock, self._send_lock = threading.Lock(), threading.Lock()

    def send(self, message: dict):
        """
        Raises:
            `PrivateInferenceError`: If the message is too large, or the peer is gone or takes nothing.
        """
        content = json.dumps(message, allow_nan=False).encode()
        if len(content) > MAX_MESSAGE_BYTES:
            raise PrivateInferenceError(f"a message of {len(content):,} bytes is more than {MAX_MESSAGE_BYTES:,}.")
        self._send(LENGTH.pack(len(content)) + content)

    def send_bytes(self, content: bytes, seconds: float):
        """Bytes whose number the peer knows; within these seconds it takes all. Raises as [`Channel.send`]."""
        end = time.monotonic() + seconds
        for begin in range(0, len(content), PART_BYTES):
            self._send(content[begin : begin + PART_BYTES], end)

    def receive_bytes(self, size: int, seconds: float) -> bytes:
        """What [`Channel.send_bytes`] sends; each part comes within these seconds. Raises as [`Channel.receive`]."""
        content = bytearray()
        while len(content) < size:
            with _receiving(seconds):
                content += self._read(min(size - len(content), PART_BYTES), time.monotonic() + seconds)
        return content

    def _send(self, content: bytes, end: float = math.inf):
        waiting, limit = memoryview(content), min(end, time.monotonic() + SEND_SECONDS)
        try:
            with self._send_lock:
                while waiting:
                    send = functools.partial(self.connection.send, waiting)
                    waiting = waiting[self._try(send, select.POLLOUT, limit) :]
        except TimeoutError as error:
            raise PrivateInferenceError(f"the peer took no whole message for {SEND_SECONDS:g} seconds.") from error
        except OSError as error:
            raise PrivateInferenceError(f"the peer is gone: {_reason(error)}") from error

    @contextlib.contextmanager
    def telling(self, party: str) -> Iterator[None]:
        """
        Within, what fails is said to the peer in a line.

        Args:
            party (`str`): What this side is to the peer: its own failures are no business of the other's.
        """
        try:
            yield
        except RefusalError:
            raise
        except (PrivateInferenceError, OSError) as error:
            told = may_be_told(error)
            reason, code = (one_line(error), error.code) if told else (f"the {party} failed.", None)
            with contextlib.suppress(PrivateInferenceError):
                self.send({"kind": "refusal", "reason": reason, "code": code})
            raise

    def receive(self, seconds: float | None, kinds: tuple[str, ...]) -> dict:
        """
        The next message.

        Args:
            seconds (`float`, *optional*): To wait at most for all of it.
            kinds (`tuple[str]`): What may come.

        Raises:
            `PrivateInferenceError`: If the peer is gone, silent for so long, refuses, or breaks the rules.
        """
        with _receiving(seconds):
            limit = None if seconds is None else time.monotonic() + seconds
            (length,) = LENGTH.unpack(self._read(LENGTH.size, limit, ClosedError))
            if length > MAX_MESSAGE_BYTES:
                raise PrivateInferenceError(_describe_announced(length))
            content = self._read(length, limit)
        message = _parse(content)
        if message["kind"] == "refusal":
            code = message.get("code")
            known = code if code in (TURN_OVER, NO_HALF) else None
            raise RefusalError(f"the peer refuses: {clean(message.get('reason'))}", known)
        if message["kind"] not in kinds:
            raise PrivateInferenceError(
                f"the peer says {clean(message['kind'])!r} where {' or '.join(kinds)} belongs."
            )
        return message

    @property
    def peer(self) -> str:
        """By which a client is known: a hash of its certificate, or without TLS its address."""
        if isinstance(self.connection, ssl.SSLSocket):
            return hashlib.sha256(self.connection.getpeercert(binary_form=True)).hexdigest()
        return self.connection.getpeername()[0]

    def close(self):
        shut_down(self.connection)
        with self._lock:
            self.connection.close()

    def _try(self, action: Callable, event: int, limit: float | None = None):
        """Until it does not block."""
        while True:
            with self._lock, contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return action()
            left = None if limit is None else limit - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            wait({self.connection: event}, left)

    def _read(
        self, size: int, limit: float | None, closed: type[PrivateInferenceError] = PrivateInferenceError
    ) -> bytes:
        content = bytearray()
        while len(content) < size:
            left = min(size - len(content), 2**16)
            part = self._try(functools.partial(self.connection.recv, left), select.POLLIN, limit)
            if not part:
                raise closed("the peer closed the connection.")
            content += part
        return bytes(content)


@contextlib.contextmanager
def _receiving(seconds: float | None) -> Iterator[None]:
    """Within, a peer that is gone or silent is an error in a line."""
    try:
        yield
    except TimeoutError as error:
        raise PrivateInferenceError(f"the peer sent no whole message for {seconds:g} seconds.") from error
    except OSError as error:
        raise PrivateInferenceError(f"the peer is gone: {_reason(error)}") from error


def wait(needs: dict[socket.socket, int], seconds: float | None = None):
    """
    Until one of some sockets can be read or written, as `select.poll` names it.

    Raises:
        `OSError`: If one was closed meanwhile.
    """
    poll = select.poll()
    for connection, events in needs.items():
        try:
            poll.register(connection, events)
        except ValueError as error:
            raise OSError(errno.EBADF, "the connection was closed here") from error
    poll.poll(None if seconds is None else seconds * 1000)


def shut_down(connection: socket.socket):
    """
    Ends what goes on in a connection, in whichever thread. Not by `SSLSocket.shutdown`: that takes the encryption away
    first, and a thread in the midst of sending could send plain text.
    """
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _parse(content: bytes) -> dict:
    def pairs(items: list) -> dict:
        found = dict(items)
        if len(found) < len(items):
            raise ValueError("a name is there twice")
        return found

    def refuse(constant: str):
        raise ValueError(f"{constant} is no number")

    try:
        message = json.loads(content.decode(), object_pairs_hook=pairs, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise PrivateInferenceError(f"the peer sends no proper message: {clean(str(error))}") from error
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise PrivateInferenceError("the peer sends no proper message: it has no kind.")
    return message


def _describe_announced(length: int) -> str:
    """What it means that a peer begins with these four bytes, which are the length of no message."""
    begin = LENGTH.pack(length)
    if begin.startswith(TLS_HANDSHAKE):
        return "the peer wants TLS, and this side has none: give --cert, --key and --ca on both sides or on neither."
    return f"the peer announces a message of {length:,} bytes: it speaks another way."


def may_be_told(error: Exception) -> bool:
    """Whether the peer may hear of an error: what fails in a library or an engine may describe this machine."""
    return isinstance(error, PrivateInferenceError) and not isinstance(error, MachineError)


def one_line(text: object, most: int = MAX_REASON_CHARACTERS) -> str:
    """A library's message without the places in its code where it failed, with which it may go on."""
    said = " ".join(str(text).split("Stacktrace", 1)[0].split())
    return clean(said.removeprefix("what: "), most=most)


def clean(text: object, kept: str = "", most: int | None = MAX_REASON_CHARACTERS) -> str:
    """A peer's text without characters that could drive a terminal, except those in `kept`; at most `most` long."""
    visible = (letter for letter in str(text) if letter in kept or unicodedata.category(letter)[0] != "C")
    return "".join(visible)[:most]


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, ssl.SSLError) and (said := explain(error)):
        return one_line(said)
    if isinstance(error, UnicodeError):
        return "the name is no host's"
    return one_line(error.strerror or error)


class Listener:
    """
    A server's port.

    Args:
        host (`str`), port (`int`): 0 takes a free port.
        tls ([`TLSFiles`], *optional*): Without them, connections are plain.

    Raises:
        `PrivateInferenceError`: If the port is in use, or a file of TLS is wrong.
    """

    def __init__(self, host: str, port: int, tls: TLSFiles | None):
        self._context = tls.context(server=True) if tls else None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family)
        except (OSError, UnicodeError) as error:
            raise PrivateInferenceError(
                f"{show_address(host, port)} can't be listened on: {_reason(error)}."
            ) from error
        self.address = self._socket.getsockname()[:2]

    def accept(self) -> socket.socket:
        """The next connection, about which nothing is known yet."""
        return self._socket.accept()[0]

    def welcome(
        self, connection: socket.socket, on_wrapped: Callable[[socket.socket], None] = lambda secured: None
    ) -> Channel:
        """
        Shakes hands.

        Args:
            connection (`socket.socket`): One of [`Listener.accept`].
            on_wrapped: Called with the socket of TLS that takes the connection's place, before hands are shaken.

        Raises:
            `PrivateInferenceError`: If the client has no proper certificate, or takes too long.
        """
        return Channel(_secure(connection, self._context, None, on_wrapped))

    def close(self):
        shut_down(self._socket)  # wakes who accepts
        self._socket.close()


def connect(host: str, port: int, tls: TLSFiles | None) -> Channel:
    """
    Raises:
        `NoServerError`: If there is no server.
        `PrivateInferenceError`: If it has no proper certificate for its name.
    """
    context = tls.client_context if tls else None
    try:
        connection = socket.create_connection((host, port), timeout=HANDSHAKE_SECONDS)
    except (OSError, UnicodeError) as error:
        raise NoServerError(f"no server at {show_address(host, port)}: {_reason(error)}.") from error
    return Channel(_secure(connection, context, host))


def _secure(
    connection: socket.socket,
    context: ssl.SSLContext | None,
    server_name: str | None,
    on_wrapped: Callable[[socket.socket], None] = lambda secured: None,
) -> socket.socket:
    if context is None:
        connection.settimeout(None)
        return connection
    connection.settimeout(HANDSHAKE_SECONDS)
    is_server = server_name is None
    try:
        if is_server:
            _expect_tls(connection)
        secured = context.wrap_socket(
            connection, server_side=is_server, server_hostname=server_name, do_handshake_on_connect=False
        )
    except OSError as error:
        connection.close()
        raise PrivateInferenceError(f"TLS failed: {_reason(error)}.") from error
    on_wrapped(secured)
    try:
        secured.do_handshake()
    except OSError as error:
        _part(secured)
        raise PrivateInferenceError(f"TLS failed: {_reason(error)}.") from error
    secured.settimeout(None)
    return secured


def _expect_tls(connection: socket.socket):
    """
    Raises:
        `PrivateInferenceError`: If a client begins with something else; it learns why.
    """
    begin = connection.recv(1, socket.MSG_PEEK)
    if begin and begin != TLS_HANDSHAKE[:1]:
        refusal = json.dumps({"kind": "refusal", "reason": "TLS is wanted: give --cert, --key and --ca."}).encode()
        connection.sendall(LENGTH.pack(len(refusal)) + refusal)
        _part(connection)
        raise PrivateInferenceError(f"TLS failed: {NO_TLS}.")


def _part(connection: socket.socket):
    """Ends a connection such that the peer still reads what it was sent, which a reset would take from it."""
    plain = socket.socket
    with contextlib.suppress(OSError):
        plain.shutdown(connection, socket.SHUT_WR)
        connection.settimeout(PARTING_SECONDS)
        until = time.monotonic() + PARTING_SECONDS
        while time.monotonic() < until and plain.recv(connection, 2**16):
            pass
    connection.close()
