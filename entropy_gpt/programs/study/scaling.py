"""What the record of the protocol `scaling` says, as far as it is measured: tables, picture and text of its page."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from matplotlib.figure import Figure

from entropy_gpt.evaluation.showing.comparison_plots import number_plainly
from entropy_gpt.evaluation.showing.markdown import markdown_table
from entropy_gpt.evaluation.showing.plots import DOTS_PER_INCH
from entropy_gpt.evaluation.showing.run_plots import RUN_COLORS

from .power_laws import FEWEST, MILLION, Curve, find_crossing, interval, make_curve, pool_spread, tell_apart
from .protocol import timed_settings
from .records import TIMED, Study, StudyRun
from .tables import PAPER, conditions_text, list_trained, missing_table, perplexity_cell, run_cost


BASELINE, WITHOUT_MAXIMUM = "SM+LN+G", "Pow4(t_h)+ScFuFFN"
# Groups of the protocol whose names begin so.
AMOUNTS, LARGER, RATES = ("tokens_", "more_dropout"), ("larger_",), "rates"
PAPER_TOKENS = 2.1e9
# The row of the paper's table that is compared with each of ours.
IN_THE_PAPER = {"EReg(SM(t_h)+ScFuFFN)": "EReg(SM(t)+ScFuFFN)"}
Runs = dict[int, list[StudyRun]]


@dataclass(frozen=True)
class Scaling:
    """
    The trained runs of a record, by row and by tokens of training.

    Args:
        study ([`Study`]): The record.
    """

    study: Study

    @cached_property
    def rows(self) -> dict[str, Runs]:
        """Runs of the smaller size, those that diverged too."""
        return self._collect(AMOUNTS)

    @cached_property
    def trained(self) -> dict[str, Runs]:
        """Those that did not diverge."""
        return _leave_out_diverged(self.rows)

    @cached_property
    def larger(self) -> dict[str, Runs]:
        """Runs of the larger size that did not diverge."""
        return _leave_out_diverged(self._collect(LARGER))

    @cached_property
    def baseline(self) -> Runs:
        """GPT-2 at each number of tokens, with the dropout that is best on validation."""
        found: Runs = {}
        for name, by_tokens in self.trained.items():
            for tokens, runs in by_tokens.items():
                if _is_baseline(name) and (
                    tokens not in found or _mean(runs, "validation_nats") < _mean(found[tokens], "validation_nats")
                ):
                    found[tokens] = runs
        return dict(sorted(found.items()))

    @property
    def is_comparable(self) -> bool:
        """Whether there is anything to compare with GPT-2."""
        return bool(self.baseline and self.others)

    @cached_property
    def others(self) -> dict[str, Runs]:
        """All rows but GPT-2's."""
        return {name: runs for name, runs in self.trained.items() if not _is_baseline(name)}

    @cached_property
    def tokens(self) -> list[int]:
        return sorted({tokens for by_tokens in self.rows.values() for tokens in by_tokens})

    @cached_property
    def spread(self) -> float:
        """The standard deviation of the test loss over seeds."""
        groups = [runs for by_tokens in self.trained.values() for runs in by_tokens.values()]
        return pool_spread([[run.test_nats for run in runs] for runs in groups])

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """The test loss of each row; GPT-2 has one for each dropout."""
        return {name: self._curve(runs, seed) for seed, (name, runs) in enumerate(self.trained.items())}

    @cached_property
    def baseline_curve(self) -> Curve:
        """The test loss of GPT-2 with the dropout that is best at each number of tokens."""
        return self._curve(self.baseline, len(self.trained))

    @cached_property
    def larger_curves(self) -> dict[str, Curve]:
        """The test loss of the larger size."""
        first = len(self.trained) + 1
        return {name: self._curve(runs, seed) for seed, (name, runs) in enumerate(self.larger.items(), first)}

    def predict(self, name: str, tokens: float) -> np.ndarray | None:
        """The loss by the fitted law in each repetition, of GPT-2 the least of its dropouts; `None` without a law."""
        rows = [row for row in self.curves if row == name or (name == BASELINE and _is_baseline(row))]
        fitted = [self.curves[row] for row in rows if self.has_law(row)]
        return np.min([curve.predict(tokens) for curve in fitted], axis=0) if fitted else None

    def has_law(self, name: str) -> bool:
        """Whether a row has enough numbers of tokens for a law, and the spread of seeds is known."""
        return len(self.curves[name].tokens) >= FEWEST and not math.isnan(self.spread)

    @cached_property
    def timed(self) -> list[StudyRun]:
        """The runs that timed steps."""
        return [run for run in self.study.runs.values() if run.kind == TIMED]

    def seconds_per_step(self, run: StudyRun) -> float:
        """Of one core; NaN if that is not measured, or if steps were timed on several machines."""
        wanted = timed_settings(run.settings)
        found = [other for other in self.timed if other.settings == wanted]
        machines = {other.origin and other.origin.machine for other in self.timed}
        return found[0].cpu_seconds_per_step if found and len(machines) == 1 else math.nan

    def _curve(self, runs: Runs, seed: int) -> Curve:
        return make_curve(
            {tokens: [run.test_nats for run in found] for tokens, found in runs.items()}, self.spread, seed
        )

    def _collect(self, groups: Sequence[str]) -> dict[str, Runs]:
        found: dict[str, Runs] = {}
        for group in self.study.groups:
            if group.startswith(groups):
                for run in self.study.group(group):
                    runs = found.setdefault(row_name(run), {}).setdefault(planned_tokens(run), [])
                    runs += [run] if run not in runs else []
        return {name: dict(sorted(by_tokens.items())) for name, by_tokens in found.items()}


