"""Tables that set models side by side: the best of each measure, and what can't be compared."""

import math
import string
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .conditions import (
    Facts,
    common_facts,
    describe_difference,
    diversity_facts,
    duration_facts,
    head_facts,
    list_settings,
    operation_facts,
    task_facts,
    text_facts,
    token_facts,
    traffic_facts,
)
from .operation_counts import NonlinearOperation
from .page import Cell, Column, Table
from .results import ModelResult, PrivateCost


LOWEST, HIGHEST = min, max
# Units, and the letters of their thousands.
THOUSANDS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# Between these, numbers are written without a power of ten.
PLAIN_NUMBERS = (1e-3, 1e5)


@dataclass(frozen=True)
class Measure:
    """
    A number of each model.

    Args:
        title (`str`): What it is.
        group (`str`): What it is one of.
        values (`list[float | None]`): Of each model; `None` where it was not measured.
        facts (`list[Facts | None]`): What each depends on.
        show: Writes a number.
        best: [`LOWEST`] or [`HIGHEST`], or `None` where neither is better.
        details (`list[str]`, *optional*): What stands beside each.
    """

    title: str
    group: str
    values: list[float | None]
    facts: list[Facts | None]
    show: Callable[[float], str]
    best: Callable | None = None
    details: list[str] | None = None

    @property
    def reference(self) -> Facts:
        """What most of the numbers depend on."""
        return common_facts(facts for facts in self.facts if facts is not None)

    @property
    def best_value(self) -> float | None:
        """The best of the numbers that can be compared; `None` if it is no better than the others, or alone."""
        comparable = [
            value
            for value, facts in zip(self.values, self.facts, strict=True)
            if value is not None and not math.isnan(value) and facts == self.reference
        ]
        if self.best is None or len(set(comparable)) < 2:
            return None
        return self.best(comparable)


class Notes:
    """The notes of a table, each once, by letters in the order in which they come."""

    def __init__(self):
        self.texts: dict[str, str] = {}

    def letter(self, text: str) -> str:
        """The letter of a note; nothing for no note."""
        if not text:
            return ""
        for letter, known in self.texts.items():
            if known == text:
                return letter
        rounds, index = divmod(len(self.texts), len(string.ascii_uppercase))
        letter = string.ascii_uppercase[index] * (rounds + 1)
        self.texts[letter] = text
        return letter


def measure_cells(measure: Measure, notes: Notes) -> list[Cell]:
    """The numbers of a measure, for each model, with the best marked and those set apart that can't be compared."""
    reference, best = measure.reference, measure.best_value
    details = measure.details or [""] * len(measure.values)
    cells = []
    for value, facts, detail in zip(measure.values, measure.facts, details, strict=True):
        if value is None:
            cells.append(Cell(""))
            continue
        note = notes.letter(describe_difference(facts, reference))
        cells.append(Cell(measure.show(value), detail, is_best=not note and value == best, note=note))
    return cells


def comparison_table(results: list[ModelResult]) -> Table:
    """All that is one number of each model; what was measured of none is left out."""
    measures = [
        measure
        for measure in (
            *_prediction_measures(results),
            *_head_measures(results),
            *_operation_measures(results),
            *_cost_measures(results),
        )
        if any(value is not None for value in measure.values)
    ]
    notes = Notes()
    columns = [measure_cells(measure, notes) for measure in measures]
    return Table(
        caption="Models side by side",
        columns=[Column("model", is_text=True), *(Column(measure.title, measure.group) for measure in measures)],
        rows=[
            [Cell(result.name, result.title), *cells]
            for result, *cells in zip(results, *columns, strict=True)
        ],
        notes=notes.texts,
        remarks=_comparison_remarks(results),
    )


def operations_table(results: list[ModelResult]) -> Table:
    """The non-linear operations of each model by their kinds, in the paper's notation."""
    kinds = list(dict.fromkeys(each.name for result in results for each in result.operations.nonlinear))
    reference = common_facts(map(operation_facts, results))
    notes = Notes()
    rows = []
    for result in results:
        note = notes.letter(describe_difference(operation_facts(result), reference))
        of_kinds = [
            " + ".join(_describe_operation(each) for each in result.operations.nonlinear if each.name == kind)
            for kind in kinds
        ]
        rows.append([Cell(result.name, result.title), *(Cell(text, note=note if text else "") for text in of_kinds)])
    return Table(
        caption="Non-linear operations of a forward pass",
        columns=[Column("model", is_text=True), *map(Column, kinds)],
        rows=rows,
        notes=notes.texts,
        remarks=[
            f"Of a sequence of {reference['sequence']}, in the blocks, as the paper counts them: 144 × R^(128×128) are "
            "144 tensors of this shape. –: the architecture has none."
        ],
    )


