"""The study's tables, in Markdown, out of its record alone."""

import functools
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Sequence

from entropy_gpt.evaluation.measuring.perplexity import perplexity_of
from entropy_gpt.evaluation.private_inference.costs.cost_model import predict
from entropy_gpt.evaluation.private_inference.costs.measured_inference import make_config
from entropy_gpt.evaluation.private_inference.costs.paper_table import PAPER_SIZES
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from entropy_gpt.evaluation.records.conditions import describe_origins, list_settings
from entropy_gpt.evaluation.showing.markdown import fold_away, markdown_table

from .records import Study, StudyRun


BASELINE, PROPOSAL = "SM+LN+G", "EReg(SM(t)+ScFuFFN)"
FUSED, UNREGULARIZED = "SM+ScFuFFN", "SM(t)+ScFuFFN"
# Groups of the main architectures: with the paper's warm-up, which most is held against, and with a longer one.
LADDER, WARM = "ladder", "warm_ladder"
# Groups of other architectures, with one seed, and of what answered privately.
UNUSUAL = ("others_with_norm", "others")
OTHERS = (*UNUSUAL, "static_weights")
PRIVATE = ("private", "private_with_norm", "private_others")
GPT2_VOCABULARY = 50257
# Perplexities of the paper (tables 2 and 4, CodeParrot, T=128), GPT-2 small.
PAPER = {
    "SM+LN+G": 2.69,
    "SM+LN+R": 2.76,
    "SM+LN": 3.38,
    "SM+G": 3.20,
    "SM+R": 2.94,
    "SM": math.nan,
    "SM+ScFFN": 3.50,
    "SM+ScFuFFN": 3.48,
    "EReg(SM(t)+ScFuFFN)": 3.21,
    "SM+WN(QK)": 3.89,
    "SM+WN(FFN)": 3.64,
    "SM+WN(QK+FFN)": 3.88,
    "SM+WN(QKV+FFN)": 3.93,
    "SM+WN(QKVO+FFN)": 3.98,
    "SM+SN(QK)": 4.25,
    "SM+SN(FFN)": 3.63,
    "SM+SN(QK+FFN)": 4.23,
    "SM+SN(QKV+FFN)": 4.26,
    "SM+SN(QKVO+FFN)": 4.34,
}
QUALITY_HEADINGS = ("architecture", "test ppl", "above GPT-2", "entropy, nats", "overloaded")
PAPER_GAIN = 0.078  # of the regulariser: 3.48 to 3.21


