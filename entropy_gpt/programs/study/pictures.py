"""The study's pictures, out of its record alone."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from entropy_gpt.evaluation.measuring.perplexity import perplexity_of
from entropy_gpt.evaluation.showing.comparison_plots import number_plainly, plot_tradeoff
from entropy_gpt.evaluation.showing.plots import DOTS_PER_INCH, add_entropy_scale, draw_heat_map, wrap
from entropy_gpt.evaluation.showing.run_plots import RUN_COLORS

from .records import Study, StudyRun
from .tables import (
    BASELINE,
    LADDER,
    PROPOSAL,
    UNREGULARIZED,
    UNUSUAL,
    WARM,
    alike,
    by_notation,
    error_of,
    gpt2_bytes,
    gpt2_notation,
    list_trained,
    mean_nats,
    same_seeds,
    spread_of,
    teacher_tokens,
)


PANEL = (3.4, 3.2)
# Colours of the scratch and the converted models in the curves.
SCRATCH_COLOR, OWN_COLOR, ALL_COLOR, BASELINE_COLOR = RUN_COLORS[0], RUN_COLORS[1], RUN_COLORS[2], "#4a5158"


def plot_pareto(study: Study) -> Figure:
    """Test perplexity against what a private inference of GPT-2 small sends, of the main architectures."""
    return _plot_tradeoff(study, (WARM,))


def plot_others(study: Study) -> Figure:
    """
    The same of the main architectures with the paper's warm-up, of the others, and of what was converted. Models with
    static weights all cost what SM does, and are left to the table.
    """
    return _plot_tradeoff(study, (LADDER, *UNUSUAL, "conversion", "conversion_targets"))


def _plot_tradeoff(study: Study, groups: Sequence[str]) -> Figure:
    names, costs, perplexities, deviations = [], [], [], []
    runs = list_trained(study.group(*groups))
    longest = max((run.settings["heal_steps"] for run in runs if run.source), default=0)
    kept = [run for run in runs if run.source is None or run.settings["heal_steps"] == longest]
    by_title: dict[str, list[StudyRun]] = {}
    for run in kept:
        by_title.setdefault(_title(run), []).append(run)
    for title, members in by_title.items():
        names.append(title)
        costs.append(gpt2_bytes(gpt2_notation(members[0])) / 1e9)
        perplexities.append(perplexity_of(mean_nats(members)))
        deviations.append(perplexities[-1] * spread_of(members))
    title = "private inference of GPT-2 small, T=128 (GB, predicted)"
    return plot_tradeoff(names, costs, perplexities, title, deviations)


def plot_conversion(study: Study) -> Figure:
    """Test perplexity against tokens: trained from scratch, and converted, without and with the teacher's tokens."""
    figure = Figure(figsize=(7.4, 4.6), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot(xlabel="tokens (millions)", ylabel=f"test perplexity of {PROPOSAL}")
    ladder = by_notation(study.group(LADDER))
    scratch = alike(list_trained([*ladder[PROPOSAL], *study.group("scratch")]), "max_steps")
    converted = alike(list_trained(study.group("conversion")), "heal_steps")
    teacher = teacher_tokens(study, study.group("conversion"))
    for runs, offset, label, color in (
        (scratch, 0, "trained from scratch", SCRATCH_COLOR),
        (converted, 0, "converted: its own tokens", OWN_COLOR),
        (converted, teacher, "converted: with its teacher's tokens", ALL_COLOR),
    ):
        if runs:
            _draw_curve(axes, runs, offset, label, color)
    axes.axhline(perplexity_of(mean_nats(ladder[BASELINE])), color=BASELINE_COLOR, ls=":", label=f"{BASELINE}")
    crossing = find_crossing(scratch, converted)
    if crossing is not None:
        tokens, nats = crossing
        axes.plot(tokens / 1e6, perplexity_of(nats), "x", color="black", ms=9, mew=2, zorder=5)
        axes.annotate(
            f"as good as from scratch\nafter {tokens / 1e6:.2f} M own tokens",
            (tokens / 1e6, perplexity_of(nats)),
            textcoords="offset points",
            xytext=(-12, -14),
            ha="right",
            va="top",
            fontsize=9,
        )
    axes.set(xscale="log", yscale="log")
    number_plainly(axes.xaxis, axes.get_xlim())
    number_plainly(axes.yaxis, axes.get_ylim())
    axes.legend()
    axes.grid(alpha=0.25)
    return figure


def find_crossing(scratch: Sequence[Sequence[StudyRun]], converted: Sequence[Sequence[StudyRun]]):
    """
    Where a converted model is as good as the first of those trained from scratch, between two amounts of healing, by
    the seeds that all three have; if the longer healing ends up better by at least twice the standard error of that.

    Returns:
        `tuple[float, float]`: Its own tokens, and nats of a test token; `None` if there is no such place.
    """
    for fewer, more in itertools.pairwise(converted):
        seeds = same_seeds(scratch[0], fewer, more)
        goal, before, after = map(mean_nats, seeds)
        error = math.hypot(error_of(seeds[0]), error_of(seeds[2]))
        if before > goal > after + 2 * error:
            share = (before - goal) / (before - after)
            return fewer[0].tokens + share * (more[0].tokens - fewer[0].tokens), goal
    return None


def plot_heads(study: Study) -> Figure:
    """Mean entropy of every head of the main architectures, of the first seed each."""
    firsts = [runs[0] for runs in by_notation(study.group(WARM)).values() if runs[0].heads is not None]
    figure = Figure(figsize=(PANEL[0] * len(firsts) + 1, PANEL[1]), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(1, len(firsts), squeeze=False)[0]
    maximum = firsts[0].heads.maximum
    for axes, run in zip(panels, firsts, strict=True):
        image = draw_heat_map(axes, run.heads.nats, 0, maximum)
        title = f"{run.notation}\n{run.heads.overloaded_share:.0%} of heads overloaded"
        axes.set_title("\n".join(wrap(line, PANEL[0], 9) for line in title.split("\n")), fontsize=9)
    add_entropy_scale(figure, list(panels), image, maximum)
    return figure


def plot_tolerance(study: Study) -> Figure:
    """Test perplexity and mean entropy against the tolerance of the penalty, with the model without a penalty."""
    runs = sorted(list_trained(study.group("tolerance")), key=lambda run: run.settings["entropy_tolerance"])
    without = list_trained(by_notation(study.group(LADDER)).get(UNREGULARIZED, []))[:1]
    figure = Figure(figsize=(8.4, 3.6), dpi=DOTS_PER_INCH, layout="constrained")
    left, right = figure.subplots(1, 2)
    tolerances = [run.settings["entropy_tolerance"] for run in runs]
    left.plot(tolerances, [perplexity_of(run.test_nats) for run in runs], "o-", color=RUN_COLORS[0])
    right.plot(tolerances, [run.heads.mean for run in runs], "o-", color=RUN_COLORS[0], label="with the penalty")
    for run in without:
        left.axhline(perplexity_of(run.test_nats), color=BASELINE_COLOR, ls=":")
        right.axhline(run.heads.mean, color=BASELINE_COLOR, ls=":", label=UNREGULARIZED)
    left.set(xlabel="tolerance", ylabel="test perplexity")
    right.set(xlabel="tolerance", ylabel="mean entropy (nats)")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return figure


def _draw_curve(axes, groups: Sequence[Sequence[StudyRun]], offset: int, label: str, color: str):
    points = sorted((runs[0].tokens + offset, mean_nats(runs), spread_of(runs)) for runs in groups)
    tokens, nats, spreads = map(np.array, zip(*points, strict=True))
    errors = np.exp(nats) * np.where(np.isnan(spreads), 0, spreads)
    axes.errorbar(tokens / 1e6, np.exp(nats), errors, marker="o", capsize=3, label=label, color=color)


def _title(run: StudyRun) -> str:
    return run.notation if run.source is None else f"{run.notation} from {BASELINE}"
