"""Sends a model to the Hub, or writes its card, and prints what was done."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console

from entropy_gpt.workflows.options import read_options
from entropy_gpt.workflows.publish import PublicationOptions, prepare_package, send_package, write_card

from .progress import progress_display
from .tables import make_table


console = Console()


def run(folder: Path, **options):
    """
    Sends a model if it passes all checks, and prints its files and its address.

    Args:
        folder (`Path`): Folder of a trained model with its tokenizer.
        options: The other arguments of [`~entropy_gpt.publish`].

    Raises:
        `UserError`: If something is missing or wrong, or the Hub refuses or does not answer.
    """
    checked = read_options(PublicationOptions, **options)
    hub_logging.set_verbosity_error()  # errors are printed in one line
    if not sys.stderr.isatty():
        disable_progress_bars()
    with ExitStack() as stack:
        with progress_display(console) as progress:
            package = stack.enter_context(prepare_package(folder, checked, progress))
        rows = [(name, f"{size / 1e6:,.3f}") for name, size in package.files.items()]
        console.print(make_table(("file", "MB"), rows))
        if checked.dry_run:
            console.print("It loads in a fresh process with the same logits. Nothing was sent.")
            return
        console.print(f"sending it to {package.options.repository}", highlight=False)
        url = send_package(package)  # outside of the display: huggingface_hub has its own progress bars
    console.print(f"sent: {url}", soft_wrap=True, highlight=False)


def run_card(folder: Path, results: Sequence[Path], licence: str | None):
    """
    Writes the card of a model's folder, and prints where it is.

    Args:
        folder (`Path`): Folder of a trained model with its tokenizer.
        results (`Sequence[Path]`): Files or folders with results of the model, besides those in `folder`.
        licence (`str`, *optional*): Licence of the weights.

    Raises:
        `UserError`: If the model or its results can't be read, or lack what a card shows.
    """
    hub_logging.set_verbosity_error()
    with progress_display(console, transient=True) as progress, progress.stage("writing the card"):
        card = write_card(folder, results=results, licence=licence)
    console.print(f"card: {card}", markup=False, soft_wrap=True)
