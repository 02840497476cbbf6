"""Pictures of what was measured."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from .conversion_report import ConversionReport
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
    image = _draw_result(axes, result)
    add_entropy_scale(figure, [axes], image, result.maximum_entropy_nats)
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
    images = [_draw_result(axes, result) for axes, result in zip(all_axes, results, strict=True)]
    add_entropy_scale(figure, list(all_axes), images[0], results[0].maximum_entropy_nats)
    figure.savefig(path, format="png")


def _draw_result(axes: Axes, result: ModelResult) -> AxesImage:
    entropy = result.headwise_entropy
    axes.set_title(
        f"{result.title}\nfinal norm: {result.final_normalization}\n"
        f"perplexity {result.perplexity_per_token:.1f}, {entropy.overloaded_share:.0%} of heads overloaded",
        fontsize=10,
    )
    return draw_heat_map(axes, entropy.nats, 0, entropy.maximum)


def draw_heat_map(
    axes: Axes, values: list[list[float]], lowest: float, highest: float, font_size: float = 8
) -> AxesImage:
    """
    Draws a number of each head as a colour, layers downwards, and as a number too where there is room.

    Args:
        axes (`Axes`): Where to.
        values (`list[list[float]]`): Of each head of each layer; what is NaN is grey.
        lowest, highest (`float`): The ends of the colour scale.
        font_size (`float`): Of the numbers.
    """
    axes.set_facecolor("lightgray")
    image = axes.imshow(values, cmap=COLORMAP, vmin=lowest, vmax=highest, aspect="auto")
    heads = len(values[0])
    axes.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(len(values)))
    if heads <= MOST_HEADS_WITH_NUMBERS:
        for layer, row in enumerate(values):
            for head, value in enumerate(row):
                # NaN is on grey.
                color = "white" if value <= (lowest + highest) / 2 else "black"
                axes.text(head, layer, f"{value:.2f}", ha="center", va="center", color=color, fontsize=font_size)
    return image


def add_entropy_scale(figure: Figure, all_axes: list[Axes], image: AxesImage, maximum: float | None, **options):
    """Draws the scale of heat maps of entropies beside them; `maximum` is that of uniform attention, if it is one."""
    uniform = "" if maximum is None else f"\nuniform attention: {maximum:.2f}"
    figure.colorbar(image, ax=all_axes, label=f"mean entropy of attention rows (nats){uniform}", **options)


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
