"""The check inside the protocol: what it looks at, what it lets pass, and what it costs."""

import numpy as np
import pytest
import torch

from entropy_gpt.evaluation.benchmarks.range_check import predict_shares
from entropy_gpt.evaluation.private_inference.detection import (
    CORRUPTIONS,
    SHIFT,
    SHIFTED_BITS,
    measure_detection,
    measure_false_alarms,
)
from entropy_gpt.evaluation.private_inference.program.arithmetic import Arithmetic, checksum
from entropy_gpt.evaluation.private_inference.program.fixed_point import FixedPointArithmetic, emulate_variables
from entropy_gpt.evaluation.private_inference.program.program import (
    LOGITS,
    LOGITS_CHECKSUM,
    OUT_OF_RANGE,
    STREAM,
    bounds_name,
    build_steps,
    checked_parts,
    find_out_of_range,
    sum_alternating,
    sum_neighbours,
    sums_name,
)
from entropy_gpt.evaluation.private_inference.program.range_audit import audit, choose_sequences
from entropy_gpt.evaluation.private_inference.program.range_report import tolerated_error
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, run_steps
from entropy_gpt.evaluation.private_inference.program.variables import client_inputs
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from tests.architectures import ARCHITECTURES, make_config, make_model
from tests.slow import slow_but


LENGTH = 8


def audited(model) -> tuple:
    """Configuration and weights of the program, the audit's bounds, and the tolerated error."""
    config, weights = prepare_weights(model)
    report = audit(config, weights, PrivateSettings(), choose_sequences(config, weights))
    if report.problems:
        pytest.skip(f"No server would take this model: {report.problems[0]}")
    return config, weights, report.bounds, tolerated_error(report.typical_logit)


