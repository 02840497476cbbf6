"""Pictures of training runs, drawn from their logs alone; with the paper's (arXiv 2501.03489) in mind."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from entropy_gpt.evaluation.records.run_log import EntropyRecord, RunLog, run_titles
from modeling_entropy_gpt.layers import LEARNED_SCALARS, LearnedScalar

from .plots import (
    COLORMAP,
    DOTS_PER_INCH,
    MOST_HEADS_WITH_NUMBERS,
    RANGE_NAMES,
    add_entropy_scale,
    add_legend,
    draw_heat_map,
    draw_ranges,
    range_colors,
    wrap,
)


# Okabe and Ito's, which the colour-blind can distinguish. After the last, the first come again in another line style.
RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", ":")
MARKERS = "os^DvP"
DIVERGENCE_COLOR = "#D55E00"
# The yellow end of the colour map can't be seen on white.
LAST_LAYER_COLOR = 0.9
# Up to this many records, each is marked.
MOST_MARKED_RECORDS = 20
# A scale is logarithmic from this ratio of its largest to its smallest number on.
LOGARITHMIC_FROM = 20
# How far above the first loss the axis reaches, whatever a run that diverged comes to.
LOSS_HEADROOM = 1.25


def plot_losses(runs: list[RunLog]) -> Figure:
    """
    Draws the cross-entropy of training and of evaluations against the step, all runs in one picture. Where a run
    diverged or went back is marked.

    Args:
        runs (`list[RunLog]`): The runs.
    """
    figure = Figure(figsize=(8, 4.7 + 0.24 * len(runs)), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    handles, firsts, largest, marks = [], [], 0.0, []
    for index, (run, title) in enumerate(zip(runs, run_titles(runs), strict=True)):
        training = [(record.step, record.cross_entropy) for record in run.training if record.cross_entropy is not None]
        evaluations = [(record.step, record.loss) for record in run.evaluations]
        style = _run_style(index)
        marker = MARKERS[index % len(MARKERS)]
        # A lone number makes no line.
        axes.plot(*_columns(training), **style, lw=0.9, alpha=0.55, marker="." if len(training) == 1 else None)
        axes.plot(*_columns(evaluations), **style, lw=1.8, marker=marker, ms=5, zorder=3)
        handles.append(Line2D([], [], **style, lw=1.8, marker=marker, ms=5, label=wrap(title + _fate(run), 7.4, 9)))
        finite = sorted(loss for loss in (*training, *evaluations) if math.isfinite(loss[1]))
        if finite:
            firsts.append(finite[0][1])
            largest = max(largest, *(loss for _, loss in finite))
        for step, symbol in _breaks(run):
            before = [loss for at, loss in finite if at <= step]
            if before:
                marks.append((step, before[-1], symbol, style["color"]))
    axes.grid(alpha=0.25)
    _label_steps(axes)
    axes.set_ylabel("negative log-likelihood of a token (nats)")
    if firsts and largest > LOSS_HEADROOM * max(firsts):
        axes.set_ylim(top=LOSS_HEADROOM * max(firsts))
        axes.set_title(f"The axis is cut: the largest loss is {largest:.3g}", fontsize=9)
    for step, loss, symbol, color in marks:
        height = min(loss, axes.get_ylim()[1])
        axes.plot(step, height, symbol, color=color, mec="black", mew=1, ms=10, zorder=4, clip_on=False)
    figure.legend(handles=handles, loc="outside lower center", fontsize=9, frameon=False)
    kinds = [
        Line2D([], [], color="gray", lw=0.9, alpha=0.7, label="training"),
        Line2D([], [], color="gray", lw=1.8, marker="o", ms=5, label="evaluation"),
    ]
    if any(run.diverged_at is not None for run in runs):
        kinds.append(Line2D([], [], color="lightgray", marker="X", ls="", mec="black", ms=9, label="diverged"))
    if any(run.rollbacks for run in runs):
        kinds.append(Line2D([], [], color="lightgray", marker="<", ls="", mec="black", ms=9, label="went back"))
    add_legend(figure, kinds, place="upper center")
    return figure


def plot_layer_entropies(runs: list[RunLog]) -> Figure:
    """
    Draws the mean entropy of each layer's heads against the step, a panel for each run (the paper's figure 2).

    Args:
        runs (`list[RunLog]`): Runs with entropies.
    """
    columns = len(runs) if len(runs) <= 3 else math.ceil(math.sqrt(len(runs)))
    rows = math.ceil(len(runs) / columns)
    width = 4.6 if columns > 1 else 6.4
    figure = Figure(figsize=(width * columns + 0.9, 3.6 * rows + 0.4), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    colors = _LayerColors(max(run.layers for run in runs))
    for axes, run, title in zip(panels.flat, runs, run_titles(runs), strict=False):
        _draw_layers(axes, run, colors, lambda record: np.mean(record.entropies, axis=1))
        axes.axhline(run.entropies[-1].maximum, color="black", ls="--", lw=1.2)
        axes.set_ylim(bottom=0)
        axes.set_title(wrap(title, width - 0.8, 10), fontsize=10)
        axes.set_ylabel("mean entropy (nats)")
        axes.tick_params(labelleft=True)
    for axes in panels.flat[len(runs) :]:
        axes.remove()
    colors.add_bar(figure, panels.flat[: len(runs)])
    label = "uniform attention under the causal mask"
    if (common := _common_maximum(runs)) is not None:
        label += f" ({common:.2f} nats)"
    maximum = Line2D([], [], color="black", ls="--", lw=1.2, label=label)
    add_legend(figure, [maximum, *_divergence_handles(runs)])
    return figure


def plot_head_entropies(runs: list[RunLog], steps: list[int] | None = None) -> Figure:
    """
    Draws heat maps of the mean entropy of every head, a row of them for each run, on one scale (the paper's figure 5).

    Args:
        runs (`list[RunLog]`): Runs with entropies.
        steps (`list[int]`, *optional*):
            The steps to show; the nearest recorded ones stand for them. Else the first, middle and last of each run.
    """
    chosen = [choose_records(run, steps) for run in runs]
    columns = max(map(len, chosen))
    width, heights = _heat_map_width(runs), [_heat_map_height(run) for run in runs]
    height = max(3.6, sum(heights) + 0.9 * len(runs))  # the name of the scale takes so much
    figure = Figure(figsize=(width * columns + 1.3, height), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(len(runs), columns, squeeze=False, height_ratios=heights)
    maximum = max(record.maximum for records in chosen for record in records)
    common = _common_maximum(runs)
    for row, records, title in zip(panels, chosen, run_titles(runs), strict=True):
        uniform = f", uniform attention: {records[-1].maximum:.2f}" if common is None else ""
        _set_row_title(row[0], title + uniform, width * columns)
        for axes, record in zip(row, records, strict=False):
            image = draw_heat_map(axes, record.entropies, 0, maximum, font_size=6.5)
            axes.set_title(f"step {record.step:,}", fontsize=9)
        for axes in row[len(records) :]:
            axes.set_axis_off()
    add_entropy_scale(figure, list(panels.flat), image, common, **_narrow(figure))
    return figure


def choose_records(run: RunLog, steps: list[int] | None = None) -> list[EntropyRecord]:
    """The records nearest to these steps; else the first, the middle and the last, as far as there are three."""
    if steps is not None:
        return [run.nearest_entropies(step) for step in steps]
    last = len(run.entropies) - 1
    return [run.entropies[index] for index in sorted({0, last // 2, last})]


def plot_thresholds(runs: list[RunLog]) -> Figure:
    """
    Draws the learned thresholds of every head as a heat map, and by layer with those at the first record (the
    paper's figures 6 and 7). A run is a row.

    Args:
        runs (`list[RunLog]`): Runs with thresholds.
    """
    width, heights = _heat_map_width(runs), [max(2.4, _heat_map_height(run)) for run in runs]
    figure = Figure(figsize=(2 * width + 1.6, sum(heights) + 1.0 * len(runs)), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(len(runs), 2, squeeze=False, height_ratios=heights)
    with_thresholds = [[record for record in run.entropies if "thresholds" in record.learned] for run in runs]
    seen = [record.learned["thresholds"] for records in with_thresholds for record in (records[0], records[-1])]
    lowest, highest = _limits(seen)
    for row, run, records, title in zip(panels, runs, with_thresholds, run_titles(runs), strict=True):
        heat_map, strip = row
        first, last = records[0], records[-1]
        causal = run.description.config.get("entropy_maximum") == "causal"
        name = "part of the causal maximum" if causal else "part of log T"
        _set_row_title(heat_map, title, 2 * width)
        image = draw_heat_map(heat_map, last.learned["thresholds"], lowest, highest, font_size=6.5)
        heat_map.set_title(f"thresholds at step {last.step:,}", fontsize=9)
        figure.colorbar(image, ax=heat_map, label=name)
        strip.set_title("by layer: each head, and their mean", fontsize=9)
        # Beside one another, lest they hide one another.
        sides = [(last, RUN_COLORS[0], 0.0)]
        if first is not last:
            sides = [(first, "gray", -0.18), (last, RUN_COLORS[0], 0.18)]
        for record, color, shift in sides:
            layers = np.arange(run.layers)
            for thresholds in np.transpose(record.learned["thresholds"]):
                strip.plot(layers + shift, thresholds, "o", ms=3.5, color=color, alpha=0.5, mew=0)
            means = np.mean(record.learned["thresholds"], axis=1)
            strip.plot(layers + shift, means, "_", ms=10, color=color, mew=2, label=f"step {record.step:,}")
        margin = 0.06 * (highest - lowest)
        strip.set(xlabel="layer", xlim=(-0.6, run.layers - 0.4), xticks=range(run.layers))
        strip.set(ylabel=name, ylim=(lowest - margin, highest + margin))
        strip.tick_params(axis="x", labelsize=9 if run.layers <= 12 else 7)
        strip.grid(axis="y", alpha=0.25)
        strip.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    return figure


def plot_entropy_ranges(runs: list[RunLog]) -> Figure:
    """
    Draws the shares of heads in the paper's four ranges of entropy at each run's last record: once as parts of the
    largest value seen, as the paper does, and once as parts of what uniform attention has under the causal mask.

    Args:
        runs (`list[RunLog]`): Runs with entropies.
    """
    entropies = [run.entropies[-1].headwise_entropy for run in runs]
    figure = Figure(figsize=(10.6, 1.9 + 0.62 * len(runs)), dpi=DOTS_PER_INCH, layout="constrained")
    seen, causal = figure.subplots(1, 2)
    labels = [
        f"{wrap(title, 2.6, 9)}\nstep {run.entropies[-1].step:,}"
        for run, title in zip(runs, run_titles(runs), strict=True)
    ]
    draw_ranges(seen, entropies, [entropy.largest for entropy in entropies])
    draw_ranges(causal, entropies, [entropy.maximum for entropy in entropies])
    seen.set_title("of the largest value seen in the run's last record\n(the paper's way)", fontsize=10)
    causal.set_title("of the causal maximum\n(uniform attention under the causal mask)", fontsize=10)
    seen.set_yticks(range(len(runs)), labels, fontsize=9)
    causal.set_yticks([])
    handles = [Patch(color=color, label=name) for color, name in zip(range_colors(), RANGE_NAMES, strict=True)]
    if any(sum(entropy.range_shares()) < 1 - 1e-9 for entropy in entropies):
        handles.append(Patch(color="lightgray", label="not finite"))
    add_legend(figure, handles)
    return figure


PENALTY_TITLES = {
    "entropy_loss": "entropy loss",
    "penalized_share": "penalised share",
    "log_sum_loss": "log-sum loss\n(nats²)",
}


def plot_penalty(runs: list[RunLog]) -> Figure:
    """
    Draws the entropy penalty, the part of heads or rows that has one, and the penalty on log-sums, against the step:
    those of them that any run has.

    Args:
        runs (`list[RunLog]`): Runs with a penalty.
    """
    records = [record for run in runs for record in run.training]
    names = [name for name in PENALTY_TITLES if any(getattr(record, name) is not None for record in records)]
    height = 0.4 + 2.5 * len(names) + 0.24 * len(runs)
    figure = Figure(figsize=(8, height), dpi=DOTS_PER_INCH, layout="constrained")
    panels = dict(zip(names, figure.subplots(len(names), 1, sharex=True, squeeze=False).flat, strict=True))
    handles = []
    for index, (run, title) in enumerate(zip(runs, run_titles(runs), strict=True)):
        style = _run_style(index)
        for name, axes in panels.items():
            figures = [(record.step, getattr(record, name)) for record in run.training]
            figures = [point for point in figures if point[1] is not None]
            marker = MARKERS[index % len(MARKERS)] if len(figures) <= MOST_MARKED_RECORDS else None
            axes.plot(*_columns(figures), **style, lw=1.4, marker=marker, ms=4)
            for step, _ in _breaks(run):
                axes.axvline(step, color=style["color"], ls=":", lw=1)
        handles.append(Line2D([], [], **style, lw=1.8, label=wrap(title + _fate(run), 7.4, 9)))
    for name, axes in panels.items():
        axes.set_ylabel(PENALTY_TITLES[name])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    if "penalized_share" in panels:
        panels["penalized_share"].set_ylim(-0.03, 1.03)
        panels["penalized_share"].yaxis.set_major_formatter(PercentFormatter(1))
    _label_steps(panels[names[-1]])
    figure.legend(handles=handles, loc="outside lower center", fontsize=9, frameon=False)
    return figure


def _title(scalar: LearnedScalar) -> str:
    mean = "geometric mean" if scalar.is_logarithm else "mean"
    return f"{scalar.title}\n({mean} of heads)" if scalar.by_head else scalar.title


def _layer_values(scalar: LearnedScalar, record: EntropyRecord) -> Iterable[float] | None:
    """The number of each layer; of heads the mean, a geometric one where their logarithms are learned."""
    values = record.learned.get(scalar.name)
    if values is None or not scalar.by_head:
        return values
    if not scalar.is_logarithm:
        return np.mean(values, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(np.log(values).mean(axis=1))


# What each row of the picture of scales shows: its name, and the numbers of the layers in a record.
SCALES: dict[str, Callable[[EntropyRecord], Iterable[float] | None]] = {
    **{_title(scalar): partial(_layer_values, scalar) for scalar in LEARNED_SCALARS if not scalar.in_training_alone},
    "residual stream behind\nthe block (std)": lambda record: record.residual_scale,
}


def plot_scales(runs: list[RunLog]) -> Figure:
    """
    Draws the scalars that blocks learn but for thresholds, and the residual stream, of each layer against the step. A
    run is a column.

    Args:
        runs (`list[RunLog]`): Runs with some of these.
    """
    scales = [scale for scale in SCALES.items() if any(_is_there(run, scale[1]) for run in runs)]
    width = 4.0 if len(runs) > 1 else 6.0
    figure = Figure(
        figsize=(width * len(runs) + 1.2, 2.5 * len(scales) + 0.9), dpi=DOTS_PER_INCH, layout="constrained"
    )
    panels = figure.subplots(len(scales), len(runs), sharex="col", sharey="row", squeeze=False)
    colors = _LayerColors(max(run.layers for run in runs))
    for (name, values), row in zip(scales, panels, strict=True):
        drawn = []
        for axes, run in zip(row, runs, strict=True):
            if _is_there(run, values):
                drawn += _draw_layers(axes, run, colors, values)
            else:
                axes.text(0.5, 0.5, "none", color="gray", ha="center", va="center", transform=axes.transAxes)
        row[0].set_ylabel(name)
        if _spans_decades(drawn):
            row[0].set_yscale("log")
    for axes, title in zip(panels[0], run_titles(runs), strict=True):
        axes.set_title(wrap(title, width - 0.5, 10), fontsize=10)
    for axes in panels[:-1].flat:
        axes.set_xlabel("")
    for axes in panels[-1]:
        _label_steps(axes)
    colors.add_bar(figure, panels.flat)
    add_legend(figure, _divergence_handles(runs))
    return figure


def has_scales(run: RunLog) -> bool:
    """Whether there is anything of a run for [`plot_scales`] to draw."""
    return any(_is_there(run, values) for values in SCALES.values())


def _is_there(run: RunLog, values: Callable[[EntropyRecord], Iterable[float] | None]) -> bool:
    return any(values(record) is not None for record in run.entropies)


class _LayerColors:
    """A colour for each layer, and the bar that shows which."""

    def __init__(self, layers: int):
        self.layers = layers
        self.colors = colormaps[COLORMAP](np.linspace(0, LAST_LAYER_COLOR, layers))

    def __getitem__(self, layer: int):
        return self.colors[layer]

    def add_bar(self, figure: Figure, all_axes: Iterable[Axes]):
        norm = BoundaryNorm(np.arange(self.layers + 1) - 0.5, self.layers)
        mappable = ScalarMappable(norm, ListedColormap(self.colors))
        ticks = range(0, self.layers, math.ceil(self.layers / 24))
        bar = figure.colorbar(mappable, ax=list(all_axes), label="layer", ticks=ticks, **_narrow(figure))
        bar.ax.minorticks_off()
        bar.ax.invert_yaxis()  # layers go downwards, as in the heat maps


def _common_maximum(runs: list[RunLog]) -> float | None:
    """The entropy of uniform attention, or `None` if it is not the same in all runs."""
    maxima = [run.entropies[-1].maximum for run in runs]
    return maxima[0] if max(maxima) - min(maxima) < 0.005 else None


def _narrow(figure: Figure) -> dict:
    """Options of a scale of some width in inches, whatever the figure's."""
    width, height = figure.get_size_inches()
    return {"fraction": 0.8 / width, "pad": 0.12 / width, "aspect": height / 0.25}


def _draw_layers(
    axes: Axes, run: RunLog, colors: _LayerColors, values: Callable[[EntropyRecord], Iterable[float] | None]
) -> list[float]:
    """Draws a line for each layer, and returns all that was drawn."""
    records = [record for record in run.entropies if values(record) is not None]
    steps = [record.step for record in records]
    numbers = np.array([values(record) for record in records], dtype=float)
    numbers[~np.isfinite(numbers)] = np.nan
    marker = "." if len(records) <= MOST_MARKED_RECORDS else None
    for layer in range(run.layers):
        axes.plot(steps, numbers[:, layer], color=colors[layer], lw=1.4, marker=marker)
    for step, symbol in _breaks(run):
        axes.axvline(step, color=DIVERGENCE_COLOR, ls=":" if symbol == "X" else "-.", lw=1.5)
    axes.grid(alpha=0.25)
    _label_steps(axes)
    return numbers[np.isfinite(numbers)].tolist()


def _set_row_title(axes: Axes, title: str, inches: float):
    """Sets the title of a row at the left of its first panel, above that panel's own."""
    axes.set_title(wrap(title, inches, 10) + "\n", loc="left", fontsize=10, fontweight="bold")


def _heat_map_width(runs: list[RunLog]) -> float:
    """Inches of a heat map with room for the numbers in it."""
    heads = max(run.description.config["n_head"] for run in runs)
    return max(2.8, 0.34 * heads + 0.6 if heads <= MOST_HEADS_WITH_NUMBERS else 0.2 * heads + 0.6)


def _heat_map_height(run: RunLog) -> float:
    return max(1.6, 0.24 * run.layers)


def _run_style(index: int) -> dict:
    return {
        "color": RUN_COLORS[index % len(RUN_COLORS)],
        "ls": LINE_STYLES[index // len(RUN_COLORS) % len(LINE_STYLES)],
    }


def _breaks(run: RunLog) -> list[tuple[int, str]]:
    """The steps at which the run went back, and at which it diverged, each with the symbol for it."""
    diverged = [] if run.diverged_at is None else [(run.diverged_at, "X")]
    return [*((step, "<") for step in run.rollbacks), *diverged]


def _fate(run: RunLog) -> str:
    """What is to be said of a run that did not go smoothly."""
    went_back = f", went back at step {', '.join(f'{step:,}' for step in run.rollbacks)}" if run.rollbacks else ""
    return went_back + (f", diverged at step {run.diverged_at:,}" if run.diverged_at is not None else "")


def _divergence_handles(runs: list[RunLog]) -> list[Artist]:
    handles = []
    if any(run.diverged_at is not None for run in runs):
        handles.append(Line2D([], [], color=DIVERGENCE_COLOR, ls=":", lw=1.5, label="diverged"))
    if any(run.rollbacks for run in runs):
        handles.append(Line2D([], [], color=DIVERGENCE_COLOR, ls="-.", lw=1.5, label="went back"))
    return handles


def _label_steps(axes: Axes):
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps, and numbers, NaN where they are infinite: what is not finite leaves a gap."""
    return [step for step, _ in points], [value if math.isfinite(value) else math.nan for _, value in points]


def _limits(values: list) -> tuple[float, float]:
    """The smallest and the largest number, a little apart if they are the same."""
    numbers = np.array([number for value in values for number in np.ravel(value) if math.isfinite(number)])
    if not len(numbers):
        return 0.0, 1.0
    lowest, highest = float(numbers.min()), float(numbers.max())
    return (lowest, highest) if highest - lowest > 0.02 else (lowest - 0.01, highest + 0.01)


def _spans_decades(values: list[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) >= LOGARITHMIC_FROM