def task_table(results: list[ModelResult]) -> Table | None:
    """The scores of lm-eval, a row for each task and metric; `None` if there are none."""
    names = dict.fromkeys(
        (score.task, score.metric, score.few_shot)
        for result in results
        if result.tasks is not None
        for score in result.tasks.scores
    )
    if not names:
        return None
    scored = [result for result in results if result.tasks is not None]
    notes = Notes()
    rows = []
    for task, metric, few_shot in names:
        shown = f", {few_shot} shown" if few_shot else ""
        measure = _task_measure(scored, task, metric, few_shot)
        rows.append([Cell(task, f"{metric}{shown}"), *measure_cells(measure, notes)])
    (first, *_) = (result.tasks for result in scored)
    limit = "all samples" if first.limit is None else f"{first.limit:,} samples at most of each task"
    return Table(
        caption="Scores of lm-eval",
        columns=[Column("task and metric", is_text=True), *(Column(result.name) for result in scored)],
        rows=rows,
        notes=notes.texts,
        remarks=[
            "Bold: the best of the row among numbers measured alike. ±: one standard error, from the samples alone; a "
            "difference of less than about two of them is no evidence.",
            f"{scored[0].name}: {limit}, {first.bos}, at most {first.context:,} tokens, {first.data}.",
        ],
    )


def cost_table(results: list[ModelResult]) -> Table | None:
    """Every private inference that was measured, a row each; `None` if there is none."""
    costs = [(result, cost) for result in results for cost in result.costs]
    if not costs:
        return None
    scale, letter = find_scale(cost.total_bytes for _, cost in costs)
    return Table(
        caption="Private inference, each as it was measured",
        columns=[
            Column("model", is_text=True),
            Column("protocol", is_text=True),
            Column("tokens"),
            Column(f"sent ({letter}B)"),
            Column("rounds"),
            Column("seconds"),
            Column("network", is_text=True),
            Column("machine", is_text=True),
            Column("versions and commit", is_text=True),
        ],
        rows=[
            [
                Cell(result.name, result.title),
                Cell(cost.protocol),
                Cell(f"{cost.context:,}"),
                Cell(format_number(cost.total_bytes / scale)),
                Cell(f"{cost.rounds:,}"),
                Cell(format_number(cost.seconds)),
                Cell(cost.network),
                Cell(cost.machine),
                Cell(f"{list_settings(cost.versions)}; commit {cost.git_revision or 'unknown'}"),
            ]
            for result, cost in costs
        ],
        remarks=["Sent: by all parties together. Rounds: times that a party has to wait for another."],
    )


def main_costs(results: list[ModelResult]) -> list[PrivateCost | None]:
    """One private inference of each model: of the protocol, prompt and network that most models were measured with."""
    counts = Counter(setting for result in results for setting in {_setting(cost): None for cost in result.costs})
    most_common = max(counts, key=counts.get, default=None)
    return [
        next((cost for cost in result.costs if _setting(cost) == most_common), next(iter(result.costs), None))
        for result in results
    ]


def perplexity_measure(results: list[ModelResult]) -> Measure:
    """Perplexity per token."""
    return _prediction_measures(results)[0]


def traffic_measure(results: list[ModelResult]) -> Measure:
    """Bytes of private inference, in the unit that the title tells."""
    return _cost_measures(results)[0]


def find_scale(values: Iterable[float]) -> tuple[float, str]:
    """By what to divide numbers so that the largest is short, and the letter for it; 1 and nothing for small ones."""
    largest = max(values, default=0)
    return next(((scale, letter) for scale, letter in THOUSANDS if largest >= scale), (1, ""))


def format_perplexity(value: float) -> str:
    """Two decimals, as papers give them, where it is not very large."""
    return f"{value:,.2f}" if value < PLAIN_NUMBERS[1] else format_number(value)


