"""What the record of the protocol `ladder` says, as far as it is measured: tables, picture and text of its page."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from entropy_gpt.evaluation.measuring.perplexity import perplexity_of
from entropy_gpt.evaluation.private_inference.costs.paper_table import PAPER_SIZES
from entropy_gpt.evaluation.showing.comparison_plots import number_plainly
from entropy_gpt.evaluation.showing.markdown import markdown_table
from entropy_gpt.evaluation.showing.plots import DOTS_PER_INCH
from entropy_gpt.evaluation.showing.run_plots import RUN_COLORS
from modeling_entropy_gpt.notation import ATTENTION_TOKENS

from .protocol import read_protocol
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
    predict_cost,
    private_table,
    same_seeds,
    spread_of,
)


PROTOCOL = Path(__file__).with_name("protocols") / "ladder.yaml"
# Groups of the protocol: trained from scratch, converted from GPT-2 and healed, and asked privately.
SCRATCH = ("fused", "norm", "regularized", "penalized", "functions")
HEALED = ("healed",)
PRIVATE = ("private", "private_norm", "private_functions")
SOFTMAX = "SM"
FUNCTION = re.compile(rf"\b({'|'.join(ATTENTION_TOKENS)})\b")
MARKERS = "osD^v"


def function_of(notation: str) -> str:
    """What stands for its attention function."""
    return FUNCTION.search(notation)[0]


def architecture_of(notation: str) -> str:
    """The notation with softmax in place of its function."""
    return FUNCTION.sub(SOFTMAX, notation)


def log_sum_weight(run: StudyRun) -> float:
    """The weight of the penalty on log-sums in its training, or in its healing."""
    return {**run.settings, **run.settings.get("settings", {})}.get("log_sum_coefficient", 0.0)


def rung_of(run: StudyRun) -> tuple[str, str, float]:
    """Its architecture, its function and its penalty on log-sums."""
    return architecture_of(run.notation), function_of(run.notation), log_sum_weight(run)


def rungs(study: Study, groups: Sequence[str]) -> dict[tuple[str, str, float], list[StudyRun]]:
    """Runs by seeds; the rungs of an architecture follow each other."""
    found: dict[tuple[str, str, float], list[StudyRun]] = {}
    for run in study.group(*groups):
        found.setdefault(rung_of(run), []).append(run)
    architectures = list(dict.fromkeys(architecture for architecture, *_ in found))
    return {rung: found[rung] for rung in sorted(found, key=lambda rung: architectures.index(rung[0]))}


def quality_table(study: Study, groups: Sequence[str]) -> str:
    """Perplexities, each compared with softmax of its architecture, without and with the penalty on log-sums."""
    found = rungs(study, groups)
    rows = []
    for (architecture, function, weight), runs in found.items():
        references = [
            found.get((architecture, SOFTMAX, other)) if (function, weight) != (SOFTMAX, other) else None
            for other in (0.0, weight)
        ]
        rows.append(
            (
                f"`{runs[0].notation}`",
                f"{weight:g}",
                str(len(runs)),
                perplexity_cell(runs, "validation"),
                perplexity_cell(runs),
                _above_cell(runs, references[0]),
                _above_cell(runs, references[1] if weight else None),
            )
        )
    headings = ("seeds", "validation ppl", "test ppl", "above softmax", "above softmax with that penalty")
    return markdown_table(("architecture", "log-sum penalty", *headings), rows)


def _above_cell(runs: Sequence[StudyRun], reference: Sequence[StudyRun] | None) -> str:
    """By which share the test perplexity is above another's, over their common seeds, with the standard error."""
    if reference is None:
        return ""
    own, other = same_seeds(runs, reference)
    share = above(own, other)
    error = (1 + share) * math.hypot(error_of(own), error_of(other))
    return "" if math.isnan(share) else f"{share:+.1%}" + ("" if math.isnan(error) else f" ± {error:.1%}")


def cost_table() -> str:
    """
    What one private answer takes, predicted, at the size of the protocol and at that of GPT-2 small. The entropy
    penalty acts in training alone.
    """
    protocol = read_protocol(PROTOCOL)
    rows = {row.settings["notation"]: row.settings for row in protocol.rows if row.group in SCRATCH}
    notations = sorted((each for each in rows if not each.startswith("EReg")), key=architecture_of, reverse=True)
    cells = []
    for notation in notations:
        sizes = {name: rows[notation][name] for name in PAPER_SIZES}
        costs = predict_cost(notation, vocab_size=protocol.vocabulary, **sizes), gpt2_cost(notation)
        cells.append((f"`{notation}`", *(f"{each:,.0f}" for sent, trips in costs for each in (sent / 1e6, trips))))
    headings = ("MB", "round trips", "GPT-2 small, MB", "GPT-2 small, round trips")
    return markdown_table(("architecture", *headings), cells)


def plot_ladder(study: Study) -> Figure:
    """
    Test perplexity, with the standard deviation over seeds, against what a private inference of GPT-2 small takes:
    a colour for each function, a marker for each architecture, hollow for what was converted.
    """
    figure = Figure(figsize=(10.5, 5.2), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    drawn = [
        (*rung, runs, groups is HEALED)
        for groups in (SCRATCH, HEALED)
        for rung, runs in rungs(study, groups).items()
        if list_trained(runs)
    ]
    markers = dict(zip(dict.fromkeys(architecture for architecture, *_ in drawn), MARKERS, strict=False))
    for architecture, function, weight, runs, is_healed in drawn:
        color = RUN_COLORS[list(ATTENTION_TOKENS).index(function)]
        perplexity, spread = perplexity_of(mean_nats(runs)), spread_of(runs)
        is_penalized = function == SOFTMAX and weight > 0
        label = runs[0].notation + ", penalised" * is_penalized + ", healed" * is_healed
        for axes, cost in zip(panels, gpt2_cost(runs[0].notation), strict=True):
            axes.errorbar(
                cost / 1e9 if axes is panels[0] else cost,
                perplexity,
                None if math.isnan(spread) else perplexity * spread,
                fmt=markers[architecture],
                color=color,
                mfc="white" if is_healed else color,
                capsize=3,
                ms=7,
                label=label,
            )
    panels[0].set(xlabel="private inference of GPT-2 small (GB, predicted for a WAN)", ylabel="test perplexity")
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
    """Whether there are two rungs to compare that were trained from scratch."""
    return sum(bool(list_trained(runs)) for runs in rungs(study, SCRATCH).values()) > 1


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
    parts += [
        "## Private cost\n",
        "One answer to 128 tokens, predicted for a WAN, without the set-up of a connection. The entropy penalty acts "
        "in training alone.\n",
        cost_table() + "\n",
    ]
    if study.group(*PRIVATE):
        parts += [
            "Measured between two processes; perplexities in the ring, emulated to the engine's last bit, and in the "
            "clear:\n",
            private_table(study, PRIVATE) + "\n",
        ]
    return "\n".join(filter(None, [*parts, *conditions_text(study)]))
