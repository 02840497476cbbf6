"""The pictures of the page about evaluated models, with what they show in words."""

import warnings
from collections.abc import Callable
from functools import partial
from io import BytesIO

import torch
from matplotlib.figure import Figure

from entropy_gpt.evaluation.measuring.text_diagnostics import TextDiagnostics
from entropy_gpt.evaluation.records.conditions import (
    Facts,
    common_facts,
    describe_difference,
    frequency_facts,
    head_facts,
    list_facts,
    token_facts,
)
from entropy_gpt.evaluation.records.results import ModelResult
from entropy_gpt.evaluation.records.run_log import RunLog, run_titles

from .comparison_plots import (
    pareto_front,
    plot_entropy_quantiles,
    plot_frequencies,
    plot_positions,
    plot_tradeoff,
    shorten,
)
from .head_plots import compare_models, plot_head_diagnostics
from .measures import Measure, nonlinear_measure, perplexity_measure, traffic_measure
from .page import Paragraph, Picture
from .report_summary import list_names
from .run_plots import has_scales, plot_layer_entropies, plot_losses, plot_penalty, plot_scales, plot_thresholds
from .text_plots import draw_attention, plot_text_entropies


def tradeoff_blocks(results: list[ModelResult]) -> list[Paragraph | Picture]:
    """
    Perplexity against communication, where that was measured of two models or more, and else against the numbers that
    go through non-linear operations; a sentence where there are no two models with a perplexity.
    """
    perplexities, costs = perplexity_measure(results), traffic_measure(results)
    common = _in_both(perplexities, costs)
    if len(common) >= 2:
        axis = f"sent in one private inference ({costs.unit})"
        what = f"the bytes that all parties send in one private inference ({list_facts(costs.reference)})"
        remark = ""
    else:
        costs = nonlinear_measure(results)
        common = _in_both(perplexities, costs)
        unit = f" ({costs.unit})" if costs.unit else ""
        axis = f"numbers that go through non-linear operations{unit}"
        what = (
            f"the numbers that go through non-linear operations in a forward pass over {costs.reference['sequence']}"
        )
        of_two = " of two models that can be compared" if any(result.costs for result in results) else ""
        remark = (
            f" Communication was not measured{of_two}; these numbers are counted from the configurations, and what "
            "one of them costs depends on the operation and on the protocol."
        )
    if len(common) < 2:
        return [Paragraph("To draw perplexity against cost takes two models whose perplexities can be compared.")]
    names = [results[index].name for index in common]
    points = [(costs.values[index], perplexities.values[index]) for index in common]
    missing = [result.name for index, result in enumerate(results) if index not in common]
    if missing:
        remark += f" Not drawn, for want of numbers that can be compared: {list_names(missing)}."
    front = [names[index] for index in pareto_front(points)]
    read = "; ".join(
        f"{name} {costs.show(cost)} and {perplexities.show(loss)}"
        for name, (cost, loss) in zip(names, points, strict=True)
    )
    return [
        _draw(
            "tradeoff",
            f"Perplexity per token against {what}. {read}.",
            f"Perplexity per token against {what}. On the front, where no other model is better in one without being "
            f"worse in the other: {list_names(front)}.{remark}",
            partial(plot_tradeoff, names, *map(list, zip(*points, strict=True)), axis),
        )
    ]


def prediction_pictures(results: list[ModelResult]) -> list[Picture]:
    """Perplexity by position and by the frequency of tokens, as far as they were measured."""
    predicted = [result for result in results if result.likelihood is not None]
    positioned = [result for result in predicted if result.likelihood.likelihood.by_position]
    counted = [result for result in predicted if result.likelihood.likelihood.by_frequency]
    return [
        *_draw_alike(
            "positions",
            "Perplexity per token against the number of tokens that the model saw before the predicted one",
            positioned,
            token_facts,
            plot_positions,
        ),
        *_draw_alike(
            "frequencies",
            "Perplexity per token against how often the token is in a training text",
            counted,
            frequency_facts,
            plot_frequencies,
        ),
    ]


