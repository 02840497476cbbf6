"""Draws training runs, and prints a table of them."""

from pathlib import Path

from rich.console import Console

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.records.run_log import RunLog
from entropy_gpt.evaluation.showing.columns import Column, entropy_columns, list_rows
from entropy_gpt.evaluation.showing.run_pictures import PICTURES, Drawing, draw_pictures
from entropy_gpt.training.storage import check_folder

from .progress import progress_display
from .tables import make_table


console = Console()


def run(paths: list[Path], output: Path | None, steps: str | None):
    """
    Draws everything that the runs have logged, and prints the state of each run.

    Args:
        paths (`list[Path]`): Folders of runs, or their logs.
        output (`Path`, *optional*): Folder for the pictures.
        steps (`str`, *optional*): Steps of the heat maps, separated by commas.

    Raises:
        `UserError`: If a run can't be read, is given twice or has logged nothing, or an option has a wrong value.
    """
    wanted = None if steps is None else read_steps(steps)
    runs = _load(paths)
    if output is None:
        output = runs[0].path.parent / PICTURES if len(runs) == 1 else Path(PICTURES)
    output = output.resolve()
    check_folder(output)
    with progress_display(console, transient=True) as progress, progress.stage("drawing"):
        drawings = draw_pictures(runs, output, wanted)
    show(runs, drawings, wanted)


def show(runs: list[RunLog], drawings: list[Drawing], steps: list[int] | None = None):
    """
    Prints the state of each run, and where the pictures are.

    Args:
        runs (`list[RunLog]`): The runs.
        drawings (`list[Drawing]`): Their pictures.
        steps (`list[int]`, *optional*): The chosen steps of the heat maps.
    """
    _print_table(runs)
    if steps is not None:
        _print_nearest_steps(runs, steps)
    _print_where(drawings, runs)


def read_steps(text: str) -> list[int]:
    """
    Reads steps that are separated by commas.

    Raises:
        `UserError`: If a part is not a whole number.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise UserError(f"--steps {text}: {part!r} is not a step. Give whole numbers, such as 0,500,1500.")
    return sorted({int(part) for part in parts})


def _load(paths: list[Path]) -> list[RunLog]:
    runs = [RunLog.load(path) for path in paths]
    for index, run in enumerate(runs):
        if run.path in [other.path for other in runs[:index]]:
            raise UserError(f"{run.place} is given twice. Give each run once.")
    return runs


def _print_table(runs: list[RunLog]):
    headings = [column.narrow for column in COLUMNS]
    console.print(make_table(headings, list_rows(COLUMNS, runs), folded={0}))
    console.print(
        "entropy: mean of all heads in the last record; collapsed: below 5 % of the entropy of uniform attention; "
        "overloaded: at least 3/4 of it",
        style="dim",
    )


def _last_loss(run: RunLog) -> str:
    losses = [record.cross_entropy for record in run.training if record.cross_entropy is not None]
    return f"{losses[-1]:.3f}" if losses else ""


def _divergence(run: RunLog) -> str:
    went_back = f"{len(run.rollbacks)} x back" if run.rollbacks else ""
    diverged = "" if run.diverged_at is None else f"{run.diverged_at:,}"
    return "\n".join(filter(None, (diverged, went_back)))


MEAN_ENTROPY, OVERLOADED, COLLAPSED = entropy_columns(
    lambda run: run.entropies[-1].headwise_entropy if run.entropies else None
)
COLUMNS = (
    Column("run", "run and\narchitecture", lambda run: f"{run.place.name}\n {run.description.notation}"),
    Column("last step", "last\nstep", lambda run: f"{run.last_step:,}"),
    Column("last loss", "last\nloss", _last_loss),
    Column("perplexity", "eval.\nppl", lambda run: f"{run.evaluations[-1].perplexity:.4g}" if run.evaluations else ""),
    MEAN_ENTROPY,
    COLLAPSED,
    OVERLOADED,
    Column("alarms", "alarms", lambda run: str(len(run.alarms))),
    Column("diverged at step", "diverged\nat step", _divergence),
)


def _print_nearest_steps(runs: list[RunLog], steps: list[int]):
    from entropy_gpt.evaluation.showing.run_plots import choose_records

    for run in runs:
        if not run.entropies:
            continue
        for step, record in zip(steps, choose_records(run, steps), strict=True):
            if record.step != step:
                console.print(
                    f"{run.place.name}: no entropies were recorded at step {step:,}; step {record.step:,} is shown",
                    highlight=False,
                    markup=False,
                )


def _print_where(drawings: list[Drawing], runs: list[RunLog]):
    for drawing in drawings:
        picture, path = drawing.picture, drawing.path
        without = [run.place.name for run in runs if run not in drawing.runs]
        if not drawing.runs:
            old = "; the existing file is older" if path.exists() else ""
            line = f"not drawn: {picture.name} ({picture.lacking} logged{old})"
        else:
            line = f"{picture.shows}: {path}"
            line += f" (without {', '.join(without)}: {picture.lacking})" if without else ""
        console.print(line, markup=False, soft_wrap=True)
