"""Pictures of what was measured."""

import math
import re

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter

from entropy_gpt.evaluation.measuring.entropy_diagnostics import HeadwiseEntropy
from entropy_gpt.evaluation.records.conversion_report import ConversionReport


COLORMAP = "viridis"
DOTS_PER_INCH = 150
# Up to this many heads a layer, each cell shows its number too.
MOST_HEADS_WITH_NUMBERS = 12
MOST_TICKS = 24
RANGE_NAMES = ("[0, 1/4)", "[1/4, 1/2)", "[1/2, 3/4)", "[3/4, 1]")
INCHES_PER_CHARACTER = 0.0085  # for each point of the font's size, a wide mixture of letters


def draw_heat_map(
    axes: Axes, values: list[list[float]], lowest: float, highest: float, font_size: float = 8, digits: int = 2
) -> AxesImage:
    """
    Draws a number of each head as a colour, layers downwards, and as a number too where there is room.

    Args:
        axes (`Axes`): Where to.
        values (`list[list[float]]`): Number of each head of each layer; what is NaN is grey.
        lowest, highest (`float`): The ends of the colour scale.
        font_size (`float`): Font size of the numbers.
        digits (`int`): Digits of the numbers after the point.
    """
    axes.set_facecolor("lightgray")
    image = axes.imshow(values, cmap=COLORMAP, vmin=lowest, vmax=highest, aspect="auto")
    heads = len(values[0])
    axes.set(xlabel="head", ylabel="layer", xticks=number_ticks(heads), yticks=number_ticks(len(values)))
    if heads <= MOST_HEADS_WITH_NUMBERS:
        for layer, row in enumerate(values):
            for head, value in enumerate(row):
                # NaN is on grey.
                color = "white" if value <= (lowest + highest) / 2 else "black"
                axes.text(
                    head, layer, f"{value:.{digits}f}", ha="center", va="center", color=color, fontsize=font_size
                )
    return image


def number_ticks(count: int) -> range:
    """Which of a number of layers or heads are numbered on an axis."""
    return range(0, count, math.ceil(count / MOST_TICKS))


def draw_ranges(axes: Axes, entropies: list[HeadwiseEntropy], maxima: list[float]):
    """Draws the shares of heads in the paper's four ranges of a maximum (nats) each, one bar for each entry."""
    for row, (entropy, maximum) in enumerate(zip(entropies, maxima, strict=True)):
        shares = entropy.range_shares(maximum)
        beginning = 0.0
        for share, color in zip((*shares, 1 - sum(shares)), (*range_colors(), "lightgray"), strict=True):
            axes.barh(row, share, 0.62, left=beginning, color=color, edgecolor="white")
            if share >= 0.07:
                dark = np.dot(to_rgb(color), (0.3, 0.6, 0.1)) < 0.5
                axes.text(
                    beginning + share / 2,
                    row,
                    f"{share:.0%}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if dark else "black",
                )
            beginning += share
        if math.isfinite(maximum):
            axes.text(1.01, row, f"{maximum:.2f} nats", va="center", fontsize=8)
    axes.set(xlim=(0, 1), ylim=(len(entropies) - 0.5, -0.5), xlabel="share of heads")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)


def range_colors() -> list:
    """The colours of the four ranges."""
    return [colormaps[COLORMAP](part) for part in (0.08, 0.36, 0.66, 0.95)]


def add_entropy_scale(figure: Figure, all_axes: list[Axes], image: AxesImage, maximum: float | None, **options):
    """Draws the scale of heat maps of entropies next to them; `maximum` is that of uniform attention, if it is one."""
    uniform = "" if maximum is None else f"\nuniform attention: {maximum:.2f}"
    figure.colorbar(image, ax=all_axes, label=f"mean entropy of attention rows (nats){uniform}", **options)


def add_legend(figure: Figure | SubFigure, handles: list[Artist], font_size: float = 9, place: str = "lower center"):
    """Explains what is drawn, outside of the panels, in as many columns as the figure has room for."""
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(
            handles=handles, loc=f"outside {place}", ncols=columns, fontsize=font_size, frameon=False
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def wrap(text: str, inches: float, font_size: float) -> str:
    """Breaks a title into lines of a width in inches, after a blank, `+` or `/`, or anywhere if there is none."""
    characters = max(8, int(inches / (INCHES_PER_CHARACTER * font_size)))
    lines = [""]
    for part in re.split(r"(?<=[+/ ])", text):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > characters:
            lines.append("")
        lines[-1] += part
        while len(lines[-1]) > characters + 1:
            lines[-1:] = [lines[-1][:characters], lines[-1][characters:]]
    return "\n".join(line.rstrip() for line in lines).replace("$", r"\$")


def plot_healing(report: ConversionReport) -> Figure:
    """
    Draws the loss against the step of healing, with what was removed when, between the original and its conversion.

    Args:
        report ([`ConversionReport`]): Of a conversion that was healed.
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
    return figure


def _events_by_step(events: list[list]) -> dict[int, str]:
    """What happened at each step, in few words: what was removed, or that the guard went back."""
    merged: dict[int, list[str]] = {}
    for step, event in events:
        merged.setdefault(step, []).append("back" if event.startswith("back") else event.removesuffix(" removed"))
    return {step: names[0] + (f" and {len(names) - 1} more" * (len(names) > 1)) for step, names in merged.items()}