def gpt2_notation(run: StudyRun) -> str:
    """The architecture with the 12 layers of GPT-2 small: the same part of the FFNs is pruned."""
    layers = run.settings.get("n_layer", PAPER_SIZES["n_layer"])
    return re.sub(r"(?<=FFNi)\d+$", lambda found: str(int(found[0]) * PAPER_SIZES["n_layer"] // layers), run.notation)


@functools.cache
def predict_cost(notation: str, context: int, vocab_size: int, **sizes: int) -> tuple[float, float]:
    """Bytes and round trips of one private answer to a whole context, predicted: logits of the last position."""
    steps = predict(
        make_config(notation, context, vocab_size=vocab_size, **sizes), PrivateSettings(), Span(0, context, 1)
    )
    return sum(step.total_bytes for step in steps), sum(step.round_trips for step in steps)


def gpt2_cost(notation: str) -> tuple[float, float]:
    """Of GPT-2 small in this architecture, T=128."""
    return predict_cost(notation, vocab_size=GPT2_VOCABULARY, **PAPER_SIZES)


def gpt2_bytes(notation: str) -> float:
    return gpt2_cost(notation)[0]


def run_cost(run: StudyRun) -> tuple[float, float]:
    """Of the model of a run."""
    sizes = {name: run.settings[name] for name in PAPER_SIZES}
    return predict_cost(run.notation, vocab_size=run.validation.conditions.vocab_size, **sizes)


def mean_nats(runs: Sequence[StudyRun], text: str = "test") -> float:
    """
    Of a token, over the seeds that did not diverge: what geometric means of perplexities are taken from. Infinite if
    all did.
    """
    values = _nats(runs, text)
    return statistics.fmean(values) if values else math.inf


def error_of(runs: Sequence[StudyRun], text: str = "test") -> float:
    """The standard error of the mean over these seeds, in nats; NaN of fewer than two."""
    return spread_of(runs, text) / math.sqrt(max(1, len(_nats(runs, text))))


def spread_of(runs: Sequence[StudyRun], text: str = "test") -> float:
    """The standard deviation over these seeds, in nats; NaN of fewer than two."""
    values = _nats(runs, text)
    return statistics.stdev(values) if len(values) > 1 else math.nan


def perplexity_cell(runs: Sequence[StudyRun], text: str = "test") -> str:
    """Geometric mean over seeds, with the standard deviation; and how many seeds diverged."""
    nats, spread = mean_nats(runs, text), spread_of(runs, text)
    diverged = len(runs) - len(list_trained(runs))
    if diverged == len(runs):
        return "diverged"
    return (
        f"{perplexity_of(nats):.2f}"
        + ("" if math.isnan(spread) else f" ± {perplexity_of(nats) * spread:.2f}")
        + (f" ({diverged} of {len(runs)} diverged)" if diverged else "")
    )


def above(runs: Sequence[StudyRun], reference: Sequence[StudyRun]) -> float:
    """By how much the perplexity is above another's, as a share of that; NaN if all of one of them diverged."""
    return (
        math.expm1(mean_nats(runs) - mean_nats(reference))
        if _nats(runs, "test") and _nats(reference, "test")
        else math.nan
    )


def same_seeds(*groups: Sequence[StudyRun]) -> list[list[StudyRun]]:
    """Of each group, the runs of those seeds that diverged in none of them."""
    common = set.intersection(*({run.settings["seed"] for run in list_trained(runs)} for runs in groups))
    return [[run for run in list_trained(runs) if run.settings["seed"] in common] for runs in groups]


def ladder_table(study: Study, group: str) -> str:
    """The main architectures: quality, heads, price."""
    ladder = by_notation(study.group(group))
    rows = []
    for notation, runs in ladder.items():
        trained = list_trained(runs)
        rows.append(
            (
                _code(notation),
                f"{runs[0].settings['learning_rate']:g}",
                perplexity_cell(runs, "validation"),
                perplexity_cell(runs),
                _above_cell(runs, ladder[BASELINE]),
                _paper_above(notation),
                _mean_cell(map(_bits_per_byte, trained), ".3f"),
                *_head_cells(runs),
                _mean_cell((run.seconds_per_step for run in trained), ".2f"),
                _private_cell(study, notation),
                f"{gpt2_bytes(notation) / 1e9:.2f}",
            )
        )
    headings = (
        *("architecture", "learning rate", "validation ppl", "test ppl", "above GPT-2", "paper"),
        *("test bits/byte", "entropy, nats", "overloaded", "s/step", "private MB", "GPT-2 small, GB"),
    )
    return markdown_table(headings, rows)


def readme_table(study: Study, group: str) -> str:
    """The main architectures in the few columns of the README."""
    ladder = by_notation(study.group(group))
    rows = [
        (
            _code(notation),
            perplexity_cell(runs),
            _above_cell(runs, ladder[BASELINE]),
            _paper_above(notation),
            f"{gpt2_bytes(notation) / 1e9:.2f}",
        )
        for notation, runs in ladder.items()
    ]
    return markdown_table(("architecture", "test perplexity", "above GPT-2", "in the paper", "private GB"), rows)


def rates_table(study: Study, group: str) -> str:
    """Validation perplexity of each architecture at each learning rate: what the rate was chosen by."""
    by_rate: dict[float, dict[str, StudyRun]] = {}
    for run in study.group(group):
        by_rate.setdefault(run.settings["learning_rate"], {})[run.notation] = run
    rows = [
        (
            _code(notation),
            *(
                perplexity_cell([runs[notation]], "validation") if notation in runs else ""
                for runs in by_rate.values()
            ),
        )
        for notation in by_notation(study.group(group))
    ]
    return markdown_table(("architecture", *(f"{rate:g}" for rate in by_rate)), rows)


def order_table(study: Study, groups: Sequence[str]) -> str:
    """Each pair of architectures of which the paper has perplexities: is the same one better here?"""
    runs = by_notation(study.group(*groups))
    known = sorted((notation for notation in runs if not math.isnan(PAPER.get(notation, math.nan))), key=PAPER.get)
    rows = []
    for better, worse in itertools.pairwise(known):
        difference = mean_nats(runs[worse]) - mean_nats(runs[better])
        error = math.hypot(error_of(runs[better]), error_of(runs[worse]))
        rows.append(
            (
                f"{_code(better)} before {_code(worse)}",
                f"{PAPER[worse] / PAPER[better] - 1:+.1%}",
                f"{math.expm1(difference):+.1%}" if math.isfinite(difference) else "diverged",
                "" if math.isnan(error) else f"{math.exp(difference) * error:.1%}",
                _verdict(difference, error),
            )
        )
    return markdown_table(("order in the paper", "paper, ppl", "here, test ppl", "standard error", "holds here"), rows)


def others_table(study: Study, groups: Sequence[str]) -> str:
    """Architectures with one seed, with the baseline of the ladder."""
    baseline = by_notation(study.group(LADDER)).get(BASELINE, [])
    rows = [
        (
            *_quality_cells(run, baseline),
            _paper_above(run.notation),
            _private_cell(study, run.notation),
            f"{gpt2_bytes(gpt2_notation(run)) / 1e9:.2f}",
            run.diverged or "",
        )
        for run in study.group(*groups)
    ]
    return markdown_table((*QUALITY_HEADINGS, "paper", "private MB", "GPT-2 small, GB", "remark"), rows)


def parts_table(study: Study, groups: Sequence[str], reference: str) -> str:
    """Architectures with parts of the proposal, with the baseline of a ladder."""
    ladder = by_notation(study.group(reference))
    (proposal, *_), baseline = ladder[PROPOSAL], ladder[BASELINE]
    rows = []
    for runs in alike(study.group(*groups), *(proposal.settings.keys() - {"seed"})):
        rows.append(
            (
                _code(runs[0].notation),
                f"{runs[0].settings['learning_rate']:g}",
                _list_changes(runs[0], proposal),
                str(len(runs)),
                perplexity_cell(runs),
                _above_cell(runs, baseline),
                *_head_cells(runs),
            )
        )
    name, *others = QUALITY_HEADINGS
    return markdown_table((name, "learning rate", "otherwise", "seeds", *others), rows)


def larger_table(study: Study, groups: Sequence[str]) -> str:
    """Models of other sizes, each with the baseline of its own size."""
    rows = []
    for group in groups:
        runs = study.group(group)
        baseline = [run for run in runs if run.notation == BASELINE]
        rows += [
            (str(run.settings["n_layer"]), str(run.settings["context"]), *_quality_cells(run, baseline))
            for run in runs
        ]
    return markdown_table(("layers", "context", *QUALITY_HEADINGS), rows)


def settings_table(study: Study, groups: dict[str, str]) -> str:
    """Runs of groups that differ in one setting, and the same architecture as the ladder has it."""
    rows = [
        (setting, str(run.settings[setting]), perplexity_cell([run]), *_head_cells([run]))
        for group, setting in groups.items()
        for run in study.group(group)
    ]
    return markdown_table(("setting", "value", "test ppl", "entropy, nats", "overloaded"), rows)


def conversion_table(study: Study) -> str:
    """Converted models by what they are and what they were healed with, and training from scratch."""
    ladder = by_notation(study.group(LADDER))
    rows = [_conversion_row(f"{notation}, from scratch", ladder[notation], 0) for notation in (BASELINE, PROPOSAL)]
    for runs in alike(study.group("scratch", "scratch_baseline"), "notation", "max_steps"):
        rows.append(_conversion_row(f"{runs[0].notation}, from scratch", runs, 0))
    for group in ("conversion", "conversion_targets", "conversion_teacher"):
        for runs in alike(study.group(group), "notation", "heal_steps"):
            rows.append(_conversion_row(f"{runs[0].notation} from {BASELINE}", runs, teacher_tokens(study, runs)))
    return markdown_table(
        ("model", "learning rate", "own tokens", "with the teacher's", "seeds", "test ppl", "validation ppl"), rows
    )


def teacher_tokens(study: Study, runs: Sequence[StudyRun]) -> int:
    """What the models were trained on that these were converted from."""
    return max(study.runs[run.source].tokens for run in runs)


def ways_table(study: Study, groups: Sequence[str]) -> str:
    """The same conversion with and without distillation and calibration, and at other learning rates."""
    runs = {run.name: run for run in study.group(*groups)}
    rows = [
        (
            f"{run.settings['heal_steps']:,}",
            "yes" if run.settings["distill"] else "no",
            "nothing" if run.settings["naive"] else "each step",
            f"{run.settings['learning_rate']:g}",
            perplexity_cell([run], "validation"),
            perplexity_cell([run]),
        )
        for run in sorted(runs.values(), key=lambda run: run.settings["heal_steps"])
    ]
    headings = ("steps of healing", "distilled", "fitted to text", "learning rate", "validation ppl", "test ppl")
    return markdown_table(headings, rows)


def private_table(study: Study, groups: Sequence[str] = PRIVATE) -> str:
    """What private answers cost and how they agree."""
    rows = [
        (
            _code(run.notation),
            f"{run.cost.total_bytes / 1e6:.1f}",
            f"{run.cost.rounds:,}",
            f"{run.cost.seconds:.1f}",
            f"{run.agreement.agreeing:,} of {run.agreement.positions:,}",
            f"{run.agreement.largest_error:.3f} of {run.agreement.largest_logit:.1f}",
            f"{run.agreement.perplexity:.3f}",
            f"{run.agreement.private_perplexity:.3f}",
        )
        for run in study.group(*groups)
    ]
    headings = ("architecture", "MB", "rounds", "s", "same token", "largest error", "ppl", "private ppl")
    return markdown_table(headings, rows)


def missing_table(study: Study) -> str:
    """How many rows of each group are not measured yet, without trials; empty if none is missing."""
    missing = {group: count for group, count in study.missing.items() if not group.startswith("smoke")}
    rows = [(f"`{group}`", f"{count:,}") for group, count in missing.items()]
    return markdown_table(("group", "rows not measured yet"), rows) + "\n" if rows else ""


def conditions_text(study: Study) -> list[str]:
    """The texts of the runs, and what computed them; nothing of a record without runs."""
    runs = [run for run in study.runs.values() if run.validation is not None]
    if not runs:
        return []
    texts = {
        "Validation": [run.validation for run in runs],
        "Test": [result for run in runs for result in run.test.values()],
        "Prose": [result for run in runs for result in run.transfer.values()],
    }
    of_all = {"Protocol": study.protocol, "Tokenizer": study.tokenizer and f"sha256:{study.tokenizer}"}
    of_all["Pinned packages"] = study.pins
    lines = [" ".join(f"{title}: {value}." for title, value in of_all.items() if value)]
    for title, results in texts.items():
        found = dict.fromkeys(
            f"{each.likelihood.tokens:,} tokens of {each.conditions.corpus} ({each.conditions.corpus_revision})"
            for each in results
        )
        lines += [f"{title}: {'; '.join(found)}."] if found else []
    lines.append(f"Measured with {describe_origins(run.validation.conditions for run in runs)}.")
    for title, origins in {
        "Timed": [run.origin for run in study.runs.values() if run.origin is not None],
        "Asked privately": [run.cost for run in study.runs.values() if run.cost is not None],
    }.items():
        lines += [f"{title} with {describe_origins(origins)}."] if origins else []
    return [fold_away("Conditions", lines) + "\n"]


def _nats(runs: Iterable[StudyRun], text: str) -> list[float]:
    return [getattr(run, f"{text}_nats") for run in list_trained(runs)]


def _quality_cells(run: StudyRun, baseline: Sequence[StudyRun]) -> tuple[str, ...]:
    return (_code(run.notation), perplexity_cell([run]), _above_cell([run], baseline), *_head_cells([run]))


def _head_cells(runs: Iterable[StudyRun]) -> tuple[str, str]:
    heads = [run.heads for run in list_trained(runs)]
    return _mean_cell((each.mean for each in heads), ".2f"), _mean_cell(
        (each.overloaded_share for each in heads), ".0%"
    )


def _above_cell(runs: Sequence[StudyRun], reference: Sequence[StudyRun]) -> str:
    """By how much the perplexity is above that of the reference with the same seeds; nothing if a seed diverged."""
    if list_trained(runs) != list(runs):
        return ""
    share = above(*same_seeds(runs, reference))
    return "" if math.isnan(share) else f"{share:+.1%}"


def _private_cell(study: Study, notation: str) -> str:
    """What a private answer took, of a model of this architecture."""
    costs = [run.cost for run in study.group(*PRIVATE) if run.notation == notation]
    return f"{costs[0].total_bytes / 1e6:.1f}" if costs else ""


def _list_changes(run: StudyRun, other: StudyRun) -> str:
    """Settings of a run that are not another's, without those that have a column of their own."""
    own = ("notation", "learning_rate", "seed")
    return list_settings(
        {name: value for name, value in run.settings.items() if name not in own and value != other.settings[name]}
    )


def _mean_cell(values: Iterable[float], form: str) -> str:
    values = list(values)
    return f"{statistics.fmean(values):{form}}" if values else ""


def _conversion_row(name: str, runs: Sequence[StudyRun], teacher: int) -> tuple[str, ...]:
    own = max(run.tokens for run in runs)
    return (
        name,
        f"{runs[0].settings['learning_rate']:g}",
        f"{own:,}" if own else "",
        f"{own + teacher:,}" if own else "",
        str(len(runs)),
        perplexity_cell(runs),
        perplexity_cell(runs, "validation"),
    )


def list_trained(runs: Iterable[StudyRun]) -> list[StudyRun]:
    """Those that did not diverge."""
    return [run for run in runs if run.diverged is None]


def by_notation(runs: Iterable[StudyRun]) -> dict[str, list[StudyRun]]:
    found: dict[str, list[StudyRun]] = {}
    for run in runs:
        found.setdefault(run.notation, []).append(run)
    return found


def alike(runs: Iterable[StudyRun], *names: str) -> list[list[StudyRun]]:
    """Runs by seeds: those that have these settings in common."""
    found: dict[tuple, list[StudyRun]] = {}
    for run in runs:
        found.setdefault(tuple(run.settings[name] for name in names), []).append(run)
    return list(found.values())


def _paper_above(notation: str) -> str:
    perplexity = PAPER.get(notation)
    if perplexity is None:
        return ""
    return "diverged" if math.isnan(perplexity) else f"{perplexity / PAPER[BASELINE] - 1:+.1%}"


def _verdict(difference: float, error: float) -> str:
    """Whether the order holds; with an error that is not known, of one seed alone."""
    if not math.isfinite(difference):
        return "diverged"
    if abs(difference) < 2 * error:
        return "undecided"
    return ("one seed: " if math.isnan(error) else "") + ("yes" if difference > 0 else "no")


def _bits_per_byte(run: StudyRun) -> float:
    parts = [result.likelihood for result in run.test.values()]
    return sum(part.nats for part in parts) / math.log(2) / sum(part.bytes for part in parts)


def _code(notation: str) -> str:
    return f"`{notation}`"
