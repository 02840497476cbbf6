"""A client of a private model: one connection for many prompts, which stay on this machine."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic.dataclasses import dataclass
from transformers import PreTrainedTokenizerFast
from transformers.generation import BaseStreamer

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.json_records import RECORD, StoredRecord
from entropy_gpt.evaluation.private_inference.parties.channel import (
    NO_HALF,
    TURN_OVER,
    RefusalError,
    TLSFiles,
    check_plain_allowed,
    parse_address,
)
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.engine import check_engine
from entropy_gpt.evaluation.private_inference.parties.sampling import GREEDY, Sampling
from entropy_gpt.evaluation.private_inference.parties.session import (
    Outcome,
    check_prompt,
    check_request,
    check_sampling,
)
from entropy_gpt.evaluation.private_inference.parties.terms import Terms
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost, StepCost
from entropy_gpt.evaluation.private_inference.program.range_report import FRACTION_BITS
from entropy_gpt.evaluation.private_inference.program.settings import PARTIES, PrivateSettings
from entropy_gpt.evaluation.records.results import AnswerCheck
from entropy_gpt.training.model_tokenizer import hash_vocabulary
from entropy_gpt.training.progress import SILENT, Progress, Stage
from entropy_gpt.training.tokenizer import load_tokenizer

from .options import check_positive, read_options, with_argument_names


DEFAULT_TIMEOUT = 600
# Preparations that have lost their other half, one after another, until an error says so.
MOST_LOST = 16
Tokenizer = str | Path | PreTrainedTokenizerFast


@dataclass(config=RECORD)
class PrivateAnswer(StoredRecord):
    """
    The client's answer as text, with its check and its cost.

    Args:
        text (`str`): The continuation of the prompt; empty for a client without a tokenizer.
        check ([`AnswerCheck`], *optional*): How it compares with the model in the clear, if that is at hand.
        seconds (`float`): Wall-clock time, including compilation and set-up.
        cost ([`InferenceCost`]): The cost by the client's count.
        repeats (`int`): How many tokens were out of range and computed again.
        tokens (`list[int]`): Those of the continuation.
    """

    KIND = "a private answer"
    SCHEMA_VERSION = 5

    text: str
    check: AnswerCheck | None
    seconds: float
    cost: InferenceCost
    repeats: int = 0
    tokens: list[int] = field(default_factory=list)

    @classmethod
    def migrate(cls, content: dict, version: int) -> dict | None:
        """Version 3 had no `repeats`, version 4 no `tokens`."""
        return content if version in (3, 4) else None


class Asked(Protocol):
    """Whom a prompt can be put to: a [`PrivateClient`], or the [`Client`] of one connection."""

    terms: Terms

    def ask(
        self,
        prompt: list[int],
        new_tokens: int = 1,
        answers: int = 1,
        on_event: Callable[[dict], None] = lambda event: None,
        sampling: Sampling = GREEDY,
    ) -> Outcome: ...


class PrivateClient:
    """
    Asks a private server, one prompt after another over one connection. If the connection breaks, or the server ends
    it between two prompts, the next prompt makes it anew. Prompts of several threads wait for one another.

    Args:
        address (`str`): `HOST:PORT` of the server.
        tokenizer (`str`, `Path` or `PreTrainedTokenizerFast`, *optional*):
            The server's tokenizer: a folder, a repository on the Hub, or loaded. Prompts are tokens without it.
        tls ([`TLSFiles`], *optional*): This side's certificate and key. Required beyond the loopback.
        insecure (`bool`): Allow plain TCP beyond the loopback.
        protocol (`str`): The only protocol that the client accepts.
        timeout (`int`): Seconds without any event after which the client gives up.
        prepared (`str` or `Path`, *optional*): Folder of [`prepare`]; the smallest preparation that fits is used up.
        require_prepared (`bool`): Whether to fail if none fits.

    Attributes:
        terms ([`Terms`]): What the server offers.
        tokenizer (`PreTrainedTokenizerFast`, *optional*): As given.

    Raises:
        `UserError`: If there is no server, its tokenizer is another, or a value can't be used.

    Example:

    ```python
    from entropy_gpt import PrivateClient

    with PrivateClient("127.0.0.1:9000", tokenizer="runs/proposal/model") as client:
        for prompt in ("def main(", "import "):
            print(client.generate(prompt, max_new_tokens=3).text)
    ```
    """

    def __init__(
        self,
        address: str,
        *,
        tokenizer: Tokenizer | None = None,
        tls: TLSFiles | None = None,
        insecure: bool = False,
        protocol: str = "cheetah",
        timeout: int = DEFAULT_TIMEOUT,
        prepared: str | Path | None = None,
        require_prepared: bool = False,
    ):
        check_engine()
        check_positive(timeout=timeout)
        if require_prepared and prepared is None:
            raise UserError("--require-prepared needs the folder of preparations: give --prepared DIR.")
        self._require_prepared = require_prepared
        self.host, port = parse_address(address)
        check_connection(self.host, tls, insecure, read_settings(protocol=protocol))
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(expanded(tokenizer))
        self.tokenizer = tokenizer
        folder = prepared and expanded(prepared)
        self._connect = lambda: Client(self.host, port, tls, timeout, protocol, folder)
        self._connection: Client | None = None
        self._lock = threading.Lock()
        self.terms = self._connected().terms

    def __enter__(self) -> "PrivateClient":
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Ends the connection. A further prompt would make another one."""
        with self._lock:
            self._disconnect()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 1,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        progress: Progress = SILENT,
    ) -> PrivateAnswer:
        """
        Continues a prompt.

        Args:
            prompt (`str` or `Sequence[int]`): Text, or tokens.
            max_new_tokens (`int`): Tokens of the answer; their number is public, and all are computed.
            temperature, top_k, top_p, seed: How tokens are chosen, as of [`Sampling`]; by default, the most likely.
            streamer (`BaseStreamer`, *optional*):
                One of transformers, such as `TextStreamer(client.tokenizer)`. It receives the prompt's tokens
                `(1, length)` first, then each new token `(1,)`.
            progress (`Progress`): Receives one stage, with a unit for each step.

        Raises:
            `UserError`: If the server does not answer, or a value can't be used.
        """
        check_positive(max_new_tokens=max_new_tokens)
        sampling = read_options(Sampling, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        tokens = self._read_prompt(prompt)
        with _streaming(streamer, tokens) as put:
            _, answer = answer_prompt(
                self, self.tokenizer, tokens, max_new_tokens, f"TCP to {self.host}", progress, put, sampling
            )
        return answer

    def ask(
        self,
        prompt: list[int],
        new_tokens: int = 1,
        answers: int = 1,
        on_event: Callable[[dict], None] = lambda event: None,
        sampling: Sampling = GREEDY,
    ) -> Outcome:
        """
        The continuation of a prompt in tokens, with its logits; as of [`Client.ask`]. A connection that was open
        before, and ends before the server has accepted the prompt, is made anew.

        Raises:
            `PrivateInferenceError`: As [`Client.ask`].
        """
        self.check(prompt, new_tokens, answers, sampling)

        def ask(connection: Client, note: Callable[[dict], None]) -> Outcome:
            return connection.ask(prompt, new_tokens, answers, note, sampling, require_prepared=self._require_prepared)

        with self._lock:
            return self._try_again(ask, on_event)

    def check(self, prompt: list[int], new_tokens: int, answers: int, sampling: Sampling = GREEDY):
        """
        Raises:
            `PrivateInferenceError`: If the model can't answer this, whatever becomes of the connection.
        """
        check_request(self.terms.config, self.terms.settings, len(prompt), new_tokens, answers)
        check_sampling(self.terms.settings, sampling)
        check_prompt(prompt, self.terms.config.vocab_size)

    def _try_again(self, ask: Callable[[Client, Callable[[dict], None]], Outcome], on_event: Callable[[dict], None]):
        """
        Asks on the connection, and a second time on a new one if that was open before and is at its end; and again as
        long as half of a preparation is lost. What a server has accepted, or refuses otherwise, is not repeated.
        """
        was_open, accepted = self._connection is not None, threading.Event()

        def note(event: dict):
            if event["event"] == "accepted":
                accepted.set()
            on_event(event)

        for _ in range(MOST_LOST):
            try:
                return self._once(ask, note)
            except PrivateInferenceError as error:
                ended = was_open and (error.code == TURN_OVER or not isinstance(error, RefusalError))
                if accepted.is_set() or not (ended or error.code == NO_HALF):
                    raise
            was_open = False
        return self._once(ask, on_event)

    def _once(self, ask: Callable[[Client, Callable[[dict], None]], Outcome], on_event: Callable[[dict], None]):
        try:
            return ask(self._connected(), on_event)
        except BaseException:
            self._disconnect()
            raise

    def prepare(
        self,
        length: int,
        new_tokens: int = 1,
        on_event: Callable[[dict], None] = lambda event: None,
        answers: int = 1,
    ) -> Outcome:
        """
        Makes a preparation; as of [`Client.prepare`].

        Raises:
            `UserError`: If the server keeps none, or does not answer.
        """
        with self._lock:
            if self.terms.store is None:
                raise UserError("this server keeps no preparations: it has to be run with serve --prepared.")
            return self._try_again(
                lambda connection, note: connection.prepare(length, new_tokens, answers, note), on_event
            )

    def _connected(self) -> Client:
        if self._connection is None:
            connection = self._connect()
            if self.tokenizer is not None:
                self._compare_tokenizer(connection)
            self._connection, self.terms = connection, connection.terms
        return self._connection

    def _compare_tokenizer(self, connection: Client):
        try:
            connection.check_tokenizer(hash_vocabulary(self.tokenizer, connection.terms.config.vocab_size))
        except PrivateInferenceError:
            connection.close()
            raise

    def _disconnect(self):
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise UserError("this client has no tokenizer: give the prompt as tokens, or name one with --tokenizer.")
        return tokenize(prompt, self.tokenizer)


@with_argument_names
def ask(
    prompt: str,
    address: str,
    *,
    tokenizer: str | Path,
    tls: TLSFiles | None = None,
    insecure: bool = False,
    new_tokens: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    protocol: str = "cheetah",
    timeout: int = DEFAULT_TIMEOUT,
    prepared: str | Path | None = None,
    require_prepared: bool = False,
    progress: Progress = SILENT,
) -> PrivateAnswer:
    """
    Asks a server to continue one prompt. The prompt stays on this machine, and so does how tokens are chosen.

    Args:
        prompt (`str`): The prompt.
        address, tokenizer, tls, insecure, protocol, timeout, prepared, require_prepared: As of [`PrivateClient`].
        new_tokens (`int`): Tokens of the answer; their number is public.
        temperature, top_k, top_p, seed: As of [`PrivateClient.generate`].
        progress (`Progress`): Receives one stage, with a unit for each step.

    Raises:
        `UserError`: If the server does not answer, or a value can't be used.

    Example:

    ```python
    from entropy_gpt.workflows.private_client import ask

    answer = ask("def main(", "127.0.0.1:9000", tokenizer="runs/proposal/model", new_tokens=3)
    print(answer.text, answer.cost.total_bytes)
    ```
    """
    check_positive(max_new_tokens=new_tokens)
    options = {"tls": tls, "insecure": insecure, "protocol": protocol, "timeout": timeout}
    options |= {"prepared": prepared, "require_prepared": require_prepared}
    with PrivateClient(address, tokenizer=tokenizer, **options) as client:
        return client.generate(
            prompt,
            max_new_tokens=new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            progress=progress,
        )


@with_argument_names
def prepare(
    address: str,
    *,
    tokenizer: str | Path,
    prepared: str | Path,
    tokens: int = 128,
    new_tokens: int = 1,
    count: int = 1,
    tls: TLSFiles | None = None,
    insecure: bool = False,
    protocol: str = "cheetah",
    timeout: int = DEFAULT_TIMEOUT,
    progress: Progress = SILENT,
) -> list[list[StepCost]]:
    """
    Does with a server all of later answers that needs no prompt. Each serves one prompt and answer, these long or
    shorter. What is whole stays if it is interrupted.

    Args:
        address, tokenizer, tls, insecure, protocol, timeout: As of [`PrivateClient`].
        prepared (`str` or `Path`): Folder for this side's halves.
        tokens (`int`): Tokens of the prompt, at most.
        new_tokens (`int`): Tokens of the answer, at most.
        count (`int`): How many to make.
        progress (`Progress`): Receives one stage for each, with a unit for each step.

    Returns:
        `list[list[StepCost]]`: What each took.

    Raises:
        `UserError`: If the server does not answer or keeps no preparations, or a value can't be used.
    """
    check_positive(tokens=tokens, max_new_tokens=new_tokens, count=count)
    options = {"tls": tls, "insecure": insecure, "protocol": protocol, "timeout": timeout, "prepared": prepared}
    made = []
    with PrivateClient(address, tokenizer=tokenizer, **options) as client:
        for number in range(count):
            with progress.stage(f"preparing {number + 1} of {count}") as line:
                line.say("both sides compile the program")
                made.append(client.prepare(tokens, new_tokens, partial(show_event, line=line)).steps)
    return made


def answer_prompt(
    client: Asked,
    words: PreTrainedTokenizerFast | None,
    tokens: list[int],
    new_tokens: int,
    network: str,
    progress: Progress = SILENT,
    put: Callable[[int], None] = lambda token: None,
    sampling: Sampling = GREEDY,
) -> tuple[Outcome, PrivateAnswer]:
    """
    Has a prompt continued.

    Args:
        client ([`Asked`]): Who asks the server.
        words (`PreTrainedTokenizerFast`, *optional*): Makes text of the answer.
        tokens (`list[int]`): The prompt's.
        new_tokens (`int`): Tokens of the answer.
        network (`str`): What connects the parties, for the record.
        progress (`Progress`): Receives one stage.
        put (`Callable`): Receives each new token.
        sampling ([`Sampling`]): How tokens are chosen.
    """
    started = time.perf_counter()
    with progress.stage("answering privately") as line:
        line.say("both sides compile the program")

        def follow(event: dict):
            show_event(event, line)
            if event["event"] == "token":
                put(event["token"])

        outcome = client.ask(tokens, new_tokens, on_event=follow, sampling=sampling)
    answer = PrivateAnswer(
        text=words.decode(outcome.tokens) if words else "",
        check=None,
        seconds=time.perf_counter() - started,
        cost=outcome.cost(client.terms, len(tokens), new_tokens, network),
        repeats=outcome.repeats.total(),
        tokens=outcome.tokens,
    )
    return outcome, answer


def show_event(event: dict[str, Any], line: Stage):
    """Reports an event of [`Client.ask`] to a stage: the number of steps, and each step with its layer."""
    if event["event"] == "unprepared":
        line.say("no preparation fits: all of it is computed now")
    elif event["event"] == "waiting":
        line.say(f"the server is busy; clients before this one: {event['before']}")
    elif event["event"] == "program":
        line.reach(0, event["steps"])
    elif event["event"] == "step":
        layer = "" if event["cost"]["layer"] is None else f"layer {event['cost']['layer']}, "
        line.say(layer + event["cost"]["operation"])
        line.advance()


def tokenize(prompt: str, words: PreTrainedTokenizerFast) -> list[int]:
    """
    Raises:
        `PrivateInferenceError`: If there are no tokens.
    """
    tokens = words(prompt)["input_ids"]
    if not tokens:
        raise PrivateInferenceError("the prompt is empty: give some text.")
    return tokens


def read_settings(**settings: str | int) -> PrivateSettings:
    """Settings for two parties; other protocols run only in one process."""
    read = read_options(PrivateSettings, **settings)
    if read.fraction_bits not in FRACTION_BITS:
        raise UserError(
            f"--fraction-bits {read.fraction_bits} is not from {FRACTION_BITS[0]} to {FRACTION_BITS[-1]}: fewer leave "
            "no precision, and more no room before the point."
        )
    if PARTIES[read.protocol] != 2:
        two = " or ".join(name for name, parties in PARTIES.items() if parties == 2)
        raise UserError(f"--protocol {read.protocol} is not for two parties: give {two}.")
    return read


def check_connection(host: str, tls: TLSFiles | None, insecure: bool, settings: PrivateSettings):
    """
    Raises:
        `PrivateInferenceError`: If a host beyond this machine is to be reached without TLS.
    """
    if tls is None:
        check_plain_allowed(host, insecure, settings)


@contextlib.contextmanager
def _streaming(streamer: BaseStreamer | None, prompt: list[int]):
    """Gives a streamer the prompt, and its end also where the answer fails: somebody may wait for it."""
    if streamer is None:
        yield lambda token: None
        return
    streamer.put(torch.tensor([prompt]))
    try:
        yield lambda token: streamer.put(torch.tensor([token]))
    finally:
        streamer.end()
