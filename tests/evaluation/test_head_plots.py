"""Pictures of heads: drawn for every model that a record can hold, and with what tells models apart."""

import dataclasses
import math

import pytest
from matplotlib.figure import Figure

from entropy_gpt.evaluation.showing.head_plots import (
    compare_models,
    plot_comparison,
    plot_head_diagnostics,
)
from tests.slow import slow_cases

from .example_results import example_heads, example_likelihood, example_result


pytestmark = pytest.mark.filterwarnings("error")


def texts_of(figure: Figure) -> list[str]:
    """What is written on a picture."""
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_all_that_is_known_of_a_model():
    heads = example_heads(layers=3, heads=4)
    texts = texts_of(plot_head_diagnostics(heads.heads, "mine: SM+LN+G"))
    assert "mine: SM+LN+G\n65,024 rows of each head, sequences of 128 tokens" in texts
    assert f"{heads.heads.entropy.nats[2][3]:.2f}" in texts
    assert f"{100 * heads.heads.sink_share[2][3]:.1f}" in texts
    assert f"{heads.heads.diversity[2]:.2f}" in texts
    assert {"mean entropy of rows; uniform attention: 3.88 nats", "no two heads share a key: 1.39"} <= {*texts}
    # The maxima of the two bars of ranges.
    assert {f"{heads.heads.entropy.largest:.2f} nats", "3.88 nats"} <= {*texts}
    assert "not finite" not in texts


@pytest.mark.parametrize(
    ("largest", "written"),
    [(0.0706, "0.0706"), (70612.0, "70.6"), *slow_cases((7.06, "7.06"), (1234.4, "1234"))],
)
def test_spectral_norms_have_about_three_digits(largest, written):
    heads = example_heads(layers=1, heads=2)
    heads.heads.logit_spectral_norms = [[largest, largest / 2]]
    texts = texts_of(plot_head_diagnostics(heads.heads))
    assert written in texts
    assert ("thousands" in texts) == (largest >= 10_000)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 12), *slow_cases((26, 16))])
def test_models_of_every_size(layers, heads):
    diagnostics = example_heads(layers=layers, heads=heads).heads
    title = "cost $a and $b/" * 9
    for figure in (plot_head_diagnostics(diagnostics, title), plot_comparison([diagnostics], [title])):
        assert any("cost" in text for text in texts_of(figure))


def test_a_broken_model_is_drawn():
    heads = example_heads(layers=2, heads=2)
    broken = dataclasses.replace(
        heads.heads,
        entropy=dataclasses.replace(heads.heads.entropy, nats=[[math.nan] * 2] * 2),
        sink_share=[[math.nan] * 2] * 2,
        logit_spectral_norms=[[math.nan] * 2] * 2,
        diversity=[math.nan] * 2,
        entropy_quantiles=[[[math.nan] * len(heads.heads.quantile_levels)] * 2] * 2,
    )
    result = example_result(heads=dataclasses.replace(heads, heads=broken))
    texts = texts_of(plot_head_diagnostics(broken))
    assert texts.count("nan") == 3 * 4 + 2
    assert "not finite" in texts
    assert texts_of(compare_models([result])).count("nan") == 4


def test_models_side_by_side_are_told_apart():
    results = [
        example_result("one", heads=example_heads(layers=2, heads=2), likelihood=example_likelihood(2.7)),
        example_result("two", heads=example_heads(layers=2, heads=2, context=256)),
        *(example_result(f"{n}", "SM", heads=example_heads(layers=1, heads=2)) for n in range(3)),
    ]
    written = "\n".join(texts_of(compare_models(results)))
    assert "one\nSM+LN+G\nfinal norm: layernorm\nperplexity 2.7, " in written
    # Lengths differ, and so does what uniform attention has.
    assert "uniform attention: 3.88" in written
    assert "uniform attention: 4.56" in written
    assert not any("one" in text for text in texts_of(compare_models(results[:1])))


def test_diagnostics_alone_are_enough():
    models = [example_heads(layers=1, heads=2, seed=seed).heads for seed in range(2)]
    assert {"first", "second"} <= {*texts_of(plot_comparison(models, ["first", "second"]))}
