"""What each of the two phases sends."""

from collections import Counter

import numpy as np
import pytest

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.costs.cost_model import predict, predict_phases
from entropy_gpt.evaluation.private_inference.program.ciphertexts import INPUTS
from entropy_gpt.evaluation.private_inference.program.counting import REVEALED, SHARED_BATCHES, Stock, count_step
from entropy_gpt.evaluation.private_inference.program.first_phase import ROWS, multiply_rows
from entropy_gpt.evaluation.private_inference.program.fixed_point import FixedPointArithmetic
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from entropy_gpt.evaluation.private_inference.program.two_phases import Preparation

from .phases import LENGTH, SPANS, prepared_weights


def test_the_second_phase_waits_and_sends_less():
    config, _ = prepared_weights("SM+ScFuFFN", n_embd=192, n_head=3, n_positions=128)
    spans = [Span(0, 64)]
    one = predict(config, PrivateSettings(), spans[0])
    before, after = predict_phases(config, PrivateSettings(), spans)
    sums = [sum(step.total_bytes for step in steps) for steps in (one, before, after)]
    assert sums[2] < sums[0] / 2
    assert sums[1] + sums[2] < 1.1 * sums[0]
    assert sum(step.round_trips for step in after) < sum(step.round_trips for step in one)
    operations = [sorted({(step.operation, str(step.layer)) for step in steps}) for steps in (after, one)]
    assert operations[0] == operations[1]
    with pytest.raises(PrivateInferenceError, match="not for 'semi2k'"):
        predict_phases(config, PrivateSettings("semi2k"), spans)


def count_phases(config, *spans: Span) -> list[dict[str, Counter]]:
    """What the operations of the first phase, and of each pass of the second, consist of."""
    private, preparation = PrivateSettings(), Preparation(config, PrivateSettings(), spans)
    phases, found = [preparation.steps, *(preparation.use(*numbered) for numbered in enumerate(spans))], []
    for number, steps in enumerate(phases):
        variables = preparation.variables(max(number - 1, 0), spans[max(number - 1, 0)])
        counts: dict[str, Counter] = {}
        for step in steps:
            parts = count_step(step, variables, private, Stock()).parts
            counts.setdefault(step.operation, Counter()).update(parts)
        found.append(counts)
    return found


def test_what_is_0_or_the_servers_to_see_takes_no_bytes_of_others():
    config, _ = prepared_weights("SM+ScFuFFN", n_layer=2)
    heads, width = config.n_head, config.n_embd
    _, after = count_phases(config, Span(0, LENGTH, LENGTH))
    visible = heads * LENGTH * (LENGTH + 1) // 2
    assert after["values"][REVEALED] == 2 * visible
    # Shown to the server alone, which takes half.
    assert after["embedding"][REVEALED] == LENGTH * config.vocab_size / 2
    assert after["output"][REVEALED] == 2 * LENGTH * width / 2


def test_kept_keys_and_values_are_revealed_once():
    config, _ = prepared_weights("SM+ScFuFFN", n_layer=2)
    heads, width = config.n_head, config.n_embd
    before, _, *after = count_phases(config, *SPANS)
    for span, counts in zip(SPANS[1:], after, strict=True):
        # Of each layer a query, and a weight for each key and head.
        assert counts["scores"][REVEALED] == 2 * width
        assert counts["values"][REVEALED] == 2 * heads * span.end
        # A key and a value; and what the server is shown, in the last layer for queries apart.
        assert counts["query, key, value"][REVEALED] == 2 * 2 * width + (1 + 2) * width / 2
    # The masks of all passes are one product: the rows of further tokens take next to nothing.
    alone, _ = count_phases(config, SPANS[0])
    assert before["scores"][INPUTS] <= 2 * alone["scores"][INPUTS]


def test_rows_with_one_factor_each_are_products_of_matrices():
    """Where that sends less: not for few rows."""
    config, _ = prepared_weights("SM+LN+G", n_layer=1, n_embd=192, n_head=3, n_positions=128)
    before, _ = count_phases(config, Span(0, 128, 128))
    assert ROWS in before
    products = before[ROWS]
    assert products[INPUTS] and not products[SHARED_BATCHES]
    short, _ = count_phases(config, Span(0, 2, 2))
    assert not short[ROWS][INPUTS]


def test_products_of_rows_are_those_of_their_numbers():
    random, shapes = np.random.default_rng(0), [(2, 100, 64), (2, 100, 1), (3, 35, 64), (3, 35, 1)]
    masks = [random.integers(-(2**63), 2**63 - 1, shape) for shape in shapes for _ in range(2)]
    rows, factors, others, their_factors = (masks[place] + masks[place + 1] for place in range(0, 8, 2))
    found = multiply_rows(FixedPointArithmetic(PrivateSettings()), *masks)
    for product, expected in zip(found, (rows * factors, others * their_factors), strict=True):
        assert np.array_equal(product, expected)


def test_several_answers_share_the_weights():
    """The rows of all passes are one product."""
    config, _ = prepared_weights("SM+ScFuFFN", n_layer=1)
    one, three = (predict_phases(config, PrivateSettings(), spans)[0] for spans in (SPANS[:1], SPANS))
    products = [[step.total_bytes for step in steps if step.operation == "output"] for steps in (one, three)]
    assert len(products[0]) == len(products[1]) == 1
    assert products[1][0] < 2 * products[0][0]
