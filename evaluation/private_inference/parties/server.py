"""
A server that holds weights, for clients that hold prompts, on other machines.

A client connects to the server's one port and learns the terms: architecture, settings, tokenizer's hash. Both then
compile the same program from these public facts, each in a process of its own (`party_process.py`), compare its hash,
and run it; all that the engines send goes through connections the client opens (`tunnel.py`), under TLS.
"""

import contextlib
import json
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.cost import MEGA
from entropy_gpt.evaluation.private_inference.program.program import ProgramConfig
from entropy_gpt.evaluation.private_inference.program.settings import SERVER

from .channel import TURN_OVER, Channel, ClosedError, Listener, TLSFiles, one_line, shut_down
from .drafts import least_positions
from .halves import MOST_PREPARED_BYTES, Halves
from .job import Job, Request
from .limits import Accounts, Limits, Use
from .preparations import LostHalfError, pass_spans
from .question import check_request
from .session import Session, SilenceError, free_port
from .tables import encode_table
from .terms import HANDSHAKE_SECONDS, LARGEST, PROTOCOL_VERSION, Offer
from .tunnel import ServerTunnel
from .turns import Turns


# For which a client may keep the engine between two prompts, unless another one waits for it.
KEPT_SECONDS, KEPT_CHECK_SECONDS = 30, 0.5
# For which what is about to end is waited for.
PARTING_SECONDS = 5
# What this side is to the other.
SERVER_NAME = "server"
# How much of a certificate's hash a log has.
PEER_CHARACTERS = 16
# Connections at once that are not answered yet.
MAX_GREETINGS = 64


