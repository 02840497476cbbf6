"""What the page about evaluated models says first: its numbers in a few sentences."""

import math
from dataclasses import dataclass

from entropy_gpt.evaluation.records.results import ModelResult

from .measures import Measure, nonlinear_measure, overload_measure, perplexity_measure, traffic_measure


# More are counted and not named.
MOST_NAMES = 4


def summarize(results: list[ModelResult]) -> str:
    """The models, and how far apart they are in each kind of number, as far as the numbers can be compared."""
    sentences = (_models(results), _prediction(results), _heads(results), _operations(results), _traffic(results))
    return " ".join(sentence for sentence in sentences if sentence)


def list_names(names: list[str]) -> str:
    """Names in a sentence; their number, if they are many."""
    if len(names) > MOST_NAMES:
        return f"{len(names)} models"
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


@dataclass(frozen=True)
class _End:
    """The lowest or highest of the numbers that can be compared, and the models that have it."""

    value: float
    shown: str
    names: str


def _models(results: list[ModelResult]) -> str:
    if len(results) == 1:
        (result,) = results
        return f"{result.name} is {result.title} with {result.architecture.parameters:,} parameters."
    names = [result.name if result.name == result.title else f"{result.name} ({result.title})" for result in results]
    listed = f": {list_names(names)}" if len(names) <= MOST_NAMES else ""
    return f"{len(results)} models are set side by side{listed}."


def _prediction(results: list[ModelResult]) -> str:
    measure = perplexity_measure(results)
    if not measure.is_measured:
        return "Perplexity was not measured."
    sentences = []
    if measure.comparable:
        low, high = _ends(measure, results)
        text = measure.reference["text"]
        if len(measure.comparable) == 1:
            sentences.append(f"The perplexity per token of {low.names} is {low.shown} on {text}.")
        elif low.value == high.value:
            sentences.append(f"Their perplexity per token on {text} is the same, {low.shown}.")
        else:
            sentences.append(
                f"On {text}, perplexity per token lies between {low.shown} ({low.names}) and {high.shown} "
                f"({high.names}), {high.value / low.value - 1:.1%} more."
            )
    infinite = [
        result.name
        for result, value in zip(results, measure.values, strict=True)
        if value is not None and not math.isfinite(value)
    ]
    if infinite:
        sentences.append(f"Not finite is that of {list_names(infinite)}.")
    return " ".join([*sentences, _left_out(measure, results)]).strip()


def _left_out(measure: Measure, results: list[ModelResult]) -> str:
    names = [
        result.name
        for result, facts in zip(results, measure.facts, strict=True)
        if facts is not None and facts != measure.reference
    ]
    if not names:
        return ""
    return f"Measured under other conditions, and so not compared with that: {list_names(names)}."


def _heads(results: list[ModelResult]) -> str:
    measure = overload_measure(results)
    if not measure.is_measured or not measure.comparable:
        return ""
    low, high = _ends(measure, results)
    if len(measure.comparable) == 1:
        return f"Of the attention heads of {low.names}, {low.shown} are overloaded."
    if low.value == high.value:
        return f"The share of overloaded attention heads is {low.shown} in all of them."
    return (
        f"The share of overloaded attention heads goes from {low.shown} ({low.names}) to {high.shown} ({high.names})."
    )


def _operations(results: list[ModelResult]) -> str:
    measure = nonlinear_measure(results)
    low, high = _ends(measure, results)
    unit = {"": "", "k": " thousand", "M": " million", "G": " billion", "T": " trillion"}[measure.unit]
    take = f"A forward pass over {measure.reference['sequence']}"
    if low.value == high.value:
        return f"{take} puts {low.shown}{unit} numbers through non-linear operations."
    times = f", {high.value / low.value:.1f} times as many" if low.value else ""
    return (
        f"{take} puts {low.shown}{unit} numbers through non-linear operations in {low.names}, and "
        f"{high.shown}{unit} in {high.names}{times}."
    )


def _traffic(results: list[ModelResult]) -> str:
    measure = traffic_measure(results)
    if not measure.is_measured:
        return "Communication of private inference was not measured."
    low, high = _ends(measure, results)
    unit = f" {measure.unit}"
    facts = measure.reference
    under = f"({facts['protocol']}, {facts['answer']} after a prompt of {facts['prompt']})"
    if len(measure.comparable) == 1:
        return f"Private inference of {low.names} sends {low.shown}{unit} {under}."
    if low.value == high.value:
        return f"Private inference of each sends {low.shown}{unit} {under}."
    times = f", {high.value / low.value:.2f} times as much" if low.value else ""
    return (
        f"Private inference sends {low.shown}{unit} in {low.names} and {high.shown}{unit} in {high.names}{times} "
        f"{under}."
    )


def _ends(measure: Measure, results: list[ModelResult]) -> tuple[_End, _End]:
    """The lowest and the highest of the numbers that can be compared."""
    values = measure.comparable
    return tuple(
        _End(
            end,
            measure.show(end),
            list_names([results[index].name for index, value in values.items() if value == end]),
        )
        for end in (min(values.values()), max(values.values()))
    )