def planned_tokens(run: StudyRun) -> int:
    """Tokens of the training as the protocol wants it, whether or not it came to its end."""
    return math.prod(run.settings[name] for name in ("max_steps", "per_device_train_batch_size", "context"))


def _leave_out_diverged(rows: dict[str, Runs]) -> dict[str, Runs]:
    """The runs that did not diverge, without numbers of tokens, and rows, that have none."""
    trained = {
        name: {tokens: kept for tokens, runs in by_tokens.items() if (kept := list_trained(runs))}
        for name, by_tokens in rows.items()
    }
    return {name: by_tokens for name, by_tokens in trained.items() if by_tokens}


def _is_baseline(name: str) -> bool:
    return name.partition(",")[0] == BASELINE


def row_name(run: StudyRun) -> str:
    """The architecture, with its dropout if there is any."""
    dropout = run.settings["resid_pdrop"]
    return run.notation + (f", dropout {dropout:g}" if dropout else "")


def quality_table(scaling: Scaling, nats: str) -> str:
    """Perplexity of each row at each number of tokens; `nats` is the text: test or transfer."""
    rows = [
        (_code(name), *(perplexity_cell(runs[tokens], nats) if tokens in runs else "" for tokens in scaling.tokens))
        for name, runs in scaling.rows.items()
    ]
    return markdown_table(("architecture", *map(label, scaling.tokens)), rows)


def difference_table(scaling: Scaling) -> str:
    """How far the test perplexity of each row is above GPT-2's, where they cross, and what the fits predict."""
    baseline = scaling.baseline_curve
    rows = []
    for name, runs in scaling.others.items():
        curve = scaling.curves[name]
        measured = {tokens: _difference(runs, scaling.baseline, tokens) for tokens in scaling.tokens}
        cells = [
            "" if math.isnan(difference) else _share_cell(curve.at(tokens) - baseline.at(tokens), difference)
            for tokens, difference in measured.items()
        ]
        rows.append(
            (_code(name), *cells, _crossing_cell(curve, baseline), _predicted_cell(scaling, name), _paper_cell(name))
        )
    headings = (*map(label, scaling.tokens), "better than GPT-2", "predicted at 2.1 billion", "the paper")
    return markdown_table(("architecture", *headings), rows)


def laws_table(scaling: Scaling) -> str:
    """The fitted power laws of the rows with enough numbers of tokens; nothing if there is none."""
    rows = []
    for name, curve in scaling.curves.items():
        if scaling.has_law(name):
            floor, scale, exponent = map(interval, curve.laws.T)
            cells = [f"{each.middle:.2f} ({each.low:.2f} to {each.high:.2f})" for each in (floor, scale, exponent)]
            rows.append((_code(name), *cells))
    return (
        markdown_table(("architecture", "constant, nats", "at 1 million, above it", "exponent"), rows) if rows else ""
    )


def heads_table(scaling: Scaling) -> str:
    """Mean entropy of the heads, and how many of them are overloaded."""

    def cell(runs: Sequence[StudyRun]) -> str:
        heads = [run.heads for run in runs]
        return (
            f"{np.mean([each.mean for each in heads]):.2f}, {np.mean([each.overloaded_share for each in heads]):.0%}"
        )

    rows = [
        (_code(name), *(cell(runs[tokens]) if tokens in runs else "" for tokens in scaling.tokens))
        for name, runs in scaling.trained.items()
    ]
    return markdown_table(("architecture", *map(label, scaling.tokens)), rows)


def equal_time_table(scaling: Scaling) -> str:
    """How far each row is above GPT-2 with as much training time, where its curve reaches as far."""
    baseline = scaling.baseline_curve
    rows = []
    for name, runs in scaling.others.items():
        curve, own = scaling.curves[name], scaling.seconds_per_step(next(iter(runs.values()))[0])
        cells = []
        for tokens, reference in scaling.baseline.items():
            more = tokens * scaling.seconds_per_step(reference[0]) / own
            cells.append(_share_cell(curve.at(more) - baseline.at(tokens)))
        rows.append((_code(name), "" if math.isnan(own) else f"{1000 * own:.0f}", *cells))
    return markdown_table(("architecture", "ms/step", *map(label, scaling.baseline)), rows)


