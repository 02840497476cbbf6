"""Serves, asks and demonstrates private inference."""

import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.folding import list_absorbable_ffns
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.json_records import RECORD, StoredRecord
from entropy_gpt.evaluation.measuring.perplexity import Windows
from entropy_gpt.evaluation.private_inference.costs.published_cost import as_private_cost
from entropy_gpt.evaluation.private_inference.parties.channel import (
    TLSFiles,
    check_plain_allowed,
    clean,
    parse_address,
)
from entropy_gpt.evaluation.private_inference.parties.engine import check_engine
from entropy_gpt.evaluation.private_inference.parties.session import Answer
from entropy_gpt.evaluation.private_inference.parties.two_party import Client, Model, Server
from entropy_gpt.evaluation.private_inference.program.cost import (
    LAN,
    TABLE_COLUMNS,
    WAN,
    InferenceCost,
    Network,
    by_operation,
    parse_network,
    project,
    set_up_by_operation,
    table_rows,
)
from entropy_gpt.evaluation.private_inference.program.range_audit import audit
from entropy_gpt.evaluation.private_inference.program.settings import TRUST, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from entropy_gpt.evaluation.records.conditions import describe_check
from entropy_gpt.evaluation.records.measurement import describe_model
from entropy_gpt.evaluation.records.results import AnswerCheck, ModelResult, save_results
from entropy_gpt.terminal.tables import make_table
from entropy_gpt.training.files import written_whole
from entropy_gpt.training.model_tokenizer import hash_vocabulary, load_model_tokenizer
from entropy_gpt.training.tokenizer import load_tokenizer
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .evaluate_inputs import default_context, short_names


# What the audit and the bound of the logits look at: random tokens, so that they tell nothing of anybody's text.
AUDITED_SEQUENCES, AUDITED_TOKENS = 4, 64
# Logits so many times as large as any seen are taken for an overflow.
LOGIT_MARGIN = 4
# How far private logits may be from those in the clear, beside a share of the largest.
TOLERATED_ERROR, TOLERATED_SHARE = 0.05, 0.005
DEFAULT_TIMEOUT = 600
LISTENING = "listening on "
# Of `python -c`, as `entropy-gpt private serve`.
SERVE = (
    "import sys; from entropy_gpt.commands.main import main; sys.argv[1:1] = ['private', 'serve']; sys.exit(main())"
)
SERVER_START_SECONDS, SERVER_STOP_SECONDS = 300, 15
TLSOptions = tuple[Path | None, Path | None, Path | None]

console = Console()


@dataclass(config=RECORD)
class PrivateAnswer(StoredRecord):
    """
    What a client learned, and what it took.

    Args:
        text (`str`): After the prompt.
        check ([`AnswerCheck`], *optional*): How it compares with the model in the clear, where there is one.
        seconds (`float`): By the clock, with compiling and set-up.
        cost ([`InferenceCost`]): By the client's count.
    """

    KIND = "a private answer"
    SCHEMA_VERSION = 3

    text: str
    check: AnswerCheck | None
    seconds: float
    cost: InferenceCost


def serve(
    source: str,
    listen: str,
    tls: TLSOptions,
    insecure: bool,
    settings: dict,
    tokenizer: str | None,
    longest: int,
    timeout: int,
):
    """
    Serves until it is interrupted.

    Raises:
        `UserError`: If the model, the address or the certificates can't be used, or the engine is missing.
    """
    check_engine()
    agreed = PrivateSettings(**settings)
    (host, port), files = _network(listen, tls, insecure, agreed)
    offer = _offer(source, tokenizer, agreed)
    server = Server(offer, host, port, files, timeout, longest, _print_line)
    host, port = server.address
    _print_line(f"{LISTENING}{f'[{host}]' if ':' in host else host}:{port}")
    _print_line(f"{offer.settings.protocol}: {TRUST[offer.settings.protocol]}")
    if layers := list_absorbable_ffns(offer.config):
        names = ", ".join(map(str, layers))
        _print_line(f"FFNs of layers {names} can't be absorbed: they stretch or shrink the stream too far")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        _print_line("stopped")
    finally:
        server.close()


def ask(
    prompt: str,
    address: str,
    tokenizer: str,
    tls: TLSOptions,
    insecure: bool,
    new_tokens: int,
    protocol: str,
    output: Path | None,
    timeout: int,
    networks: list[str],
):
    """
    Asks a server, and shows its answer and what it cost.

    Raises:
        `UserError`: If there is no answer, or a network is not known.
    """
    shown = _read_networks(networks)
    check_engine()
    (host, port), files = _network(address, tls, insecure, PrivateSettings(protocol))
    words = load_tokenizer(tokenizer)
    client = Client(host, port, files, timeout, protocol)
    _, found = _ask(client, words, prompt, new_tokens, f"TCP to {host}")
    print_answer(prompt, found)
    _print_costs(found, shown)
    _save(found.cost, output)


