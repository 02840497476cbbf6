"""Private inference: a server with the weights, a client with the prompt, and a demonstration of both."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.json_records import RECORD, StoredRecord
from entropy_gpt.evaluation.measuring.perplexity import Windows
from entropy_gpt.evaluation.private_inference.costs.published_cost import as_private_cost
from entropy_gpt.evaluation.private_inference.inference import NETWORKS, TWO_PARTY, serve_on_loopback
from entropy_gpt.evaluation.private_inference.parties.channel import TLSFiles, check_plain_allowed, parse_address
from entropy_gpt.evaluation.private_inference.parties.engine import check_engine
from entropy_gpt.evaluation.private_inference.parties.limits import Limits
from entropy_gpt.evaluation.private_inference.parties.memory import check_memory
from entropy_gpt.evaluation.private_inference.parties.session import Outcome, check_request
from entropy_gpt.evaluation.private_inference.parties.two_party import MOST_PREPARED_BYTES, Client, Offer, Server
from entropy_gpt.evaluation.private_inference.program.cost import MEGA, InferenceCost, StepCost
from entropy_gpt.evaluation.private_inference.program.program import weight_shapes
from entropy_gpt.evaluation.private_inference.program.range_audit import (
    FRACTION_BITS,
    MOST_WINDOWS,
    audit,
    choose_sequences,
    tolerated_error,
)
from entropy_gpt.evaluation.private_inference.program.settings import PARTIES, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from entropy_gpt.evaluation.records.conditions import describe_check
from entropy_gpt.evaluation.records.measurement import describe_model
from entropy_gpt.evaluation.records.results import AnswerCheck, ModelResult
from entropy_gpt.training.library_bars import library_bars_hidden
from entropy_gpt.training.model_tokenizer import hash_vocabulary, load_model_tokenizer
from entropy_gpt.training.progress import SILENT, Progress, Stage
from entropy_gpt.training.tokenizer import load_tokenizer
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .options import check_positive, read_options, with_argument_names


DEFAULT_ADDRESS, DEFAULT_TIMEOUT, DEFAULT_LIMITS = "127.0.0.1:9000", 600, Limits()
DEFAULT_FRACTION_BITS = PrivateSettings().fraction_bits
DEFAULT_PREPARED_MB = round(MOST_PREPARED_BYTES / MEGA)
# Characters of a text that are read for a token of the audit.
CHARACTERS_A_TOKEN = 16


@dataclass(config=RECORD)
class PrivateAnswer(StoredRecord):
    """
    The client's answer as text, with its check and its cost.

    Args:
        text (`str`): The continuation of the prompt.
        check ([`AnswerCheck`], *optional*): How it compares with the model in the clear, if that is at hand.
        seconds (`float`): Wall-clock time, including compilation and set-up.
        cost ([`InferenceCost`]): The cost by the client's count.
        repeats (`int`): How many tokens were out of range and computed again.
    """

    KIND = "a private answer"
    SCHEMA_VERSION = 5

    text: str
    check: AnswerCheck | None
    seconds: float
    cost: InferenceCost
    repeats: int = 0

    @classmethod
    def migrate(cls, content: dict, version: int) -> dict | None:
        """Version 3 had no `repeats`, and 4 no `before` of its cost."""
        return content if version in (3, 4) else None


@with_argument_names
def open_server(
    model: str | Path,
    listen: str = DEFAULT_ADDRESS,
    *,
    tls: TLSFiles | None = None,
    insecure: bool = False,
    protocol: str = "cheetah",
    embedding: str = "one_hot",
    answer: str = "logits",
    fraction_bits: int = DEFAULT_FRACTION_BITS,
    text: str | Path | None = None,
    tokenizer: str | Path | None = None,
    limits: Limits = DEFAULT_LIMITS,
    prepared: str | Path | None = None,
    prepared_mb: int = DEFAULT_PREPARED_MB,
    timeout: int = DEFAULT_TIMEOUT,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = SILENT,
) -> Server:
    """
    Opens a server that holds the weights. Call its `serve_forever`, and `close` in the end.

    Args:
        model (`str` or `Path`): An EntropyGPT or GPT-2: a folder, or a repository on the Hub.
        listen (`str`): `HOST:PORT`; port 0 takes a free one.
        tls ([`TLSFiles`], *optional*): This side's certificate and key. Required beyond the loopback.
        insecure (`bool`): Allow plain TCP beyond the loopback.
        protocol (`str`): "cheetah", or "semi2k" for measurements only.
        embedding (`str`): "one_hot" or "client_table", as in [`PrivateSettings`].
        answer (`str`): What the client learns of each new token: "logits" or "token".
        fraction_bits (`int`): Bits of a number behind the point, from 12 to 22.
        text (`str` or `Path`, *optional*): A file with text that the audit looks at too.
        tokenizer (`str` or `Path`, *optional*): The tokenizer's folder or repository. Default: the model's.
        limits ([`Limits`]): What each client may ask for, by its certificate, or without TLS by its address.
        prepared (`str` or `Path`, *optional*): Folder for its halves of preparations. Without it there are none.
        prepared_mb (`int`): MB that these may take.
        timeout (`int`): Seconds without any event after which an inference ends.
        report (`Callable`): Receives the audit's warnings, and a line about each client.
        progress (`Progress`): Receives the stages before the server is open.

    Raises:
        `UserError`: If the model, the address or a certificate can't be used, or the engine is not installed.

    Example:

    ```python
    from entropy_gpt.workflows.private import open_server

    server = open_server("runs/proposal/model", "127.0.0.1:9000", report=print)
    try:
        server.serve_forever()
    finally:
        server.close()
    ```
    """
    check_engine()
    check_positive(
        max_new_tokens=limits.answers,
        max_requests=limits.requests,
        max_positions=limits.positions,
        max_seconds=limits.seconds,
        prepared_mb=prepared_mb,
        timeout=timeout,
    )
    settings = _read_settings(protocol=protocol, embedding=embedding, answer=answer, fraction_bits=fraction_bits)
    host, port = parse_address(listen)
    _check_connection(host, tls, insecure, settings)
    offer, _, _ = _make_offer(expanded(model), tokenizer, settings, text, report, progress)
    check_memory(weight_shapes(offer.config).values())
    folder = prepared and expanded(prepared)
    return Server(offer, host, port, tls, timeout, limits, report, folder, round(prepared_mb * MEGA))


@with_argument_names
def ask(
    prompt: str,
    address: str,
    *,
    tokenizer: str | Path,
    tls: TLSFiles | None = None,
    insecure: bool = False,
    new_tokens: int = 1,
    protocol: str = "cheetah",
    prepared: str | Path | None = None,
    require_prepared: bool = False,
    timeout: int = DEFAULT_TIMEOUT,
    progress: Progress = SILENT,
) -> PrivateAnswer:
    """
    Asks a server to continue a prompt, always with the most likely token. The prompt stays on this machine.

    Args:
        prompt (`str`): The prompt.
        address (`str`): `HOST:PORT` of the server.
        tokenizer (`str` or `Path`): The server's tokenizer: a folder, or a repository on the Hub.
        tls ([`TLSFiles`], *optional*): This side's certificate and key. Required beyond the loopback.
        insecure (`bool`): Allow plain TCP beyond the loopback.
        new_tokens (`int`): Tokens of the answer; their number is public.
        protocol (`str`): The only protocol that the client accepts.
        prepared (`str` or `Path`, *optional*): Folder of [`prepare`]; the smallest preparation that fits is used up.
        require_prepared (`bool`): Whether to fail if none fits.
        timeout (`int`): Seconds without any event after which the client gives up.
        progress (`Progress`): Receives one stage, with a unit for each step.

    Raises:
        `UserError`: If the server does not answer, or a value can't be used.

    Example:

    ```python
    from entropy_gpt.workflows.private import ask

    answer = ask("def main(", "127.0.0.1:9000", tokenizer="runs/proposal/model", new_tokens=3)
    print(answer.text, answer.cost.total_bytes)
    ```
    """
    check_engine()
    check_positive(max_new_tokens=new_tokens, timeout=timeout)
    if require_prepared and prepared is None:
        raise UserError("--require-prepared needs the folder of preparations: give --prepared DIR.")
    with _connect(address, tokenizer, tls, insecure, protocol, prepared, timeout) as (client, words, host):
        tokens = _tokenize(prompt, words)
        found = client.find_preparation(len(tokens), new_tokens)
        if require_prepared and found is None:
            raise UserError(
                f"no preparation in {prepared} fits {len(tokens)} tokens and {new_tokens} new ones of this server: "
                "make one (entropy-gpt private prepare)."
            )
        _, answer = _ask(client, words, tokens, new_tokens, f"TCP to {host}", progress, found)
    return answer


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
    timeout: int = DEFAULT_TIMEOUT,
    progress: Progress = SILENT,
) -> list[list[StepCost]]:
    """
    Does with a server all of later answers that needs no prompt. Each serves one prompt and answer, these long or
    shorter. What is whole stays if it is interrupted.

    Args:
        address (`str`): `HOST:PORT` of the server.
        tokenizer (`str` or `Path`): The server's tokenizer: a folder, or a repository on the Hub.
        prepared (`str` or `Path`): Folder for this side's halves.
        tokens (`int`): Tokens of the prompt, at most.
        new_tokens (`int`): Tokens of the answer, at most.
        count (`int`): How many to make.
        tls, insecure, timeout: As of [`ask`].
        progress (`Progress`): Receives one stage for each, with a unit for each step.

    Returns:
        `list[list[StepCost]]`: What each took.

    Raises:
        `UserError`: If the server does not answer or keeps no preparations, or a value can't be used.
    """
    check_engine()
    check_positive(tokens=tokens, max_new_tokens=new_tokens, count=count, timeout=timeout)
    made = []
    with _connect(address, tokenizer, tls, insecure, "cheetah", prepared, timeout) as (client, _, _):
        if client.terms.store is None:
            raise UserError("this server keeps no preparations: it has to be run with serve --prepared.")
        for number in range(count):
            with progress.stage(f"preparing {number + 1} of {count}") as line:
                line.say("both sides compile the program")
                outcome = client.prepare(tokens, new_tokens, on_event=lambda event, line=line: show_event(event, line))
            made.append(outcome.steps)
    return made


@contextlib.contextmanager
def _connect(
    address: str,
    tokenizer: str | Path,
    tls: TLSFiles | None,
    insecure: bool,
    protocol: str,
    prepared: str | Path | None,
    timeout: int,
) -> Iterator[tuple[Client, PreTrainedTokenizerFast, str]]:
    """A client of the server at an address, with its tokenizer and the host."""
    host, port = parse_address(address)
    _check_connection(host, tls, insecure, _read_settings(protocol=protocol))
    words = load_tokenizer(expanded(tokenizer))
    with contextlib.closing(Client(host, port, tls, timeout, protocol, prepared and expanded(prepared))) as client:
        client.check_tokenizer(hash_vocabulary(words, client.terms.config.vocab_size))
        yield client, words, host


@with_argument_names
def demonstrate(
    model: str | Path,
    prompt: str,
    *,
    new_tokens: int = 1,
    protocol: str = "cheetah",
    embedding: str = "one_hot",
    answer: str = "logits",
    fraction_bits: int = DEFAULT_FRACTION_BITS,
    text: str | Path | None = None,
    tokenizer: str | Path | None = None,
    prepared: bool = False,
    timeout: int = DEFAULT_TIMEOUT,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = SILENT,
) -> PrivateAnswer:
    """
    Runs a server and a client on this machine, whose engines are two processes, and compares the answer with the
    model's own in the clear.

    Args:
        model (`str` or `Path`): An EntropyGPT or GPT-2: a folder, or a repository on the Hub.
        prompt (`str`): The prompt.
        new_tokens (`int`): Tokens of the answer.
        protocol, embedding, answer, fraction_bits, text: As of [`open_server`].
        tokenizer (`str` or `Path`, *optional*): The tokenizer's folder or repository. Default: the model's.
        prepared (`bool`): Whether to do first what needs no prompt, as [`prepare`] does.
        timeout (`int`): Seconds without any event after which both sides give up.
        report (`Callable`): Receives the audit's warnings.
        progress (`Progress`): Receives each stage.

    Raises:
        `UserError`: If there is no answer, or it differs from the one in the clear.

    Example:

    ```python
    from entropy_gpt.workflows.private import demonstrate

    answer = demonstrate("runs/proposal/model", "def main(", new_tokens=3)
    print(answer.text, answer.check.same)
    ```
    """
    check_engine()
    check_positive(max_new_tokens=new_tokens, timeout=timeout)
    settings = _read_settings(protocol=protocol, embedding=embedding, answer=answer, fraction_bits=fraction_bits)
    offer, clear, words = _make_offer(expanded(model), tokenizer, settings, text, report, progress)
    tokens = _tokenize(prompt, words)
    check_request(offer.config, settings, len(tokens), new_tokens, answers=1)
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_on_loopback(offer, timeout, Path(folder)) as address,
        contextlib.closing(Client(*address, None, timeout, protocol, Path(folder))) as client,
    ):
        name = None
        if prepared:
            with progress.stage("preparing") as line:
                line.say("both sides compile the program")
                name = client.prepare(len(tokens), new_tokens, 1, lambda event: show_event(event, line)).prepared
        outcome, found = _ask(client, words, tokens, new_tokens, NETWORKS[TWO_PARTY], progress, name)
    found.check = _compare(clear, tokens, outcome)
    return found


def describe_cost(model: str | Path, answer: PrivateAnswer) -> ModelResult:
    """The cost of an answer as a result of its model, named as `evaluate` names it, so that a report merges both."""
    model = expanded(model)
    loaded = load_language_model(model)
    from .evaluate_inputs import default_context, short_names  # private answers do without data sets

    context = default_context(loaded.config.n_positions)
    windows = Windows(context, context, separate=False, bos=False)
    result = describe_model(loaded, *short_names([model]), windows)
    return replace(result, costs=[as_private_cost(answer.cost, answer.check)])


def _read_settings(**settings: str | int) -> PrivateSettings:
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


def _check_connection(host: str, tls: TLSFiles | None, insecure: bool, settings: PrivateSettings):
    if tls is None:
        check_plain_allowed(host, insecure, settings)


def _make_offer(
    source: str,
    tokenizer: str | Path | None,
    settings: PrivateSettings,
    text: str | Path | None,
    report: Callable[[str], None],
    progress: Progress,
) -> tuple[Offer, EntropyGPTForCausalLM, PreTrainedTokenizerFast]:
    """What a server offers, if the model's numbers fit the ring, with the model in the clear and its tokenizer."""
    with library_bars_hidden(), progress.stage("loading the model"):
        model = load_language_model(source).eval()
        words = load_model_tokenizer(tokenizer and expanded(tokenizer), source, model.config.vocab_size)
    audited_text = _read_audited_text(expanded(text), words, model.config.n_positions) if text else []
    with progress.stage("checking the range of its numbers"):
        config, weights = prepare_weights(model)
        audited = audit(config, weights, settings, choose_sequences(config, weights, audited_text))
    if audited.problems:
        raise PrivateInferenceError(f"{source} does not fit the ring: {audited.problems[0]}")
    for line in audited.warnings:
        report(line)
    vocabulary = hash_vocabulary(words, config.vocab_size)
    offer = Offer(config, weights | audited.bounds, model.config.notation, settings, vocabulary)
    return offer, model, words


