"""Programs with some of the economies: what each of them changes, and that no answer is another one."""

import numpy as np
import pytest
import torch

from entropy_gpt.evaluation.private_inference.costs.cost_model import predict
from entropy_gpt.evaluation.private_inference.costs.economies import (
    ALL,
    NONE,
    VARIANTS,
    emulate_variant,
    pair_scores,
    predict_variant,
)
from entropy_gpt.evaluation.private_inference.program.fixed_point import exact_logits
from entropy_gpt.evaluation.private_inference.program.networks import WAN
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from tests.architectures import make_config, make_model


SPANS = (Span(0, 15), Span(15, 1))
# The operations that an economy alone changes.
CHANGED = {
    "heads as one product": {"scores", "values"},
    "contests of more than two": {"maximum"},
    "division early or late": {"division", "values"},
    "reciprocals without comparisons": {"division"},
    "public embeddings": {"embedding", "check"},
}


SMALL = make_config("SM+ScFuFFN", n_layer=3, n_embd=64, n_head=4, n_positions=16)


@pytest.mark.parametrize("span", [Span(0, 16), SPANS[-1]])
def test_all_of_them_are_what_is_run(span):
    predicted = predict_variant(SMALL, VARIANTS[ALL], span, WAN.name)
    assert predicted == predict(SMALL, PrivateSettings(embedding="public"), span)


@pytest.mark.parametrize("economy", CHANGED)
def test_each_changes_its_operations_alone(economy):
    none, one = (predict_variant(SMALL, VARIANTS[variant], Span(0, 16), WAN.name) for variant in (NONE, economy))
    before, after = (
        {(step.operation, step.layer, step.total_bytes, step.round_trips) for step in each} for each in (none, one)
    )
    operations = {operation for operation, *_ in before ^ after}
    assert operations and operations <= CHANGED[economy]
    assert sum(step.round_trips for step in one) < sum(step.round_trips for step in none)


def test_one_that_is_not_known_is_not_forgotten_here():
    assert {NONE, *CHANGED, ALL} == {*VARIANTS}


@pytest.mark.parametrize(("keys", "levels"), [(1, 0), (2, 1), (3, 2), (128, 7), (129, 8)])
def test_pairs_need_a_level_for_each_doubling(keys, levels):
    assert pair_scores(1, keys, keys, WAN.name) == (2,) * levels


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_those_of_the_model_in_one_pass_and_in_two(variant):
    torch.manual_seed(0)
    config, weights = prepare_weights(make_model("SM+ScFuFFN", n_positions=16))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 16)
    (exact,) = exact_logits(config, weights, PrivateSettings(), tokens)
    for spans in ([Span(0, 16)], SPANS):
        found = emulate_variant(config, weights, VARIANTS[variant], spans, tokens, WAN.name)
        assert np.abs(found - exact).max() < 0.05 < np.abs(exact).max()