class Server:
    """
    Answers as many clients at once as it has workers; others wait, and see how many are before them.

    Args:
        offer ([`Offer`]): What it offers.
        host (`str`), port (`int`): Where it listens.
        tls ([`TLSFiles`], *optional*): Without them, whoever is between could listen or change what is sent.
        timeout_seconds (`int`): For which nothing may happen in an inference.
        limits ([`Limits`]): What it grants each client.
        report (`Callable`): Told in a line what happens, with time and address.
        turns ([`Turns`], *optional*): How many clients it answers at once, and how many may wait.
        json_log (`bool`): Whether lines are JSON, as of [`json_line`].
        prepared (`Path`, *optional*): Folder for its halves of preparations; without it there are none.
        most_prepared_bytes (`int`): That these may take.
    """

    def __init__(
        self,
        offer: Offer,
        host: str,
        port: int,
        tls: TLSFiles | None,
        timeout_seconds: int = 600,
        limits: Limits | None = None,
        report: Callable[[str], None] = print,
        turns: Turns | None = None,
        json_log: bool = False,
        prepared: Path | None = None,
        most_prepared_bytes: int = MOST_PREPARED_BYTES,
    ):
        self.offer, self.timeout_seconds = offer, timeout_seconds
        self.halves = None if prepared is None else Halves(offer, prepared, most_prepared_bytes)
        self.limits = limits or Limits()
        self.listener = Listener(host, port, tls)
        self.address = self.listener.address
        self.turns = turns or Turns()
        self._report, self._json_log = report, json_log
        self._accounts = Accounts(self.limits)
        self._lock = threading.Lock()
        self._waiting: dict[socket.socket, str] = {}
        self._channels: set[Channel] = set()
        self._closed = self._draining = False
        self._tunnels: set[ServerTunnel] = set()

    def serve_forever(self):
        """Until it is closed."""
        while True:
            try:
                connection = self.listener.accept()
            except OSError as error:
                if self._closed:
                    return
                self._say("-", f"no connection can be accepted now: {error.strerror}")
                time.sleep(1)
                continue
            self._admit(connection)
            try:
                threading.Thread(target=self._greet, args=(connection,), daemon=True).start()
            except RuntimeError:  # the system has no more threads
                self._say("-", "no thread can be started now")
                self._leave(connection)
                connection.close()

    def close(self):
        """Ends all that goes on, and waits a little until nothing is left of an inference."""
        with self._lock:
            self._closed = True
            channels = list(self._channels)
        self.listener.close()
        for channel in channels:
            shut_down(channel.connection)
        self.turns.wait_until_idle(PARTING_SECONDS)

    def drain(self, seconds: float):
        """
        Lets the answers that are being computed end, and begins no others.

        Args:
            seconds (`float`): After which it waits no longer.
        """
        self._draining = True
        self.turns.close()
        threading.Thread(target=self.serve_forever, daemon=True).start()  # engines that have begun need their streams
        self._say("-", f"ends; {self.turns.active} answers may take {seconds:g} s more")
        self.turns.wait_until_idle(seconds)

    def state(self) -> dict:
        """What may be known of it at any time."""
        turns = self.turns
        status = "draining" if self._draining else "ok"
        return {"status": status, "workers": turns.workers, "active": turns.active, "waiting": turns.waiting}

    def _say(self, who: str, line: str, **facts: float):
        """A line about somebody: an address, and after a space the beginning of a certificate's hash."""
        if self._json_log:
            self._report(json_line(line, who, **facts))
        else:
            self._report(f"{datetime.now():%Y-%m-%d %H:%M:%S} {who} {line}")

    def _admit(self, connection: socket.socket):
        """
        Gives a connection a slot for its greeting. If all are taken, the oldest connection ends of the address that
        has most of them: who says nothing keeps nobody waiting.
        """
        with self._lock:
            if len(self._waiting) >= MAX_GREETINGS:
                hosts = Counter(address.rpartition(":")[0] for address in self._waiting.values())
                (most, _), *_ = hosts.most_common(1)
                oldest = next(each for each, address in self._waiting.items() if address.rpartition(":")[0] == most)
                del self._waiting[oldest]
                shut_down(oldest)
            self._waiting[connection] = _address_of(connection)

    def _leave(self, connection: socket.socket):
        with self._lock:
            self._waiting.pop(connection, None)

    def _greet(self, connection: socket.socket):
        address, slots = _address_of(connection), [connection]

        def replace(secured: socket.socket):
            slots.append(secured)
            self._replace(connection, secured)

        try:
            channel = self.listener.welcome(connection, replace)
            with self._heard(channel):
                by_address = address.startswith(channel.peer)
                self._hear(channel, address if by_address else f"{address} {channel.peer[:PEER_CHARACTERS]}")
        except (PrivateInferenceError, OSError) as error:
            self._say(address, f"a connection was refused: {one_line(error)}")
        finally:
            for slot in slots:
                self._leave(slot)

    def _replace(self, connection: socket.socket, secured: socket.socket):
        """A connection of TLS takes the slot of the one beneath it, or ends if that one has lost it."""
        with self._lock:
            if connection in self._waiting:
                self._waiting[secured] = self._waiting.pop(connection)
            else:
                shut_down(secured)

    @contextlib.contextmanager
    def _heard(self, channel: Channel) -> Iterator[None]:
        """Within, [`Server.close`] ends the connection."""
        with self._lock:
            self._channels.add(channel)
            if self._closed:
                shut_down(channel.connection)
        try:
            yield
        finally:
            self._leave(channel.connection)
            with self._lock:
                self._channels.discard(channel)

    def _hear(self, channel: Channel, who: str):
        try:
            with channel.telling(SERVER_NAME):
                first = channel.receive(HANDSHAKE_SECONDS, ("hello", "stream"))
                if first["kind"] == "stream":
                    self._attach(channel, first)
                    return
                self._serve(channel, who, first)
        except (PrivateInferenceError, OSError) as error:
            if not self._closed:
                self._say(who, f"an inference ended early: {one_line(error)}")
        channel.close()

    def _attach(self, channel: Channel, message: dict):
        token = str(message.get("session")).encode()
        with self._lock:
            tunnels = list(self._tunnels)
        for tunnel in tunnels:
            if secrets.compare_digest(token, tunnel.session_token.encode()):
                tunnel.attach(channel, message.get("direction"))
                return
        raise PrivateInferenceError("a stream belongs to no inference.")

    def _serve(self, channel: Channel, who: str, hello: dict):
        if hello.get("version") != PROTOCOL_VERSION:
            raise PrivateInferenceError(f"version {PROTOCOL_VERSION} is spoken here: install the same entropy-gpt.")
        channel.send({"kind": "terms", **self.offer.terms(), "store": self.halves and self.halves.name})
        try:
            message = channel.receive(HANDSHAKE_SECONDS, ("request",))
        except ClosedError:
            self._say(who, "left without a request")
            return
        self._leave(channel.connection)

        def announce(before: int, seconds: int):
            channel.send({"kind": "waiting", "before": before, "seconds": seconds})

        with self.turns.turn(channel.peer, announce), contextlib.ExitStack() as taken:
            asked = self._read_request(channel, message, taken)
            with self._opened(channel, asked[1]) as session:

                def take_another(index: int) -> str | None:
                    return self._take_another(session, channel, taken)

                wants = channel if message.get("tables") is True else None
                self._answer(session, who, *asked, take_another, wants)
                while message := self._next_request(session, asked[1]):
                    taken.close()
                    asked = self._read_request(channel, message, taken)
                    channel.send({"kind": "accepted", "positions": asked[1].positions})
                    self._answer(session, who, *asked, take_another)

    def _read_request(
        self, channel: Channel, message: dict, taken: contextlib.ExitStack
    ) -> tuple[Request, Use, Limits]:
        """
        A client's request. What it takes out of the store is dropped when `taken` closes.

        Raises:
            `PrivateInferenceError`: If the model can't answer so much, or the client has not so much left.
        """
        asked = {name: self._number(message, name) for name in ("length", "new_tokens", "answers")}
        asked["drafts"] = self._number({"drafts": 0} | message, "drafts", 0)
        check_request(self.offer.config, self.offer.settings, **asked)
        length, new_tokens, answers, drafts = asked.values()
        prepares = message.get("prepares") is True
        name = None if prepares else message.get("preparation")
        if drafts and (prepares or name is not None):
            raise PrivateInferenceError("drafts are verified in one phase: no preparation is made for their passes.")
        if self.halves is None and (prepares or name is not None):
            raise PrivateInferenceError("no preparations are kept here (serve --prepared).")
        use, left = self._accounts.open(channel.peer, least_positions(**asked), new_tokens * (drafts + 1), drafts)
        if drafts:  # however it ends, and if it never begins
            taken.callback(use.settle, new_tokens)
        if prepares:
            use.positions = 0
            taken.enter_context(self.halves.reserved(channel.peer, pass_spans(length, new_tokens, answers)))
        most, limit = min((left.answers, "--max-new-tokens"), (left.positions, "--max-positions"))
        half = None if name is None else str(self.halves.take(name, channel.peer, taken))
        return Request(**asked, most_positions=most, limit=limit, prepares=prepares, preparation=half), use, left

    def _take_another(self, session: Session, channel: Channel, taken: contextlib.ExitStack) -> str | None:
        """This side's half of the preparation that the client would use for the rest of an answer, if it is here."""
        while (name := session.hear_of_another()) is not None:
            try:
                half = self.halves.take(name, channel.peer, taken)
            except LostHalfError:
                channel.send({"kind": "another", "preparation": None})
                continue
            channel.send({"kind": "another", "preparation": name})
            return str(half)
        return None

    @staticmethod
    def _number(request: dict, name: str, least: int = 1) -> int:
        value = request.get(name)
        if type(value) is not int or not least <= value <= LARGEST["n_positions"]:
            raise PrivateInferenceError(f"{name} is no number from {least} to {LARGEST['n_positions']:,}.")
        return value

    @contextlib.contextmanager
    def _opened(self, channel: Channel, use: Use) -> Iterator[Session]:
        """An engine for a client, for as long as its connection lasts."""
        token, own_port = secrets.token_hex(32), free_port()
        job = Job(
            rank=SERVER,
            config=ProgramConfig.of(self.offer.config),
            settings=self.offer.settings,
            timeout_seconds=self.timeout_seconds,
            store=self.halves and str(self.halves.store.folder),
            owner=channel.peer,
        )
        tunnel = ServerTunnel(token, own_port)
        with self._lock:
            self._tunnels.add(tunnel)
        try:
            channel.send({"kind": "accepted", "session": token, "positions": use.positions})
            session = Session(job, self.offer.weights, channel, tunnel, own_port)
            # The client hears the reason before engine and streams end, which it would take for the reason.
            with contextlib.closing(session), channel.telling(SERVER_NAME):
                yield session
        finally:
            with self._lock:
                self._tunnels.discard(tunnel)
            tunnel.close()

    def _next_request(self, session: Session, use: Use) -> dict | None:
        """
        The client's next request on its connection, if there is one. The engine is kept for it, at the client's
        expense, until another client wants it, however soon the request comes.

        Raises:
            `PrivateInferenceError`: If the client's turn is over.
        """
        began, message = time.monotonic(), None
        while True:
            if self.turns.waiting or self._draining or use.kept_seconds > KEPT_SECONDS:
                raise PrivateInferenceError(
                    "the turn is over, or no further prompt came in time: connect again.", TURN_OVER
                )
            if message is not None:
                return message
            try:
                message = session.events.expect(KEPT_CHECK_SECONDS, "peer's request")
            except ClosedError:
                return None
            except SilenceError:
                pass
            finally:
                use.kept_seconds = time.monotonic() - began

    def _answer(
        self,
        session: Session,
        who: str,
        request: Request,
        use: Use,
        left: Limits,
        take_another: Callable[[int], str | None],
        wants: Channel | None = None,
    ):
        """To a client that wants the tables, they go first, over its channel."""
        asks = "prepares" if request.prepares else "asks for"
        prepared = " (prepared)" if request.preparation else ""
        tokens = "token" if request.new_tokens == 1 else "tokens"
        asked = {"new_tokens": request.new_tokens, "prompt_tokens": request.length, "positions": request.answers}
        drafts = f", with {request.drafts} drafts a pass" if request.drafts else ""
        self._say(who, f"{asks} {request.new_tokens} {tokens} after {request.length}{drafts}{prepared}", **asked)
        began = use.running_since = time.monotonic()

        def note(event: dict):
            if event["event"] == "pass":
                use.note_pass(event["answers"])
            elif event["event"] == "repeat":
                self._say(who, "had an answer out of range, and has it repeated")

        try:
            if wants is not None:
                self._send_tables(wants, who, left.seconds)
            seconds = left.seconds - (time.monotonic() - began)
            outcome = session.answer(request, note, seconds, take_another=take_another)
        finally:
            use.seconds, use.running_since = time.monotonic() - began, None
            if request.drafts:
                use.settle(request.new_tokens)
        total = sum(cost.total_bytes for cost in outcome.steps) / MEGA
        line = f"was answered in {use.seconds:.1f} s; {total:.1f} MB went over the link after the set-up"
        self._say(who, line, seconds=round(use.seconds, 3), megabytes=round(total, 3))

    def _send_tables(self, channel: Channel, who: str, seconds: float):
        """
        Raises:
            `PrivateInferenceError`: If they are no client's, or the client takes too long for them.
        """
        if self.offer.settings.embedding != "client_table":
            raise PrivateInferenceError("no embeddings are sent here (--embedding client_table).")
        content = b"".join(
            encode_table(self.offer.weights[name], table.precision) for name, table in self.offer.tables.items()
        )
        channel.send_bytes(content, seconds)
        megabytes = len(content) / MEGA
        self._say(who, f"was sent the embeddings, {megabytes:.1f} MB", megabytes=round(megabytes, 3))


def json_line(event: str, who: str = "-", **facts: float) -> str:
    """What happened, for a log that programs read: `who` is an address, and after a space a client's certificate."""
    address, _, certificate = who.partition(" ")
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    client = certificate or address.rpartition(":")[0] or "-"
    return json.dumps({"time": now, "client": client, "address": address, "event": event} | facts)


def _address_of(connection: socket.socket) -> str:
    try:
        host, port = connection.getpeername()[:2]
    except OSError:  # it is gone already
        return "-"
    return f"{host}:{port}"
