"""Pictures of what private inference costs."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from entropy_gpt.evaluation.private_inference.program.cost import MEGA, CostSum, InferenceCost, by_operation
from entropy_gpt.evaluation.showing.comparison_plots import PLAIN_NUMBERS, shorten
from entropy_gpt.evaluation.showing.plots import DOTS_PER_INCH


# In the order of the program. Families have a hue each, of Okabe and Ito's, and steps of lightness within: parts of
# the softmax in orange, products of scores in green, linear maps in blue. The softmax as one operation stands in place
# of its parts, so it has a hue of its own.
OPERATION_COLORS = {
    "embedding": "#d9d9d9",
    "norm": "#CC79A7",
    "query, key, value": "#003f66",
    "scores": "#009E73",
    "temperatures": "#005c43",
    "maximum": "#7a3300",
    "exponential": "#D55E00",
    "softmax": "#6F2DA8",
    "attention function": "#E9967A",
    "values": "#8fd6c0",
    "division": "#F0C27A",
    "output": "#0072B2",
    "FFN": "#9ccbe8",
    "activation": "#F0E442",
    "head": "#9a9a9a",
    "argmax": "#4d4d4d",
    "check": "#B7410E",
    "squares": "#c48a2c",
    "numbers": "#8c6d31",
    "rows": "#e7ba52",
}
OTHER_COLOR = "#000000"
BAR_HEIGHT = 0.62
# Segments from this part of the picture's width on have their share written in them.
LABELLED_SHARE = 0.055


def draw_costs(costs: dict[str, InferenceCost]) -> Figure:
    """
    Draws where the bytes of each inference go, by operation, without the set-up.

    Args:
        costs (`dict[str, InferenceCost]`): By what the bars are called, the first one on top.
    """
    figure = Figure(figsize=(9.6, 1.9 + 0.5 * len(costs)), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot(xlabel="MB sent by all parties, set-up apart")
    longest = max((cost.total_bytes for cost in costs.values()), default=0)
    for row, cost in enumerate(costs.values()):
        _draw_bar(axes, row, by_operation(cost), longest)
    axes.set_yticks(range(len(costs)), list(map(shorten, costs)))
    axes.set(ylim=(len(costs) - 0.4, -0.6), xlim=(0, 1.13 * longest / MEGA or 1))
    axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    found = {part.name for cost in costs.values() for part in by_operation(cost)}
    names = [name for name in OPERATION_COLORS if name in found] + sorted(found - set(OPERATION_COLORS))
    handles = [Patch(facecolor=_color(name), label=name) for name in names]
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False)
    return figure


def _draw_bar(axes: Axes, row: int, parts: list[CostSum], longest: int):
    total, beginning = sum(part.total_bytes for part in parts), 0
    for part in parts:
        color = _color(part.name)
        width = part.total_bytes / MEGA
        axes.barh(row, width, BAR_HEIGHT, beginning, color=color, edgecolor="white", linewidth=0.6)
        if part.total_bytes >= LABELLED_SHARE * longest > 0:
            ink = "white" if np.dot(to_rgb(color), (0.3, 0.6, 0.1)) < 0.5 else "black"
            share = f"{part.total_bytes / total:.0%}"
            axes.text(beginning + width / 2, row, share, ha="center", va="center", color=ink, fontsize=8)
        beginning += width
    axes.annotate(f"{_round(total / MEGA)} MB", (beginning, row), (4, 0), textcoords="offset points", va="center")


def _round(number: float) -> str:
    """A number with three significant figures, without an exponent."""
    return f"{float(f'{number:.3g}'):,.9g}"


def _color(operation: str) -> str:
    return OPERATION_COLORS.get(operation, OTHER_COLOR)
