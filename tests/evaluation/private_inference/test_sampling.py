"""How a client draws tokens: at home from logits, and by its noise where it learns tokens alone."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import chisquare

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.costs.cost_model import predict
from entropy_gpt.evaluation.private_inference.costs.measured_inference import make_config
from entropy_gpt.evaluation.private_inference.parties.question import check_sampling
from entropy_gpt.evaluation.private_inference.parties.sampling import GREEDY, Noise, Sampling, choose, draw_noise
from entropy_gpt.evaluation.private_inference.program.fixed_point import FixedPointArithmetic, emulate
from entropy_gpt.evaluation.private_inference.program.program import LOGITS, NOISE, TOKEN, build_steps
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, run_steps
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from tests.architectures import make_model


SAMPLED = PrivateSettings(answer="sampled")
DRAWS = 4000


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """`(1, vocabulary)`, as the emulated ring has them."""
    torch.manual_seed(0)
    config, weights = prepare_weights(make_model("SM+R", n_layer=1))
    weights["head.weight"] /= 8
    return emulate(config, weights, SAMPLED, np.arange(2, 9))


def argmax_step():
    steps = build_steps(make_model("SM+R", n_layer=1).config, SAMPLED, Span(0, 7))
    (step,) = (step for step in steps if step.operation == "argmax")
    return step


def drawn_by_noise(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Tokens of the program's own step in the emulated ring, for many draws at once."""
    ops, rows = FixedPointArithmetic(SAMPLED), np.repeat(logits, DRAWS, axis=0)
    noise = draw_noise(rows.shape, Sampling(temperature), np.random.default_rng(0))
    return run_steps([argmax_step()], ops, {LOGITS: rows, NOISE: ops.encode(noise)})[TOKEN]


def drawn_at_home(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    noise = draw_noise((DRAWS, logits.shape[1]), sampling, np.random.default_rng(0))
    return np.array([choose(logits[0], sampling, row) for row in noise])


def agreement(tokens: np.ndarray, logits: np.ndarray, temperature: float, most: int | None = None) -> float:
    """The probability of counts as far as these from those of the softmax in the clear; rare tokens are one."""
    order = np.argsort(-logits[0])[:most]
    shares = torch.from_numpy(logits[0][order] / temperature).softmax(0).numpy()
    counts = np.bincount(tokens, minlength=logits.shape[1])[order]
    assert counts.sum() == DRAWS
    often = shares * DRAWS >= 5
    expected, found = ([*part[often], part[~often].sum()] for part in (shares * DRAWS, counts))
    if not expected[-1]:
        expected, found = expected[:-1], found[:-1]
    return chisquare(found, expected).pvalue


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0])
def test_noise_draws_as_often_as_sampling_in_the_clear(logits, temperature):
    tokens = drawn_by_noise(logits, temperature)
    assert len(np.unique(tokens)) > 2
    assert agreement(tokens, logits, temperature) > 0.01
    assert agreement(tokens, logits, 1.5 * temperature) < 1e-6


@pytest.mark.parametrize("most", [None, 5])
def test_tokens_drawn_at_home_are_as_frequent_as_they_are_likely(logits, most):
    tokens = drawn_at_home(logits, Sampling(1.0, top_k=most))
    assert agreement(tokens, logits, 1.0, most) > 0.01


def test_top_k_comes_before_top_p():
    logits = np.log(np.array([[0.1, 0.4, 0.3, 0.2]]))
    noise = draw_noise((200, 4), Sampling(1.0), np.random.default_rng(0))
    # Of the three most likely, the first two have 7/9: enough for 0.75, but not of all four, which would be 0.7.
    drawn = {choose(logits[0], Sampling(1.0, top_k=3, top_p=0.75), row) for row in noise}
    assert drawn == {1, 2}
    assert {choose(logits[0], Sampling(1.0, top_k=1), row) for row in noise} == {1}
    with pytest.raises(ValidationError, match="top_k"):
        Sampling(1.0, top_k=0)


def test_without_temperature_there_is_no_noise_and_a_seed_repeats_it():
    assert not draw_noise((2, 9), GREEDY, np.random.default_rng()).any()
    first, second = (draw_noise((2, 9), Sampling(1.0), np.random.default_rng(5)) for _ in range(2))
    assert (first == second).all() and first.any()


def test_noise_of_a_token_is_the_same_whenever_it_is_asked_for():
    at_once, again = (Noise(Sampling(1.0, seed=5), 9) for _ in range(2))
    rows = at_once.rows(0, 6)
    assert np.array_equal(again.rows(0, 2), rows[:2])
    assert np.array_equal(again.rows(1, 5), rows[1:])
    assert np.array_equal(again.rows(2, 1), rows[2:3])
    assert len(np.unique(rows)) == rows.size


@pytest.mark.parametrize(
    ("answer", "sampling", "said"),
    [
        ("token", Sampling(0.5), "temperature=0.5 is not possible: .*--answer sampled"),
        ("sampled", Sampling(0.5, top_k=9), "top_k=9 is not possible: .* Use the temperature alone"),
        ("sampled", Sampling(0.5, top_p=0.9), "top_p=0.9 is not possible: .* Use the temperature alone"),
        ("sampled", Sampling(1e9), r"temperature=1e\+09 is not possible: 1000 is the most"),
    ],
)
def test_what_a_server_without_logits_cannot_do(answer, sampling, said):
    with pytest.raises(PrivateInferenceError, match=said):
        check_sampling(PrivateSettings(answer=answer), sampling)


@pytest.mark.parametrize(
    ("answer", "sampling"),
    [
        ("logits", Sampling(9e9, top_k=2, top_p=0.1)),
        ("token", GREEDY),
        ("sampled", Sampling(1.0)),
        ("sampled", GREEDY),
    ],
)
def test_what_a_server_can_do(answer, sampling):
    check_sampling(PrivateSettings(answer=answer), sampling)


def test_noise_costs_nothing():
    config = make_config("SM+ScFuFFN", 32, n_layer=1, n_embd=64, n_head=2, vocab_size=1000)
    drawn, likely = (predict(config, PrivateSettings(answer=answer), Span(0, 16)) for answer in ("sampled", "token"))
    assert sum(step.total_bytes for step in drawn) == sum(step.total_bytes for step in likely)
    assert sum(step.round_trips for step in drawn) == sum(step.round_trips for step in likely)


def test_noise_of_its_own_choice_gives_a_client_the_logits(logits):
    """What the page says of a client that deviates: two tokens are compared, and their difference is halved in on."""
    ops, step, one, other = FixedPointArithmetic(SAMPLED), argmax_step(), 11, 77
    low, high, asked = -64.0, 64.0, 0
    while high - low > 0.01:
        noise = np.full(logits.shape, -1000.0)
        noise[0, one], noise[0, other] = 0.0, (low + high) / 2
        chosen = run_steps([step], ops, {LOGITS: logits, NOISE: ops.encode(noise)})[TOKEN][0]
        low, high, asked = (*((low, noise[0, other]) if chosen == other else (noise[0, other], high)), asked + 1)
    assert (low + high) / 2 == pytest.approx(logits[0, one] - logits[0, other], abs=0.01)
    assert asked == 14
