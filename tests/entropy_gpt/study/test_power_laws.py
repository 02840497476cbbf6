"""Power laws, crossings and intervals, on losses that are made up with known ones."""

import math
from dataclasses import replace

import numpy as np
import pytest

from entropy_gpt.programs.study.power_laws import (
    EXPONENTS,
    MILLION,
    Curve,
    find_crossings,
    fit,
    interval,
    make_curve,
    pool_spread,
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
    found = find_crossings(better_at_first, better_later)
    assert np.isfinite(found).mean() > 0.99
    assert interval(found).low < truth < interval(found).high
    assert interval(found).middle == pytest.approx(truth, rel=0.1)
    apart = find_crossings(curve((2.0, 2.0, 0.3), seed=1), curve((2.5, 2.7, 0.3), seed=2))
    assert np.isnan(apart).all()


def test_intervals_hold_what_they_say():
    noise = np.random.default_rng(0)
    held = np.zeros(2)
    for seed in range(40):
        noisy = curve((2.0, 3.0, 0.4), seed=seed, noise=noise)
        noisy = replace(noisy, repeated=noisy.repeated[:200])
        for index, (values, tokens) in enumerate(((noisy.predict(2.1e9), 2.1e9), (noisy.at(3e7), 3e7))):
            found = interval(values)
            held[index] += found.low <= law(2.0, 3.0, 0.4, tokens) <= found.high
    assert (held >= 32).all() and (held <= 40).all()


def test_a_single_seed_is_as_uncertain_as_the_others_say():
    lone = curve((2.0, 3.0, 0.4))
    np.testing.assert_allclose(lone.errors, SPREAD / np.sqrt([3, 3, 2, 1]))
    assert np.std(lone.repeated[:, 3]) == pytest.approx(SPREAD, rel=0.1)
    assert np.isnan(lone.at(31 * MILLION)).all() and np.isfinite(lone.at(5 * MILLION)).all()


def test_the_spread_is_pooled():
    assert pool_spread([[1.0, 3.0], [5.0], [2.0, 2.0, 2.0]]) == pytest.approx(math.sqrt(2 / 3))
    assert math.isnan(pool_spread([[1.0], [2.0]]))