def format_number(value: float) -> str:
    """Four digits that count, with commas; NaN and infinity in words."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    smallest, largest = PLAIN_NUMBERS
    if value and not smallest <= abs(value) < largest:
        return f"{value:.2e}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def nonlinear_elements(result: ModelResult) -> int:
    """Numbers that go through a non-linear operation in a forward pass."""
    return sum(operation.elements for operation in result.operations.nonlinear)


def mean_of_heads(values: list[list[float]] | list[float]) -> float:
    """The mean over layers, and heads if there are any."""
    numbers = [number for row in values for number in (row if isinstance(row, list) else [row])]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def _prediction_measures(results: list[ModelResult]) -> list[Measure]:
    def measure(title: str, facts: Callable, value: Callable, show: Callable) -> Measure:
        measured = [result if result.likelihood is not None else None for result in results]
        return Measure(
            title,
            "Prediction",
            [result and value(result.likelihood.likelihood) for result in measured],
            [result and facts(result) for result in measured],
            show,
            LOWEST,
        )

    return [
        measure("perplexity per token", token_facts, lambda likelihood: likelihood.perplexity, format_perplexity),
        measure("perplexity per word", text_facts, lambda likelihood: likelihood.word_perplexity, format_perplexity),
        measure("bits per byte", text_facts, lambda likelihood: likelihood.bits_per_byte, "{:.3f}".format),
    ]


def _head_measures(results: list[ModelResult]) -> list[Measure]:
    def measure(title: str, value: Callable, show: Callable, best=None, facts: Callable = head_facts) -> Measure:
        measured = [result if result.heads is not None else None for result in results]
        return Measure(
            title,
            "Attention heads",
            [result and value(result.heads.heads) for result in measured],
            [result and facts(result) for result in measured],
            show,
            best,
        )

    nats, share = "{:.2f}".format, "{:.0%}".format
    return [
        measure("mean entropy (nats)", lambda heads: heads.entropy.mean, nats),
        measure("largest entropy (nats)", lambda heads: heads.entropy.largest, nats),
        measure("overloaded", lambda heads: heads.entropy.overloaded_share, share, LOWEST),
        measure("collapsed", lambda heads: heads.entropy.collapsed_share, share, LOWEST),
        measure("sink share", lambda heads: mean_of_heads(heads.sink_share), "{:.1%}".format),
        measure("diversity (nats)", lambda heads: mean_of_heads(heads.diversity), nats, None, diversity_facts),
    ]


def _operation_measures(results: list[ModelResult]) -> list[Measure]:
    def measure(title: str, value: Callable) -> Measure:
        values = [value(result) for result in results]
        scale, letter = find_scale(values)
        return Measure(
            f"{title} ({letter})" if letter else title,
            "Forward pass",
            [number / scale for number in values],
            list(map(operation_facts, results)),
            format_number,
            LOWEST,
        )

    return [
        measure("non-linear", nonlinear_elements),
        measure("FLOPs of FFNs", lambda result: result.operations.ffn_flops),
        measure("FLOPs of attention", lambda result: result.operations.attention_flops),
    ]


def _cost_measures(results: list[ModelResult]) -> list[Measure]:
    costs = main_costs(results)
    scale, letter = find_scale(cost.total_bytes for cost in costs if cost is not None)

    def measure(title: str, facts: Callable, value: Callable, show: Callable) -> Measure:
        return Measure(
            title,
            "Private inference",
            [None if cost is None else value(cost) for cost in costs],
            [None if cost is None else facts(cost) for cost in costs],
            show,
            LOWEST,
        )

    return [
        measure(f"sent ({letter}B)", traffic_facts, lambda cost: cost.total_bytes / scale, format_number),
        measure("rounds", traffic_facts, lambda cost: cost.rounds, "{:,}".format),
        measure("seconds", duration_facts, lambda cost: cost.seconds, format_number),
    ]


def _task_measure(results: list[ModelResult], task: str, metric: str, few_shot: int) -> Measure:
    """The scores of models that have some."""
    scores = [
        next((s for s in result.tasks.scores if (s.task, s.metric, s.few_shot) == (task, metric, few_shot)), None)
        for result in results
    ]
    higher_is_better = next(score.higher_is_better for score in scores if score is not None)
    return Measure(
        metric,
        task,
        [score and score.value for score in scores],
        [score and task_facts(score, result.tasks) for score, result in zip(scores, results, strict=True)],
        format_number,
        HIGHEST if higher_is_better else LOWEST,
        [
            "" if score is None or score.standard_error is None else f"± {format_number(score.standard_error)}"
            for score in scores
        ],
    )


def _comparison_remarks(results: list[ModelResult]) -> list[str]:
    """What the numbers mean, and what those without a letter depend on."""
    remarks = [
        "Bold: the best of the column among numbers measured alike. –: not measured. Non-linear: numbers that go "
        "through a non-linear operation. k, M, G: thousands, millions, billions."
    ]
    predicted = [result for result in results if result.likelihood is not None]
    if predicted:
        remarks.append(f"Prediction: {_list_facts(common_facts(map(token_facts, predicted)))}.")
    looked_at = [result for result in results if result.heads is not None]
    if looked_at:
        facts = common_facts(map(head_facts, looked_at))
        heads = next(result.heads.heads for result in looked_at if head_facts(result) == facts)
        remarks.append(
            f"Attention heads: {_list_facts(facts)}. Attention that is spread evenly has an entropy of "
            f"{heads.entropy.maximum:.2f} nats and a sink share of {heads.uniform_sink_share:.1%}. Overloaded: heads "
            "with at least 3/4 of this entropy; collapsed: with less than 5 % of it. Sink share: attention to the "
            "first token. Diversity: how much the heads of a layer differ (Jensen-Shannon divergence)."
        )
    remarks.append(f"Forward pass: {_list_facts(common_facts(map(operation_facts, results)))}.")
    costs = [cost for cost in main_costs(results) if cost is not None]
    if costs:
        remarks.append(f"Private inference: {_list_facts(common_facts(map(duration_facts, costs)))}.")
    return remarks


def _list_facts(facts: Facts) -> str:
    return "; ".join(f"{name}: {value}" for name, value in facts.items())


def _describe_operation(operation: NonlinearOperation) -> str:
    return f"{operation.count:,} × R^({'×'.join(map(str, operation.shape))})"


def _setting(cost: PrivateCost) -> tuple[str, int, str]:
    return cost.protocol, cost.context, cost.network
