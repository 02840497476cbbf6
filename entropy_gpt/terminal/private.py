"""Serves, asks and demonstrates private inference, and prints answers with their costs."""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.folding import list_absorbable_ffns
from entropy_gpt.evaluation.private_inference.parties.channel import TLSFiles, clean, show_address
from entropy_gpt.evaluation.private_inference.parties.health import Health
from entropy_gpt.evaluation.private_inference.parties.limits import Limits
from entropy_gpt.evaluation.private_inference.parties.server import Server, json_line
from entropy_gpt.evaluation.private_inference.program.cost import (
    MEGA,
    TABLE_COLUMNS,
    before_by_operation,
    by_operation,
    project,
    set_up_by_operation,
    table_rows,
)
from entropy_gpt.evaluation.private_inference.program.networks import LAN, WAN, Network, parse_network
from entropy_gpt.evaluation.private_inference.program.settings import TRUST
from entropy_gpt.evaluation.records.conditions import describe_check
from entropy_gpt.evaluation.records.results import save_results
from entropy_gpt.training.files import written_whole
from entropy_gpt.workflows import private
from entropy_gpt.workflows.private import describe_cost, open_server
from entropy_gpt.workflows.private_answer import PrivateAnswer, show_event
from entropy_gpt.workflows.private_client import PrivateClient

from .progress import format_count, progress_display
from .tables import make_table


LISTENING = "listening on "

console = Console()
_PRINTING = threading.Lock()


def serve(
    model: str,
    listen: str,
    certificate: Path | None,
    key: Path | None,
    authority: Path | None,
    *,
    answers: int,
    requests: int,
    positions: int,
    seconds: int,
    drain_seconds: int,
    health_port: int | None,
    health_host: str,
    json_log: bool,
    **options,
):
    """
    Serves until it is interrupted, and prints a line about each client.

    Args:
        model (`str`): A folder, or a repository on the Hub.
        listen (`str`): `HOST:PORT`.
        certificate, key, authority (`Path`, *optional*): The files of TLS.
        answers, requests, positions, seconds (`int`): The fields of [`Limits`].
        drain_seconds (`int`): For which answers that have begun may go on after SIGTERM.
        health_port (`int`, *optional*), health_host (`str`): Where the server's state can be asked for.
        json_log (`bool`): Whether lines are JSON.
        options: Further arguments of [`open_server`].

    Raises:
        `UserError`: If the model, the address or a certificate can't be used, or the engine is not installed.
    """
    tls = read_certificates(certificate, key, authority)
    with progress_display(console, transient=True) as progress:
        server = open_server(
            model,
            listen,
            tls=tls,
            limits=Limits(answers, requests, positions, seconds),
            report=_print_line,
            progress=progress,
            json_log=json_log,
            **options,
        )

    def say(line: str):
        _print_line(json_line(line) if json_log else line)

    say(f"{LISTENING}{show_address(*server.address)}")
    protocol = server.offer.settings.protocol
    say(f"{protocol}: {TRUST[protocol]}")
    offer = server.offer
    positions, width = server.limits.positions, offer.config.n_embd
    if offer.settings.answer == "sampled":
        say(
            f"a client may have {positions} positions a day: with noise of its own choice it can compare logits, "
            "at most 14 answers for each difference (--max-positions, or --answer token)"
        )
    if offer.settings.answer == "logits" and positions > width:
        say(
            f"a client may have {positions} positions a day: from the logits of {width + 1} it can compute the head "
            "but for a change of basis (--max-positions, or --answer token)"
        )
    if offer.settings.answer == "logits" and offer.settings.embeds_at_home:
        say(
            "clients have the embeddings: if the head is tied to them, logits give the last hidden states and in "
            "time the final norm (--answer token)"
        )
    if layers := list_absorbable_ffns(server.offer.config):
        names = ", ".join(map(str, layers))
        say(f"FFNs of layers {names} can't be absorbed: they stretch or shrink the stream too far")
    try:
        with contextlib.ExitStack() as stack:
            if health_port is not None:
                health = stack.enter_context(contextlib.closing(Health(health_host, health_port, server.state)))
                say(f"health: port {health.address[1]}")
            _serve_until_terminated(server, drain_seconds)
    except KeyboardInterrupt:
        say("stopped")
    finally:
        server.close()