def equal_size_table(scaling: Scaling) -> str:
    """Rows with two sizes: their perplexity where parameters, or private bytes, are GPT-2's of the smaller size."""
    measures: dict[str, Callable[[StudyRun], float]] = {
        "parameters": lambda run: run.parameters,
        "private bytes": lambda run: run_cost(run)[0],
    }
    rows = []
    for name, by_tokens in scaling.larger.items():
        for tokens, large in by_tokens.items():
            small, reference = scaling.others.get(name, {}).get(tokens), scaling.baseline.get(tokens)
            if not small or not reference:
                continue
            differences = [
                (scaling.curves[name].at(tokens) - scaling.baseline_curve.at(tokens), _mean(small, "test_nats")),
                (
                    scaling.larger_curves[name].at(tokens) - scaling.baseline_curve.at(tokens),
                    _mean(large, "test_nats"),
                ),
            ]
            goal = _mean(reference, "test_nats")
            cells = []
            for measure in measures.values():
                low, high = (math.log(measure(runs[0])) for runs in (small, large))
                share = (math.log(measure(reference[0])) - low) / (high - low)
                repeated, nats = (a + share * (b - a) for a, b in zip(*differences, strict=True))
                cells.append(_share_cell(repeated, nats - goal) if 0 <= share <= 1 else "")
            rows.append((_code(name), label(tokens), *cells))
    return markdown_table(("architecture", "tokens", *measures), rows, text_columns=2) if rows else ""


def plot_scaling(scaling: Scaling) -> Figure:
    """Test loss against tokens, with the fits and their intervals; and how far each row is above GPT-2."""
    figure = Figure(figsize=(10.5, 4.8), dpi=DOTS_PER_INCH, layout="constrained")
    left, right = figure.subplots(1, 2)
    baseline = scaling.baseline_curve
    known = not math.isnan(scaling.spread)
    for index, name in enumerate((BASELINE, *scaling.others)):
        curve, color = baseline if name == BASELINE else scaling.curves[name], ("#4a5158", *RUN_COLORS)[index]
        errors = np.exp(curve.nats) * curve.errors if known else None
        left.errorbar(curve.tokens / MILLION, np.exp(curve.nats), errors, fmt="o", color=color, ms=4, label=name)
        far = np.geomspace(curve.tokens[0], PAPER_TOKENS, 40)
        predicted = [scaling.predict(name, tokens) for tokens in far]
        if predicted[0] is not None:
            _draw_band(left, far, np.exp(predicted), color)
        else:
            left.plot(curve.tokens / MILLION, np.exp(curve.nats), color=color, lw=1)
        if name == BASELINE:
            continue
        common = [tokens for tokens in curve.tokens if tokens in baseline.tokens]
        if known and common:
            values = [100 * np.expm1(curve.at(tokens) - baseline.at(tokens)) for tokens in common]
            _draw_band(right, common, values, color)
        references = [scaling.predict(BASELINE, tokens) for tokens in far]
        if predicted[0] is not None and references[0] is not None:
            _draw_band(right, far, 100 * np.expm1(np.subtract(predicted, references)), color, ls="--")
        if (paper := _above_in_paper(name)) is not None:
            right.plot(PAPER_TOKENS / MILLION, 100 * paper, "*", color=color, ms=10)
    right.axhline(0, color="#4a5158", lw=1)
    left.set(xscale="log", yscale="log", xlabel="tokens (millions)", ylabel="test perplexity")
    right.set(xscale="log", xlabel="tokens (millions)", ylabel=f"above {BASELINE} with its best dropout (%)")
    number_plainly(left.yaxis, left.get_ylim())
    for axes in (left, right):
        number_plainly(axes.xaxis, axes.get_xlim())
        axes.grid(alpha=0.25)
    right.plot([], [], "*", color="#4a5158", ms=10, label="the paper")
    right.legend()
    left.legend(fontsize=8)
    return figure


