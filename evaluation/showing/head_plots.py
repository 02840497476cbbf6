"""Pictures of what attention heads do, from result records."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from entropy_gpt.evaluation.measuring.entropy_diagnostics import HeadDiagnostics
from entropy_gpt.evaluation.records.results import ModelResult

from .comparison_plots import draw_quantiles
from .plots import (
    COLORMAP,
    DOTS_PER_INCH,
    MOST_HEADS_WITH_NUMBERS,
    RANGE_NAMES,
    add_entropy_scale,
    add_legend,
    draw_heat_map,
    draw_ranges,
    number_ticks,
    range_colors,
    wrap,
)


MOST_IN_A_ROW = 4
# Inches of a head and of a layer in a heat map, with numbers and without, and the least of a panel.
CELL_WITH_NUMBER, CELL, LEAST_PANEL = (0.36, 0.26), (0.22, 0.14), (3.8, 2.6)
LEAST_COLUMN = 4.9
# Beyond this many heads a layer, their numbers are small.
HEADS_WITH_LARGE_NUMBERS = 8
LARGE_NUMBERS, SMALL_NUMBERS = 8.5, 6.5
# Sinks are drawn on a scale that ends no lower than here, in percent.
LEAST_SINK_SCALE = 20.0
# Spectral norms are shown in thousands from here on.
FIRST_IN_THOUSANDS = 10_000
# Up to this many layers, each bar of the diversity has its number.
MOST_NUMBERED_BARS = 16
LEGEND_SIZE = 8
LIMIT_COLOR = "#D55E00"


def plot_comparison(models: Sequence[HeadDiagnostics], titles: Sequence[str]) -> Figure:
    """
    Draws the heat maps of several models side by side on one scale in nats.

    Args:
        models (`Sequence[HeadDiagnostics]`): The heads of each model.
        titles (`Sequence[str]`): What stands above each; may have several lines.
    """
    rows = math.ceil(len(models) / MOST_IN_A_ROW)
    columns = math.ceil(len(models) / rows)
    lines = [models[begin : begin + columns] for begin in range(0, len(models), columns)]
    width = max(_panel_size(heads)[0] for heads in models)
    heights = [max(_panel_size(heads)[1] for heads in line) for line in lines]
    size = (width * columns + 1.2, sum(heights) + 1.7 * rows)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).flat
    maxima = {heads.entropy.maximum for heads in models}
    for axes, heads, title in zip(panels, models, titles, strict=False):
        axes.set_title("\n".join(wrap(line, width - 0.2, 10) for line in title.splitlines()), fontsize=10)
        image = _draw_numbers(axes, heads.entropy.nats, max(maxima))
    for axes in panels[len(models) :]:
        axes.remove()
    add_entropy_scale(figure, list(panels[: len(models)]), image, max(maxima) if len(maxima) == 1 else None)
    return figure


def compare_models(results: Sequence[ModelResult]) -> Figure:
    """
    Draws the heat maps of models side by side, with what is known of each above it. Where uniform attention has not
    the same entropy in all of them, as the length of the sequences differs, each panel names its own.

    Args:
        results (`Sequence[ModelResult]`): Results of models whose heads were looked at.
    """
    maxima = {result.heads.heads.entropy.maximum for result in results}
    titles = [result.title for result in results]
    facts = [_describe(result, len(maxima) > 1, titles.count(result.title) > 1) for result in results]
    return plot_comparison([result.heads.heads for result in results], ["\n".join(lines) for lines in facts])


def _describe(result: ModelResult, with_maximum: bool, with_name: bool) -> list[str]:
    """The lines above a model's heat map."""
    entropy = result.heads.heads.entropy
    perplexity = "" if result.likelihood is None else f"perplexity {result.likelihood.likelihood.perplexity:.1f}, "
    return [
        *([result.name] if with_name else []),
        result.title,
        f"final norm: {result.architecture.final_normalization}",
        f"{perplexity}{entropy.overloaded_share:.0%} of heads overloaded",
        *([f"uniform attention: {entropy.maximum:.2f}"] if with_maximum else []),
    ]