def _serve_until_terminated(server: Server, drain_seconds: int):
    """The handler of SIGTERM raises `SystemExit`; a second one, or an interrupt, ends the waiting too."""
    try:
        server.serve_forever()
    except SystemExit:
        server.drain(drain_seconds)
        raise


def ask(
    prompt: str | None,
    prompt_file: Path | None,
    networks: list[str],
    output: Path | None,
    generation: dict[str, Any],
    **connection,
):
    """
    Asks a server, and prints the answer and its cost.

    Args:
        prompt (`str`, *optional*): The prompt; "-" reads it from standard input.
        prompt_file (`Path`, *optional*): A file with the prompt, in place of it.
        networks (`list[str]`): Networks to estimate seconds for; LAN and WAN if there are none.
        output (`Path`, *optional*): The file for the cost.
        generation (`dict[str, Any]`): Further arguments of [`PrivateClient.generate`].
        connection: Arguments of [`open_client`].

    Raises:
        `UserError`: If the server does not answer, or a value can't be used.
    """
    shown, prompt = read_networks(networks), read_prompt(prompt, prompt_file)
    with progress_display(console) as progress, open_client(**connection) as client:
        answer = client.generate(prompt, progress=progress, **generation)
    print_answer(prompt, answer)
    _print_cost(answer, shown)
    _save(answer, output)


def prepare(tokens: int, new_tokens: int, count: int, **connection):
    """
    Makes preparations, and shows what each sent. What is whole stays if it is interrupted.

    Args:
        tokens (`int`): Tokens of a prompt, at most.
        new_tokens (`int`): Tokens of an answer, at most.
        count (`int`): How many to make.
        connection: Arguments of [`open_client`].

    Raises:
        `UserError`: If the server does not answer or keeps none, or a value can't be used.
    """
    made = 0
    try:
        with progress_display(console) as progress, open_client(**connection) as client:
            for number in range(1, count + 1):
                with progress.stage(f"preparing {number} of {count}") as line:
                    line.say("both sides compile the program")
                    steps = client.prepare(tokens, new_tokens, functools.partial(show_event, line=line)).steps
                    line.say(f"{sum(step.total_bytes for step in steps) / MEGA:,.1f} MB")
                made = number
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"{made} of {count} were made, and stay.")
        raise


def open_client(
    address: str, certificate: Path | None, key: Path | None, authority: Path | None, **options
) -> PrivateClient:
    """
    Connects to a server.

    Args:
        address (`str`): `HOST:PORT` of the server.
        certificate, key, authority (`Path`, *optional*): The files of TLS.
        options: Further arguments of [`PrivateClient`].

    Raises:
        `UserError`: As [`PrivateClient`].
    """
    return PrivateClient(address, tls=read_certificates(certificate, key, authority), **options)


def demo(model: str, prompt: str, networks: list[str], output: Path | None, results: Path | None, **options):
    """
    Runs both sides on this machine, and prints the answer, its check and its cost.

    Args:
        model (`str`): A folder, or a repository on the Hub.
        prompt (`str`): The prompt.
        networks (`list[str]`): Networks to estimate seconds for; LAN and WAN if there are none. Forms are chosen for
            the first, or a WAN.
        output (`Path`, *optional*): The file for the cost of each step.
        results (`Path`, *optional*): The file for the sum of the cost, as a result of the model.
        options: Further arguments of [`~entropy_gpt.workflows.private.demonstrate`].

    Raises:
        `UserError`: If there is no answer, or it differs from the one in the clear.
    """
    shown = read_networks(networks)
    with progress_display(console) as progress:
        answer = private.demonstrate(
            model, prompt, network=choose_network(networks), report=_print_line, progress=progress, **options
        )
    print_answer(prompt, answer)
    _print_cost(answer, shown)
    _save(answer, output)
    if results is not None:
        with written_whole(results) as path:
            save_results([describe_cost(model, answer)], path)
        console.print(f"result: {results}", markup=False, soft_wrap=True)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """
    The prompt of a command line, of standard input ("-") or of a file; of these two without the last line's end.

    Raises:
        `UserError`: If there is none, or two, or the file can't be read.
    """
    if (prompt is None) == (file is None):
        raise UserError("give one prompt: as PROMPT, as - for standard input, or with --prompt-file.")
    if prompt not in (None, "-"):
        return prompt
    try:
        content = sys.stdin.buffer.read() if file is None else file.read_bytes()
        return content.decode().removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UserError(f"the prompt can't be read from {file or 'standard input'}: {reason}.") from error