def _read_audited_text(path: Path, words: PreTrainedTokenizerFast, n_positions: int) -> list[int]:
    """Tokens of the beginning of a text, as many as an audit looks at."""
    tokens = MOST_WINDOWS * n_positions
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(CHARACTERS_A_TOKEN * tokens)
    except OSError as error:
        raise UserError(f"--text {path} can't be read: {error.strerror}.") from error
    return words(text)["input_ids"][:tokens]


def _tokenize(prompt: str, words: PreTrainedTokenizerFast) -> list[int]:
    tokens = words(prompt)["input_ids"]
    if not tokens:
        raise PrivateInferenceError("the prompt is empty: give some text.")
    return tokens


def _ask(
    client: Client,
    words: PreTrainedTokenizerFast,
    tokens: list[int],
    new_tokens: int,
    network: str,
    progress: Progress,
    preparation: str | None,
) -> tuple[Outcome, PrivateAnswer]:
    started = time.perf_counter()
    with progress.stage("answering privately") as line:
        line.say("both sides compile the program")
        outcome = client.ask(tokens, new_tokens, 1, lambda event: show_event(event, line), preparation)
    seconds = time.perf_counter() - started
    cost = outcome.cost(client.terms, len(tokens), new_tokens, network)
    text, repeats = words.decode(outcome.tokens), outcome.repeats.total()
    return outcome, PrivateAnswer(text=text, check=None, seconds=seconds, cost=cost, repeats=repeats)


