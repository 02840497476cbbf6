"""`entropy-gpt study`: many models of the family, trained, converted and answering privately, by a protocol."""

import os
from pathlib import Path
from typing import Annotated

import typer

from entropy_gpt.conversion.early_checks import check_path
from entropy_gpt.training.claims import refuse_claimed
from entropy_gpt.training.storage import check_folder

from .paths import read_path


PROTOCOLS = Path(__file__).parents[1] / "programs" / "study" / "protocols"
ARCHITECTURES, SCALING, LADDER = NAMED = ("study", "scaling", "ladder")


def study(
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="What is trained, converted and asked, with what: 'study', 'scaling' (at up to thirty times the "
            "tokens), 'ladder' (attention without a maximum), or a YAML file.",
        ),
    ] = ARCHITECTURES,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP",
            help="Only groups whose names begin like this, with what they need. Can be repeated. 'smoke': a trial.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(callback=read_path, help="Folder for runs and record. Default: runs/ and the protocol's name."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Runs side by side. They share the cores, unless the protocol names threads.")
    ] = os.cpu_count() or 1,
    hours: Annotated[
        float | None,
        typer.Option(min=0, help="Stop after this many hours. Runs that are not finished keep their last checkpoint."),
    ] = None,
    time_again: Annotated[
        bool, typer.Option("--time-again", help="Time the steps again, for instance when nothing else is running.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and the hours it takes; write nothing.")
    ] = False,
):
    """
    Measure quality against private cost: train, convert and ask many models by a protocol.

    A protocol is a YAML file with groups of runs; lists of settings are crossed. Finished runs are skipped, and
    the same command continues an interrupted one from its last checkpoint. Each run leaves its result in
    OUTPUT/runs/NAME, and all of them together OUTPUT/study.json.

    Example: entropy-gpt study --only ladder --only scratch --workers 2
    """
    file = find_protocol(protocol)
    check_path(file)
    output = output or Path("runs", file.stem)
    check_folder(output)  # before the imports, which take seconds
    if not dry_run:
        refuse_claimed(output)
    from entropy_gpt.programs.study import study as study_job

    study_job.run(file, only or (), output, workers, dry_run, hours, time_again)


def find_protocol(name: str) -> Path:
    """The file of a protocol that comes with the package, or of that name."""
    named = PROTOCOLS / f"{name}.yaml"
    return named if name in NAMED else read_path(Path(name))
