"""Numbers of several models side by side: which depend on the same, and which of those is the best."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from entropy_gpt.evaluation.measuring.operation_counts import OperationCounts
from entropy_gpt.evaluation.records.conditions import (
    Facts,
    common_facts,
    diversity_facts,
    duration_facts,
    head_facts,
    operation_facts,
    task_facts,
    text_facts,
    token_facts,
    traffic_facts,
)
from entropy_gpt.evaluation.records.results import ModelResult, PrivateCost


LOWEST, HIGHEST = min, max
# What measures are grouped by.
PREDICTION, HEADS, OPERATIONS, COSTS = "Prediction", "Attention heads", "Forward pass", "Private inference"
# What units are divided by, and the letters for it.
THOUSANDS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# Between these, numbers are written without a power of ten.
PLAIN_NUMBERS = (1e-3, 1e5)


@dataclass(frozen=True)
class Measure:
    """
    A number of each of several models.

    Args:
        name (`str`): What it is.
        unit (`str`): What it is counted in; nothing for a number without a unit.
        group (`str`): What it is one of.
        values (`list[float | None]`): Value of each model; `None` where it was not measured.
        facts (`list[Facts | None]`): What each depends on.
        show (`Callable[[float], str]`): Writes a number.
        best (`Callable`, *optional*): [`LOWEST`] or [`HIGHEST`]; none where neither is better.
        details (`list[str]`, *optional*): What stands next to each.
    """

    name: str
    unit: str
    group: str
    values: list[float | None]
    facts: list[Facts | None]
    show: Callable[[float], str]
    best: Callable | None = None
    details: list[str] | None = None

    @property
    def title(self) -> str:
        """Its name and unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def is_measured(self) -> bool:
        """Whether it was measured of any model."""
        return any(value is not None for value in self.values)

    @property
    def reference(self) -> Facts:
        """What most of the numbers depend on."""
        return common_facts(facts for facts in self.facts if facts is not None)

    @property
    def comparable(self) -> dict[int, float]:
        """The finite numbers that depend on this, by the model's place."""
        return {
            index: value
            for index, (value, facts) in enumerate(zip(self.values, self.facts, strict=True))
            if value is not None and math.isfinite(value) and facts == self.reference
        }

    @property
    def best_value(self) -> float | None:
        """The best of the numbers that can be compared; `None` if neither is better or they are all the same."""
        values = set(self.comparable.values())
        return None if self.best is None or len(values) < 2 else self.best(values)


def prediction_measures(results: list[ModelResult]) -> list[Measure]:
    """How well text is predicted."""
    predicted = _with(results, "likelihood")

    def measure(name: str, value: Callable) -> Measure:
        return _measure(name, "", PREDICTION, predicted, value, text_facts, format_plain, LOWEST)

    return [
        perplexity_measure(results),
        measure("perplexity per word", lambda result: result.likelihood.likelihood.word_perplexity),
        measure("bits per byte", lambda result: result.likelihood.likelihood.bits_per_byte),
    ]


def perplexity_measure(results: list[ModelResult]) -> Measure:
    """Perplexity per token."""
    return _measure(
        "perplexity per token",
        "",
        PREDICTION,
        _with(results, "likelihood"),
        lambda result: result.likelihood.likelihood.perplexity,
        token_facts,
        format_plain,
        LOWEST,
    )


def head_measures(results: list[ModelResult]) -> list[Measure]:
    """What the attention heads do."""

    def measure(name: str, unit: str, value: Callable, show: str, best=None, facts: Callable = head_facts) -> Measure:
        with_heads = _with(results, "heads")
        return _measure(
            name, unit, HEADS, with_heads, lambda result: value(result.heads.heads), facts, show.format, best
        )

    return [
        measure("mean entropy", "nats", lambda heads: heads.entropy.mean, "{:.2f}"),
        measure("largest entropy", "nats", lambda heads: heads.entropy.largest, "{:.2f}"),
        overload_measure(results),
        measure("collapsed", "", lambda heads: heads.entropy.collapsed_share, "{:.1%}", LOWEST),
        measure("sink share", "", lambda heads: _mean(itertools.chain(*heads.sink_share)), "{:.1%}"),
        measure("diversity", "nats", lambda heads: _mean(heads.diversity), "{:.2f}", None, diversity_facts),
    ]


def overload_measure(results: list[ModelResult]) -> Measure:
    """The share of heads that are overloaded."""
    return _measure(
        "overloaded",
        "",
        HEADS,
        _with(results, "heads"),
        lambda result: result.heads.heads.entropy.overloaded_share,
        head_facts,
        "{:.1%}".format,
        LOWEST,
    )


