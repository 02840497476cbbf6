"""A client of a private model: one connection for many prompts, which stay on this machine."""

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast
from transformers.generation import BaseStreamer

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.channel import (
    NO_HALF,
    TURN_OVER,
    RefusalError,
    TLSFiles,
    check_plain_allowed,
    parse_address,
)
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.drafts import ACCEPTED, NOT_PREPARED
from entropy_gpt.evaluation.private_inference.parties.engine import check_engine
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.sampling import Sampling
from entropy_gpt.evaluation.private_inference.parties.session import Outcome
from entropy_gpt.evaluation.private_inference.program.range_report import FRACTION_BITS
from entropy_gpt.evaluation.private_inference.program.settings import PARTIES, PrivateSettings
from entropy_gpt.training.model_tokenizer import hash_vocabulary
from entropy_gpt.training.progress import SILENT, Progress
from entropy_gpt.training.tokenizer import load_tokenizer

from .options import check_positive, read_options, with_argument_names
from .private_answer import PrivateAnswer, answer_question, tokenize
from .private_drafts import DraftOptions, LoadedDrafts, load_drafts


DEFAULT_TIMEOUT = 600
# Connections that are tried, each with a preparation that has lost its other half, until an error says so.
MOST_TRIES = 17
Tokenizer = str | Path | PreTrainedTokenizerFast


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
        public_checkpoint (`str` or `Path`, *optional*):
            For a server with public embeddings: this side's copy of their checkpoint, a folder or a repository on the
            Hub.
        timeout (`int`): Seconds without any event after which the client gives up.
        prepared (`str` or `Path`, *optional*):
                Folder for its halves of preparations. The smallest that fits a prompt is used up.
        require_prepared (`bool`): Whether to fail if none fits.
        draft (`str` or `Path`, *optional*):
            A causal language model of one's own, with the server's tokenizer: a folder, or a repository on the Hub. It
            drafts tokens, which the server's model verifies several at a time. The answer is the same.
        draft_tokens (`int`, *optional*): The most drafts that are verified at once; 8 by default.
        draft_keep (`str`): "accepted" or "prompt": what is kept after each pass, as of [`Drafts`].

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

    @with_argument_names
    def __init__(
        self,
        address: str,
        *,
        tokenizer: Tokenizer | None = None,
        tls: TLSFiles | None = None,
        insecure: bool = False,
        protocol: str = "cheetah",
        public_checkpoint: str | Path | None = None,
        timeout: int = DEFAULT_TIMEOUT,
        prepared: str | Path | None = None,
        require_prepared: bool = False,
        draft: str | Path | None = None,
        draft_tokens: int | None = None,
        draft_keep: str = ACCEPTED,
    ):
        check_engine()
        check_positive(timeout=timeout)
        self._draft = _load_drafts(draft, require_prepared, draft_tokens=draft_tokens, draft_keep=draft_keep)
        if require_prepared and prepared is None:
            raise UserError("--require-prepared needs the folder of preparations: give --prepared DIR.")
        self._require_prepared = require_prepared
        self.host, port = parse_address(address)
        check_connection(self.host, tls, insecure, read_settings(protocol=protocol))
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(expanded(tokenizer))
        self.tokenizer = tokenizer
        folder = prepared and Path(expanded(prepared))
        self._connect = lambda: Client(self.host, port, tls, timeout, protocol, folder, public_checkpoint)
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

    @with_argument_names
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
        with _streaming(streamer) as put:
            check_positive(max_new_tokens=max_new_tokens)
            sampling = read_options(Sampling, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
            _check_drawing(sampling)
            drafts = self._draft and self._draft.drafts
            question = Question(self._read_prompt(prompt), max_new_tokens, sampling=sampling, drafts=drafts)
            put([question.prompt])
            network = f"TCP to {self.host}"
            _, answer = answer_question(self, self.tokenizer, question, network, progress, lambda token: put([token]))
        return answer

    def ask(self, question: Question, on_event: Callable[[dict], None] = lambda event: None) -> Outcome:
        """
        The answer in tokens, with its logits; as of [`Client.ask`]. A connection that was open before, and ends before
        the server has accepted the prompt, is made anew.

        Raises:
            `PrivateInferenceError`: As [`Client.ask`].
        """
        question.check(self.terms)

        def ask(connection: Client, note: Callable[[dict], None]) -> Outcome:
            return connection.ask(question, note, require_prepared=self._require_prepared)

        with self._lock:
            return self._try_again(ask, on_event)

    def _try_again(
        self, ask: Callable[[Client, Callable[[dict], None]], Outcome], on_event: Callable[[dict], None]
    ) -> Outcome:
        """Asks on the connection, and again on a new one as long as [`_is_worth_another`] says so."""
        was_open, accepted, tries = self._connection is not None, threading.Event(), 0

        def note(event: dict):
            if event["event"] == "accepted":
                accepted.set()
            on_event(event)

        while True:
            tries += 1
            try:
                return ask(self._connected(), note)
            except BaseException as error:
                self._disconnect()
                if tries == MOST_TRIES or accepted.is_set() or not _is_worth_another(error, was_open):
                    raise
            was_open = False

    def prepare(
        self,
        length: int,
        new_tokens: int = 1,
        on_event: Callable[[dict], None] = lambda event: None,
        answers: int = 1,
    ) -> Outcome:
        """
        Does with the server all of a later answer that needs no prompt; as of [`Client.prepare`].

        Raises:
            `UserError`: If the server keeps none, or does not answer.
        """
        check_positive(tokens=length, max_new_tokens=new_tokens)
        with self._lock:
            if self.terms.store is None:
                raise UserError("this server keeps no preparations: it has to be run with serve --prepared.")
            return self._try_again(
                lambda connection, note: connection.prepare(length, new_tokens, answers, note), on_event
            )

    def _connected(self) -> Client:
        if self._connection is None:
            connection = self._connect()
            self._compare_tokenizers(connection)
            self._connection, self.terms = connection, connection.terms
        return self._connection

    def _compare_tokenizers(self, connection: Client):
        vocab_size = connection.terms.config.vocab_size
        try:
            if self.tokenizer is not None:
                connection.check_tokenizer(hash_vocabulary(self.tokenizer, vocab_size))
            if self._draft is not None:
                of_draft = hash_vocabulary(self._draft.tokenizer, vocab_size)
                connection.check_tokenizer(of_draft, "the draft model's tokenizer", "Give another model with --draft.")
        except PrivateInferenceError:
            connection.close()
            raise

    def _disconnect(self):
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            try:
                return [operator.index(token) for token in prompt]
            except TypeError as error:
                raise UserError("a prompt is one text, or a list of tokens, which are integers.") from error
        if self.tokenizer is None:
            raise UserError("this client has no tokenizer: give the prompt as tokens, or name one with --tokenizer.")
        return tokenize(prompt, self.tokenizer)


def _load_drafts(draft: str | Path | None, require_prepared: bool, **options: int | str | None) -> LoadedDrafts | None:
    """
    Raises:
        `UserError`: As [`load_drafts`], and if options are for what is not asked for.
    """
    read = read_options(DraftOptions, **options)
    if draft is None:
        if read != DraftOptions():
            raise UserError("--draft-tokens and --draft-keep are for drafts: give a model with --draft.")
        return None
    if require_prepared:
        raise UserError(NOT_PREPARED)
    return load_drafts(draft, read)


def _check_drawing(sampling: Sampling):
    """
    Raises:
        `UserError`: If it says how to draw tokens, and none are drawn.
    """
    given = {"--top-k": sampling.top_k, "--top-p": sampling.top_p < 1 or None, "--seed": sampling.seed}
    if not sampling.temperature and (names := [name for name, value in given.items() if value is not None]):
        raise UserError(f"{names[0]} is for tokens that are drawn: give a --temperature above 0 too.")


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


def _is_worth_another(error: BaseException, was_open: bool) -> bool:
    """
    Whether a new connection may do what this one has not: this one was open before and is at its end, or half of a
    preparation is lost. What a server refuses otherwise is not repeated.
    """
    if not isinstance(error, PrivateInferenceError):
        return False
    ended = error.code == TURN_OVER or not isinstance(error, RefusalError)
    return error.code == NO_HALF or (was_open and ended)


@contextlib.contextmanager
def _streaming(streamer: BaseStreamer | None) -> Iterator[Callable[[list], None]]:
    """What gives a streamer tokens, and in the end its end, also where the answer fails: somebody may wait for it."""
    if streamer is None:
        yield lambda tokens: None
        return
    try:
        yield lambda tokens: streamer.put(torch.tensor(tokens))
    finally:
        streamer.end()
