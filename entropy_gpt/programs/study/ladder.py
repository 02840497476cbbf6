"""What the record of the protocol `ladder` says, as far as it is measured: tables, picture and text of its page."""

import math
import re
from collections.abc import Sequence

from matplotlib.figure import Figure

from entropy_gpt.evaluation.measuring.perplexity import perplexity_of
from entropy_gpt.evaluation.showing.comparison_plots import number_plainly
from entropy_gpt.evaluation.showing.markdown import markdown_table
from entropy_gpt.evaluation.showing.plots import DOTS_PER_INCH
from entropy_gpt.evaluation.showing.run_plots import RUN_COLORS
from modeling_entropy_gpt.notation import ATTENTION_TOKENS

from .records import Study, StudyRun
from .tables import (
    above,
    conditions_text,
    error_of,
    gpt2_cost,
    list_trained,
    mean_nats,
    missing_table,
    perplexity_cell,
    private_table,
    run_cost,
    same_seeds,
    spread_of,
)


# Groups of the protocol: trained from scratch, converted from GPT-2 and healed, and asked privately.
SCRATCH = ("fused", "norm", "regularized", "penalized", "functions")
HEALED = ("healed",)
PRIVATE = ("private", "private_norm", "private_functions")
SOFTMAX = "SM"
FUNCTION = re.compile(rf"\b({'|'.join(ATTENTION_TOKENS)})\b")
MARKERS = "osD^v"


def function_of(run: StudyRun) -> str:
    """The notation of its attention function."""
    return FUNCTION.search(run.notation)[0]


def architecture_of(run: StudyRun) -> str:
    """Its notation with softmax in place of its function."""
    return FUNCTION.sub(SOFTMAX, run.notation)


def log_sum_weight(run: StudyRun) -> float:
    """The weight of the penalty on log-sums in its training, or in its healing."""
    return {**run.settings, **run.settings.get("settings", {})}.get("log_sum_coefficient", 0.0)


def rungs(study: Study, groups: Sequence[str]) -> list[list[StudyRun]]:
    """Runs by seeds: those of one architecture, function and penalty; those of an architecture follow each other."""
    found: dict[tuple, list[StudyRun]] = {}
    for run in study.group(*groups):
        found.setdefault((architecture_of(run), function_of(run), log_sum_weight(run)), []).append(run)
    architectures = list(dict.fromkeys(architecture for architecture, *_ in found))
    return [runs for key, runs in sorted(found.items(), key=lambda item: architectures.index(item[0][0]))]


def quality_table(study: Study, groups: Sequence[str]) -> str:
    """Perplexities, each compared with softmax of its architecture, without and with the penalty on log-sums."""
    found = rungs(study, groups)
    softmax = {
        (architecture_of(runs[0]), log_sum_weight(runs[0])): runs for runs in found if function_of(runs[0]) == SOFTMAX
    }
    rows = []
    for runs in found:
        architecture, weight = architecture_of(runs[0]), log_sum_weight(runs[0])
        references = [softmax.get((architecture, 0.0)), softmax.get((architecture, weight)) if weight else None]
        rows.append(
            (
                f"`{runs[0].notation}`",
                f"{weight:g}",
                str(len(runs)),
                perplexity_cell(runs, "validation"),
                perplexity_cell(runs),
                *(_above_cell(runs, reference) for reference in references),
            )
        )
    headings = ("seeds", "validation ppl", "test ppl", "above softmax", "above softmax with that penalty")
    return markdown_table(("architecture", "log-sum penalty", *headings), rows)


def _above_cell(runs: Sequence[StudyRun], reference: Sequence[StudyRun] | None) -> str:
    """By which share the test perplexity is above another's, over their common seeds, with the standard error."""
    if reference is None or reference is runs:
        return ""
    own, other = same_seeds(runs, reference)
    share = above(own, other)
    error = (1 + share) * math.hypot(error_of(own), error_of(other))
    return "" if math.isnan(share) else f"{share:+.1%}" + ("" if math.isnan(error) else f" ± {error:.1%}")


