"""Pictures of what was measured."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from .conversion_report import ConversionReport
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
        f"{result.title}\nfinal norm: {result.final_normalization}\n"
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


def plot_healing(report: ConversionReport, path: Path):
    """
    Draws the loss against the step of healing, with what was removed when, between the original and its conversion.

    Args:
        report ([`ConversionReport`]): Of a conversion that was healed.
        path (`Path`): The PNG to write.
    """
    healing = report.healing
    figure = Figure(figsize=(7.2, 4.4), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*healing.validation_nats, strict=True), marker="o", ms=4, label="validation text", zorder=3)
    axes.axhline(report.original_nats, color="black", ls=":", lw=1, label="original")
    for step, names in _events_by_step(healing.events).items():
        axes.axvline(step, color="tab:red" if "back" in names else "gray", lw=0.6, alpha=0.7)
        axes.text(
            step, 0.99, names, rotation=90, fontsize=6, ha="right", va="top", transform=axes.get_xaxis_transform()
        )
    axes.margins(y=0.2)
    axes.set(
        xlabel="step of healing",
        ylabel="negative log-likelihood of a token (nats)",
        title=f"{report.source_notation} to {report.target_notation}",
    )
    axes.legend(loc="upper right")
    figure.savefig(path, format="png")


def _events_by_step(events: list[list]) -> dict[int, str]:
    """What happened at each step, in few words: what was removed, or that the guard went back."""
    merged: dict[int, list[str]] = {}
    for step, event in events:
        merged.setdefault(step, []).append("back" if event.startswith("back") else event.removesuffix(" removed"))
    return {step: names[0] + (f" and {len(names) - 1} more" * (len(names) > 1)) for step, names in merged.items()}