def show_event(event: dict[str, Any], line: Stage):
    """Reports an event of [`Client.ask`] to a stage: the number of steps, and each step with its layer."""
    if event["event"] == "program":
        line.reach(0, event["steps"])
    elif event["event"] == "step":
        layer = "" if event["cost"]["layer"] is None else f"layer {event['cost']['layer']}, "
        line.say(layer + event["cost"]["operation"])
        line.advance()


@torch.no_grad()
def _compare(model: EntropyGPTForCausalLM, prompt: list[int], outcome: Outcome) -> AnswerCheck:
    """
    Compares an answer with the model in the clear. Where two tokens are equally likely within the tolerated error of
    the logits, the answer may have either.

    Raises:
        `UserError`: If logits or tokens differ by more.
    """
    sequence = torch.tensor([prompt + outcome.tokens])
    logits = model(sequence, use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(-1, torch.tensor(outcome.tokens)[:, None]).squeeze(-1)
    behind = (logits.amax(dim=-1) - chosen).tolist()
    largest = logits.abs().max().item()
    error = tolerated_error(logits.square().mean().sqrt().item())
    check = AnswerCheck(len(behind), behind.count(0), largest)
    if outcome.logits:
        check.largest_error = np.abs(np.concatenate(outcome.logits) - logits.numpy()).max().item()
        if check.largest_error > error:
            raise UserError(
                f"the private logits differ from those in the clear: {describe_check(check)}; a difference of "
                f"{error:.2f} is tolerated."
            )
    if max(behind) > 2 * error:
        raise UserError(f"the private answer {outcome.tokens} differs from the one in the clear.")
    return check
