"""The console command `entropy-gpt`."""

import atexit
import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from entropy_gpt.conversion.errors import UserError, missing_package

from .card import card
from .convert import convert
from .diagnose import diagnose
from .doctor import doctor
from .evaluate import evaluate
from .export import export
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
# What goes on with what is done already, if it is started again.
RESUMED = ("quickstart", "train", "convert", "evaluate", "study", "private benchmark")

app = typer.Typer(
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
    status = _run_app()
    if status == INTERRUPTED:
        goes_on = " ".join(sys.argv[1:3]).startswith(RESUMED)
        print(f"entropy-gpt: interrupted.{' The same command goes on from here.' * goes_on}", file=sys.stderr)
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
        return app(standalone_mode=False) or 0  # typer itself makes a KeyboardInterrupt the status 130
    except typer.TyperException as wrong_usage:
        if message := wrong_usage.format_message():  # none where the help is shown for want of a subcommand
            print(f"entropy-gpt: {message} (entropy-gpt --help shows more)", file=sys.stderr)
        return wrong_usage.exit_code
    except ModuleNotFoundError as missing:
        print(f"entropy-gpt: {missing_package('this command', missing, _likely_extra())}", file=sys.stderr)
        return 1
    except (UserError, OSError) as failure:
        print(f"entropy-gpt: {' '.join(str(failure).split())}", file=sys.stderr)  # libraries write paragraphs
        return 1