def scaling_text(study: Study) -> str:
    """The page's part, as far as the record goes; what is not measured yet is named."""
    scaling = Scaling(study)
    parts = list(filter(None, [missing_table(study)]))
    if not scaling.is_comparable:
        return "\n".join(
            [*parts, "Nothing can be compared with GPT-2 yet.\n", *_rates(study), *conditions_text(study)]
        )
    spread = "" if math.isnan(scaling.spread) else f" Seeds differ by {math.expm1(scaling.spread):.1%}."
    parts += [
        f"![Test perplexity against tokens](study/scaling.png)\n\nTest perplexity, by tokens of training.{spread} "
        "Dashed lines are differences of the fits.\n",
        quality_table(scaling, "test") + "\n",
        "How far the test perplexity is above that of GPT-2 with its best dropout, with its interval. Then up to, or "
        "from, which number of tokens a row is better, if intervals show both sides. Then what the fits predict.\n",
        difference_table(scaling) + "\n",
        "With as much training time as GPT-2 has at each number of tokens:\n",
        equal_time_table(scaling) + "\n",
    ]
    if sizes := equal_size_table(scaling):
        parts += ["With GPT-2's parameters or private bytes, between two sizes:\n", sizes + "\n"]
    parts += ["Perplexity of English prose:\n", quality_table(scaling, "transfer") + "\n"]
    if laws := laws_table(scaling):
        parts += ["The fitted laws:\n", laws + "\n"]
    parts += ["Mean entropy of the heads in nats, and the share that is overloaded:\n", heads_table(scaling) + "\n"]
    return "\n".join([*parts, *_rates(study), *conditions_text(study)])


def label(tokens: int) -> str:
    return f"{tokens / MILLION:.3g} M"


def _rates(study: Study) -> list[str]:
    """Validation perplexity by learning rate, of each row that has any."""
    by_row: dict[str, list[StudyRun]] = {}
    for run in study.group(RATES):
        by_row.setdefault(row_name(run), []).append(run)
    if not by_row:
        return []
    rates = sorted({run.settings["learning_rate"] for runs in by_row.values() for run in runs})
    rows = []
    for name, runs in by_row.items():
        found = {run.settings["learning_rate"]: perplexity_cell([run], "validation") for run in runs}
        rows.append((_code(name), *(found.get(rate, "") for rate in rates)))
    table = markdown_table(("architecture", *(f"{rate:g}" for rate in rates)), rows)
    return ["Validation perplexity at 3 million tokens, by which the learning rate is chosen:\n", table + "\n"]


def _mean(runs: Iterable[StudyRun], name: str) -> float:
    return float(np.mean([getattr(run, name) for run in runs]))


def _difference(runs: Runs, baseline: Runs, tokens: int) -> float:
    if tokens not in runs or tokens not in baseline:
        return math.nan
    return _mean(runs[tokens], "test_nats") - _mean(baseline[tokens], "test_nats")


def _share_cell(differences: np.ndarray, measured: float = math.nan) -> str:
    """A difference in nats as a share of the perplexity, with its interval where the spread of seeds is known."""
    if np.isnan(differences).all():
        return "" if math.isnan(measured) else f"{math.expm1(measured):+.1%}"
    found = interval(np.expm1(differences))
    middle = found.middle if math.isnan(measured) else math.expm1(measured)
    return f"{middle:+.1%} ({found.low:+.1%} to {found.high:+.1%})"


def _crossing_cell(curve: Curve, baseline: Curve) -> str:
    """Up to, or from, which number of tokens a row is better than GPT-2."""
    if np.isnan(curve.errors).any():
        return ""
    tokens, sides = tell_apart(curve, baseline)
    if (crossing := find_crossing(curve, baseline)) is None:
        words = {frozenset({-1}): "throughout", frozenset({1}): "nowhere", frozenset({0}): "level"}
        return words.get(frozenset(sides.tolist()), "not settled")
    found = interval(crossing.tokens)
    low, middle, high = (_place(place, tokens) for place in (found.low, found.middle, found.high))
    return f"{'up to' if crossing.rises else 'from'} {middle} ({low} to {high})"


def _place(tokens: float, measured: np.ndarray) -> str:
    if math.isinf(tokens):
        return f"more than {label(measured[-1])}"
    return label(tokens) if tokens else f"less than {label(measured[0])}"


def _predicted_cell(scaling: Scaling, name: str) -> str:
    own, reference = (scaling.predict(row, PAPER_TOKENS) for row in (name, BASELINE))
    return "" if own is None or reference is None else _share_cell(own - reference)


def _above_in_paper(name: str) -> float | None:
    perplexity = PAPER.get(IN_THE_PAPER.get(name, name))
    return None if perplexity is None else perplexity / PAPER[BASELINE] - 1


def _paper_cell(name: str) -> str:
    above = _above_in_paper(name)
    return "" if above is None else f"{above:+.1%}"


def _draw_band(axes, tokens: Sequence[float], values: Sequence[np.ndarray], color: str, ls: str = "-"):
    """The middle of the repetitions as a line, and the interval around it."""
    found = [interval(each) for each in values]
    tokens = np.array(tokens) / MILLION
    axes.plot(tokens, [each.middle for each in found], color=color, lw=1, ls=ls)
    axes.fill_between(tokens, [each.low for each in found], [each.high for each in found], color=color, alpha=0.15)


def _code(name: str) -> str:
    notation, comma, dropout = name.partition(",")
    return f"`{notation}`{comma}{dropout}"