def head_pictures(results: list[ModelResult]) -> list[Picture]:
    """Entropies of heads side by side, their quantiles by layer, and all that is known of each model's heads."""
    with_heads = [result for result in results if result.heads is not None]
    alone = [
        _draw(
            f"heads-{number}",
            f"Entropy and its spread, attention to the first token, spectral norms of the logits and diversity of the "
            f"attention heads of {result.name}.",
            f"The attention heads of {result.name} ({result.title}).",
            partial(plot_head_diagnostics, result.heads.heads, f"{shorten(result.name)}: {result.title}"),
        )
        for number, result in enumerate(with_heads, 1)
    ]
    texts = [result for result in results if result.attention is not None]
    return [
        *_draw_alike(
            "entropies",
            "Mean entropy of the rows of every attention head, models from left to right",
            with_heads,
            head_facts,
            compare_models,
        ),
        *_draw_alike(
            "quantiles",
            "How the entropies of attention rows are spread in each layer (quantiles of each head's rows, averaged "
            "over the layer's heads, and the median of each head)",
            with_heads,
            head_facts,
            _compare_quantiles,
        ),
        *alone,
        *(picture for number, result in enumerate(texts, 1) for picture in _text_pictures(number, result)),
    ]


def _text_pictures(number: int, result: ModelResult) -> list[Picture]:
    attention = result.attention
    layer, head = attention.head
    title = f"{shorten(result.name)}: {result.title}"
    diagnostics = TextDiagnostics(attention.tokens, torch.tensor(attention.entropies))
    entropies = (
        f"Entropy of every head of {result.name} at every token of one text of {len(attention.tokens):,} tokens, and "
        "that of uniform attention."
    )
    rows = (
        f"Attention of head {head} in layer {layer} of {result.name} over the same text: each row shows what a token "
        "attends to."
    )
    return [
        _draw(f"text-entropies-{number}", entropies, entropies, partial(plot_text_entropies, diagnostics, title)),
        _draw(
            f"text-attention-{number}",
            rows,
            rows,
            partial(draw_attention, torch.tensor(attention.weights), attention.tokens, layer, head, title),
        ),
    ]


def _compare_quantiles(results: list[ModelResult]) -> Figure:
    return plot_entropy_quantiles([result.heads.heads for result in results], [result.name for result in results])


def run_pictures(runs: list[RunLog]) -> list[Picture]:
    """The course of training, as far as it was logged."""
    kinds: list[tuple[str, str, Callable, Callable]] = [
        ("losses", "Loss in the course of training", plot_losses, lambda run: run.has_losses),
        (
            "entropies",
            "Mean entropy of each layer's heads",
            plot_layer_entropies,
            lambda run: bool(run.entropies),
        ),
        ("thresholds", "Learned entropy thresholds of the heads", plot_thresholds, lambda run: run.has_thresholds),
        (
            "penalty",
            "Penalties on attention rows, and the part that has one",
            plot_penalty,
            lambda run: run.has_penalty,
        ),
        ("scales", "Temperatures and residual scales of each layer", plot_scales, has_scales),
    ]
    pictures = []
    for name, what, plot, is_for in kinds:
        suited = [run for run in runs if is_for(run)]
        if suited:
            sentence = f"{what}: {'; '.join(run_titles(suited))}."
            pictures.append(_draw(f"training-{name}", sentence, sentence, partial(plot, suited)))
    return pictures


def _in_both(first: Measure, second: Measure) -> list[int]:
    """The places of models whose numbers can be compared in both measures, and drawn on a logarithmic scale."""
    if not (first.is_measured and second.is_measured):
        return []
    return [index for index in first.comparable if second.comparable.get(index, 0) > 0]


def _draw_alike(
    name: str,
    what: str,
    results: list[ModelResult],
    facts: Callable[[ModelResult], Facts],
    plot: Callable[[list[ModelResult]], Figure],
) -> list[Picture]:
    """One picture of all models that were measured under the same conditions, those that most have first."""
    if not results:
        return []
    common = common_facts(map(facts, results))
    kinds = {tuple(common.items()): [], **{tuple(facts(result).items()): [] for result in results}}
    for result in results:
        kinds[tuple(facts(result).items())].append(result)
    pictures = []
    for number, (kind, alike) in enumerate(kinds.items(), 1):
        sentence = f"{what}: {', '.join(result.name for result in alike)}."
        if difference := describe_difference(dict(kind), common):
            sentence += f" Not to be compared with the first picture of this kind, for other conditions: {difference}."
        pictures.append(_draw(f"{name}-{number}", sentence, sentence, partial(plot, alike)))
    return pictures


def _draw(name: str, alt: str, caption: str, plot: Callable[[], Figure]) -> Picture:
    png = BytesIO()
    with warnings.catch_warnings():
        # Letters that matplotlib's font lacks are boxes in the picture; the page's own text has them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        plot().savefig(png, format="png")
    return Picture(name, alt, caption, png.getvalue())