def nonlinear_measure(results: list[ModelResult]) -> Measure:
    """Numbers that go through a non-linear operation in a forward pass."""

    def count(operations: OperationCounts) -> int:
        return sum(operation.elements for operation in operations.nonlinear)

    return _operation_measure("non-linear", results, count)


def flops_measures(results: list[ModelResult]) -> list[Measure]:
    """FLOPs of FFNs and of attention in the paper's accounting, of attention in full, and of the head."""
    return [
        _operation_measure("FFNs", results, lambda operations: operations.ffn_flops),
        _operation_measure("attention", results, lambda operations: operations.attention_flops),
        _operation_measure("attention in full", results, lambda operations: operations.computed_attention_flops),
        _operation_measure("head", results, lambda operations: operations.head_flops),
    ]


def cost_measures(results: list[ModelResult]) -> list[Measure]:
    """What private inference costs."""
    costs = main_costs(results)
    return [
        traffic_measure(results),
        _measure("rounds", "", COSTS, costs, lambda cost: cost.rounds, traffic_facts, "{:,}".format, LOWEST),
        _measure("seconds", "", COSTS, costs, lambda cost: cost.seconds, duration_facts, format_number, LOWEST),
    ]


def traffic_measure(results: list[ModelResult]) -> Measure:
    """Bytes that private inference sends."""
    costs = main_costs(results)
    scale, letter = find_scale(cost.total_bytes for cost in costs if cost is not None)

    def value(cost: PrivateCost) -> float:
        return cost.total_bytes / scale

    return _measure("sent", f"{letter}B", COSTS, costs, value, traffic_facts, format_number, LOWEST)


def main_costs(results: list[ModelResult]) -> list[PrivateCost | None]:
    """
    One private inference of each model: of the protocol, prompt, answer and network that most models were measured
    with.
    """
    counts = Counter(setting for result in results for setting in {_setting(cost): None for cost in result.costs})
    most_common = max(counts, key=counts.get, default=None)
    return [
        next((cost for cost in result.costs if _setting(cost) == most_common), next(iter(result.costs), None))
        for result in results
    ]


def task_measure(results: list[ModelResult], task: str, metric: str, few_shot: int) -> Measure:
    """A score of lm-eval; some of the models have one."""
    wanted = (task, metric, few_shot)
    scores = [
        next((score for score in result.tasks.scores if (score.task, score.metric, score.few_shot) == wanted), None)
        for result in results
    ]
    higher_is_better = next(score.higher_is_better for score in scores if score is not None)
    errors = [score and score.standard_error for score in scores]
    return Measure(
        metric,
        "",
        task,
        [score and score.value for score in scores],
        [score and task_facts(score, result.tasks) for score, result in zip(scores, results, strict=True)],
        format_number,
        HIGHEST if higher_is_better else LOWEST,
        ["" if error is None else f"± {error:.2g}" for error in errors],
    )


def find_scale(values: Iterable[float]) -> tuple[float, str]:
    """By what to divide numbers so that the largest is short, and the letter for it; 1 and nothing for small ones."""
    largest = max(values, default=0)
    return next(((scale, letter) for scale, letter in THOUSANDS if largest >= scale), (1, ""))


def format_plain(value: float) -> str:
    """Two decimals, as papers give perplexities, where it is not very large; three below 10."""
    if 0 < value < PLAIN_NUMBERS[1]:
        return f"{value:,.2f}" if value >= 10 else f"{value:.3f}"
    return format_number(value)


def format_number(value: float) -> str:
    """Four digits that count, with commas; what is not finite by its name."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    smallest, largest = PLAIN_NUMBERS
    if value and not smallest <= abs(value) < largest:
        return f"{value:.2e}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def _measure(
    name: str,
    unit: str,
    group: str,
    measured: list,
    value: Callable,
    facts: Callable,
    show: Callable[[float], str],
    best: Callable | None = None,
) -> Measure:
    """Of what was measured of each model: `None` where nothing was."""
    return Measure(
        name,
        unit,
        group,
        [None if each is None else value(each) for each in measured],
        [None if each is None else facts(each) for each in measured],
        show,
        best,
    )


def _operation_measure(name: str, results: list[ModelResult], count: Callable[[OperationCounts], int]) -> Measure:
    scale, letter = find_scale(count(result.operations) for result in results)

    def value(result: ModelResult) -> float:
        return count(result.operations) / scale

    return _measure(name, letter, OPERATIONS, results, value, operation_facts, format_number, LOWEST)


def _with(results: list[ModelResult], part: str) -> list[ModelResult | None]:
    """`None` in place of those of which this part was not measured."""
    return [None if getattr(result, part) is None else result for result in results]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan


def _setting(cost: PrivateCost) -> tuple[str, int, int, str]:
    return cost.protocol, cost.context, cost.answers, cost.network
