"""`entropy-gpt study`: many models of the family, trained, converted and answering privately, by a protocol."""

import os
from pathlib import Path
from typing import Annotated

import typer

from entropy_gpt.conversion.early_checks import check_path
from entropy_gpt.training.claims import refuse_claimed
from entropy_gpt.training.storage import check_folder

from .paths import read_path


PROTOCOL = Path(__file__).parents[1] / "programs" / "study" / "protocol.yaml"


def study(
    protocol: Annotated[
        Path, typer.Option(callback=read_path, help="What is trained, converted and asked, with what.")
    ] = PROTOCOL,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP",
            help="Groups whose name begins so, and what they depend on; more than once, of any. 'smoke': a trial.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(callback=read_path, help="Folder for runs and record.")] = Path("runs/study"),
    workers: Annotated[
        int, typer.Option(min=1, help="Runs side by side; the cores are divided among them.")
    ] = os.cpu_count() or 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")] = False,
):
    """
    Measure quality against private cost: train, convert and ask many models by a protocol.

    A protocol is a YAML file with groups of runs; lists of settings are crossed. Runs that are finished are skipped,
    and an interrupted one goes on from its last checkpoint: the same command goes on. Each leaves its result in
    OUTPUT/runs/NAME, and all together OUTPUT/study.json.

    Example: entropy-gpt study --only ladder --only scratch --workers 2
    """
    check_path(protocol)
    check_folder(output)  # before the imports, which take seconds
    if not dry_run:
        refuse_claimed(output)
    from entropy_gpt.programs.study import study as study_job

    study_job.run(protocol, only or (), output, workers, dry_run)
