"""Private inference: a server with the weights, and a demonstration of it with a client."""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.embeddings import Embeddings, read_embeddings
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.measuring.perplexity import Windows
from entropy_gpt.evaluation.private_inference.costs.published_cost import as_private_cost
from entropy_gpt.evaluation.private_inference.inference import NETWORKS, TWO_PARTY, serve_on_loopback
from entropy_gpt.evaluation.private_inference.parties.channel import TLSFiles, parse_address
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.engine import check_engine
from entropy_gpt.evaluation.private_inference.parties.halves import MOST_PREPARED_BYTES
from entropy_gpt.evaluation.private_inference.parties.limits import Limits
from entropy_gpt.evaluation.private_inference.parties.memory import check_memory
from entropy_gpt.evaluation.private_inference.parties.question import Question, check_request
from entropy_gpt.evaluation.private_inference.parties.server import Server, json_line
from entropy_gpt.evaluation.private_inference.parties.session import Outcome
from entropy_gpt.evaluation.private_inference.parties.tables import PublicCheckpoint
from entropy_gpt.evaluation.private_inference.parties.terms import Offer
from entropy_gpt.evaluation.private_inference.parties.turns import LONGEST_LINE, LONGEST_WAIT, Turns
from entropy_gpt.evaluation.private_inference.program.cost import MEGA
from entropy_gpt.evaluation.private_inference.program.networks import WAN
from entropy_gpt.evaluation.private_inference.program.program import weight_shapes
from entropy_gpt.evaluation.private_inference.program.range_audit import MOST_WINDOWS, bound
from entropy_gpt.evaluation.private_inference.program.range_report import tolerated_error
from entropy_gpt.evaluation.private_inference.program.settings import SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from entropy_gpt.evaluation.records.conditions import describe_check
from entropy_gpt.evaluation.records.measurement import describe_model
from entropy_gpt.evaluation.records.results import AnswerCheck, ModelResult
from entropy_gpt.training.library_bars import library_bars_hidden
from entropy_gpt.training.model_tokenizer import hash_vocabulary, load_model_tokenizer
from entropy_gpt.training.progress import SILENT, Progress
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .options import check_positive, with_argument_names
from .private_answer import PrivateAnswer, answer_question, show_event, tokenize
from .private_client import DEFAULT_TIMEOUT, check_connection, read_settings


DEFAULT_ADDRESS, DEFAULT_LIMITS = "127.0.0.1:9000", Limits()
DEFAULT_FRACTION_BITS = PrivateSettings().fraction_bits
DEFAULT_PREPARED_MB = round(MOST_PREPARED_BYTES / MEGA)
# Characters of a text that are read for a token of the audit.
CHARACTERS_A_TOKEN = 16


@with_argument_names
def open_server(
    model: str | Path,
    listen: str = DEFAULT_ADDRESS,
    *,
    tls: TLSFiles | None = None,
    insecure: bool = False,
    protocol: str = "cheetah",
    embedding: str = "one_hot",
    public_checkpoint: str | Path | None = None,
    answer: str = "logits",
    fraction_bits: int = DEFAULT_FRACTION_BITS,
    network: str = WAN.name,
    text: str | Path | None = None,
    tokenizer: str | Path | None = None,
    limits: Limits = DEFAULT_LIMITS,
    workers: int = 1,
    longest_line: int = LONGEST_LINE,
    longest_wait: int = LONGEST_WAIT,
    json_log: bool = False,
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
        embedding (`str`): "one_hot", "client_table" or "public", as in [`PrivateSettings`].
        public_checkpoint (`str` or `Path`, *optional*): With "public", the checkpoint that the embeddings are from.
        answer (`str`): What the client learns of each new token: "logits", "token" or "sampled".
        fraction_bits (`int`): Bits of a number behind the point, from 12 to 22.
        network (`str`): What operations take their forms for: "LAN", "WAN", or such as "300Mbps,20ms".
        text (`str` or `Path`, *optional*): A file with text that the audit looks at too.
        tokenizer (`str` or `Path`, *optional*): The tokenizer's folder or repository. Default: the model's.
        limits ([`Limits`]): What each client may ask for, by its certificate, or without TLS by its address.
        workers (`int`): Clients that are answered at once. Each has an engine with a copy of the weights.
        longest_line (`int`): Clients that may wait for that.
        longest_wait (`int`): Seconds for which each may wait.
        json_log (`bool`): Whether all lines are JSON.
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
        longest_wait=longest_wait,
        prepared_mb=prepared_mb,
        timeout=timeout,
        workers=workers,
    )
    settings = read_settings(
        protocol=protocol, embedding=embedding, answer=answer, fraction_bits=fraction_bits, network=network
    )
    host, port = parse_address(listen)
    check_connection(host, tls, insecure, settings)
    warn = (lambda line: report(json_line(line))) if json_log else report
    offer, _, _ = _make_offer(expanded(model), tokenizer, settings, public_checkpoint, text, warn, progress)
    check_memory(weight_shapes(offer.config).values(), SERVER, workers)
    turns, folder = Turns(workers, longest_line, longest_wait), prepared and Path(expanded(prepared))
    return Server(offer, host, port, tls, timeout, limits, report, turns, json_log, folder, round(prepared_mb * MEGA))