def demo(
    source: str,
    prompt: str,
    new_tokens: int,
    settings: dict,
    tokenizer: str | None,
    output: Path | None,
    results: Path | None,
    timeout: int,
    networks: list[str],
):
    """
    Serves and asks on this machine, and compares with the model in the clear.

    Raises:
        `UserError`: As [`demonstrate`], or if a network is not known.
    """
    shown = _read_networks(networks)
    found = demonstrate(source, prompt, new_tokens, settings, tokenizer, timeout)
    print_answer(prompt, found)
    _print_costs(found, shown)
    _save(found.cost, output)
    if results is not None:
        with written_whole(results) as path:
            save_results([_as_result(source, found)], path)
        console.print(f"result: {results}", markup=False, soft_wrap=True)


def demonstrate(
    source: str,
    prompt: str,
    new_tokens: int,
    settings: dict | None = None,
    tokenizer: str | None = None,
    timeout: int = DEFAULT_TIMEOUT,
) -> PrivateAnswer:
    """
    A server and a client on this machine, whose answer is compared with the model's in the clear.

    Raises:
        `UserError`: If there is no answer, or it is another than in the clear.
    """
    settings = settings or {}
    check_engine()
    model, words = _load(source, tokenizer)
    process, port = _start_server(source, settings, tokenizer, new_tokens, timeout)
    try:
        client = Client("127.0.0.1", port, None, timeout, PrivateSettings(**settings).protocol)
        answer, found = _ask(client, words, prompt, new_tokens, "loopback, two processes")
    finally:
        _stop_server(process)
    found.check = _compare(model, words(prompt)["input_ids"], answer)
    return found


def _as_result(source: str, found: PrivateAnswer) -> ModelResult:
    """Named and described as `entropy-gpt evaluate` does, so that both become one in a report."""
    model = load_language_model(source)
    context = default_context(model.config.n_positions)
    result = describe_model(model, *short_names([source]), Windows(context, context, separate=False, bos=False))
    return replace(result, costs=[as_private_cost(found.cost, found.check)])


def _read_networks(texts: list[str]) -> list[Network]:
    """Those that are named, or LAN and WAN."""
    try:
        return [parse_network(text) for text in texts] or [LAN, WAN]
    except ValueError as error:
        raise UserError(str(error)) from error


def _network(
    address: str, tls: TLSOptions, insecure: bool, settings: PrivateSettings
) -> tuple[tuple[str, int], TLSFiles | None]:
    host, port = parse_address(address)
    given = [path for path in tls if path is not None]
    if given and len(given) < len(tls):
        raise PrivateInferenceError("TLS needs all three of --cert, --key and --ca.")
    if given:
        return (host, port), TLSFiles(*tls)
    check_plain_allowed(host, insecure, settings)
    return (host, port), None


def _load(source: str, tokenizer: str | None) -> tuple[EntropyGPTForCausalLM, PreTrainedTokenizerFast]:
    with console.status("loading the model"):
        model = load_language_model(source).eval()
        return model, load_model_tokenizer(tokenizer, source, model.config.vocab_size)


def _offer(source: str, tokenizer: str | None, settings: PrivateSettings) -> Model:
    """A model as it is served, if its numbers fit the ring."""
    model, words = _load(source, tokenizer)
    with console.status("looking at its numbers"):
        config, weights = prepare_weights(model)
        rng = np.random.default_rng(0)
        shape = (AUDITED_SEQUENCES, min(AUDITED_TOKENS, config.n_positions))
        tokens = rng.integers(0, config.vocab_size, shape)
        report = audit(config, weights, settings, tokens)
        if report.problems:
            raise PrivateInferenceError(f"{source} does not fit the ring: {report.problems[0]}")
        with torch.no_grad():
            largest = model(torch.from_numpy(tokens), use_cache=False).logits.abs().max().item()
    bound = 2.0 ** np.ceil(np.log2(LOGIT_MARGIN * largest))
    vocabulary = hash_vocabulary(words, config.vocab_size)
    return Model(config, weights, model.config.notation, settings, vocabulary, float(bound))


