"""The tables of the page about evaluated models."""

import string
from collections.abc import Callable

from entropy_gpt.evaluation.measuring.operation_counts import NonlinearOperation
from entropy_gpt.evaluation.records.conditions import (
    Facts,
    common_facts,
    describe_difference,
    describe_origin,
    describe_windows,
    duration_facts,
    harness_facts,
    head_facts,
    list_facts,
    list_settings,
    operation_facts,
    token_facts,
)
from entropy_gpt.evaluation.records.results import ModelResult

from .measures import (
    COSTS,
    HEADS,
    OPERATIONS,
    PREDICTION,
    Measure,
    cost_measures,
    find_scale,
    flops_measures,
    format_number,
    head_measures,
    main_costs,
    nonlinear_measure,
    prediction_measures,
    task_measure,
)
from .page import Cell, Column, Table


MODEL = Column("model", is_text=True)


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


def comparison_table(results: list[ModelResult]) -> Table:
    """All that is one number of each model; what was measured of none is left out."""
    measures = [
        *prediction_measures(results),
        *head_measures(results),
        nonlinear_measure(results),
        *cost_measures(results),
    ]
    measures = [measure for measure in measures if measure.is_measured]
    notes = Notes()
    columns = [_cells(measure, notes) for measure in measures]
    return Table(
        caption="Models side by side",
        columns=[MODEL, *(Column(measure.title, measure.group) for measure in measures)],
        rows=[[_heading(result), *cells] for result, *cells in zip(results, *columns, strict=True)],
        notes=notes.texts,
        remarks=_comparison_remarks(results),
    )


def operations_table(results: list[ModelResult]) -> Table:
    """The non-linear operations of each model by their kinds, in the paper's notation, and FLOPs."""
    notes = Notes()
    in_blocks = _operation_columns([result.operations.nonlinear for result in results], results, notes)
    apart = _operation_columns([result.operations.apart for result in results], results, notes)
    flops = {measure.title: _cells(measure, notes) for measure in flops_measures(results)}
    groups = {"Non-linear in the blocks": in_blocks, "Apart from them": apart, "FLOPs": flops}
    columns = [cells for group in groups.values() for cells in group.values()]
    return Table(
        caption="What a forward pass takes",
        columns=[MODEL, *(Column(title, group) for group, cells in groups.items() for title in cells)],
        rows=[[_heading(result), *cells] for result, *cells in zip(results, *columns, strict=True)],
        notes=notes.texts,
        remarks={
            "Signs": "144 × R^(128×128) stands for 144 tensors of this shape. –: the architecture has none. Bold: the "
            "least. k, M, G, T: thousands, millions, billions, trillions.",
            "Counted": f"For {common_facts(map(operation_facts, results))['sequence']}. The paper counts what is in "
            'the blocks; its FLOPs of attention leave out half of one product, and "in full" has both.',
        },
    )


def task_table(results: list[ModelResult]) -> Table | None:
    """The scores of lm-eval, a row for each task and metric; `None` if there are none."""
    scored = [result for result in results if result.tasks is not None and result.tasks.scores]
    if not scored:
        return None
    names = dict.fromkeys(
        (score.task, score.metric, score.few_shot) for result in scored for score in result.tasks.scores
    )
    notes = Notes()
    rows = []
    for task, metric, few_shot in names:
        heading = Cell(task, f"{metric}, {few_shot} examples shown" if few_shot else metric)
        rows.append([heading, *_cells(task_measure(scored, task, metric, few_shot), notes)])
    return Table(
        caption="Scores of lm-eval",
        columns=[Column("task and metric", is_text=True), *(Column(result.name) for result in scored)],
        rows=rows,
        notes=notes.texts,
        remarks={
            "Signs": "Bold: the best of the row among numbers measured alike. ±: one standard error, for the choice "
            "of samples; a difference of less than about two of them is no evidence. –: not measured.",
            "Measured": f"{list_facts(common_facts(harness_facts(result.tasks) for result in scored))}.",
        },
    )


