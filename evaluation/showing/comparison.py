"""Models that were trained and measured alike, side by side: rows, a Markdown table, and all its conditions."""

from entropy_gpt.evaluation.records.conditions import (
    describe_difference,
    describe_origin,
    describe_windows,
    list_facts,
    list_settings,
    traffic_facts,
)
from entropy_gpt.evaluation.records.results import ModelResult, PrivateCost

from .columns import (
    ARCHITECTURE,
    BITS_PER_BYTE,
    FINAL_NORM,
    MEAN_ENTROPY,
    OVERLOADED,
    PARAMETERS,
    PERPLEXITY,
    TRAINING_SECONDS,
    list_rows,
)
from .markdown import fold_away
from .measures import main_costs


COLUMNS = (
    ARCHITECTURE,
    FINAL_NORM,
    PARAMETERS,
    PERPLEXITY,
    BITS_PER_BYTE,
    MEAN_ENTROPY,
    OVERLOADED,
    TRAINING_SECONDS,
)
COST_COLUMN = "private answer (MB)"
MEGA = 1e6


def comparison_rows(results: list[ModelResult]) -> list[tuple[str, ...]]:
    """
    One row of text for each model, in the order of `COLUMNS`.

    Raises:
        `ValueError`: If training, likelihood or heads of a model are missing.
    """
    _check_complete(results)
    return list_rows(COLUMNS, results)


def comparison_markdown(results: list[ModelResult]) -> str:
    """
    The comparison as a Markdown table, with a column for private answers if there are any, followed by the conditions,
    folded away.

    Raises:
        `ValueError`: If the results were not measured under the same conditions, or some are missing.
    """
    rows = [
        tuple(column.title for column in COLUMNS),
        ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2),
        *comparison_rows(results),
    ]
    costs = main_costs(results)
    if any(costs):
        column = [COST_COLUMN, "---:", *map(_megabytes, costs)]
        rows = [(*row, cell) for row, cell in zip(rows, column, strict=True)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{fold_away('Conditions', list_conditions(results))}\n"


def _megabytes(cost: PrivateCost | None) -> str:
    return "–" if cost is None else f"{cost.total_bytes / MEGA:,.1f}"


def conditions_text(results: list[ModelResult]) -> str:
    """
    The conditions of a comparison in one paragraph.

    Raises:
        `ValueError`: If the results were not measured under the same conditions, or some are missing.
    """
    return " ".join(list_conditions(results))


def list_conditions(results: list[ModelResult]) -> list[str]:
    """
    What all models have in common, and what each has alone, a sentence or two for each condition.

    Raises:
        `ValueError`: If the results were not measured under the same conditions, or some are missing.
    """
    _check_complete(results)
    _check_comparable(results)
    first = results[0]
    training, heads = first.training, first.heads.heads
    likelihood, conditions = first.likelihood.likelihood, first.likelihood.conditions
    settings = [result.training.hyperparameters.items() for result in results]
    shared = {name: value for name, value in settings[0] if all((name, value) in items for items in settings)}
    origin = "Trained from scratch" if training.converted_from is None else "Converted and healed"
    return [
        f"{origin} on {training.text or f'{conditions.corpus} ({conditions.corpus_revision})'} for {training.steps:,} "
        f"steps, {training.tokens:,} tokens of a vocabulary of {conditions.vocab_size:,} "
        f"({list_settings(shared)}; seed {conditions.seed}, {conditions.dtype}).",
        *(
            f"{result.title} alone: {list_settings(own)}."
            for result in results
            if (own := _own_settings(result, shared))
        ),
        *(_healing_text(result) for result in results if result.training.converted_from is not None),
        f"Evaluated on {likelihood.tokens:,} tokens of text kept out of training, in "
        f"{describe_windows(likelihood.windows)}.",
        f"Entropies: of {heads.rows:,} rows of each head. Overloaded: a mean entropy of at least 3/4 of "
        f"{heads.entropy.maximum:.2f} nats, which uniform attention has.",
        *_private_conditions(results),
        f"Versions: {describe_origin(conditions)}.",
    ]


def _own_settings(result: ModelResult, shared: dict) -> dict:
    return {name: value for name, value in result.training.hyperparameters.items() if name not in shared}


def _healing_text(result: ModelResult) -> str:
    return (
        f"{result.title}: fitted step by step, then healed for {result.training.steps:,} steps, "
        f"{result.training.tokens:,} tokens, in addition to those of its source."
    )


def _private_conditions(results: list[ModelResult]) -> list[str]:
    """What private answers depend on; empty if no model has any."""
    cost = next(filter(None, main_costs(results)), None)
    if cost is None:
        return []
    facts = list_facts(traffic_facts(cost))
    return [f"Private answers: sent by all parties, without the set-up of their connection ({facts})."]


def _check_complete(results: list[ModelResult]):
    if not results:
        raise ValueError("There are no models to compare: give one at least.")
    for result in results:
        missing = [name for name in ("training", "likelihood", "heads") if getattr(result, name) is None]
        if missing:
            raise ValueError(f"{result.title}: {' and '.join(missing)} are missing. Measure it again with them.")


def _check_comparable(results: list[ModelResult]):
    """Numbers side by side were measured under the same conditions, from scratch with the same amount of training."""
    first = results[0]
    from_scratch = [result for result in results if result.training.converted_from is None]
    for result in results:
        compared = {
            "windows": (result.likelihood.likelihood.windows, first.likelihood.likelihood.windows),
            "conditions of the likelihood": (result.likelihood.conditions, first.likelihood.conditions),
            "conditions of the heads": (result.heads.conditions, first.heads.conditions),
            "entropies of uniform attention": (
                result.heads.heads.entropy.maximum,
                first.heads.heads.entropy.maximum,
            ),
        }
        if result in from_scratch:
            compared["training steps"] = (result.training.steps, from_scratch[0].training.steps)
            compared["training tokens"] = (result.training.tokens, from_scratch[0].training.tokens)
        for name, (value, expected) in compared.items():
            if value != expected:
                raise ValueError(
                    f"{result.title} and {first.title} can't be compared: their {name} differ, {value} and "
                    f"{expected}. Measure them in one run."
                )
    _check_comparable_costs(results)


def _check_comparable_costs(results: list[ModelResult]):
    measured = [(result, cost) for result, cost in zip(results, main_costs(results), strict=True) if cost is not None]
    for result, cost in measured:
        first, expected = measured[0]
        if difference := describe_difference(traffic_facts(cost), traffic_facts(expected)):
            raise ValueError(
                f"{result.title} and {first.title} can't be compared: their private answers differ ({difference}). "
                "Measure them in one run."
            )