@with_argument_names
def demonstrate(
    model: str | Path,
    prompt: str,
    *,
    new_tokens: int = 1,
    protocol: str = "cheetah",
    embedding: str = "one_hot",
    public_checkpoint: str | Path | None = None,
    answer: str = "logits",
    fraction_bits: int = DEFAULT_FRACTION_BITS,
    network: str = WAN.name,
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
        protocol, embedding, public_checkpoint, answer, fraction_bits, network, text: As of [`open_server`].
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
    settings = read_settings(
        protocol=protocol, embedding=embedding, answer=answer, fraction_bits=fraction_bits, network=network
    )
    offer, clear, words = _make_offer(expanded(model), tokenizer, settings, public_checkpoint, text, report, progress)
    tokens = tokenize(prompt, words)
    check_request(offer.config, settings, len(tokens), new_tokens, answers=1)
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_on_loopback(offer, timeout, Path(folder) / "prepared") as address,
        contextlib.closing(
            Client(*address, None, timeout, protocol, Path(folder) / "prepared", public_checkpoint)
        ) as client,
    ):
        if prepared:
            with progress.stage("preparing") as line:
                line.say("both sides compile the program")
                client.prepare(len(tokens), new_tokens, on_event=lambda event: show_event(event, line))
        outcome, found = answer_question(client, words, Question(tokens, new_tokens), NETWORKS[TWO_PARTY], progress)
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


def _make_offer(
    source: str,
    tokenizer: str | Path | None,
    settings: PrivateSettings,
    public_checkpoint: str | Path | None,
    text: str | Path | None,
    report: Callable[[str], None],
    progress: Progress,
) -> tuple[Offer, EntropyGPTForCausalLM, PreTrainedTokenizerFast]:
    """What a server offers, if the model's numbers fit the ring, with the model in the clear and its tokenizer."""
    public = _read_public(settings, public_checkpoint)
    with library_bars_hidden(), progress.stage("loading the model"):
        model = load_language_model(source).eval()
        words = load_model_tokenizer(tokenizer and expanded(tokenizer), source, model.config.vocab_size)
    audited_text = _read_audited_text(Path(expanded(text)), words, model.config.n_positions) if text else []
    with progress.stage("checking the range of its numbers"):
        config, weights = prepare_weights(model)
        if public is not None:
            _compare_embeddings(weights, public)
        weights, audited = bound(config, weights, settings, audited_text)
    for line in audited.warnings:
        report(line)
    checkpoint = public and PublicCheckpoint(public.name, public.revision)
    vocabulary = hash_vocabulary(words, config.vocab_size)
    offer = Offer(config, weights, model.config.notation, settings, vocabulary, checkpoint)
    return offer, model, words


def _read_public(settings: PrivateSettings, checkpoint: str | Path | None) -> Embeddings | None:
    """
    Raises:
        `UserError`: If one of both options is there alone, or there are no such embeddings.
    """
    if (settings.embedding == "public") != (checkpoint is not None):
        raise UserError("--embedding public and --public-checkpoint MODEL belong together: give both or neither.")
    return None if checkpoint is None else read_embeddings(checkpoint)


def _compare_embeddings(weights: dict[str, np.ndarray], public: Embeddings):
    """
    Raises:
        `UserError`: If the model's embeddings are not the public ones, to the last bit.
    """
    for name, table in public.tables.items():
        own, differing = weights[name], weights[name].size
        if own.shape == table.shape:
            differing = np.count_nonzero(own.view(np.uint32) != table.view(np.uint32))
        if differing:
            raise UserError(
                f"--embedding public: {name} of the model is not that of {public.name} ({differing:,} of {own.size:,} "
                "numbers differ). Freeze the embeddings when the model is made (convert --freeze-embeddings, train "
                "freeze_embeddings=true), or choose another --embedding."
            )


def _read_audited_text(path: Path, words: PreTrainedTokenizerFast, n_positions: int) -> list[int]:
    """Tokens of the beginning of a text, as many as an audit looks at."""
    tokens = MOST_WINDOWS * n_positions
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(CHARACTERS_A_TOKEN * tokens)
    except OSError as error:
        raise UserError(f"--text {path} can't be read: {error.strerror}.") from error
    return words(text)["input_ids"][:tokens]


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