def read_certificates(*paths: Path | None) -> TLSFiles | None:
    """
    The files of `--cert`, `--key` and `--ca`, or `None` if none is given.

    Raises:
        `UserError`: If some are given and others are not.
    """
    given = [path for path in paths if path is not None]
    if given and len(given) < len(paths):
        raise UserError("TLS needs all three of --cert, --key and --ca.")
    return TLSFiles(*paths) if given else None


def print_answer(prompt: str, answer: PrivateAnswer):
    """Prints the prompt and the answer, without control characters, and how the answer compares with the clear."""
    prompt, text = (escape(clean(part, kept="\n\t", most=None)) for part in (prompt, answer.text))
    if answer.repeats:
        were = "was" if answer.repeats == 1 else "were"
        again = format_count(answer.repeats, *(("pass", "passes") if answer.verified else ("token",)))
        console.print(f"{again} {were} out of range and computed again.")
    if answer.verified:
        drafts, right = (sum(numbers) for numbers in zip(*answer.verified, strict=True))
        passes = format_count(len(answer.verified), "pass", "passes")
        console.print(f"{right} of {drafts} drafts were right: {len(answer.tokens)} tokens took {passes}.")
    console.print(f"\n[dim]{prompt}[/dim][bold]{text}[/bold]", highlight=False, soft_wrap=True)
    if answer.check:
        console.print(f"in the clear, {describe_check(answer.check)}", soft_wrap=True)


def read_networks(texts: Sequence[str]) -> list[Network]:
    """
    The networks of `--network`, or LAN and WAN if there are none.

    Raises:
        `UserError`: If one is not known.
    """
    try:
        return [parse_network(text) for text in texts] or [LAN, WAN]
    except ValueError as error:
        raise UserError(str(error)) from error


def choose_network(texts: Sequence[str]) -> str:
    """The network of `--network` that operations take their forms for."""
    return texts[0] if texts else WAN.name


def _print_cost(answer: PrivateAnswer, networks: list[Network]):
    cost = answer.cost
    console.print(f"{answer.seconds:.1f} s in all, including compilation and set-up")
    if cost.before:
        _print_before(table_rows(before_by_operation(cost)))
    name = "after it came" if cost.before else "operation"
    console.print(make_table((name, *TABLE_COLUMNS), table_rows(by_operation(cost))))
    console.print(make_table(("once a connection", *TABLE_COLUMNS), table_rows(set_up_by_operation(cost))[-1:]))
    for network in networks:
        console.print(f"on {network.name}: about {project(cost, network):,.0f} s", highlight=False)


def _print_before(rows: list[tuple[str, ...]]):
    console.print(make_table(("before the prompt", *TABLE_COLUMNS), rows))


def _save(answer: PrivateAnswer, output: Path | None):
    if output is not None:
        with written_whole(output) as path:
            answer.cost.save(path)
        console.print(f"costs: {output}", markup=False, soft_wrap=True)


def _print_line(line: str):
    """
    Writes a line at once, so that threads do not mix theirs. A server goes on when nobody reads its lines any more.
    """
    try:
        with _PRINTING:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