def cost_table(study: Study) -> str:
    """What one private answer takes, predicted, at the size of the study and at that of GPT-2 small."""
    firsts = {run.notation: run for run in list_trained(study.group(*SCRATCH))}
    rows = []
    for notation, run in firsts.items():
        costs = (run_cost(run), gpt2_cost(notation))
        cells = [cell for total, trips in costs for cell in (f"{total / 1e6:,.0f}", f"{trips:,.0f}")]
        rows.append((f"`{notation}`", *cells))
    headings = ("MB", "round trips", "GPT-2 small, MB", "GPT-2 small, round trips")
    return markdown_table(("architecture", *headings), rows)


def plot_ladder(study: Study) -> Figure:
    """
    Test perplexity, with the standard deviation over seeds, against what a private inference of GPT-2 small takes:
    a colour for each function, a marker for each architecture, hollow for what was converted.
    """
    figure = Figure(figsize=(10.5, 5.2), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    drawn = [(runs, groups is HEALED) for groups in (SCRATCH, HEALED) for runs in rungs(study, groups)]
    architectures = list(dict.fromkeys(architecture_of(runs[0]) for runs, _ in drawn))
    for runs, is_healed in drawn:
        if not list_trained(runs):
            continue
        color = RUN_COLORS[list(ATTENTION_TOKENS).index(function_of(runs[0]))]
        perplexity, spread = perplexity_of(mean_nats(runs)), spread_of(runs)
        is_penalized = function_of(runs[0]) == SOFTMAX and log_sum_weight(runs[0]) > 0
        label = runs[0].notation + ", penalised" * is_penalized + ", healed" * is_healed
        for axes, cost in zip(panels, gpt2_cost(runs[0].notation), strict=True):
            axes.errorbar(
                cost / 1e9 if axes is panels[0] else cost,
                perplexity,
                None if math.isnan(spread) else perplexity * spread,
                fmt=MARKERS[architectures.index(architecture_of(runs[0]))],
                color=color,
                mfc="white" if is_healed else color,
                capsize=3,
                ms=7,
                label=label,
            )
    panels[0].set(xlabel="private inference of GPT-2 small (GB, predicted)", ylabel="test perplexity")
    panels[1].set(xlabel="its round trips (predicted)")
    for axes in panels:
        axes.set(xscale="log", yscale="log")
        number_plainly(axes.xaxis, axes.get_xlim())
        axes.grid(alpha=0.25)
    number_plainly(panels[0].yaxis, panels[0].get_ylim())
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def is_drawn(study: Study) -> bool:
    """Whether there is a model that was trained from scratch."""
    return bool(list_trained(study.group(*SCRATCH)))


def ladder_text(study: Study) -> str:
    """The page's part, as far as the record goes; what is not measured yet is named."""
    parts = [missing_table(study)]
    if is_drawn(study):
        parts += [
            "![Test perplexity against private bytes and round trips](ladder.png)\n",
            "## From scratch\n",
            quality_table(study, SCRATCH) + "\n",
        ]
    if study.group(*HEALED):
        (run, *_) = study.group(*HEALED)
        parts += [
            "## Converted and healed\n",
            f"From `SM+LN+G` of the same seed, healed for {run.settings['heal_steps']:,} steps with distillation.\n",
            quality_table(study, HEALED) + "\n",
        ]
    if is_drawn(study):
        parts += [
            "## Private cost\n",
            "One answer to 128 tokens by the cost model, without the set-up of a connection.\n",
            cost_table(study) + "\n",
        ]
    if study.group(*PRIVATE):
        parts += [
            "Measured between two processes; perplexities in the ring, emulated to the engine's last bit, and in the "
            "clear:\n",
            private_table(study, PRIVATE) + "\n",
        ]
    return "\n".join(filter(None, [*parts, *conditions_text(study)]))