def plot_head_diagnostics(heads: HeadDiagnostics, title: str = "") -> Figure:
    """
    Draws all that is known of a model's heads: entropies and their spread, sinks, spectral norms, diversity, and the
    shares of heads in the paper's ranges by both maxima.

    Args:
        heads ([`HeadDiagnostics`]): The heads of a model.
        title (`str`): What stands above them.
    """
    width, height = _panel_size(heads)
    width, heights = max(LEAST_COLUMN, width) + 1.1, [height + 0.9, height + 0.9, 2.9]
    figure = Figure(figsize=(2 * width, sum(heights) + 0.7), dpi=DOTS_PER_INCH, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    measured = f"{heads.rows:,} rows of each head, sequences of {heads.entropy.length:,} tokens"
    figure.suptitle("\n".join(filter(None, [wrap(title, 2 * width, 12), measured])), fontsize=12)
    panels = figure.subfigures(3, 2, height_ratios=heights).flat
    draw = (_draw_entropies, _draw_spread, _draw_sinks, _draw_norms, _draw_diversity, _draw_both_ranges)
    for panel, draw_panel in zip(panels, draw, strict=True):
        draw_panel(panel, panel.add_subplot(), heads)
    return figure


def _panel_size(heads: HeadDiagnostics) -> tuple[float, float]:
    """Inches of a heat map with room for its numbers, if it has any."""
    layers, count = np.shape(heads.sink_share)
    width, height = CELL_WITH_NUMBER if count <= MOST_HEADS_WITH_NUMBERS else CELL
    return max(LEAST_PANEL[0], width * count), max(LEAST_PANEL[1], height * layers)


def _draw_entropies(panel: SubFigure, axes: Axes, heads: HeadDiagnostics):
    uniform = heads.entropy.maximum
    panel.colorbar(_draw_numbers(axes, heads.entropy.nats, uniform), ax=axes, label="nats")
    axes.set_title(f"mean entropy of rows; uniform attention: {uniform:.2f} nats", fontsize=10)


def _draw_spread(panel: SubFigure, axes: Axes, heads: HeadDiagnostics):
    handles = draw_quantiles(axes, heads)
    axes.set(xlim=(-0.5, len(heads.diversity) - 0.5), ylim=(0, None))
    axes.set_title("spread of row entropies, averaged over the layer's heads", fontsize=10)
    add_legend(panel, handles, LEGEND_SIZE)


def _draw_sinks(panel: SubFigure, axes: Axes, heads: HeadDiagnostics):
    percent = 100 * np.array(heads.sink_share)
    highest = max(LEAST_SINK_SCALE, _largest(percent))
    panel.colorbar(_draw_numbers(axes, percent.tolist(), highest, digits=1), ax=axes, label="%")
    axes.set_title(
        f"mean probability of the first key (sink); uniform attention: {heads.uniform_sink_share:.1%}", fontsize=10
    )


def _draw_norms(panel: SubFigure, axes: Axes, heads: HeadDiagnostics):
    norms, unit = np.array(heads.logit_spectral_norms), ""
    if _largest(norms) >= FIRST_IN_THOUSANDS:
        norms, unit = norms / 1000, "thousands"
    highest = _largest(norms)
    digits = max(0, 2 - math.floor(math.log10(highest)))  # about three in all
    panel.colorbar(_draw_numbers(axes, norms.tolist(), highest, digits), ax=axes, label=unit)
    axes.set_title("largest singular value of the logits of a sequence", fontsize=10)


def _draw_diversity(panel: SubFigure, axes: Axes, heads: HeadDiagnostics):
    count, limit = len(heads.diversity), math.log(len(heads.sink_share[0]))
    bars = axes.bar(range(count), np.nan_to_num(heads.diversity), color=colormaps[COLORMAP](0.36))
    is_numbered = [count <= MOST_NUMBERED_BARS or math.isnan(value) for value in heads.diversity]
    labels = [f"{value:.2f}" * told for value, told in zip(heads.diversity, is_numbered, strict=True)]
    axes.bar_label(bars, labels, fontsize=7.5, padding=1)
    axes.axhline(limit, color=LIMIT_COLOR, ls="--", lw=1)
    axes.annotate(
        f"no two heads share a key: {limit:.2f}",
        (1, limit),
        (0, 2),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
    )
    axes.set(xlabel="layer", xticks=number_ticks(count), xlim=(-0.5, count - 0.5))
    axes.set(ylabel="nats", ylim=(0, max(limit, 0.1) * 1.2))
    axes.set_title("how much a layer's heads differ (Jensen-Shannon divergence)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_both_ranges(panel: SubFigure, axes: Axes, heads: HeadDiagnostics):
    """The shares of heads in the paper's ranges, by the largest value seen and by the causal maximum."""
    entropy = heads.entropy
    draw_ranges(axes, [entropy] * 2, [entropy.largest, entropy.maximum])
    names = ["parts of the\nlargest seen\n(the paper's way)", "parts of the\ncausal maximum"]
    axes.set_yticks(range(2), names, fontsize=8.5)
    axes.set_title("heads in the paper's four ranges of mean entropy", fontsize=10)
    patches = [Patch(color=color, label=name) for color, name in zip(range_colors(), RANGE_NAMES, strict=True)]
    if not np.isfinite(entropy.nats).all():
        patches.append(Patch(color="lightgray", label="not finite"))
    add_legend(panel, patches, LEGEND_SIZE)


def _draw_numbers(axes: Axes, values: list[list[float]], highest: float, digits: int = 2) -> AxesImage:
    large = len(values[0]) <= HEADS_WITH_LARGE_NUMBERS
    return draw_heat_map(axes, values, 0, highest, LARGE_NUMBERS if large else SMALL_NUMBERS, digits)


def _largest(values: np.ndarray) -> float:
    """The largest number that is one; 1 if there is none above 0."""
    return float(np.max(values, initial=0.0, where=np.isfinite(values))) or 1.0
