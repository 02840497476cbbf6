"""Pictures of what attention heads do, from result records."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from .entropy_diagnostics import HeadDiagnostics
from .plots import (
    COLORMAP,
    DOTS_PER_INCH,
    RANGE_NAMES,
    add_entropy_scale,
    draw_heat_map,
    draw_ranges,
    range_colors,
)
from .results import ModelResult


MOST_IN_A_ROW = 4
# Beyond so many heads a layer, their numbers are small.
HEADS_WITH_LARGE_NUMBERS = 8
# Sinks are drawn on a scale that ends no lower than here.
LEAST_SINK_SCALE = 0.2
BAND_COLOR, MEDIAN_COLOR, LIMIT_COLOR = "#56B4E9", "#0072B2", "#D55E00"


def plot_headwise_entropy(result: ModelResult, path: Path):
    """
    Draws the mean entropy of every head as a heat map, layers downwards, on a scale from 0 to the causal maximum.

    Args:
        result ([`ModelResult`]): Of a model whose heads were looked at.
        path (`Path`): The PNG to write.
    """
    plot_comparison([result], path)


def plot_comparison(results: list[ModelResult], path: Path):
    """
    Draws the heat maps of several models side by side on one scale.

    Args:
        results (`list[ModelResult]`): Of models whose heads were looked at.
        path (`Path`): The PNG to write.
    """
    columns = min(MOST_IN_A_ROW, len(results))
    rows = -(-len(results) // columns)
    layers = max(result.architecture.n_layer for result in results)
    size = (3.6 * columns + 1.2, rows * max(4.4, 1.6 + 0.28 * layers))
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    maxima = {result.heads.heads.entropy.maximum for result in results}
    titles = [result.title for result in results]
    images = [
        _draw_result(axes, result, max(maxima), len(maxima) > 1, titles.count(result.title) > 1)
        for axes, result in zip(all_axes, results, strict=False)
    ]
    for axes in all_axes[len(results) :]:
        axes.set_axis_off()
    add_entropy_scale(figure, list(all_axes), images[0], max(maxima) if len(maxima) == 1 else None)
    figure.savefig(path, format="png")


def _draw_result(axes: Axes, result: ModelResult, highest: float, tells_maximum: bool, tells_name: bool) -> AxesImage:
    entropy = result.heads.heads.entropy
    parts = [f"{entropy.overloaded_share:.0%} of heads overloaded"]
    if result.likelihood is not None:
        parts = [f"perplexity {result.likelihood.likelihood.perplexity:.1f}", *parts]
    uniform = f"\nuniform attention: {entropy.maximum:.2f}" if tells_maximum else ""
    name = f"{result.name}\n" if tells_name else ""
    norm = f"final norm: {result.architecture.final_normalization}"
    axes.set_title(f"{name}{result.title}\n{norm}\n{', '.join(parts)}{uniform}", fontsize=10)
    many = len(entropy.nats[0]) > HEADS_WITH_LARGE_NUMBERS
    return draw_heat_map(axes, entropy.nats, 0, highest, font_size=5 if many else 8)


def plot_head_diagnostics(result: ModelResult, path: Path):
    """
    Draws all that is known of a model's heads: entropies and their spread, ranges, sinks, diversity, spectral norms.

    Args:
        result ([`ModelResult`]): Of a model whose heads were looked at.
        path (`Path`): The PNG to write.
    """
    heads = result.heads.heads
    body, bottom_height = max(2.6, 1.0 + 0.26 * len(heads.diversity)), 1.7
    figure = Figure(figsize=(12.4, 2 * body + bottom_height + 3.2), dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle(f"{result.name}: {result.title}", fontsize=12)
    grid = figure.add_gridspec(3, 2, height_ratios=[body, body, bottom_height])
    entropy, spread, sink, norms = (figure.add_subplot(grid[row, column]) for row in (0, 1) for column in (0, 1))
    _draw_scaled(figure, entropy, heads.entropy.nats, heads.entropy.maximum, "mean entropy of rows (nats)")
    entropy.set_title(f"entropy; uniform attention: {heads.entropy.maximum:.2f}", fontsize=10)
    _draw_spread(spread, heads)
    _draw_scaled(
        figure,
        sink,
        heads.sink_share,
        max(LEAST_SINK_SCALE, _largest(heads.sink_share)),
        "mean probability of the first key",
    )
    sink.set_title(f"attention sink; uniform attention: {heads.uniform_sink_share:.3f}", fontsize=10)
    _draw_scaled(figure, norms, heads.logit_spectral_norms, _largest(heads.logit_spectral_norms), "spectral norm")
    norms.set_title("largest singular value of the logits", fontsize=10)
    bottom = grid[2, :].subgridspec(1, 3, width_ratios=[1.1, 1, 1])
    _draw_diversity(figure.add_subplot(bottom[0]), heads)
    kinds = {
        "heads by part of the largest\nvalue seen (the paper's way)": heads.entropy.largest,
        "heads by part of the\ncausal maximum": heads.entropy.maximum,
    }
    for place, (title, maximum) in enumerate(kinds.items(), start=1):
        axes = figure.add_subplot(bottom[place])
        draw_ranges(axes, [heads.entropy], [maximum])
        axes.set_title(title, fontsize=10)
        axes.set_yticks([])
    patches = [Patch(color=color, label=name) for color, name in zip(range_colors(), RANGE_NAMES, strict=True)]
    figure.legend(handles=patches, loc="outside lower right", ncols=len(patches), fontsize=8, frameon=False)
    figure.savefig(path, format="png")


def _draw_scaled(figure: Figure, axes: Axes, values: list[list[float]], highest: float, label: str):
    image = draw_heat_map(axes, values, 0, highest, font_size=6.5, digits=2 if highest < 100 else 0)
    figure.colorbar(image, ax=axes, label=label)


def _largest(values: list[list[float]]) -> float:
    """The largest number that is one; 1 if there is none."""
    numbers = np.array(values)
    return float(np.max(numbers, initial=0.0, where=np.isfinite(numbers))) or 1.0


def _draw_spread(axes: Axes, heads: HeadDiagnostics):
    """The quantiles of the rows of a layer's heads, averaged over its heads."""
    by_level = np.array(heads.entropy_quantiles).mean(axis=1).T  # (levels, layers)
    layers = range(by_level.shape[1])
    middle = len(by_level) // 2
    for low in range(middle):
        first, last = heads.quantile_levels[low], heads.quantile_levels[-1 - low]
        axes.fill_between(
            layers,
            by_level[low],
            by_level[-1 - low],
            color=BAND_COLOR,
            alpha=0.25 + 0.25 * low,
            lw=0,
            label=f"{first:.0%} to {last:.0%} of rows",
        )
    axes.plot(layers, by_level[middle], color=MEDIAN_COLOR, marker="o", ms=4, label="median")
    axes.axhline(heads.entropy.maximum, color=LIMIT_COLOR, ls="--", lw=1, label="mean of uniform attention")
    axes.set(xlabel="layer", ylabel="entropy of a row (nats)", xticks=layers, ylim=(0, None))
    axes.set_title("spread of row entropies, mean of the layer's heads", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _draw_diversity(axes: Axes, heads: HeadDiagnostics):
    layers, limit = range(len(heads.diversity)), np.log(len(heads.sink_share[0]))
    axes.bar(layers, heads.diversity, color=colormaps[COLORMAP](0.36))
    axes.axhline(limit, color=LIMIT_COLOR, ls="--", lw=1)
    axes.text(
        0.99,
        limit,
        "no two heads share a key",
        transform=axes.get_yaxis_transform(),
        ha="right",
        va="bottom",
        fontsize=7,
    )
    axes.set(xlabel="layer", ylabel="divergence (nats)", xticks=layers, ylim=(0, max(limit, 0.1) * 1.15))
    axes.set_title("how much the heads of a layer differ\n(Jensen-Shannon divergence)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