def cost_table(results: list[ModelResult]) -> Table | None:
    """Every private inference that was measured, a row each; `None` if there is none."""
    costs = [(result, cost) for result in results for cost in result.costs]
    if not costs:
        return None
    scale, letter = find_scale(cost.total_bytes for _, cost in costs)
    return Table(
        caption="Private inferences, each as it was measured",
        columns=[
            MODEL,
            Column("protocol", is_text=True),
            Column("prompt", "Tokens"),
            Column("answer", "Tokens"),
            Column(f"sent ({letter}B)"),
            Column("rounds"),
            Column("seconds"),
            Column("network", is_text=True),
            Column("computed with", is_text=True),
        ],
        rows=[
            [
                _heading(result),
                Cell(cost.protocol),
                Cell(f"{cost.context:,}"),
                Cell(f"{cost.answers:,}"),
                Cell(format_number(cost.total_bytes / scale)),
                Cell(f"{cost.rounds:,}"),
                Cell(format_number(cost.seconds)),
                Cell(cost.network),
                Cell(describe_origin(cost)),
            ]
            for result, cost in costs
        ],
        remarks={
            "Sent": "By all parties together, without the set-up of their connection.",
            "Rounds": "About how often a message has to travel there and back.",
        },
    )


def model_table(results: list[ModelResult]) -> Table:
    """What each model is."""
    return Table(
        caption="The models",
        columns=[
            MODEL,
            Column("final norm", is_text=True),
            *map(Column, results[0].architecture.sizes),
            Column("hash of the weights", is_text=True),
        ],
        rows=[
            [
                _heading(result),
                Cell(result.architecture.final_normalization),
                *(Cell(f"{size:,}") for size in result.architecture.sizes.values()),
                Cell(result.weights),
            ]
            for result in results
        ],
    )


def training_table(results: list[ModelResult]) -> Table | None:
    """What the training of each model took; `None` if nothing is known of any."""
    trained = [result for result in results if result.training is not None]
    if not trained:
        return None
    return Table(
        caption="Training",
        columns=[
            MODEL,
            Column("from", is_text=True),
            *map(Column, ("steps", "tokens", "seconds")),
            Column("settings", is_text=True),
        ],
        rows=[
            [
                _heading(result),
                Cell(result.training.converted_from or "scratch"),
                Cell(f"{result.training.steps:,}"),
                Cell(f"{result.training.tokens:,}"),
                Cell(format_number(result.training.seconds)),
                Cell(list_settings(result.training.hyperparameters)),
            ]
            for result in trained
        ],
        remarks={"From": "A model that was converted from another has that one's training behind it too."},
    )


def condition_table(results: list[ModelResult]) -> Table | None:
    """Under which conditions everything was measured, once for all models that share them; `None` without any."""
    measured: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for result in results:
        for part, on, origin, seconds in _conditions(result):
            measured.setdefault((part, on, origin), []).append((result.name, seconds))
    if not measured:
        return None
    return Table(
        caption="Conditions",
        columns=[
            Column("measured", is_text=True),
            Column("of", is_text=True),
            Column("on", is_text=True),
            Column("computed with", is_text=True),
        ],
        rows=[
            [
                Cell(part),
                Cell("; ".join(f"{name} in {format_number(seconds)} s" for name, seconds in models)),
                Cell(on),
                Cell(origin),
            ]
            for (part, on, origin), models in measured.items()
        ],
    )


def _conditions(result: ModelResult) -> list[tuple[str, str, str, float]]:
    """For each part that was measured: its name, what it was measured on, what computed it, and seconds."""
    parts = []
    if result.likelihood is not None:
        likelihood, conditions = result.likelihood.likelihood, result.likelihood.conditions
        on = (
            f"{conditions.corpus} ({conditions.corpus_revision}); {describe_windows(likelihood.windows)}; "
            f"{likelihood.tokens:,} predicted tokens of a vocabulary of {conditions.vocab_size:,}, "
            f"{likelihood.words:,} words, {likelihood.bytes:,} bytes; {conditions.dtype}{_seed(conditions.seed)}"
        )
        parts.append(("prediction", on, describe_origin(conditions), result.likelihood.seconds))
    if result.heads is not None:
        heads, conditions = result.heads.heads, result.heads.conditions
        on = (
            f"{conditions.corpus} ({conditions.corpus_revision}); {heads.rows:,} rows of each head, "
            f"{heads.diversity_rows:,} for the diversity, of sequences of {conditions.context:,} tokens of a "
            f"vocabulary of {conditions.vocab_size:,}; {conditions.dtype}{_seed(conditions.seed)}"
        )
        parts.append(("attention heads", on, describe_origin(conditions), result.heads.seconds))
    if result.tasks is not None:
        tasks = result.tasks
        limit = "" if tasks.limit is None else f"; at most {tasks.limit:,} samples of each task"
        on = f"{tasks.data}{limit}; {tasks.bos}; at most {tasks.context:,} tokens; {tasks.dtype}{_seed(tasks.seed)}"
        parts.append(("tasks", on, describe_origin(tasks), tasks.seconds))
    return parts


