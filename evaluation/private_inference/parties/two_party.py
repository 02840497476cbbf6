"""
A server that holds weights and a client that holds a prompt, in two processes on two machines.

The client connects to the server's one port and learns the terms: architecture, settings, tokenizer's hash. Both then
compile the same program from these public facts, each in a process of its own (`party_process.py`), compare its hash,
and run it; all that the engines send goes through connections the client opens (`tunnel.py`), under TLS.
"""

import contextlib
import math
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter
from safetensors.numpy import save_file

from entropy_gpt.evaluation.errors import EngineError, PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.program import ProgramConfig, weight_shapes
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, RING_BITS, SERVER, TRUST, PrivateSettings
from modeling_entropy_gpt import EntropyGPTConfig

from .channel import Channel, Listener, TLSFiles, clean, connect, shut_down
from .engine import engine_versions
from .party_process import Job
from .session import Outcome, Terms, check_request, free_port, run_party
from .tunnel import ClientTunnel, ServerTunnel


PROTOCOL_VERSION = 3
HANDSHAKE_SECONDS = 30
# The largest model that a client believes in: its memory is not the server's to fill.
LARGEST = {
    "n_layer": 1024,
    "n_head": 1024,
    "n_embd": 2**16,
    "inner_size": 2**18,
    "n_positions": 2**20,
    "vocab_size": 2**22,
}
MOST_WEIGHTS = 2**31
MOST_ITERATIONS = 64
# For which a client is let wait for the one before, whose engine is about to end.
PARTING_SECONDS = 5
# Connections at once about which nothing is known yet, with those of clients; more wait to be accepted.
MAX_GREETINGS = 64


@dataclass(frozen=True)
class Offer:
    """
    What a server offers; its weights are its own, the rest is public.

    Args:
        config ([`EntropyGPTConfig`]), weights (`dict`): Of [`prepare_weights`].
        notation (`str`): The architecture before that, in the paper's notation.
        settings ([`PrivateSettings`]): How it answers.
        tokenizer_hash (`str`): So that a client can compare its own.
    """

    config: EntropyGPTConfig
    weights: dict[str, np.ndarray]
    notation: str
    settings: PrivateSettings
    tokenizer_hash: str

    def terms(self) -> dict:
        """What a client is told."""
        return {
            "version": PROTOCOL_VERSION,
            "versions": engine_versions(),
            "notation": self.notation,
            "program": asdict(ProgramConfig.of(self.config)),
            "settings": asdict(self.settings),
            "tokenizer": self.tokenizer_hash,
        }


