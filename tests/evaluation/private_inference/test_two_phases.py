"""What is done before the prompt comes: the same numbers as in one phase."""

import hashlib
import itertools

import numpy as np
import pytest

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.demands import (
    NUMBERS,
    SCORES,
    SQUARES,
    VALUES,
    WEIGHTS,
    Bound,
    Demand,
    KeptTokens,
)
from entropy_gpt.evaluation.private_inference.program.fixed_point import FixedPointArithmetic
from entropy_gpt.evaluation.private_inference.program.program import LOGITS, OUT_OF_RANGE, build_steps, weight_shapes
from entropy_gpt.evaluation.private_inference.program.second_phase import MaskFactors
from entropy_gpt.evaluation.private_inference.program.settings import SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, run_steps
from entropy_gpt.evaluation.private_inference.program.two_phases import Preparation
from entropy_gpt.evaluation.private_inference.program.variables import client_inputs, program_variables
from tests.architectures import ARCHITECTURES
from tests.slow import slow_but

from .phases import LENGTH, SPANS, answers_in_one_phase, answers_in_two, draw_masks, prepared_weights


LONGER = [Span(0, 20), Span(20, 1), Span(21, 1), Span(22, 1)]
QUICK = ["EReg(SM(t_h)+LN+G+WN(QK+FFN))", "EReg(SM(t)+ScFuFFNi1)"]


def test_what_a_half_holds_and_means_has_a_format_of_its_own():
    """If the hash differs, a half of before would be used wrongly: raise `FORMAT`, then write both here."""
    preparations = pytest.importorskip("entropy_gpt.evaluation.private_inference.parties.preparations")
    private, random = PrivateSettings(), np.random.default_rng(0)
    config, _ = prepared_weights("SM+LN+G", n_layer=1)
    shapes = weight_shapes(config)
    weights = {name: random.integers(-64, 64, shape).astype(np.float32) / 64 for name, shape in shapes.items()}
    preparation, ops = Preparation(config, private, SPANS[:2]), FixedPointArithmetic(private)
    variables = {name: ops.encode(weight) for name, weight in weights.items()} | draw_masks(preparation)
    variables = run_steps(preparation.steps, ops, variables)
    digest = hashlib.sha256()
    for name in sorted([*preparation.masks, *preparation.products]):
        digest.update(name.encode() + np.ascontiguousarray(variables[name]).tobytes())
    assert (preparations.FORMAT, digest.hexdigest()[:16]) == (5, "0438c9834301d0cb")


@pytest.mark.parametrize("prepared", [SPANS, LONGER])
@pytest.mark.parametrize("notation", slow_but(QUICK, ARCHITECTURES))
def test_two_phases_give_the_same_numbers_to_the_last_bit(notation, prepared):
    config, weights = prepared_weights(notation, n_layer=2)
    tokens = np.random.default_rng(0).integers(2, 101, LENGTH + 2)
    private = PrivateSettings()
    expected = answers_in_one_phase(config, weights, private, SPANS, tokens)
    found = answers_in_two(config, weights, private, prepared, SPANS, tokens)
    for one, two in zip(expected, found, strict=True):
        assert np.array_equal(one, two)


def list_spans(length: int, new_tokens: int, answers: int) -> list[Span]:
    return [Span(0, length, answers), *(Span(length + index, 1) for index in range(new_tokens - 1))]


@pytest.mark.parametrize("notation", slow_but(["EReg(SM(t)+LN+G)"], ARCHITECTURES))
@pytest.mark.parametrize("most", [(5, 3, 1), (5, 1, 5), (5, 1, 2), (1, 3, 1)])
def test_a_preparation_serves_all_shorter_prompts_and_answers(notation, most):
    """To the last bit, from one token on."""
    config, weights = prepared_weights(notation, n_layer=2)
    tokens, private = np.random.default_rng(0).integers(2, 101, 8), PrivateSettings()
    for length, new_tokens, answers in itertools.product(*(range(1, size + 1) for size in most)):
        if answers > length:
            continue
        spans = list_spans(length, new_tokens, answers)
        expected = answers_in_one_phase(config, weights, private, spans, tokens)
        found = answers_in_two(config, weights, private, list_spans(*most), spans, tokens)
        assert all(np.array_equal(one, two) for one, two in zip(expected, found, strict=True))


