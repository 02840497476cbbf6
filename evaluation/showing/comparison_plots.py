"""Pictures that set models side by side: what they cost and how well they predict, and where they predict how well."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from entropy_gpt.evaluation.measuring.entropy_diagnostics import HeadDiagnostics
from entropy_gpt.evaluation.measuring.perplexity import Part
from entropy_gpt.evaluation.records.results import ModelResult

from .label_placement import label_points
from .plots import DOTS_PER_INCH, add_legend
from .run_plots import LINE_STYLES, LOGARITHMIC_FROM, MARKERS, RUN_COLORS


FRONT_COLOR, BEHIND_COLOR, BEHIND_LABEL_COLOR = RUN_COLORS[0], "#8a929a", "#4a5158"
QUANTILE_COLOR, HEAD_COLOR = RUN_COLORS[0], RUN_COLORS[1]
# Longer names lose their middle.
LONGEST_NAME = 44
# Inches that a picture grows by until its labels have room.
GROWTH = 1.5
# Panels in a row.
MOST_COLUMNS = 3
PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:,.6g}")


def plot_tradeoff(
    names: list[str],
    costs: list[float],
    perplexities: list[float],
    cost_title: str,
    deviations: list[float] | None = None,
) -> Figure:
    """
    Draws perplexity against cost, on a logarithmic scale, with the front: the models that none other surpasses in one
    without being worse in the other.

    Args:
        names (`list[str]`): Names of the models.
        costs (`list[float]`): Cost of each model, above 0.
        perplexities (`list[float]`): Perplexity of each model.
        cost_title (`str`): What the costs are.
        deviations (`list[float]`, *optional*): Deviation of each perplexity, drawn as an error bar; NaN where unknown.
    """
    deviations = deviations or [math.nan] * len(names)
    for height in itertools.count(4.6, GROWTH):
        figure = Figure(figsize=(7.4, height), dpi=DOTS_PER_INCH, layout="constrained")
        if _draw_tradeoff(figure, names, list(zip(costs, perplexities, strict=True)), deviations, cost_title):
            break
    return figure


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """
    The points of which none other has less of one coordinate and no more of the other; equal ones are all in it.

    Args:
        points (`list[tuple[float, float]]`): Numbers of which less is better.

    Returns:
        `list[int]`: Their places in the list, in the order of the first coordinate.
    """
    front = [
        index
        for index, (cost, loss) in enumerate(points)
        if not any(other[0] <= cost and other[1] <= loss and other != (cost, loss) for other in points)
    ]
    return sorted(front, key=points.__getitem__)


def plot_positions(results: list[ModelResult]) -> Figure:
    """
    Draws the perplexity against the number of tokens that a model saw before the predicted one.

    Args:
        results (`list[ModelResult]`): With perplexities by position, measured under the same conditions.
    """
    figure, axes = _open_curves(len(results))
    for index, result in enumerate(results):
        parts = result.likelihood.likelihood.by_position
        middles = [math.sqrt(part.begin * (part.end - 1)) for part in parts]
        axes.plot(middles, _perplexities(parts), **_style(index))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.set(xlabel="tokens before the predicted one", ylabel="perplexity per token")
    _finish_curves(figure, axes, results)
    return figure


def plot_frequencies(results: list[ModelResult]) -> Figure:
    """
    Draws the perplexity of tokens against how often they are in a training text.

    Args:
        results (`list[ModelResult]`): With perplexities by frequency, measured under the same conditions.
    """
    all_parts = [result.likelihood.likelihood.by_frequency for result in results]
    classes = {part.begin: part for parts in all_parts for part in parts}
    begins = sorted(classes)
    figure, axes = _open_curves(len(results))
    for index, parts in enumerate(all_parts):
        places = [begins.index(part.begin) for part in parts]
        axes.plot(places, _perplexities(parts), **_style(index))
    total = sum(part.tokens for part in all_parts[0])
    shares = {part.begin: part.tokens / total for part in all_parts[0]}
    labels = [f"{classes[begin].range}\n({shares.get(begin, 0):.1%})" for begin in begins]
    axes.set_xticks(range(len(begins)), [label.replace(" and more", " or more") for label in labels])
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set(
        xlabel="how often the token is in the training text\n(share of the predicted tokens)",
        ylabel="perplexity per token",
    )
    _finish_curves(figure, axes, results)
    return figure


def plot_entropy_quantiles(models: Sequence[HeadDiagnostics], titles: Sequence[str]) -> Figure:
    """
    Draws how the row entropies of each layer are spread, a panel for each model: quantiles, averaged over the layer's
    heads, the median of each head, and that of uniform attention.

    Args:
        models (`Sequence[HeadDiagnostics]`): The heads of each model.
        titles (`Sequence[str]`): What each model is called.
    """
    columns = min(MOST_COLUMNS, len(models)) if len(models) != 4 else 2
    rows = math.ceil(len(models) / columns)
    figure = Figure(figsize=(4.1 * columns + 0.6, 3.2 * rows + 0.7), dpi=DOTS_PER_INCH, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, heads, title in zip(panels.flat, models, titles, strict=False):
        handles = draw_quantiles(axes, heads)
        axes.set_title(shorten(title), fontsize=10)
        axes.tick_params(labelleft=True)
    panels.flat[0].set_ylim(bottom=0)
    for axes in panels.flat[len(models) :]:
        axes.remove()
    add_legend(figure, handles)
    return figure


def draw_quantiles(axes: Axes, heads: HeadDiagnostics) -> list:
    """
    Draws quantiles of the row entropies of each layer, averaged over its heads, and the median of each head.

    Args:
        axes (`Axes`): Where to.
        heads ([`HeadDiagnostics`]): What was measured.

    Returns:
        `list`: What a legend has to explain.
    """
    order = np.argsort(heads.quantile_levels)
    levels = np.array(heads.quantile_levels)[order]
    quantiles = np.array(heads.entropy_quantiles, dtype=float)[:, :, order]  # (layers, heads, levels)
    layers = np.arange(len(quantiles))
    means = quantiles.mean(axis=1)
    handles = []
    for low in range(len(levels) // 2):
        high = len(levels) - 1 - low
        label = f"{levels[low]:.0%} to {levels[high]:.0%} of rows"
        color = _lighten(QUANTILE_COLOR, 0.8 * (1 - low / (len(levels) // 2)) + 0.05)
        axes.fill_between(layers, means[:, low], means[:, high], color=color, lw=0)
        handles.append(Patch(color=color, lw=0, label=label))
    middle = len(levels) // 2
    name = "median" if levels[middle] == 0.5 else f"{levels[middle]:.0%} quantile"
    (line,) = axes.plot(layers, means[:, middle], color=QUANTILE_COLOR, lw=1.8, marker="o", ms=4, label=name)
    dots = axes.plot(
        layers, quantiles[:, :, middle], ".", color=HEAD_COLOR, ms=4, alpha=0.6, label=f"{name} of a head"
    )
    uniform = axes.axhline(
        heads.entropy.uniform_quantile(levels[middle]),
        color="black",
        ls="--",
        lw=1,
        label=f"{name} of uniform attention",
    )
    axes.set(xlabel="layer", ylabel="row entropy (nats)")
    step = math.ceil(len(layers) / 12)
    axes.set_xticks(layers[::step])
    axes.grid(alpha=0.25)
    return [*handles, line, dots[0], uniform]


def shorten(name: str) -> str:
    """A name as a picture shows it: on one line, without its middle if it is long, and never as a formula."""
    name = " ".join(name.split())
    if len(name) > LONGEST_NAME:
        half = LONGEST_NAME // 2 - 1
        name = f"{name[:half]} … {name[-half:]}"
    return name.replace("$", r"\$")


def _draw_tradeoff(
    figure: Figure,
    names: list[str],
    points: list[tuple[float, float]],
    deviations: list[float],
    cost_title: str,
) -> bool:
    """Whether the labels had room."""
    axes = figure.add_subplot(xscale="log", xlabel=cost_title, ylabel="perplexity per token")
    front = pareto_front(points)
    behind = [index for index in range(len(points)) if index not in front]
    for indices, color in ((behind, BEHIND_COLOR), (front, FRONT_COLOR)):
        chosen = [points[index] for index in indices]
        axes.errorbar(
            *_columns(chosen),
            [deviations[index] for index in indices],
            fmt="none",
            ecolor=color,
            capsize=3,
            zorder=2.5,
        )
        axes.plot(*_columns(chosen), "o", ms=8, color=color, mec="white", zorder=3)
    axes.margins(x=0.16, y=0.16)
    _scale_perplexities(axes)
    number_plainly(axes.xaxis, axes.get_xlim())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    corners = _staircase([points[index] for index in front], right, top)
    axes.plot(*_columns(corners), color=FRONT_COLOR, lw=1.4, zorder=2)
    axes.fill_between(*_columns(corners), top, color=FRONT_COLOR, alpha=0.05, lw=0)
    handles = [Line2D([], [], color=FRONT_COLOR, marker="o", mec="white", ms=8, lw=1.4, label="on the front")]
    if behind:
        handles.append(Line2D([], [], color=BEHIND_COLOR, marker="o", mec="white", ms=8, ls="", label="behind it"))
    if not np.isnan(deviations).all():
        label = "standard deviation over seeds"
        handles.append(Line2D([], [], color=BEHIND_COLOR, marker="|", mew=1.4, ms=10, ls="", label=label))
    add_legend(figure, handles, place="lower left")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    colors = [FRONT_COLOR if index in front else BEHIND_LABEL_COLOR for index in range(len(points))]
    return label_points(axes, points, list(map(shorten, names)), colors, corners) is not None


def _staircase(front: list[tuple[float, float]], right: float, top: float) -> list[tuple[float, float]]:
    """The corners of the line below which no model is: down to each point of the front, and on to the next."""
    corners = [(front[0][0], top), front[0]]
    for point in front[1:]:
        corners += [(point[0], corners[-1][1]), point]
    return [*corners, (right, corners[-1][1])]


def _lighten(color: str, part: float) -> tuple[float, ...]:
    """A colour that is white for this part."""
    return tuple(channel + (1 - channel) * part for channel in to_rgb(color))


def _open_curves(models: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.4, 4.0 + 0.22 * math.ceil(models / 2)), dpi=DOTS_PER_INCH, layout="constrained")
    return figure, figure.add_subplot()


def _finish_curves(figure: Figure, axes: Axes, results: list[ModelResult]):
    _scale_perplexities(axes)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], **_style(index), label=shorten(result.name)) for index, result in enumerate(results)]
    add_legend(figure, handles)


def _style(index: int) -> dict:
    return {
        "color": RUN_COLORS[index % len(RUN_COLORS)],
        "ls": LINE_STYLES[index // len(RUN_COLORS) % len(LINE_STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
        "lw": 1.6,
        "ms": 5,
    }


def _perplexities(parts: list[Part]) -> list[float]:
    """NaN where one is not finite, which leaves a gap."""
    return [part.perplexity if math.isfinite(part.perplexity) else math.nan for part in parts]


def _scale_perplexities(axes: Axes):
    """A logarithmic scale where perplexities are far apart, with plain numbers."""
    values = np.concatenate([np.empty(0), *(line.get_ydata() for line in axes.lines)]).astype(float)
    values = values[np.isfinite(values)]
    if len(values) and values.max() >= LOGARITHMIC_FROM * values.min():
        axes.set_yscale("log")
        number_plainly(axes.yaxis, axes.get_ylim())
    else:
        axes.yaxis.set_major_formatter(PLAIN_NUMBERS)


def number_plainly(axis: Axis, limits: tuple[float, float]):
    """Plain numbers along a logarithmic axis, the fewer in a decade the more decades there are."""
    decades = math.log10(limits[1] / limits[0])
    subs = (1, 1.5, 2, 3, 5, 7) if decades < 1.5 else (1, 2, 5) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN_NUMBERS)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]