class Server:
    """
    Answers one client after another; others learn that it is busy.

    Args:
        offer ([`Offer`]): What it offers.
        host (`str`), port (`int`): Where it listens.
        tls ([`TLSFiles`], *optional*): Without them, whoever is between could listen or change what is sent.
        timeout_seconds (`int`): For which nothing may happen in an inference.
        longest (`int`): New tokens, or positions of the prompt, that a client may have answered.
        report (`Callable`): Told in a line what happens.
    """

    def __init__(
        self,
        offer: Offer,
        host: str,
        port: int,
        tls: TLSFiles | None,
        timeout_seconds: int = 600,
        longest: int = 256,
        report: Callable[[str], None] = print,
    ):
        self.offer, self.timeout_seconds, self.longest, self.report = offer, timeout_seconds, longest, report
        self.listener = Listener(host, port, tls)
        self.address = self.listener.address
        self._busy = threading.Lock()
        self._greetings = threading.Semaphore(MAX_GREETINGS)
        self._lock = threading.Lock()
        self._channels: set[Channel] = set()
        self._closed = False
        self._tunnel: ServerTunnel | None = None

    def serve_forever(self):
        """Until it is closed."""
        while True:
            self._greetings.acquire()
            try:
                connection = self.listener.accept()
            except OSError as error:
                self._greetings.release()
                if self._closed:
                    return
                self.report(f"no connection can be accepted now: {error.strerror}")
                time.sleep(1)
                continue
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def close(self):
        """Ends all that goes on, and waits a little until nothing is left of an inference."""
        with self._lock:
            self._closed = True
            channels = list(self._channels)
        self.listener.close()
        for channel in channels:
            shut_down(channel.connection)
        if self._busy.acquire(timeout=PARTING_SECONDS):
            self._busy.release()

    def _greet(self, connection: socket.socket):
        try:
            channel = self.listener.welcome(connection)
            with self._heard(channel):
                self._hear(channel)
        except (PrivateInferenceError, OSError) as error:
            self.report(f"a connection was refused: {error}")
        finally:
            self._greetings.release()

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
            with self._lock:
                self._channels.discard(channel)

    def _hear(self, channel: Channel):
        try:
            first = channel.receive(HANDSHAKE_SECONDS, ("hello", "stream"))
            if first["kind"] == "stream":
                self._attach(channel, first)
                return
            self._serve(channel, first)
        except (PrivateInferenceError, OSError) as error:
            if not self._closed:
                self.report(f"an inference ended early: {error}")
            self._refuse(channel, error)
        channel.close()

    @staticmethod
    def _refuse(channel: Channel, error: Exception):
        # What this machine lacks is not the client's business.
        told = isinstance(error, PrivateInferenceError) and not isinstance(error, EngineError)
        reason = str(error) if told else "the server failed."
        with contextlib.suppress(PrivateInferenceError):
            channel.send({"kind": "refusal", "reason": reason})

    def _attach(self, channel: Channel, message: dict):
        tunnel, token = self._tunnel, message.get("session")
        known = tunnel is not None and isinstance(token, str) and token.isascii()
        if not known or not secrets.compare_digest(token.encode(), tunnel.session_token.encode()):
            raise PrivateInferenceError("a stream belongs to no inference.")
        tunnel.attach(channel, message.get("direction"))

    def _serve(self, channel: Channel, hello: dict):
        if hello.get("version") != PROTOCOL_VERSION:
            raise PrivateInferenceError(f"version {PROTOCOL_VERSION} is spoken here: install the same entropy-gpt.")
        channel.send({"kind": "terms", **self.offer.terms()})
        request = channel.receive(HANDSHAKE_SECONDS, ("request",))
        length, new_tokens, answers = (self._number(request, name) for name in ("length", "new_tokens", "answers"))
        if (asked := max(new_tokens, answers)) > self.longest:
            raise PrivateInferenceError(f"{asked} answers are asked for; {self.longest} is the most here.")
        check_request(self.offer.config, self.offer.settings, length, new_tokens, answers)
        if not self._busy.acquire(timeout=PARTING_SECONDS):
            raise PrivateInferenceError("the server is busy with another client: try again later.")
        try:
            self._infer(channel, length, new_tokens, answers)
        finally:
            self._busy.release()

    @staticmethod
    def _number(request: dict, name: str) -> int:
        value = request.get(name)
        if type(value) is not int or not 1 <= value <= LARGEST["n_positions"]:
            raise PrivateInferenceError(f"{name} is no number from 1 to {LARGEST['n_positions']:,}.")
        return value

    def _infer(self, channel: Channel, length: int, new_tokens: int, answers: int):
        self.report(f"a client asks for {new_tokens} token(s) after {length}")
        token, own_port = secrets.token_hex(32), free_port()
        self._tunnel = ServerTunnel(token, own_port)
        try:
            with tempfile.TemporaryDirectory(prefix="entropy-gpt-server-") as folder:
                channel.send({"kind": "accepted", "session": token})
                weights = Path(folder) / "weights.safetensors"
                save_file(self.offer.weights, weights)
                job = Job(
                    rank=SERVER,
                    config=ProgramConfig.of(self.offer.config),
                    settings=self.offer.settings,
                    prompt_length=length,
                    new_tokens=new_tokens,
                    answers=answers,
                    timeout_seconds=self.timeout_seconds,
                    weights=weights,
                )
                outcome = run_party(job, channel, self._tunnel, own_port, lambda event: None)
            total = sum(cost.total_bytes for cost in (*outcome.set_up, *outcome.steps)) / 1e6
            self.report(f"answered; {total:.1f} MB went over the link")
        except (PrivateInferenceError, OSError) as error:
            self._refuse(channel, error)  # before the streams end, which the client would take for the reason
            raise
        finally:
            self._tunnel.close()
            self._tunnel = None


