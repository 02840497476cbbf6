"""Pictures of training runs and the table beside them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.records.run_log import RunLog
from entropy_gpt.evaluation.showing.run_plots import (
    choose_records,
    has_scales,
    plot_entropy_ranges,
    plot_head_entropies,
    plot_layer_entropies,
    plot_losses,
    plot_penalty,
    plot_scales,
    plot_thresholds,
)
from entropy_gpt.training.files import written_whole

from .tables import make_table


# The columns of the table, for a terminal of 80 characters.
HEADINGS = (
    "run and\narchitecture",
    "last\nstep",
    "last\nloss",
    "eval.\nppl",
    "entropy\n(nats)",
    "col-\nlapsed",
    "over-\nloaded",
    "alarms",
    "diverged\nat step",
)
PICTURES = "pictures"

console = Console()


@dataclass(frozen=True)
class Picture:
    """
    A picture that the command draws.

    Args:
        name (`str`): Of the file.
        shows (`str`): What is on it.
        draw: Draws it for runs.
        lacking (`str`): What is missing from the runs that it can't be drawn for.
        is_for: Whether it can be drawn for a run.
    """

    name: str
    shows: str
    draw: Callable[[list[RunLog], Path], None]
    lacking: str
    is_for: Callable[[RunLog], bool]


def run(paths: list[Path], output: Path | None, steps: str | None):
    """
    Draws what there is to draw, and prints how each run stands.

    Args:
        paths (`list[Path]`): Folders of runs, or their logs.
        output (`Path`, *optional*): Folder for the pictures.
        steps (`str`, *optional*): Steps of the heat maps, with commas between them.

    Raises:
        `UserError`: If a run can't be read, is given twice or has logged nothing, or an option can't be followed.
    """
    wanted = None if steps is None else read_steps(steps)
    runs = _load(paths)
    if output is None:
        output = runs[0].path.parent / PICTURES if len(runs) == 1 else Path(PICTURES)
    output = output.resolve()
    if not next(place for place in (output, *output.parents) if place.exists()).is_dir():
        raise UserError(f"{output} is no folder that can be written to. Give another --output.")
    drawable = [(picture, [run for run in runs if picture.is_for(run)]) for picture in _pictures(wanted)]
    if not any(suited for _, suited in drawable):
        raise UserError(f"{', '.join(str(run.path) for run in runs)}: nothing is logged yet. Draw it later.")
    _print_table(runs)
    if wanted is not None:
        _say_which_steps(runs, wanted)
    with console.status("drawing"):
        for picture, suited in drawable:
            if suited:
                with written_whole(output / picture.name) as path:
                    picture.draw(suited, path)
    _print_where(drawable, runs, output)


def read_steps(text: str) -> list[int]:
    """
    Reads steps with commas between them.

    Raises:
        `UserError`: If it is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise UserError(f"--steps {text}: {part!r} is no step. Give whole numbers, such as 0,500,1500.")
    return sorted({int(part) for part in parts})


def _load(paths: list[Path]) -> list[RunLog]:
    runs = [RunLog.load(path) for path in paths]
    for index, run in enumerate(runs):
        if run.path in [other.path for other in runs[:index]]:
            raise UserError(f"{run.place} is given twice. Give each run once.")
    return runs


def _pictures(steps: list[int] | None) -> list[Picture]:
    def plot_heads(runs: list[RunLog], path: Path):
        plot_head_entropies(runs, path, steps)

    losses = ("no losses", lambda run: run.has_losses)
    entropies = ("no entropies", lambda run: bool(run.entropies))
    thresholds = ("no thresholds", lambda run: run.has_thresholds)
    penalty = ("no penalty", lambda run: run.has_penalty)
    return [
        Picture("losses.png", "training and evaluation loss", plot_losses, *losses),
        Picture("layer_entropies.png", "mean entropy of each layer over training", plot_layer_entropies, *entropies),
        Picture("head_entropies.png", "mean entropy of every head at some steps", plot_heads, *entropies),
        Picture("entropy_ranges.png", "heads in four ranges of entropy, at the end", plot_entropy_ranges, *entropies),
        Picture("thresholds.png", "learned entropy thresholds", plot_thresholds, *thresholds),
        Picture("penalty.png", "entropy penalty over training", plot_penalty, *penalty),
        Picture("scales.png", "temperatures and residual scales by layer", plot_scales, "no scales", has_scales),
    ]


def _print_table(runs: list[RunLog]):
    console.print(make_table(HEADINGS, map(table_row, runs), folded={0}))
    console.print(
        "entropies: of the last record, the mean of all heads; collapsed: below 5 % of what uniform attention has, "
        "overloaded: from 3/4 of it on",
        style="dim",
    )


def table_row(run: RunLog) -> tuple[str, ...]:
    """How a run stands, in the order of `HEADINGS`; what was not logged is empty."""
    losses = [record.cross_entropy for record in run.training if record.cross_entropy is not None]
    entropies = ("", "", "")
    if run.entropies:
        entropy = run.entropies[-1].headwise_entropy
        entropies = (f"{entropy.mean:.2f}", f"{entropy.collapsed_share:.0%}", f"{entropy.overloaded_share:.0%}")
    went_back = f"{len(run.rollbacks)} x back" if run.rollbacks else ""
    diverged = "" if run.diverged_at is None else f"{run.diverged_at:,}"
    return (
        f"{run.place.name}\n {run.description.notation}",
        f"{run.last_step:,}",
        f"{losses[-1]:.3f}" if losses else "",
        f"{run.evaluations[-1].perplexity:.4g}" if run.evaluations else "",
        *entropies,
        str(len(run.alarms)),
        "\n".join(filter(None, (diverged, went_back))),
    )


def _say_which_steps(runs: list[RunLog], steps: list[int]):
    for run in runs:
        if not run.entropies:
            continue
        for step, record in zip(steps, choose_records(run, steps), strict=True):
            if record.step != step:
                console.print(
                    f"{run.place.name}: step {record.step:,} stands for {step:,}, where no entropies were recorded",
                    highlight=False,
                    markup=False,
                )


def _print_where(drawable: list[tuple[Picture, list[RunLog]]], runs: list[RunLog], output: Path):
    for picture, suited in drawable:
        without = [run.place.name for run in runs if run not in suited]
        if not suited:
            old = ", and the one that is there is older" if (output / picture.name).exists() else ""
            line = f"not drawn: {picture.name} ({picture.lacking} logged{old})"
        else:
            line = f"{picture.shows}: {output / picture.name}"
            line += f" (without {', '.join(without)}: {picture.lacking})" if without else ""
        console.print(line, markup=False, soft_wrap=True)
