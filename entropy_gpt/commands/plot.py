"""`entropy-gpt plot`: draws training runs from their logs."""

from pathlib import Path
from typing import Annotated

import typer

from entropy_gpt.conversion.early_checks import check_path
from entropy_gpt.training.storage import check_folder

from .paths import read_path, read_paths


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", callback=read_paths, help="A folder of a training run, or its training_log.jsonl."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            callback=read_path,
            help="Folder for the pictures. Default: RUN/pictures, or ./pictures for several runs.",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="STEP,...",
            help="Steps of the heat maps, such as 0,500,1500. Default: first, middle and last.",
        ),
    ] = None,
):
    """
    Draw training runs, alone or side by side: losses, entropies, thresholds, penalty and scales.

    Only the logs are needed, of runs that have finished, are still running or died. A table shows the state of each
    run.

    Example: entropy-gpt plot runs/baseline runs/proposal --steps 0,500,1500
    """
    for path in runs:
        check_path(path, "Give the folder of a training run, or its training_log.jsonl.")
    if output is not None:
        check_folder(output)  # before the imports, which take seconds
    from entropy_gpt.terminal.plot import run

    run(runs, output, steps)
