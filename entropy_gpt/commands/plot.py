"""`entropy-gpt plot`: pictures of training runs, from their logs alone."""

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders of training runs, or their training_log.jsonl.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the pictures. Else RUN/pictures, or pictures here for several runs."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="STEP,...", help="Steps of the heat maps of heads, such as 0,500,1500. Else first, middle, last."
        ),
    ] = None,
):
    """
    Draw training runs, alone or side by side: losses, entropies, thresholds, penalty and scales.

    It needs nothing but the logs, of runs that have ended, are still going on or died. The table tells how each run
    stands.

    Example: entropy-gpt plot runs/baseline runs/proposal --steps 0,500,1500
    """
    from entropy_gpt.terminal.plot import run

    run(runs, output, steps)