@pytest.mark.parametrize("notation", ["SM(t)+ScFuFFN", "EReg(SM(t_h)+LN+G)"])
def test_forms_of_two_phases_answer_like_those_of_one(notation):
    config, weights = prepared_weights(notation, n_layer=2)
    tokens, private = np.random.default_rng(0).integers(2, 101, LENGTH + 2), PrivateSettings()
    forms = [answers_in_one_phase(config, weights, private, SPANS, tokens, form) for form in (True, False)]
    for prepared, one in zip(*forms, strict=True):
        assert np.abs(prepared - one).max() < 0.01


@pytest.mark.parametrize(
    "private",
    [
        PrivateSettings(embedding="client_table", answer="sampled", softmax="tuned", fraction_bits=16),
        pytest.param(PrivateSettings(softmax="stock", gelu="tanh"), marks=pytest.mark.slow),
        pytest.param(PrivateSettings(gelu="erf"), marks=pytest.mark.slow),
    ],
)
def test_every_setting_has_two_phases(private):
    pytest.importorskip("jax")
    config, weights = prepared_weights("SM+LN+G", n_layer=1)
    tokens, spans = np.random.default_rng(0).integers(2, 101, LENGTH), [Span(0, LENGTH, 3)]
    (one,) = answers_in_one_phase(config, weights, private, spans, tokens)
    (two,) = answers_in_two(config, weights, private, spans, spans, tokens)
    assert np.array_equal(one, two)


def test_what_is_prepared_for_less_is_refused():
    config, _ = prepared_weights("SM+ScFuFFN", n_layer=1)
    preparation = Preparation(config, PrivateSettings(), [Span(0, 9), Span(9, 1)])
    for number, span in ((0, Span(0, 10)), (0, Span(0, 9, 2)), (1, Span(10, 1)), (1, Span(9, 2)), (2, Span(10, 1))):
        with pytest.raises(PrivateInferenceError, match="the preparation is for less: it does not have what"):
            preparation.use(number, span)


def test_what_is_computed_before_a_product_with_a_weight_is_refused():
    ops = FixedPointArithmetic(PrivateSettings())
    with pytest.raises(TypeError, match="exp comes before a product with a weight"):
        MaskFactors(Bound.of(lambda ops, tensor: ops.matmul(ops.exp(tensor), tensor)), ())(ops, np.zeros((2, 2)))


def test_smaller_factors_are_covered_and_other_weights_are_not():
    weight = Demand(WEIGHTS, (8, 4), (4, 3))
    assert weight.covers(Demand(WEIGHTS, (5, 4), (4, 3)))
    assert not weight.covers(Demand(WEIGHTS, (5, 4), (4, 2)))
    assert not weight.covers(Demand(SCORES, (5, 4), (4, 3)))
    pair = Demand(VALUES, (2, 8, 6), (2, 6, 4))
    assert pair.covers(Demand(VALUES, (2, 5, 3), (2, 3, 4)))
    assert not pair.covers(Demand(VALUES, (2, 9, 3), (2, 3, 4)))
    assert not pair.covers(Demand(VALUES, (2, 5, 3), (2, 3, 4), is_causal=True))
    assert not Demand(NUMBERS, (4,), (4,)).covers(Demand(SQUARES, (4,)))