def _ask(
    client: Client, words: PreTrainedTokenizerFast, prompt: str, new_tokens: int, network: str
) -> tuple[Answer, PrivateAnswer]:
    terms = client.terms
    if hash_vocabulary(words, terms.config.vocab_size) != terms.tokenizer_hash:
        client.close()
        raise PrivateInferenceError(
            "the tokenizer is not the server's: its tokens would mean something else. Give the server's with "
            "--tokenizer."
        )
    tokens = words(prompt)["input_ids"]
    if not tokens:
        client.close()
        raise PrivateInferenceError("the prompt is empty: give some text.")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("both sides compile the program", total=None)

        def show(event: dict):
            if event["event"] == "program":
                progress.update(task, description="meeting the other side", total=event["steps"])
            elif event["event"] == "step":
                place = "" if event["cost"]["layer"] is None else f"layer {event['cost']['layer']}, "
                progress.update(task, description=place + event["cost"]["operation"], advance=1)

        answer = client.ask(tokens, new_tokens, on_event=show)
    seconds = time.perf_counter() - started
    if repeats := answer.repeats.total():
        console.print(f"{repeats} answer(s) were out of range and computed anew.")
    cost = answer.cost(terms, len(tokens), new_tokens, network)
    return answer, PrivateAnswer(text=words.decode(answer.tokens), check=None, seconds=seconds, cost=cost)


def _start_server(
    source: str, settings: dict, tokenizer: str | None, longest: int, timeout: int
) -> tuple[subprocess.Popen, int]:
    """A server on a free port, in a process of its own."""
    command = [sys.executable, "-P", "-c", SERVE]
    command += [source, "--listen", "127.0.0.1:0"]
    command += ["--max-new-tokens", str(longest), "--timeout", str(timeout)]
    for name, value in {**settings, **({"tokenizer": tokenizer} if tokenizer else {})}.items():
        command += [f"--{name}", value]
    with tempfile.TemporaryFile("w+") as complaints, console.status("starting the server"):
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=os.environ | {"FORCE_COLOR": "", "TTY_COMPATIBLE": "0"},  # its first line is read by a program
        )
        ready, _, _ = select.select([process.stdout], [], [], SERVER_START_SECONDS)
        line = process.stdout.readline() if ready else ""
        if not line.startswith(LISTENING):
            _stop_server(process)
            complaints.seek(0)
            reason = complaints.read().strip().rpartition("\n")[2].removeprefix("entropy-gpt: ")
            raise UserError(reason or f"the server did not start within {SERVER_START_SECONDS} seconds.")
    return process, int(line.rpartition(":")[2])


def _stop_server(process: subprocess.Popen):
    """Lets it clear away what it keeps on disk."""
    process.terminate()
    try:
        process.wait(SERVER_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def print_answer(prompt: str, found: PrivateAnswer):
    """The prompt with what follows, without what could drive a terminal, and how that compares with the clear."""
    prompt, text = (escape(clean(part, kept="\n\t", most=None)) for part in (prompt, found.text))
    console.print(f"\n[dim]{prompt}[/dim][bold]{text}[/bold]", highlight=False)
    if found.check:
        console.print(f"in the clear, {describe_check(found.check)}", soft_wrap=True)


@torch.no_grad()
def _compare(model: EntropyGPTForCausalLM, prompt: list[int], answer: Answer) -> AnswerCheck:
    """The same tokens; or, where two are as likely but for the error of the logits, one of the two."""
    sequence = torch.tensor([prompt + answer.tokens])
    logits = model(sequence, use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(-1, torch.tensor(answer.tokens)[:, None]).squeeze(-1)
    behind = (logits.amax(dim=-1) - chosen).tolist()
    largest = logits.abs().max().item()
    error = TOLERATED_ERROR + TOLERATED_SHARE * largest
    check = AnswerCheck(len(behind), behind.count(0), largest)
    if answer.logits:
        check.largest_error = np.abs(np.concatenate(answer.logits) - logits.numpy()).max().item()
        if check.largest_error > error:
            raise UserError(
                f"the private logits are not those in the clear: {describe_check(check)}; {error:.2f} is tolerated."
            )
    if max(behind) > 2 * error:
        raise UserError(f"the private answer {answer.tokens} is not that in the clear.")
    return check


def _print_costs(found: PrivateAnswer, networks: list[Network]):
    cost = found.cost
    console.print(f"{found.seconds:.1f} s in all, with compiling and set-up")
    console.print(make_table(("operation", *TABLE_COLUMNS), table_rows(by_operation(cost))))
    console.print(make_table(("once a connection", *TABLE_COLUMNS), table_rows(set_up_by_operation(cost))[-1:]))
    for network in networks:
        console.print(f"on {network.name}: about {project(cost, network):,.0f} s", highlight=False)


def _save(cost: InferenceCost, output: Path | None):
    if output is not None:
        with written_whole(output) as path:
            cost.save(path)
        console.print(f"costs: {output}", markup=False, soft_wrap=True)


def _print_line(line: str):
    print(line, flush=True)
