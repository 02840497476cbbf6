"""Runs the gateway, and says where it is."""

import errno
import os
import socket
import time
from pathlib import Path

import uvicorn
from rich.console import Console

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.measuring.text_diagnostics import diagnose_text
from entropy_gpt.evaluation.private_inference.parties.channel import NoServerError, show_address
from entropy_gpt.gateway.app import Twin, make_app
from entropy_gpt.gateway.guard import is_loopback
from entropy_gpt.training.library_bars import library_bars_hidden
from entropy_gpt.training.model_tokenizer import load_model_tokenizer
from entropy_gpt.training.progress import Stage
from entropy_gpt.workflows.private_client import PrivateClient

from .private import open_client
from .progress import progress_display


PARTING_SECONDS, RETRY_SECONDS, SHORTEST_TOKEN = 5, 1, 16

console = Console()


def run(
    *,
    host: str,
    port: int,
    token_file: Path | None,
    name: str,
    twin: str | None,
    longest_line: int,
    longest_wait: int,
    wait: int,
    **connection,
):
    """
    Runs the gateway until it is interrupted.

    Args:
        host (`str`), port (`int`): Where the gateway listens; port 0 takes a free one.
        token_file (`Path`, *optional*): A file with the token that requests have to bring.
        name (`str`): The model's, in the protocol.
        twin (`str`, *optional*): The model in the clear, for the head entropies on the page.
        longest_line (`int`), longest_wait (`int`): Requests that may wait, and for how many seconds.
        wait (`int`): Seconds in which the server may begin to listen.
        connection: Arguments of [`open_client`].

    Raises:
        `UserError`: If there is no server, the port is taken, or a value can't be used.
    """
    token = read_token(token_file)
    if token is None and not is_loopback(host):
        raise UserError(
            f"--host {host} is beyond this machine's loopback: whoever reaches it could ask. Give --token-file FILE."
        )
    with open_port(host, port) as listener:
        with progress_display(console, transient=True) as progress:
            with progress.stage("connecting to the server") as line:
                client = connect(wait, line, **connection)
            with progress.stage("loading the twin"):
                measure = load_twin(twin) if twin else None
        app = make_app(
            client, name=name, token=token, longest_line=longest_line, longest_wait=longest_wait, twin=measure
        )
        print(f"listening on http://{show_address(host, listener.getsockname()[1])}", flush=True)
        print(f"the model {name!r} is {client.terms.notation}, at {connection['address']}", flush=True)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=PARTING_SECONDS
        )
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print("stopped", flush=True)


def connect(wait: float, line: Stage, **connection) -> PrivateClient:
    """
    A client, as soon as there is a server.

    Args:
        wait (`float`): Seconds after which it is given up.
        line (`Stage`): Shows what is waited for.
        connection: Arguments of [`open_client`].

    Raises:
        `UserError`: As [`PrivateClient`].
    """
    end = time.monotonic() + wait
    while True:
        try:
            return open_client(**connection)
        except NoServerError:
            if time.monotonic() > end:
                raise
        line.say(f"nobody listens at {connection['address']} yet")
        time.sleep(RETRY_SECONDS)


def open_port(host: str, port: int) -> socket.socket:
    """
    Raises:
        `UserError`: If the port is taken, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        advice = "Give an address of this machine with --host."
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            advice = "Is another gateway there? Give another --port."
        raise UserError(f"{show_address(host, port)} can't be listened on: {reason}. {advice}") from error


def read_token(file: Path | None) -> str | None:
    """
    Raises:
        `UserError`: If the file can't be read, or holds no token that is hard to guess.
    """
    if file is None:
        return None
    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no ASCII"
        raise UserError(f"--token-file {file} can't be read: {reason}.") from error
    if len(token) < SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise UserError(
            f"--token-file {file} holds no token of {SHORTEST_TOKEN} or more letters and digits. Make one: "
            f"openssl rand -hex 32 > {file}"
        )
    if os.name == "posix" and file.stat().st_mode & 0o077:
        print(f"other users of this machine may read {file}: chmod 600 {file}", flush=True)
    return token


def load_twin(source: str) -> Twin:
    """
    A model in the clear, whose head entropies are measured on the texts of the page.

    Raises:
        `UserError`: If it, or its tokenizer, can't be loaded.
    """
    place = expanded(source)
    with library_bars_hidden():
        model = load_language_model(place).eval()
        words = load_model_tokenizer(None, place, model.config.vocab_size)

    def measure(text: str) -> dict:
        found = diagnose_text(model, words, text)
        return {"entropies": found.entropies.mean(dim=-1).tolist(), "uniform": found.uniform.mean().item()}

    return measure