def test_rows_are_chosen_that_see_all_keys():
    """Of the last 2 of 3 queries of 7 tokens, and of the last one."""
    prepared = Demand(VALUES, (1, 3, 7), (1, 7, 2), is_causal=True)
    for length, queries, first in ((7, 2, 1), (4, 2, 0), (6, 1, 1)):
        demand = Demand(VALUES, (1, queries, length), (1, length, 2), is_causal=True)
        assert KeptTokens(length, 7, 0).choose_rows(prepared, demand) == slice(first, first + queries)


def run_on_the_engine(notation: str, protocol: str, log=None):
    """
    A prompt and a token after it in one phase, of the same forms, and in two, all parties in one process: logits of
    both, whether they were out of range, costs of the first phase and of the first pass after it, and their programs.
    """
    from entropy_gpt.evaluation.private_inference.parties.engine import compile_steps
    from entropy_gpt.evaluation.private_inference.parties.local import run_parties
    from entropy_gpt.evaluation.private_inference.parties.participant import (
        Participant,
        compile_preparation,
        compile_prepared_pass,
    )

    config, weights = prepared_weights(notation, n_layer=2)
    private, spans = PrivateSettings(protocol), SPANS[:2]
    tokens = np.random.default_rng(0).integers(2, 101, LENGTH + 1)
    preparation = Preparation(config, private, [Span(0, LENGTH + 3), Span(LENGTH + 3, 1)])
    before = compile_preparation(config, private, preparation)
    after = [compile_prepared_pass(private, preparation, *numbered) for numbered in enumerate(spans)]
    one = [
        compile_steps(
            build_steps(config, private, span, prepared=True), program_variables(config, private, span), private
        )
        for span in spans
    ]

    def take_part(link):
        party = Participant(link, config, private, weights, log if link.rank == SERVER else None)
        party.set_up()
        costs, seed, shares, second = [], bytes([link.rank]) * 32, [], []
        halves = party.prepare(before, preparation, seed, costs.append)
        party.load(preparation, seed, halves)
        # One phase last, since it uses up triples, which are predicted to be there.
        for program, span in zip((*after, *one), 2 * spans, strict=True):
            inputs = client_inputs(config, private, span, tokens[span.start : span.end], weights)
            second.append(party.infer(program, span, inputs if party.is_client else {}))
            shares += [party.party.share(LOGITS), party.party.share(OUT_OF_RANGE)]
        party.forget(preparation)
        return party, shares, costs, second[0]

    parties = run_parties(private, take_part)
    party, _, costs, second = parties[SERVER]
    shares = zip(*(shares for _, shares, _, _ in parties), strict=True)
    found = [party.party.reconstruct(list(parts)) for parts in shares]
    return found[0:4:2], found[4::2], found[1::2], (costs, second), (before, after[0])


@pytest.mark.slow
@pytest.mark.parametrize("notation", ["SM+ScFuFFN", "SM(t)+LN+G"])
def test_the_engine_without_a_protocol_gives_the_same_numbers(notation):
    pytest.importorskip("spu")
    two, one, out_of_range, *_ = run_on_the_engine(notation, "ref2k")
    for first, second in zip(two, one, strict=True):
        assert np.array_equal(first, second)
    assert not any(out_of_range)


@pytest.mark.slow
@pytest.mark.private
@pytest.mark.parametrize("notation", ["SM+ScFuFFN", "SM+LN+G", "EReg(SM(t)+ScFuFFNi1)"])
def test_two_parties_send_what_was_predicted_and_answer_alike(notation):
    pytest.importorskip("spu")
    from entropy_gpt.evaluation.private_inference.parties.engine import EngineLog

    two, one, out_of_range, costs, programs = run_on_the_engine(notation, "cheetah", EngineLog())
    for first, second in zip(two, one, strict=True):
        assert np.abs(first - second).max() < 0.02
    assert not any(out_of_range)
    for measured, program in zip(costs, programs, strict=True):
        predicted = sum(step.total_bytes for step in program)
        assert sum(step.total_bytes for step in measured) == pytest.approx(predicted, rel=0.1)
