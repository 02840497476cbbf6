"""The ring in numpy: what its arithmetic rounds and loses, what an audit finds, and that the engine agrees."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program import (
    attention_functions,
    contests,
    nonlinear,
    program,
    reciprocals,
)
from entropy_gpt.evaluation.private_inference.program.fixed_point import (
    ERF_BOUND,
    FixedPointArithmetic,
    emulate,
    exact_logits,
    exact_variables,
)
from entropy_gpt.evaluation.private_inference.program.range_audit import MOST_WINDOWS, audit, bound, choose_sequences
from entropy_gpt.evaluation.private_inference.program.range_report import largest_radicand, lowest_exponent
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, Step, run_steps
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from tests.architectures import ARCHITECTURES, make_model, make_tokens
from tests.slow import slow_but


EXACT_ERRORS = {"ref2k": (-0.5, 0.5), "semi2k": (-1, 1), "aby3": (-1, 1), "cheetah": (-2, 1)}
FLOATS = st.floats(-500, 500, width=32)
BITS = st.integers(12, 20)


def arithmetic(fraction_bits: int = 18, protocol: str = "ref2k", **fields) -> FixedPointArithmetic:
    return FixedPointArithmetic(PrivateSettings(protocol=protocol, fraction_bits=fraction_bits, **fields))


def spread(low: float, high: float, count: int = 4000) -> np.ndarray:
    """Numbers of every order of magnitude."""
    return np.exp(np.linspace(math.log(low), math.log(high), count))


def prepared(notation: str = "SM+LN+G", seed: int = 0, **fields):
    torch.manual_seed(seed)
    return prepare_weights(make_model(notation, **fields))


def sequences(*lengths: int) -> list[np.ndarray]:
    return [make_tokens(1, length)[0].numpy() for length in lengths]


def scaled(weights: dict, name: str, factor: float) -> dict:
    return {**weights, name: weights[name] * np.float32(factor)}


@given(FLOATS, BITS)
def test_encoding_cuts_off_what_is_behind_the_last_bit(number, bits):
    encoded = arithmetic(bits).encode(number)
    assert abs(encoded) <= abs(number) < abs(encoded) + 2.0**-bits
    assert encoded * 2**bits % 1 == 0
    assert arithmetic(bits).encode(encoded) == encoded


@given(FLOATS, FLOATS, BITS, st.sampled_from(sorted(EXACT_ERRORS)))
@settings(deadline=None)
def test_products_err_by_the_last_bit(left, right, bits, protocol):
    ops = arithmetic(bits, protocol)
    left, right = ops.encode(np.full(100, left)), ops.encode(np.full(100, right))
    low, high = EXACT_ERRORS[protocol]
    for product in (ops.multiply(left, right), ops.matmul(left[:, None], right[None])[0]):
        assert np.all(product * 2**bits % 1 == 0)
        assert low <= np.min((product - left[0] * right[0]) * 2**bits)
        assert np.max((product - left[0] * right[0]) * 2**bits) <= high


def test_a_sum_of_products_is_rounded_once():
    ops = arithmetic(12)
    numbers = ops.encode(np.random.default_rng(0).normal(size=(2, 500)))
    assert ops.matmul(*numbers) == pytest.approx(numbers[0] @ numbers[1], abs=2**-13)


@pytest.mark.parametrize(("protocol", "bias"), [("ref2k", 0), ("semi2k", 0), ("aby3", 0), ("cheetah", -0.5)])
def test_bias_of_the_last_bit(protocol, bias):
    ops = arithmetic(18, protocol)
    numbers = ops.encode(np.random.default_rng(0).normal(size=100_000))
    assert ((ops.scale(numbers, 0.7) - numbers * ops.encode(0.7)) * 2**18).mean() == pytest.approx(bias, abs=0.01)


@pytest.mark.parametrize("squarings", range(4, 10))
@pytest.mark.parametrize("bits", [14, 18, 21])
def test_exponential_over_its_range(bits, squarings):
    numbers = np.linspace(lowest_exponent(squarings, bits), 0, 5000)
    errors = arithmetic(bits, exponential_squarings=squarings).exp(numbers) - np.exp(numbers)
    assert np.abs(errors).max() < 0.28 / 2**squarings + 2.0 ** (squarings - bits)


def test_exponential_beyond_its_range():
    lowest = -(2.0**7)
    at_end, below = arithmetic(exponential_squarings=6).exp(np.array([lowest, lowest - 16]))
    assert at_end == 1
    assert below > 1000
    assert lowest < lowest_exponent(6, 18)


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("bits", [12, 15, 18, 22])
def test_reciprocal_over_its_range(bits, iterations):
    ops = arithmetic(bits, reciprocal_iterations=iterations)
    # With many fraction bits, the reciprocal of the smallest numbers does not fit into the ring.
    numbers = ops.encode(spread(max(2.0 ** (1 - bits), 2.0 ** (2 * bits - 60)), 2.0**bits * 0.99))
    relative = 0.0858 ** (2**iterations)
    for sign in (-1, 1):
        found = ops.reciprocal(sign * numbers)
        assert np.all(np.abs(found * sign - 1 / numbers) < (relative + 6 * 2.0**-bits) / numbers + 2.0**-bits)
    found = ops.divide(np.full_like(numbers, 3), numbers)
    assert np.all(np.abs(found - 3 / numbers) < 3 * (relative + 7 * 2.0**-bits) / numbers + 2.0**-bits)


def test_there_is_no_reciprocal_of_0_and_of_large_numbers():
    assert arithmetic().reciprocal(np.array([0.0, 2.0**18])).tolist() == [0, 0]


@pytest.mark.parametrize("bits", [12, 13, 18, 21])
def test_reciprocal_root_over_its_range(bits):
    ops = arithmetic(bits)
    numbers = ops.encode(spread(2.0 ** (2 - bits), largest_radicand(bits) * 0.99))
    assert ops.reciprocal_root(np.array([largest_radicand(bits)])) == 0
    errors = np.abs(ops.reciprocal_root(numbers) * np.sqrt(numbers) - 1)
    # The polynomial errs by 2e-4; its coefficients multiply the last bit, and the power of 2 has half the bits.
    assert np.all(errors < 4e-4 + 100 * 2.0**-bits + 2.0 ** (1 - bits // 2) + np.sqrt(numbers) * 2.0**-bits)


def test_tanh_and_erf_over_their_range():
    ops = arithmetic()
    numbers = np.linspace(-50, 50, 20001)
    assert np.abs(ops.tanh(numbers) - np.tanh(numbers)).max() < 0.02
    exact = np.vectorize(math.erf)(numbers)
    assert np.abs(ops.erf(numbers) - exact).max() < 1e-3
    assert np.all(np.abs(ops.erf(numbers[np.abs(numbers) > ERF_BOUND])) == 1)


@pytest.mark.parametrize("bits", [12, 18])
def test_the_ring_wraps_around(bits):
    ops = arithmetic(bits)
    largest = 2.0 ** (31 - bits)
    assert ops.square(np.array([largest * 0.7])) == pytest.approx(largest**2 * 0.49)
    assert ops.overflows == 0
    assert ops.square(np.array([largest * 1.5])) == pytest.approx(largest**2 * (2.25 - 4))
    assert ops.overflows == 1
    ops.encode(2.0 ** (63 - bits))
    assert ops.overflows == 2


@pytest.mark.parametrize("notation", ARCHITECTURES)
@pytest.mark.parametrize("softmax", ["efficient", "stock"])
def test_exact_logits_are_the_models_own(notation, softmax):
    torch.manual_seed(0)
    model, (tokens,) = make_model(notation), sequences(17)
    found = exact_logits(*prepare_weights(model), PrivateSettings(softmax=softmax), tokens, answers=17)
    with torch.no_grad():
        expected = model.double()(torch.tensor(tokens)[None]).logits[0].numpy()
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("embedding", ["one_hot", "client_table"])
@pytest.mark.parametrize("answer", ["logits", "token", "sampled"])
def test_emulated_logits_are_near_the_models_own(embedding, answer):
    config, weights = prepared("SM+R")
    (tokens,) = sequences(17)
    chosen = PrivateSettings(embedding=embedding, answer=answer)
    found, exact = (compute(config, weights, chosen, tokens, answers=5) for compute in (emulate, exact_logits))
    assert found.shape == (5, config.vocab_size)
    assert 0 < np.abs(found - exact).max() < 0.1
    assert np.abs(emulate(config, weights, chosen, tokens, seed=1) - exact[-1:]).max() < 0.1


@pytest.mark.parametrize("softmax", ["efficient", "stock", "tuned"])
def test_a_model_that_fits(softmax):
    config, weights = prepared()
    report = audit(config, weights, PrivateSettings(softmax=softmax), sequences(17, 9))
    assert report.problems == []
    assert (report.recommended_fraction_bits, report.recommended_squarings) == (18, 8)
    assert (report.positions, report.agreement) == (26, 1)
    assert 0 < report.typical_error < report.largest_error < 0.06
    assert report.rounding_error < 0.02
    ranges = {(tensor.name, tensor.role): tensor for tensor in report.tensors}
    assert ranges["wte", "weight"].most == weights["wte"].max()
    assert ranges["norm", "radicand"].least > 0
    if softmax != "efficient":
        assert ranges["layer 1, softmax", "divisor"].least > 0.99
    assert ranges["head", "value"].size > 1


def test_an_overflow_is_named():
    config, weights = prepared("SM+R")
    report = audit(config, scaled(weights, "h.1.ffn.weight", 2e4), PrivateSettings(), sequences(17))
    assert "layer 2, scores: " in report.problems[0]
    assert "(product) does not fit with 18 fraction bits, where 6.7e+07 is the limit" in report.problems[0]
    assert not any(line.startswith(("layer 0", "layer 1")) for line in report.problems)


def test_fewer_fraction_bits_where_they_make_room():
    config, weights = prepared("SM+R")
    weights = scaled(weights, "head.weight", 5e6)
    report = audit(config, weights, PrivateSettings(), sequences(17))
    (problem,) = report.problems
    assert problem.startswith("head: ")
    bits = report.recommended_fraction_bits
    assert 12 <= bits < 18
    assert f"use --fraction-bits {bits}" in problem
    fitting = audit(config, weights, PrivateSettings(fraction_bits=bits), sequences(17))
    assert not any("does not fit" in line for line in fitting.problems)


def test_more_fraction_bits_where_a_root_needs_them():
    config, weights = prepared("SM+LN+R")
    report = audit(config, scaled(weights, "wte", 100), PrivateSettings(fraction_bits=12), sequences(17))
    problem = report.problems[0]
    assert problem.startswith("layer 0, norm: ")
    assert "(radicand) does not fit with 12 fraction bits, where 2e+03 is the limit" in problem
    assert f"use --fraction-bits {report.recommended_fraction_bits}" in problem
    assert 12 < report.recommended_fraction_bits <= 18


def test_a_model_that_no_settings_fit():
    config, weights = prepared("SM+LN+G")
    report = audit(config, scaled(weights, "h.1.ffn.weight", 1e8), PrivateSettings(), sequences(17))
    assert report.recommended_fraction_bits is None
    assert "use another model" in report.problems[0]
    too_large = audit(config, scaled(weights, "h.0.qkv.weight", 1e14), PrivateSettings(), sequences(3))
    assert too_large.problems[0].startswith("h.0.qkv.weight: ")


def test_more_fraction_bits_where_precision_is_lost():
    config, weights = prepared()
    report = audit(config, scaled(weights, "h.2.output.weight", 1e-4), PrivateSettings(), sequences(17))
    (problem,) = report.problems
    assert problem.startswith("h.2.output.weight: numbers of about")
    assert f"use --fraction-bits {report.recommended_fraction_bits}" in problem
    assert report.recommended_fraction_bits > 18
    (problem,) = audit(config, weights, PrivateSettings(fraction_bits=11), sequences(17)).problems
    assert problem.startswith("logits: rounding makes errors of ")
    assert "use --fraction-bits 1" in problem


def test_more_squarings_for_scores_that_are_far_apart():
    config, weights = prepared()
    weights = scaled(weights, "h.1.qkv.weight", 8)
    report = audit(config, weights, PrivateSettings(softmax="stock", exponential_squarings=6), sequences(17))
    problems = [line for line in report.problems if "exp(" in line]
    assert [line.split(":")[0] for line in problems] == ["layer 1, softmax"]
    assert "out of reach of 6 squarings" in problems[0]
    assert f"use exponential_squarings={report.recommended_squarings}" in problems[0]
    assert report.recommended_squarings > 8


def test_an_audit_without_tokens():
    with pytest.raises(PrivateInferenceError, match="an audit needs a sequence"):
        audit(*prepared(), PrivateSettings(), [])


def with_one_large_embedding(notation: str, factor: float) -> tuple:
    """One token in a thousand, which 256 random tokens miss, has an embedding so large; the head does not show it."""
    config, weights = prepared(notation, vocab_size=1000)
    weights["wte"][777] *= factor
    return config, weights


@pytest.mark.parametrize(
    ("notation", "factor"), [("SM+R", 300), pytest.param("SM+ScFuFFN", 1000, marks=pytest.mark.slow)]
)
def test_an_audit_finds_the_one_token_that_is_too_large(notation, factor):
    config, weights = with_one_large_embedding(notation, factor)
    random = np.random.default_rng(0).integers(0, config.vocab_size, (4, 64))
    assert not audit(config, weights, PrivateSettings(), random).problems
    problem = audit(config, weights, PrivateSettings(), choose_sequences(config, weights)).problems[0]
    assert "token 777" in problem and "use another model" in problem


def test_an_audit_looks_at_every_position():
    torch.manual_seed(0)
    model = make_model("EReg(SM(t)+ScFuFFN)", n_positions=128)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.temperature.log_temperature[:, 64:] = -22
    config, weights = prepare_weights(model)
    assert audit(config, weights, PrivateSettings(), choose_sequences(config, weights)).problems


def test_an_audit_looks_at_sums_that_only_a_preparation_leaves_undivided():
    config, weights = prepared("SM", n_embd=128, n_head=2, n_positions=64)
    chosen = PrivateSettings(network="WAN")
    span = Span(0, 64, 64)
    operations = [
        [step.operation for step in program.build_steps(config, chosen, span, late)] for late in (False, True)
    ]
    assert operations[0] != operations[1]
    tensors = audit(config, weights, chosen, sequences(64)).tensors
    values, undivided = (
        next(tensor.size for tensor in tensors if (tensor.name, tensor.role) == (f"layer 0, {name}", "value"))
        for name in ("query, key, value", "values")
    )
    assert undivided > values  # a mean is not
    config, weights = prepared(vocab_size=1000)
    weights["wte"][123] *= 9
    weights["wte"][321] /= 9
    everywhere, extremes, first, second = choose_sequences(config, weights, text=range(100))
    assert len(everywhere) == len(extremes) == config.n_positions
    assert {123, 321} <= {*extremes.tolist()}
    assert np.concatenate([first, second]).tolist() == [*range(100)]
    assert len(choose_sequences(config, weights, text=range(1000))) == 2 + MOST_WINDOWS


def test_errors_that_would_be_noticed_are_a_problem():
    """Weights of such scores fit the ring, but not what is approximated."""
    config, weights = prepared("SM+LN+G")
    report = audit(config, weights, PrivateSettings(), choose_sequences(config, weights))
    assert report.problems == report.warnings == []
    worse = replace(report, largest_error=4.03, agreement=0.984)
    (problem,) = worse.problems
    assert problem.startswith("logits: an error of 4 was found, 0.")
    assert "the same at 98.4% of the positions; use another model" in problem
    assert "use --fraction-bits 19 or more" in replace(worse, rounding_error=worse.typical_error).problems[0]
    assert replace(report, largest_error=math.nan).problems
    (warning,) = replace(report, agreement=0.984).warnings
    assert "another most likely token at 1.6%" in warning


def with_massive_activation(size: float, **fields) -> tuple:
    """As trained models with LayerNorm have it: one number of the stream, at position 0, is far above all others."""
    config, weights = prepared("SM+LN+G", **fields)
    weights["wpe"][0, 7] = size
    return config, weights


@pytest.mark.slow
@pytest.mark.parametrize(("size", "margin"), [(1000, 4), (3000, 2.7), (6000, 1.37)])
def test_a_stream_as_large_as_gpt2s_fits(size, margin):
    config, weights = with_massive_activation(size, n_embd=768, n_head=12, n_layer=1)
    report = audit(config, weights, PrivateSettings(), choose_sequences(config, weights))
    assert any("layer 0, norm: " in line for line in report.problems) == (size == 6000)
    assert report.margin == pytest.approx(margin, rel=0.02)


@pytest.mark.parametrize(
    ("size", "bits", "advice"),
    [
        (1000, 17, "use --fraction-bits 18."),
        (3000, 18, "convert the model to one without LayerNorm (entropy-gpt convert)."),
        pytest.param(6000, 18, "convert the model to one without LayerNorm", marks=pytest.mark.slow),
        pytest.param(6000, 20, "convert the model to one without LayerNorm", marks=pytest.mark.slow),
    ],
)
def test_a_refusal_names_the_number_of_the_stream_that_is_too_large(size, bits, advice):
    config, weights = with_massive_activation(size, n_layer=1)
    with pytest.raises(PrivateInferenceError, match=r"the model does not fit the ring: layer 0, norm: ") as refused:
        bound(config, weights, PrivateSettings(fraction_bits=bits))
    said = str(refused.value)
    assert re.search(rf"\(the stream reaches {size // 1000},0\d\d at position 0, token \d+, column 7\); ", said)
    assert advice in said


OPERATIONS = {
    "multiply": lambda ops, x, y: ops.multiply(x, y),
    "matmul": lambda ops, x, y: ops.matmul(x.reshape(20, 50), y.reshape(50, 20)),
    "scale": lambda ops, x, y: ops.scale(x, 0.044715),
    "square": lambda ops, x, y: ops.square(y),
    # Of so many numbers in whole ciphertexts, and the rest apart.
    "long square": lambda ops, x, y: ops.square(ops.xp.concatenate([y] * 17)),
    "product with one number": lambda ops, x, y: ops.scale_all(x, y[:1]),
    "contests": lambda ops, x, y: contests.hold_contests(ops, y.reshape(20, 50), np.array([7, 1, 12, 2, 28])),
    "reciprocal of a sum": lambda ops, x, y: reciprocals.reciprocal_by_chords(ops, sums(ops, y), 99),
    "reciprocal by steps": lambda ops, x, y: reciprocals.reciprocal_by_steps(ops, sums(ops, y), 99),
    "exponential": lambda ops, x, y: nonlinear.exponentiate(ops, (y - ops.positive_part(y))[None]),
    "reciprocal of a wide sum": lambda ops, x, y: attention_functions.reciprocal_between(ops, wide_sums(ops, x)),
    "exp": lambda ops, x, y: ops.exp(y - ops.positive_part(y) - ops.positive_part(y)),
    "reciprocal": lambda ops, x, y: ops.reciprocal(x),
    "divide": lambda ops, x, y: ops.divide(y, x),
    "reciprocal root": lambda ops, x, y: ops.reciprocal_root(ops.positive_part(x)),
    "at most": lambda ops, x, y: ops.at_most(x, 0.3),
    "tanh": lambda ops, x, y: ops.tanh(x),
    "erf": lambda ops, x, y: ops.erf(x),
    "GELU by tanh": lambda ops, x, y: nonlinear.tanh_gelu(ops, y),
    "GELU by erf": lambda ops, x, y: nonlinear.erf_gelu(ops, y),
    "LayerNorm": lambda ops, x, y: program.normalize(ops, y.reshape(20, 50), 1e-5),
}


def sums(ops, y):
    """A column of numbers from 1 to 99."""
    return ops.at_most(ops.multiply(y, y), 98.0)[:, None] + 1.0


def wide_sums(ops, x):
    """A column of numbers over all of the range of attention's sums."""
    least, most = attention_functions.LEAST_SUM, attention_functions.MOST_SUM
    return ops.at_most(ops.positive_part(x), most - least)[:, None] + least