class Client:
    """
    One connection to a server: first its terms, then one question.

    Args:
        host (`str`), port (`int`): The server.
        tls ([`TLSFiles`], *optional*): As the server's.
        timeout_seconds (`int`): For which nothing may happen.
        protocol (`str`): What the client agrees to; a server's word alone must not choose one that protects less.

    Raises:
        `PrivateInferenceError`: If there is no server, it breaks rules, or offers another protocol.
    """

    def __init__(
        self, host: str, port: int, tls: TLSFiles | None, timeout_seconds: int = 600, protocol: str = "cheetah"
    ):
        self._connect = lambda: connect(host, port, tls)
        self.timeout_seconds = timeout_seconds
        self.channel = self._connect()
        try:
            self.channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
            self.terms = self._read_terms(self.channel.receive(HANDSHAKE_SECONDS, ("terms",)))
        except PrivateInferenceError:
            self.channel.close()
            raise
        offered = self.terms.settings.protocol
        if offered != protocol:
            self.channel.close()
            raise PrivateInferenceError(
                f"the server offers the protocol {offered}, and {protocol} is asked for: {offered} means "
                f"{TRUST[offered]}. Ask for it with --protocol, if that will do."
            )

    @staticmethod
    def _read_terms(message: dict) -> Terms:
        if message.get("version") != PROTOCOL_VERSION or message.get("versions") != engine_versions():
            raise PrivateInferenceError(
                f"the server runs {clean(message.get('versions'))}, and this side {engine_versions()}: install the "
                "same."
            )
        try:
            settings = TypeAdapter(PrivateSettings).validate_python(message.get("settings"))
            config = TypeAdapter(ProgramConfig).validate_python(message.get("program"))
            notation = TypeAdapter(str).validate_python(message.get("notation"))
            _check_sizes(config, settings)
        except ValueError as error:  # those of pydantic too
            raise PrivateInferenceError(f"the server's terms are broken: {clean(error)}") from error
        return Terms(config, clean(notation), settings, str(message.get("tokenizer")))

    def ask(
        self,
        prompt: list[int],
        new_tokens: int = 1,
        answers: int = 1,
        on_event: Callable[[dict], None] = lambda event: None,
    ) -> Outcome:
        """
        Asks for the continuation of a prompt, and ends the connection.

        Args:
            prompt (`list[int]`): Tokens; they stay here.
            new_tokens (`int`): Number of tokens in the answer; public.
            answers (`int`): Number of last positions of the prompt whose logits are wanted.
            on_event (`Callable`): Told what happens, for progress.

        Raises:
            `PrivateInferenceError`: As [`run_party`], and if the model can't answer so much.
        """
        with contextlib.closing(self):
            check_request(self.terms.config, self.terms.settings, len(prompt), new_tokens, answers)
            request = {"length": len(prompt), "new_tokens": new_tokens, "answers": answers}
            self.channel.send({"kind": "request", **request})
            session = self.channel.receive(HANDSHAKE_SECONDS, ("accepted",)).get("session")
            return self._infer(str(session), prompt, new_tokens, answers, on_event)

    def _infer(
        self, session: str, prompt: list[int], new_tokens: int, answers: int, on_event: Callable[[dict], None]
    ) -> Outcome:
        own_port = free_port()
        with (
            contextlib.closing(ClientTunnel(self._connect, session, own_port)) as tunnel,
            tempfile.TemporaryDirectory(prefix="entropy-gpt-client-") as folder,
        ):
            job = Job(
                rank=CLIENT,
                config=self.terms.config,
                settings=self.terms.settings,
                prompt_length=len(prompt),
                new_tokens=new_tokens,
                answers=answers,
                timeout_seconds=self.timeout_seconds,
                prompt=prompt,
                logits=Path(folder),
            )
            outcome = run_party(job, self.channel, tunnel, own_port, on_event)
            outcome.logits = [np.load(path) for path in sorted(Path(folder).glob("*.npy"), key=_index)]
        return outcome

    def close(self):
        self.channel.close()


def _check_sizes(config: ProgramConfig, settings: PrivateSettings):
    """
    Raises:
        `ValueError`: If there is no such model, or it is larger than a client believes.
    """
    for name, most in LARGEST.items():
        if not 1 <= getattr(config, name) <= most:
            raise ValueError(f"{name} is not from 1 to {most:,}")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd={config.n_embd} is no multiple of n_head={config.n_head}")
    pruned = config.pruned_ffn_layers
    if pruned != sorted({*pruned} & {*range(config.n_layer)}):
        raise ValueError(f"pruned_ffn_layers are not some of the {config.n_layer} layers in their order")
    if not 0 < config.layer_norm_epsilon < math.inf:
        raise ValueError(f"layer_norm_epsilon={config.layer_norm_epsilon} is no small positive number")
    if sum(map(math.prod, weight_shapes(config).values())) > MOST_WEIGHTS:
        raise ValueError(f"there are more than {MOST_WEIGHTS:,} weights")
    if not 1 <= settings.fraction_bits < RING_BITS // 2:
        raise ValueError(f"fraction_bits is not from 1 to {RING_BITS // 2 - 1}")
    for name in ("exponential_squarings", "reciprocal_iterations"):
        if not 0 <= getattr(settings, name) <= MOST_ITERATIONS:
            raise ValueError(f"{name} is not from 0 to {MOST_ITERATIONS}")


def _index(path: Path) -> int:
    return int(path.stem)
