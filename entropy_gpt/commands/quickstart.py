"""`entropy-gpt quickstart`: small models of the family, trained or converted, compared, saved and loaded back."""

from pathlib import Path
from typing import Annotated

import typer

from entropy_gpt.conversion.early_checks import check_path
from entropy_gpt.training.claims import refuse_claimed
from entropy_gpt.workflows.output_folder import QUICKSTART

from .paths import read_path


DEFAULT_STEPS = 1300
DEFAULT_OUTPUT = Path("quickstart_output")


def quickstart(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each model, of 1024 tokens.")] = DEFAULT_STEPS,
    corpus: Annotated[
        Path | None,
        typer.Option(
            callback=read_path,
            help="Text to train on: a text or data file, or a folder of such. Default: Python's standard library.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(callback=read_path, help="Folder for models, pictures and results.")
    ] = DEFAULT_OUTPUT,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights and data order.")] = 0,
):
    """
    Train, convert, compare, save and reload small models, and run two under secure computation.

    Trains GPT-2 and two architectures for private inference on real text, converts the GPT-2 to the second of them,
    and compares all four: perplexity, entropy of attention heads, seconds. Each is saved as a folder ready for the Hub
    and loaded back in a fresh process. At last two of them answer a prompt under secure computation, between two
    processes. report.html shows all results. Takes about 9 minutes on two cores; if interrupted, the same command
    continues.

    Example: entropy-gpt quickstart --corpus ~/my_project/src --steps 500 --output my_run
    """
    if corpus is not None:
        check_path(corpus)
    QUICKSTART.is_in(output)  # before the imports, which take seconds
    refuse_claimed(output)
    from entropy_gpt.programs.quickstart import quickstart as quickstart_job

    quickstart_job.run(steps=steps, corpus_path=corpus, output=output, seed=seed)