def every_operation(ops, x, y):
    return tuple(operation(ops, x, y) for operation in OPERATIONS.values())


def on_the_engine(chosen: PrivateSettings, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """Every operation, without a protocol."""
    libspu = pytest.importorskip("spu").libspu
    from entropy_gpt.evaluation.private_inference.parties.engine import Party, compile_steps
    from entropy_gpt.evaluation.private_inference.program.counting import make_shape

    description = libspu.link.Desc()
    description.add_party("alone", "thread")
    party = Party(libspu.link.create_mem(description, 0), chosen)
    step = Step("a step", None, every_operation, ("x", "y"), tuple(OPERATIONS))
    (compiled,) = compile_steps([step], {"x": make_shape(x.shape), "y": make_shape(y.shape)}, chosen)
    party.set_own("x", x)
    party.set_own("y", y)
    party.run(compiled)
    return [party.reconstruct([party.share(name)]) for name in OPERATIONS]


@pytest.mark.private
@pytest.mark.parametrize("bits", slow_but([18], [13, 18, 21]))
@pytest.mark.parametrize("softmax", slow_but(["efficient"], ["stock", "efficient"]))
def test_operations_are_the_engines_to_the_last_bit(softmax, bits):
    random = np.random.default_rng(bits)
    x, y = random.normal(size=(2, 1000)).astype(np.float32) * 3
    x *= np.exp(random.uniform(-6, 9, 1000)).astype(np.float32)
    # With the efficient softmax, the engine's exponential has one squaring.
    chosen = PrivateSettings("ref2k", bits, softmax, exponential_squarings=8 if softmax == "stock" else 1)
    ops = FixedPointArithmetic(chosen)
    found = every_operation(ops, ops.encode(x), ops.encode(y))
    for name, mine, engines in zip(OPERATIONS, found, on_the_engine(chosen, x, y), strict=True):
        assert np.array_equal(np.float32(mine), engines), name


class UnmergedArithmetic(FixedPointArithmetic):
    """Refuses what the engine's compiler would merge: the product with a public number of just such a product."""

    def __init__(self, chosen: PrivateSettings):
        super().__init__(chosen)
        self._scaled = []

    def scale(self, tensor, constant):
        assert not any(tensor is scaled for scaled in self._scaled)
        self._scaled.append(super().scale(tensor, constant))
        return self._scaled[-1]


@pytest.mark.parametrize("notation", slow_but(["SM+LN+G", "EReg(Pow4(t_h)+ScFuFFN)"], ARCHITECTURES))
@pytest.mark.parametrize("softmax", slow_but(["efficient"], ["efficient", "stock", "tuned"]))
@pytest.mark.parametrize("gelu", slow_but(["piecewise"], ["piecewise", "tanh", "erf"]))
def test_no_step_multiplies_by_two_public_numbers_in_a_row(gelu, softmax, notation):
    """One product with both has fewer bits: reciprocals of large sums erred by 15 % where the engine did so."""
    chosen = PrivateSettings(softmax=softmax, gelu=gelu)
    (tokens,) = sequences(5)
    config, weights = prepared(notation, n_layer=2)
    variables = exact_variables(config, weights, chosen, tokens)
    ops = UnmergedArithmetic(chosen)
    steps = program.build_steps(config, chosen, Span(0, 5))
    run_steps(steps, ops, {name: ops.encode(value) for name, value in variables.items()})


@pytest.mark.private
@pytest.mark.parametrize("notation", slow_but(["EReg(SM(t)+ScFuFFN)"], ARCHITECTURES))
def test_emulated_logits_are_the_engines(notation):
    assert_the_engine_agrees(*prepared(notation, n_layer=2), PrivateSettings(protocol="ref2k"))


@pytest.mark.slow
@pytest.mark.private
@pytest.mark.parametrize(
    ("notation", "fields", "bits"),
    [
        *(("SM+LN+G", {"gelu": "tanh", "embedding": "client_table"}, bits) for bits in (12, 20)),
        *(("SM+LN+G", {"gelu": "erf", "softmax": "stock", "exponential_squarings": 6}, bits) for bits in (12, 15)),
        *(("SM+R", {}, bits) for bits in (15, 20)),
        *(
            ("SM+R", {"softmax": "tuned", "exponential_squarings": 4, "reciprocal_iterations": 3}, bits)
            for bits in (12, 20)
        ),
    ],
)
def test_emulated_logits_are_the_engines_with_other_settings(notation, fields, bits):
    chosen = PrivateSettings(protocol="ref2k", fraction_bits=bits, **fields)
    assert_the_engine_agrees(*prepared(notation, seed=bits, n_layer=1), chosen)


@pytest.mark.slow
@pytest.mark.private
@pytest.mark.parametrize(
    ("softmax", "protocol"),
    [("efficient", "cheetah"), ("efficient", "semi2k"), ("efficient", "aby3"), ("stock", "semi2k")],
)
def test_the_chance_of_protocols_is_as_large_as_it_is_said_to_be(protocol, softmax):
    config, weights = prepared("SM+LN+G", n_layer=1)
    assert_the_engine_agrees(config, weights, PrivateSettings(protocol, 15, softmax, exponential_squarings=6))


def assert_the_engine_agrees(config, weights: dict, chosen: PrivateSettings):
    pytest.importorskip("spu")
    from entropy_gpt.evaluation.private_inference.parties.local import infer_locally

    # One number in a thousand decides about the largest error of a sequence, so several are looked at.
    prompts = sequences(*[12] * (1 if chosen.protocol == "ref2k" else 3))
    answers = infer_locally(config, weights, chosen, [tokens.tolist() for tokens in prompts], answers=12).answers
    errors, emulated_errors = [], []
    for tokens, engines in zip(prompts, answers, strict=True):
        emulated, exact = (compute(config, weights, chosen, tokens, answers=12) for compute in (emulate, exact_logits))
        if chosen.protocol == "ref2k":
            assert np.array_equal(np.float32(emulated), engines)
        errors.append(engines - exact)
        emulated_errors.append(emulated - exact)
    for size in (lambda tensor: np.abs(tensor).max(), lambda tensor: np.sqrt(np.square(tensor).mean())):
        found, expected = (np.median([size(tensor) for tensor in tensors]) for tensors in (errors, emulated_errors))
        assert found / 3 < expected < found * 3
