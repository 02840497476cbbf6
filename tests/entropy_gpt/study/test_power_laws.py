"""Power laws, crossings and intervals, on losses that are made up with known ones."""

import math
from dataclasses import replace

import numpy as np
import pytest

from entropy_gpt.programs.study.power_laws import (
    EXPONENTS,
    MILLION,
    Curve,
    find_crossing,
    fit,
    interval,
    make_curve,
    pool_spread,
    tell_apart,
)


TOKENS = np.array([1, 3, 10, 30]) * MILLION
SEEDS = dict(zip(TOKENS, (3, 3, 2, 1), strict=True))
SPREAD = 0.01


def law(floor: float, scale: float, exponent: float, tokens=TOKENS):
    return floor + scale * (np.asarray(tokens) / MILLION) ** -exponent


def curve(parameters, spread: float = SPREAD, seed: int = 0, noise: np.random.Generator | None = None) -> Curve:
    """Of losses by a law, with noise of the seeds if there is a generator for it."""
    losses = {}
    for count in TOKENS:
        moved = noise.normal(0, spread, SEEDS[count]) if noise else np.zeros(SEEDS[count])
        losses[int(count)] = law(*parameters, count) + moved
    return make_curve(losses, spread, seed)


@pytest.mark.parametrize("parameters", [(2.0, 3.0, 0.3), (0.0, 5.0, 0.1), (1.0, 3.5, 0.9)])
def test_a_law_is_found_again(parameters):
    (found,) = fit(TOKENS, law(*parameters)[None], np.full(4, SPREAD))
    np.testing.assert_allclose(law(*found), law(*parameters), atol=1e-3)
    assert found[2] == pytest.approx(parameters[2], rel=0.05)


def test_neither_floor_nor_scale_is_negative():
    falling = np.array([[4.0, 3.0, 1.9, 0.7], [1.0, 2.0, 3.0, 4.0]])
    floors, scales, _ = fit(TOKENS, falling, np.full(4, SPREAD)).T
    assert (floors >= 0).all() and (scales >= 0).all()
    assert floors[0] == 0 and scales[1] == 0


def test_a_fit_agrees_with_least_squares_over_all_exponents():
    nats = law(1.5, 3.0, 0.4) + np.array([0.02, -0.03, 0.01, 0.02])
    errors = SPREAD / np.sqrt([3, 3, 2, 1])
    (found,) = fit(TOKENS, nats[None], errors)
    best = math.inf
    for exponent in EXPONENTS:
        matrix = np.stack([np.ones(4), (TOKENS / MILLION) ** -exponent], axis=1) / errors[:, None]
        solution, *_ = np.linalg.lstsq(matrix, nats / errors, rcond=None)
        best = min(best, np.sum((matrix @ solution - nats / errors) ** 2))
    assert np.sum(((law(*found) - nats) / errors) ** 2) == pytest.approx(best, rel=1e-6)


def test_a_crossing_is_found_with_an_interval():
    better_at_first, better_later = curve((2.5, 2.0, 0.3), seed=1), curve((2.0, 2.7, 0.3), seed=2)
    truth = MILLION * (0.7 / 0.5) ** (1 / 0.3)
    found = find_crossing(better_at_first, better_later)
    assert found.rises and not find_crossing(better_later, better_at_first).rises
    assert interval(found.tokens).low < truth < interval(found.tokens).high
    assert interval(found.tokens).middle == pytest.approx(truth, rel=0.1)
    apart, other = curve((2.0, 2.0, 0.3), seed=1), curve((2.5, 2.7, 0.3), seed=2)
    assert find_crossing(apart, other) is None
    assert tell_apart(apart, other)[1].tolist() == [-1] * 4


def test_a_crossing_near_the_end_is_open_there():
    late = make_curve(dict(zip(TOKENS, [[3.0], [2.8], [2.6], [2.518]], strict=True)), SPREAD, 1)
    other = make_curve(dict(zip(TOKENS, [[3.2], [2.9], [2.63], [2.5]], strict=True)), SPREAD / 2, 2)
    found = find_crossing(late, other)
    if found is None:  # by chance, the last difference is not told from 0
        found = find_crossing(replace(late, nats=late.nats + 0.01, repeated=late.repeated + 0.01), other)
    assert np.isinf(found.tokens).any()
    assert interval(found.tokens).low > 10 * MILLION


def test_equal_curves_do_not_cross():
    noise = np.random.default_rng(0)
    law_of_both = (2.0, 3.0, 0.4)
    pairs = [[curve(law_of_both, seed=2 * n + side, noise=noise) for side in (0, 1)] for n in range(60)]
    assert sum(find_crossing(*pair) is not None for pair in pairs) <= 6


def test_intervals_hold_as_much_as_they_say():
    """Of a mean: 90 %, no less and no more, where a spread of twice or half the size would be seen."""
    noise = np.random.default_rng(0)
    held, repetitions = 0, 300
    for seed in range(repetitions):
        noisy = curve((2.0, 3.0, 0.4), seed=seed, noise=noise)
        found = interval(noisy.at(3e7))
        held += found.low <= law(2.0, 3.0, 0.4, 3e7) <= found.high
    assert 0.85 < held / repetitions < 0.95


def test_predictions_hold_the_truth_if_the_law_is_exact():
    noise = np.random.default_rng(0)
    held, repetitions = 0, 60
    for seed in range(repetitions):
        noisy = curve((2.0, 3.0, 0.4), seed=seed, noise=noise)
        found = interval(replace(noisy, repeated=noisy.repeated[:200]).predict(2.1e9))
        held += found.low <= law(2.0, 3.0, 0.4, 2.1e9) <= found.high
    assert 0.75 < held / repetitions < 0.99


def test_a_single_seed_is_as_uncertain_as_the_others_say():
    lone = curve((2.0, 3.0, 0.4))
    np.testing.assert_allclose(lone.errors, SPREAD / np.sqrt([3, 3, 2, 1]))
    assert np.std(lone.repeated[:, 3]) == pytest.approx(SPREAD, rel=0.1)
    assert np.isnan(lone.at(31 * MILLION)).all() and np.isfinite(lone.at(5 * MILLION)).all()


def test_the_spread_is_pooled():
    assert pool_spread([[1.0, 3.0], [5.0], [2.0, 2.0, 2.0]]) == pytest.approx(math.sqrt(2 / 3))
    assert math.isnan(pool_spread([[1.0], [2.0]]))