def prompts(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(2, 101, (count, LENGTH))


@pytest.mark.parametrize("notation", slow_but(["SM+ScFuFFN"], ARCHITECTURES))
def test_no_corrupted_run_is_returned_and_no_honest_one_stopped(notation):
    torch.manual_seed(0)
    model = make_model(notation)
    config, weights, bounds, tolerated = audited(model)
    found = list(measure_detection(notation, config, weights | bounds, prompts(2), 5, tolerated))
    assert len(found) == len(CORRUPTIONS) * config.n_layer
    assert {detection.runs for detection in found} == {5, 1}
    gross = [each for each in found if CORRUPTIONS[each.corruption].is_gross]
    assert sum(detection.other_logits + detection.other_token for detection in gross) == 0
    by_size = {bit: [each for each in found if each.corruption == SHIFT.format(bit=bit)] for bit in SHIFTED_BITS}
    assert not any(each.other_logits for each in by_size[min(SHIFTED_BITS)])
    assert not any(each.returned for each in by_size[max(SHIFTED_BITS)])
    honest = measure_false_alarms(notation, config, weights | bounds, prompts(100))
    assert honest.stopped == 0
    assert 0 < honest.nearest < 0.8


@pytest.mark.parametrize("settings", [PrivateSettings(), PrivateSettings(embedding="client_table", answer="token")])
@pytest.mark.parametrize("notation", slow_but(["SM+LN+G", "EReg(SM(t)+ScFuFFN)"], ARCHITECTURES))
def test_an_error_of_one_number_is_found_however_large_honest_ones_are(notation, settings):
    """After each sum of the stream, and of the logits: a twentieth of what the largest honest number is."""
    config, weights, bounds, _ = audited(make_model(notation))
    ops, random, (prompt,) = FixedPointArithmetic(settings), np.random.default_rng(0), prompts(1)
    steps = build_steps(config, settings, Span(0, LENGTH))
    inputs = client_inputs(config, settings, Span(0, LENGTH), prompt, weights)
    variables = {name: ops.encode(value) for name, value in (weights | bounds | inputs).items()}
    assert not run_steps(steps, ops, variables)[OUT_OF_RANGE]
    corrupted = 0
    for done, step in enumerate(steps, start=1):
        variables = run_steps([step], ops, variables)
        if step.outputs[0] not in (STREAM, LOGITS):
            continue
        numbers = variables[step.outputs[0]].copy()
        numbers[random.integers(len(numbers)), random.integers(config.n_embd)] += np.abs(numbers).max() / 20
        assert run_steps(steps[done:], ops, variables | {step.outputs[0]: numbers})[OUT_OF_RANGE], step
        corrupted += 1
    assert corrupted >= 2 + config.n_layer


@pytest.mark.parametrize("length", [LENGTH, 20])
@pytest.mark.parametrize("notation", ["SM+LN+G", "EReg(SM(t)+ScFuFFN)"])
def test_false_alarms_are_counted(notation, length):
    """With bounds as large as the sums of an honest run are, and a little smaller."""
    config, weights = prepare_weights(make_model(notation))
    prompt = np.random.default_rng(1).integers(2, 101, length)
    variables = emulate_variables(config, weights, PrivateSettings(), prompt, seed=2)
    sums = {bounds_name(part): np.abs(variables[sums_name(part)]).max(axis=0) for part in checked_parts(config)}
    larger, smaller = (
        {name: part * factor + margin for name, part in sums.items()} for factor, margin in ((1.02, 0.02), (0.9, 0))
    )
    found = measure_false_alarms(notation, config, weights | larger, prompt[None])
    assert (found.length, found.runs, found.stopped) == (length, 1, 0)
    assert found.nearest > 0.9
    assert measure_false_alarms(notation, config, weights | smaller, prompt[None]).stopped == 1


def test_without_bounds_corrupted_runs_are_returned():
    config, weights = prepare_weights(make_model("SM+LN+G"))
    found = list(measure_detection("SM+LN+G", config, weights, prompts(1), 1, 0.1))
    assert sum(detection.other_logits for detection in found) > len(found) / 3
    assert sum(detection.returned for detection in found) > len(found) / 3


def test_sums_and_bounds():
    ops, hidden = Arithmetic(np), np.arange(14.0).reshape(2, 7)
    sums = sum_neighbours(ops, hidden, 4)
    assert sums.tolist() == [[6, 15], [34, 36]]
    assert not find_out_of_range(ops, sums, np.array([34.0, 36.0]))
    assert find_out_of_range(ops, sums, np.array([33.5, 36.0]))
    assert find_out_of_range(ops, -sums, np.array([34.0, 35.5]))


def test_products_of_matrices_with_checksums_have_them_too():
    ops, random = Arithmetic(np), np.random.default_rng(0)
    rows, matrix = random.normal(size=(3, 5)), random.normal(size=(5, 7))
    product = ops.matmul(rows, ops.append_checksum(matrix))
    np.testing.assert_allclose(product[:, :-1], rows @ matrix)
    np.testing.assert_allclose(checksum(product[:, :-1]), product[:, -1:], atol=1e-9)
    for column in range(7):
        wrong = product.copy()
        wrong[1, column] += 1
        assert np.abs(checksum(wrong[:, :-1]) - wrong[:, -1:])[:, 0].round(9).tolist() == [0, 1, 0]


def test_what_all_logits_have_in_common_does_not_count():
    ops, logits = Arithmetic(np), np.random.default_rng(0).normal(size=(3, 640))
    np.testing.assert_allclose(sum_alternating(ops, logits + 100, 64), sum_alternating(ops, logits, 64), atol=1e-9)
    logits[1, 77] += 1000
    assert np.abs(sum_alternating(ops, logits, 64)).max() > 900


@pytest.mark.parametrize("answer", ["logits", "token", "sampled"])
@pytest.mark.parametrize("span", [Span(0, 5, 2), Span(5, 1)])
def test_every_pass_ends_with_a_check_of_stream_and_logits(answer, span):
    steps = build_steps(make_config("SM+LN+G"), PrivateSettings(answer=answer), span)
    assert steps[-1].outputs == (OUT_OF_RANGE,)
    looked_at = [step.inputs for step in steps if step.operation == "check"]
    logits = (LOGITS, LOGITS_CHECKSUM)
    assert looked_at[:-1] == [("visible",), ("visible",), (STREAM,), ("visible",), (STREAM,), logits]


def test_the_check_of_gpt2_small_takes_a_hundredth_of_the_bytes_and_less_of_the_round_trips():
    for share in predict_shares():
        assert 0 < share.check_bytes < 0.01 * share.total_bytes
        assert 0 < share.check_round_trips < 0.03 * share.total_round_trips
