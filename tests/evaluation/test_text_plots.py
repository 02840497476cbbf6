"""Pictures of one text: the numbers in them, names of tokens that can be read, and texts of every length."""

import itertools
import math

import numpy as np
import pytest
import torch

from entropy_gpt.evaluation.measuring.text_diagnostics import TextDiagnostics
from entropy_gpt.evaluation.showing.text_plots import LONGEST_LABEL, plot_text_attention, plot_text_entropies
from tests.slow import slow_cases


pytestmark = pytest.mark.filterwarnings("error")


def example_diagnostics(tokens, layers=2, heads=3, weights=True) -> TextDiagnostics:
    length = len(tokens)
    logits = torch.randn(layers, heads, length, length).masked_fill(torch.ones(length, length).triu(1) > 0, -math.inf)
    matrices = logits.softmax(-1)
    return TextDiagnostics(tokens, torch.special.entr(matrices).sum(-1), matrices if weights else None)


def labels_of(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_the_entropy_of_every_head_at_every_token():
    diagnostics = example_diagnostics(["def", " main", "(\n"])
    rows, uniform, _ = plot_text_entropies(diagnostics, "cost $a and $b").axes
    np.testing.assert_allclose(rows.images[0].get_array(), diagnostics.entropies.reshape(6, 3))
    np.testing.assert_allclose(uniform.images[0].get_array(), [[0, math.log(2), math.log(3)]])
    assert labels_of(rows.yaxis) == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    assert labels_of(uniform.xaxis) == ["def", "␣main", "(↵"]


def test_the_attention_of_a_head():
    diagnostics = example_diagnostics(["a", "b", "$c$"])
    axes = plot_text_attention(diagnostics, 1, 2).axes[0]
    seen = axes.images[0].get_array()
    np.testing.assert_allclose(seen.filled(0), diagnostics.weights[1, 2], rtol=1e-6)
    assert seen.mask.tolist() == [[False, True, True], [False, False, True], [False] * 3]
    assert labels_of(axes.xaxis) == labels_of(axes.yaxis) == ["a", "b", "$c$"]


def test_letters_without_a_font_and_long_tokens_have_a_name(tmp_path):
    # The private use area is in no font by right; the last resort of matplotlib would show a box.
    tokens = ["\U000f1234", "Ж", "\x07", "x" * 50]
    figure = plot_text_attention(example_diagnostics(tokens), 0, 0)
    names = labels_of(figure.axes[0].xaxis)
    assert names[:3] == ["U+F1234", "Ж", "U+0007"]
    assert len(names[3]) < LONGEST_LABEL
    figure.savefig(tmp_path / "letters.png")  # a letter that is missing in the font is a warning, here an error


@pytest.mark.parametrize(("length", "layers", "heads"), [(1, 1, 1), (2, 3, 2), *slow_cases((150, 1, 2), (5, 24, 16))])
def test_texts_and_models_of_every_size(length, layers, heads):
    diagnostics = example_diagnostics([f" {number}" for number in range(length)], layers, heads)
    for figure in (plot_text_entropies(diagnostics), plot_text_attention(diagnostics, 0, 0)):
        assert max(figure.get_size_inches()) < 20
        figure.draw_without_rendering()
        for axes in figure.axes:
            boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
            assert not any(first.overlaps(second) for first, second in itertools.pairwise(boxes))


def test_a_broken_model_is_drawn():
    diagnostics = example_diagnostics(["a", "b"])
    diagnostics.entropies[0, 0] = math.nan
    assert np.ma.getmaskarray(plot_text_entropies(diagnostics).axes[0].images[0].get_array()).any()
    assert diagnostics.most_focused_head != (0, 0)


def test_what_was_not_kept_is_not_drawn():
    with pytest.raises(ValueError, match="weights=True"):
        plot_text_attention(example_diagnostics(["a"], weights=False), 0, 0)
    with pytest.raises(IndexError):
        plot_text_attention(example_diagnostics(["a"]), 2, 0)
