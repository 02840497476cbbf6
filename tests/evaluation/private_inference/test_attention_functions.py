"""Attention without a maximum in a private program: its numbers, its range, its check, its costs."""

import numpy as np
import pytest
import torch

from entropy_gpt.evaluation.private_inference.costs.cost_model import predict
from entropy_gpt.evaluation.private_inference.program.attention_functions import (
    LEAST_SUM,
    LEAST_WEIGHT,
    MOST_SUM,
    reciprocal_between,
    weigh_scores,
    weigh_visible_scores,
)
from entropy_gpt.evaluation.private_inference.program.fixed_point import (
    FixedPointArithmetic,
    Float64Arithmetic,
    emulate,
    exact_variables,
)
from entropy_gpt.evaluation.private_inference.program.program import OUT_OF_RANGE, build_steps, find_out_of_range
from entropy_gpt.evaluation.private_inference.program.range_audit import audit, choose_sequences
from entropy_gpt.evaluation.private_inference.program.range_report import tolerated_error
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, run_steps
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from modeling_entropy_gpt import EntropyGPTConfig
from modeling_entropy_gpt.attention_functions import log_function, row_floors
from tests.architectures import make_model, make_tokens


NOTATIONS = ("Pow4(t_h)+ScFuFFN", "EReg(Pow2(t)+ScFuFFN)", "ClSM(t)+LN+G")
SETTINGS = PrivateSettings()


def make_usual_model(notation: str):
    """One whose scores are as far apart as those of trained models."""
    model = make_model(notation)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(0.4)
    return model


def test_the_reciprocal_is_right_over_its_range_and_as_precise_as_the_ring_allows():
    sums = np.geomspace(LEAST_SUM, MOST_SUM, 2000)[:, None]
    error = np.abs(reciprocal_between(Float64Arithmetic(np), sums) * sums - 1)
    assert error.max() < 2.1e-4
    ring = FixedPointArithmetic(SETTINGS)
    sums = ring.encode(sums)
    error = np.abs(reciprocal_between(ring, sums) * sums - 1)
    last_bit = 2.0**-SETTINGS.fraction_bits
    assert (error < 2.1e-4 + 4 * last_bit * (sums + 1 / sums)).all() and ring.overflows == 0


@pytest.mark.parametrize("function", ["power4", "power2", "clamped"])
def test_functions_of_single_numbers_are_the_models(function):
    x = torch.linspace(-12, 6, 2001, dtype=torch.double)
    expected = log_function(x, function).exp().numpy()
    prepared = {"power4": 1 + x / 4, "power2": 1 + x / 2, "clamped": x - 3}[function].numpy()
    found = weigh_scores(FixedPointArithmetic(SETTINGS), prepared, function)
    if function == "clamped":  # by the exponential of 3 and 4 doublings
        found = found * np.exp(3) / 16
    assert np.abs(found - expected).max() < 2e-3 * expected.max()


@pytest.mark.parametrize("notation", NOTATIONS)
def test_the_ring_answers_as_the_model_and_the_audit_agrees(notation):
    model, tokens = make_usual_model(notation), make_tokens(1, 17)
    config, weights = prepare_weights(model)
    with torch.no_grad():
        expected = model(tokens).logits[0].numpy()
    found = emulate(config, weights, SETTINGS, tokens[0].numpy(), 17)
    assert np.abs(found - expected).max() < tolerated_error(np.sqrt(np.square(expected).mean()))
    report = audit(config, weights, SETTINGS, choose_sequences(config, weights))
    assert report.problems == [] and report.agreement > 0.98
    assert any(tensor.role == "sum" for tensor in report.tensors)


def test_a_row_of_zeros_attends_to_all_of_its_keys():
    model, tokens = make_model("Pow4+ScFuFFN"), make_tokens(1, 17)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.shift.attention_shift.fill_(1e3)
        expected = model(tokens).logits[0].numpy()
    config, weights = prepare_weights(model)
    found = emulate(config, weights, SETTINGS, tokens[0].numpy(), 17)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("keys", [1, 3, 128, 1024])
def test_the_least_weights_are_those_of_the_model(keys):
    nothing = np.full((1, keys), -3.0)
    found = weigh_visible_scores(Float64Arithmetic(np), nothing, np.zeros(keys, int), "power4")
    expected = row_floors(None, False, 1, keys, "cpu").item()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert expected == pytest.approx(max(LEAST_SUM / keys, LEAST_WEIGHT), rel=1e-6)


@pytest.mark.parametrize("keys", [1, 86, 128, 300, 1024])
def test_no_rounding_takes_the_least_weights_of_long_rows(keys):
    ring = FixedPointArithmetic(SETTINGS)
    weights = weigh_visible_scores(ring, np.full((20, keys), -3.0), np.zeros(keys, int), "power4")
    sums = weights.sum(axis=-1)[:, None, None]
    assert weights.min() > 0 and not find_out_of_range(ring, sums, attention_sums=1)
    assert np.abs(ring.multiply(sums, reciprocal_between(ring, sums)) - 1).max() < 0.05


def test_the_check_finds_sums_outside_of_the_range_of_the_reciprocal():
    ring = FixedPointArithmetic(SETTINGS)
    for sums in (-LEAST_SUM, 0.0, LEAST_SUM / 4, 2 * MOST_SUM):
        assert find_out_of_range(ring, np.array([[[1.0], [sums]]]), attention_sums=1)
    assert not find_out_of_range(ring, np.array([[[LEAST_SUM], [MOST_SUM]]]), attention_sums=1)


def test_sums_above_the_range_are_refused_by_the_audit_and_found_by_the_check():
    model, tokens = make_usual_model("Pow4+ScFuFFN"), make_tokens(1, 17)[0].numpy()
    config, weights = prepare_weights(model)
    report = audit(config, weights, SETTINGS, choose_sequences(config, weights))
    assert not out_of_range(config, {**weights, **report.bounds}, tokens)
    large = {**weights, "h.1.shift": weights["h.1.shift"] + 3.0}
    problems = audit(config, large, SETTINGS, choose_sequences(config, weights)).problems
    assert any("layer 1, division: a sum of attention weights is" in line for line in problems)
    assert any("log_sum_coefficient" in line for line in problems)
    assert out_of_range(config, {**large, **report.bounds}, tokens)


def out_of_range(config, weights, tokens) -> bool:
    """What the check of a private inference says."""
    ops = FixedPointArithmetic(SETTINGS)
    variables = exact_variables(config, weights, SETTINGS, tokens)
    steps = build_steps(config, SETTINGS, Span(0, len(tokens)))
    return bool(run_steps(steps, ops, {name: ops.encode(value) for name, value in variables.items()})[OUT_OF_RANGE])


def test_power4_costs_less_than_softmax():
    """GPT-2 small, 128 tokens: by the cost model, whose prices were measured."""

    def totals(notation: str) -> tuple[float, float]:
        steps = predict(EntropyGPTConfig.from_notation(notation), SETTINGS, Span(0, 128))
        assert ("maximum" in {step.operation for step in steps}) == notation.startswith("SM")
        return sum(step.total_bytes for step in steps), sum(step.round_trips for step in steps)

    softmax, power4, power2 = map(totals, ("SM(t_h)+ScFuFFN", "Pow4(t_h)+ScFuFFN", "Pow2(t_h)+ScFuFFN"))
    assert power2[0] < power4[0] < 0.9 * softmax[0]
    assert power4[1] < 0.7 * softmax[1] and power4[1] < 1150