def _seed(seed: int | None) -> str:
    return "" if seed is None else f"; seed {seed}"


def _heading(result: ModelResult) -> Cell:
    return Cell(result.name, result.title)


def _cells(measure: Measure, notes: Notes) -> list[Cell]:
    """The numbers of a measure, for each model, with the best marked and a note where one can't be compared."""
    reference, best = measure.reference, measure.best_value
    cells = []
    details = measure.details or [""] * len(measure.values)
    for value, facts, detail in zip(measure.values, measure.facts, details, strict=True):
        if value is None:
            cells.append(Cell(""))
            continue
        note = notes.letter(describe_difference(facts, reference))
        cells.append(Cell(measure.show(value), detail, is_best=not note and value == best, note=note))
    return cells


def _comparison_remarks(results: list[ModelResult]) -> dict[str, str]:
    """What the numbers mean, and what those without a letter depend on."""
    remarks = {"Signs": "Bold: the best of the column among numbers measured alike. –: not measured."}
    predicted = [result for result in results if result.likelihood is not None]
    if predicted:
        remarks[PREDICTION] = f"{_list_common(predicted, token_facts)}."
    with_heads = [result for result in results if result.heads is not None]
    if with_heads:
        common = common_facts(map(head_facts, with_heads))
        heads = next(result.heads.heads for result in with_heads if head_facts(result) == common)
        remarks[HEADS] = (
            f"{list_facts(common)}. Attention that is spread evenly has a mean entropy of {heads.entropy.maximum:.2f} "
            f"nats and a sink share of {heads.uniform_sink_share:.1%}. Overloaded: heads with at least 3/4 of this "
            "entropy; collapsed: with less than 5% of it. Sink share: attention to the first token. Diversity: the "
            "Jensen-Shannon divergence of the heads of a layer."
        )
    remarks[OPERATIONS] = (
        f"{_list_common(results, operation_facts)}. Non-linear: numbers that go through a non-linear operation; k, M, "
        "G: thousands, millions, billions."
    )
    costs = [cost for cost in main_costs(results) if cost is not None]
    if costs:
        remarks[COSTS] = (
            f"{_list_common(costs, duration_facts)}. Sent: by all parties together, without the set-up of their "
            "connection."
        )
    parts = {
        PREDICTION: {describe_origin(result.likelihood.conditions) for result in predicted},
        HEADS: {describe_origin(result.heads.conditions) for result in with_heads},
    }
    if unlike := [part.lower() for part, origins in parts.items() if len(origins) > 1]:
        remarks["Origin"] = (
            f"Versions, commit or machine are not the same for all numbers of {' and '.join(unlike)}: what each was "
            "computed with is under Models and conditions."
        )
    return remarks


def _list_common(measured: list, facts: Callable[..., Facts]) -> str:
    return list_facts(common_facts(map(facts, measured)))


def _operation_columns(
    operations: list[list[NonlinearOperation]], results: list[ModelResult], notes: Notes
) -> dict[str, list[Cell]]:
    """The shapes of each kind of operation, for each model."""
    reference = common_facts(map(operation_facts, results))
    letters = [notes.letter(describe_difference(operation_facts(result), reference)) for result in results]
    kinds = dict.fromkeys(each.name for of_model in operations for each in of_model)
    columns = {}
    for kind in kinds:
        texts = [" + ".join(each.text for each in of_model if each.name == kind) for of_model in operations]
        columns[kind] = [Cell(text, note=note if text else "") for text, note in zip(texts, letters, strict=True)]
    return columns
