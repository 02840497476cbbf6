"""Pictures of what was measured."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from .entropy_diagnostics import HeadwiseEntropy
from .results import ModelResult


COLORMAP = "viridis"
DOTS_PER_INCH = 150
# Up to so many heads a layer, each cell shows its number too.
MOST_HEADS_WITH_NUMBERS = 12


def plot_headwise_entropy(result: ModelResult, path: Path):
    """
    Draws the mean entropy of every head as a heat map, layers downwards, on a scale from 0 to the causal maximum.

    Args:
        result ([`ModelResult`]): What was measured.
        path (`Path`): The PNG to write.
    """
    figure = Figure(figsize=(5.2, 4.6), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    image = _draw_heat_map(axes, result)
    _add_scale(figure, [axes], image, result.headwise_entropy)
    figure.savefig(path, format="png")


def plot_comparison(results: list[ModelResult], path: Path):
    """
    Draws the heat maps of several models side by side on one scale.

    Args:
        results (`list[ModelResult]`): What was measured, under the same conditions.
        path (`Path`): The PNG to write.
    """
    figure = Figure(figsize=(3.6 * len(results) + 0.8, 4.4), dpi=DOTS_PER_INCH, layout="constrained")
    all_axes = figure.subplots(1, len(results), squeeze=False)[0]
    images = [_draw_heat_map(axes, result) for axes, result in zip(all_axes, results, strict=True)]
    _add_scale(figure, list(all_axes), images[0], results[0].headwise_entropy)
    figure.savefig(path, format="png")


def _draw_heat_map(axes: Axes, result: ModelResult) -> AxesImage:
    entropy = result.headwise_entropy
    image = axes.imshow(entropy.nats, cmap=COLORMAP, vmin=0, vmax=entropy.maximum, aspect="auto")
    axes.set_title(
        f"{result.notation}\nfinal norm: {result.final_normalization}\n"
        f"perplexity {result.perplexity_per_token:.1f}, {entropy.overloaded_share:.0%} of heads overloaded",
        fontsize=10,
    )
    heads = len(entropy.nats[0])
    axes.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(len(entropy.nats)))
    if heads <= MOST_HEADS_WITH_NUMBERS:
        for layer, row in enumerate(entropy.nats):
            for head, value in enumerate(row):
                color = "black" if value > entropy.maximum / 2 else "white"
                axes.text(head, layer, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    return image


def _add_scale(figure: Figure, all_axes: list[Axes], image: AxesImage, entropy: HeadwiseEntropy):
    label = f"mean entropy of attention rows (nats)\nuniform attention: {entropy.maximum:.2f}"
    figure.colorbar(image, ax=all_axes, label=label)
