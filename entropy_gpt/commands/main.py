"""The console command `entropy-gpt`."""

import atexit
import os
import sys
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated

import typer
from typer.core import TyperGroup

from entropy_gpt.conversion.errors import UserError, missing_package
from entropy_gpt.training.storage import StorageError, find_storage_error

from .card import card
from .convert import convert
from .diagnose import diagnose
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .paths import check_text
from .plot import plot
from .private import private
from .push import push
from .quickstart import quickstart
from .report import report
from .study import study
from .train import train


INTERRUPTED = 130
# The extra that each command is made for, where not all commands of a group need it.
EXTRAS = {"train": "train", "convert": "train", "export": "onnx", "private": "private"}


class Interruption(Exception):
    """An interrupted command, with a note if the same command goes on from there."""


class Commands(TyperGroup):
    """Keeps the note of an interruption, of which typer itself leaves only the status."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise Interruption(*_notes(interrupt)) from interrupt


app = typer.Typer(
    cls=Commands,
    help="GPT-2 without most of its non-linearities, for private inference.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
)
app.command()(quickstart)
app.command()(train)
app.command()(convert)
app.command()(evaluate)
app.command()(diagnose)
app.command()(plot)
app.command()(report)
app.command()(study)
app.command()(doctor)
app.command()(card)
app.command()(push)
app.command()(export)
app.add_typer(private, name="private")
for command in (*app.registered_commands, *private.registered_commands):
    # One line for each paragraph, so that the terminal breaks them and not the source.
    text = command.help or command.callback.__doc__ or ""  # python -OO leaves no docstrings
    command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def print_version(wanted: bool):
    if wanted:
        print(f"entropy-gpt {version('entropy-gpt')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
):
    """GPT-2 without most of its non-linearities, for private inference."""


def main() -> int:
    """Runs the command. Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
    status = _run_app()
    if "WORLD_SIZE" in os.environ:
        _leave(status)
    return status


def _leave(status: int):
    """
    Ends one of several processes without taking the interpreter apart. Its process group has threads of its own: left
    alone they may abort the process, and if the last reference to the group goes while they wait for the interpreter's
    lock, they and it wait for each other.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _likely_extra() -> str:
    return EXTRAS.get(sys.argv[1], "eval") if len(sys.argv) > 1 else ""


def _run_app() -> int:
    try:
        for word in sys.argv[1:]:
            check_text(word)
        status = app(standalone_mode=False) or 0
        return _complain("interrupted.", INTERRUPTED) if status == INTERRUPTED else status  # outside of a command
    except Interruption as interruption:
        return _complain(" ".join(["interrupted.", *interruption.args]), INTERRUPTED)
    except typer.TyperException as wrong_usage:
        if message := wrong_usage.format_message():  # none where the help is shown for want of a subcommand
            message = _name_value(message, wrong_usage.__cause__)
            return _complain(f"{message} (entropy-gpt --help shows more)", wrong_usage.exit_code)
        return wrong_usage.exit_code
    except ModuleNotFoundError as missing:
        return _complain(missing_package("this command", missing, _likely_extra()))
    except Exception as error:
        failure = error if isinstance(error, StorageError) else find_storage_error(error) or error
        if not isinstance(failure, UserError | OSError):
            raise
        if isinstance(failure, UserError):
            failure.in_python = ""
        return _complain(" ".join([str(failure), *_notes(error)]))


def _name_value(message: str, cause: BaseException | None) -> str:
    """pydantic's message of an option's value, with the value."""
    if "Input should be" in message:
        from pydantic import ValidationError  # here, so that other mistakes are said without it

        if isinstance(cause, ValidationError):
            return f"{message}; it is {cause.errors()[0]['input']!s:.80}"
    return message.replace("Value error, ", "")  # a word of pydantic's


def _complain(message: str, status: int = 1) -> int:
    """Prints one line, and returns the status."""
    print(f"entropy-gpt: {' '.join(message.split())}", file=sys.stderr)  # libraries write paragraphs
    return status


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])
