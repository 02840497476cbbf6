"""The pictures of training runs: which there are, which runs each can be drawn for, and drawing them to files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.records.run_log import RunLog
from entropy_gpt.training.files import written_whole


if TYPE_CHECKING:
    from matplotlib.figure import Figure


PICTURES = "pictures"  # the folder, in that of a run


@dataclass(frozen=True)
class Picture:
    """
    A picture that can be drawn for some runs.

    Args:
        name (`str`): The name of the file.
        shows (`str`): What it shows.
        draw: Draws it for runs.
        lacking (`str`): What a run has not logged if the picture can't be drawn for it.
        is_for: Whether the picture can be drawn for a run.
    """

    name: str
    shows: str
    draw: Callable[[list[RunLog]], "Figure"]
    lacking: str
    is_for: Callable[[RunLog], bool]


@dataclass(frozen=True)
class Drawing:
    """
    A picture and what became of it.

    Args:
        picture ([`Picture`]): The picture.
        path (`Path`): Where it is drawn.
        runs (`list[RunLog]`): The runs that it shows; if there are none, nothing was drawn.
    """

    picture: Picture
    path: Path
    runs: list[RunLog]


def draw_pictures(runs: list[RunLog], folder: Path, steps: Sequence[int] | None = None) -> list[Drawing]:
    """
    Draws every picture for the runs that logged what it shows. Nothing is written if nothing can be drawn.

    Args:
        runs (`list[RunLog]`): The runs; each picture shows them side by side.
        folder (`Path`): Folder for the PNG files.
        steps (`Sequence[int]`, *optional*): Steps of the heat maps of heads. Default: first, middle and last.

    Raises:
        `UserError`: If the runs have logged nothing yet.
    """
    drawings = [
        Drawing(picture, folder / picture.name, [run for run in runs if picture.is_for(run)])
        for picture in _list_pictures(steps)
    ]
    if not any(drawing.runs for drawing in drawings):
        raise UserError(f"{', '.join(str(run.path) for run in runs)}: nothing is logged yet. Draw it later.")
    for drawing in drawings:
        if drawing.runs:
            with written_whole(drawing.path) as path:
                drawing.picture.draw(drawing.runs).savefig(path, format="png")
    return drawings


def _list_pictures(steps: Sequence[int] | None) -> list[Picture]:
    from . import run_plots as plots  # training does without matplotlib

    def plot_heads(runs: list[RunLog]) -> "Figure":
        return plots.plot_head_entropies(runs, steps)

    losses = ("no losses", lambda run: run.has_losses)
    entropies = ("no entropies", lambda run: bool(run.entropies))
    thresholds = ("no thresholds", lambda run: run.has_thresholds)
    penalty = ("no penalty", lambda run: run.has_penalty)
    return [
        Picture("losses.png", "training and evaluation loss", plots.plot_losses, *losses),
        Picture(
            "layer_entropies.png",
            "mean entropy of each layer over training",
            plots.plot_layer_entropies,
            *entropies,
        ),
        Picture("head_entropies.png", "mean entropy of every head at some steps", plot_heads, *entropies),
        Picture(
            "entropy_ranges.png",
            "heads in four ranges of entropy, at the end",
            plots.plot_entropy_ranges,
            *entropies,
        ),
        Picture("thresholds.png", "learned entropy thresholds", plots.plot_thresholds, *thresholds),
        Picture("penalty.png", "penalties on attention rows over training", plots.plot_penalty, *penalty),
        Picture(
            "scales.png",
            "temperatures and residual scales by layer",
            plots.plot_scales,
            "no scales",
            plots.has_scales,
        ),
    ]
