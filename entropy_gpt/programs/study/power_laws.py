"""
Loss against tokens: power laws with a constant, where two curves cross, and what is known of that.

The spread of seeds is pooled over all rows. The mean of n seeds, or of one, has it divided by the square root of n as
its standard error. A repetition moves each mean at random by that much, and derives everything from the moved means.
An interval holds the middle 90 % of the repetitions: it says how far seeds move a value, and assumes the law.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


REPETITIONS, INSIDE = 2000, (5, 50, 95)
# Tokens that a law counts in, the exponents that are tried, and the fewest numbers of tokens that a law is fitted to:
# one more than it has parameters.
MILLION, EXPONENTS, FEWEST = 1e6, np.geomspace(0.02, 2, 600), 4


@dataclass(frozen=True)
class Curve:
    """
    Loss of one row at several numbers of tokens.

    Args:
        tokens (`np.ndarray`): Tokens of training, ascending, `(counts,)`.
        nats (`np.ndarray`): Mean over seeds of the loss, in nats of a token, `(counts,)`.
        repeated (`np.ndarray`): The same in each repetition, `(repetitions, counts)`.
        errors (`np.ndarray`): Standard errors of the means, `(counts,)`.
    """

    tokens: np.ndarray
    nats: np.ndarray
    repeated: np.ndarray
    errors: np.ndarray

    def at(self, tokens: float) -> np.ndarray:
        """The loss in each repetition, linear in the logarithm of tokens, `(repetitions,)`; NaN outside them."""
        if not self.tokens[0] <= tokens <= self.tokens[-1]:
            return np.full(len(self.repeated), math.nan)
        # A mean of the numbers of tokens around it.
        weights = [np.interp(math.log(tokens), np.log(self.tokens), row) for row in np.eye(len(self.tokens))]
        return self.repeated @ np.array(weights)

    @cached_property
    def laws(self) -> np.ndarray:
        """The fitted law of each repetition: constant, scale and exponent, `(repetitions, 3)`."""
        return fit(self.tokens, self.repeated, self.errors)

    def predict(self, tokens: float) -> np.ndarray:
        """The loss by the fitted law in each repetition, `(repetitions,)`."""
        floor, scale, exponent = self.laws.T
        return floor + scale * (tokens / MILLION) ** -exponent


@dataclass(frozen=True)
class Interval:
    """The middle of the repetitions, and where 90 % of them lie."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Crossing:
    """
    Where one curve crosses another.

    Args:
        rises (`bool`): Whether it is below the other first, and above it then.
        tokens (`np.ndarray`):
            The last such place in each repetition, `(repetitions,)`; infinite where it lies beyond the last number of
            tokens, 0 where it lies before the first.
    """

    rises: bool
    tokens: np.ndarray


def interval(values: np.ndarray) -> Interval:
    """Of the values in each repetition, those that are numbers or infinite."""
    return Interval(*np.nanpercentile(values, INSIDE, method="nearest"))


def pool_spread(groups: Sequence[Sequence[float]]) -> float:
    """The standard deviation over seeds, of all groups together; NaN where no group has two."""
    squares = sum((len(group) - 1) * np.var(group, ddof=1) for group in groups if len(group) > 1)
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(squares / freedom) if freedom else math.nan


def make_curve(losses: dict[int, Sequence[float]], spread: float, seed: int) -> Curve:
    """
    The curve of one row.

    Args:
        losses (`dict[int, Sequence[float]]`): Losses of its seeds, by tokens.
        spread (`float`): The standard deviation over seeds.
        seed (`int`): What the repetitions are drawn by; another for each row.
    """
    tokens = np.array(sorted(losses), dtype=float)
    nats = np.array([np.mean(losses[count]) for count in sorted(losses)])
    errors = spread / np.sqrt([len(losses[count]) for count in sorted(losses)])
    moved = np.random.default_rng(seed).standard_normal((REPETITIONS, len(tokens)))
    return Curve(tokens, nats, nats + errors * moved, errors)


def fit(tokens: np.ndarray, nats: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """
    Fits nats = floor + scale (tokens / million) ^ -exponent by weighted least squares, floor and scale not negative.

    Args:
        tokens (`np.ndarray`): `(counts,)`.
        nats (`np.ndarray`): `(repetitions, counts)`.
        errors (`np.ndarray`): `(counts,)`.

    Returns:
        `np.ndarray`: floor, scale and exponent, `(repetitions, 3)`.
    """
    weights = errors**-2 / np.sum(errors**-2)
    powers = (tokens / MILLION) ** -EXPONENTS[:, None]  # (exponents, counts)
    mean, means = powers @ weights, nats @ weights  # (exponents,), (repetitions,)
    products = (nats * weights) @ powers.T  # (repetitions, exponents)
    squares = (powers**2) @ weights
    scales = np.maximum(0, (products - means[:, None] * mean) / (squares - mean**2))
    floors = means[:, None] - scales * mean
    without = floors < 0
    scales = np.where(without, products / squares, scales)
    floors = np.where(without, 0, floors)
    # The weighted squares that are left, less those of the losses themselves, which all exponents have in common.
    left = (
        floors**2
        + scales**2 * squares
        - 2 * floors * means[:, None]
        - 2 * scales * products
        + 2 * floors * scales * mean
    )
    best = left.argmin(axis=1)
    rows = np.arange(len(nats))
    return np.stack([floors[rows, best], scales[rows, best], EXPONENTS[best]], axis=1)


def tell_apart(curve: Curve, other: Curve) -> tuple[np.ndarray, np.ndarray]:
    """
    Which of two curves is below the other, at the numbers of tokens that both have.

    Returns:
        The tokens, `(counts,)`; and -1 where the first is below, 1 where it is above, 0 where the interval of the
        difference holds 0, `(counts,)`.
    """
    common, differences = _subtract(curve, other)
    intervals = [interval(column) for column in differences.T]
    return common, np.array([int(each.low > 0) - int(each.high < 0) for each in intervals])


def find_crossing(curve: Curve, other: Curve) -> Crossing | None:
    """
    The place where a curve that is below another comes to be above it, or the reverse, on lines in the logarithm of
    tokens; `None` if intervals don't show that it is on one side first and on the other then.
    """
    _, sides = tell_apart(curve, other)
    sure = sides[sides != 0]
    if len(sure) == 0 or sure[0] == sure[-1]:
        return None
    common, differences = _subtract(curve, other)
    differences = differences * sure[-1]  # from negative to positive
    found = np.where(differences[:, -1] > 0, 0.0, math.inf)
    for index in range(len(common) - 1):
        before, after = differences[:, index], differences[:, index + 1]
        crossed = (before <= 0) & (after > 0) & np.isfinite(found)
        share = before[crossed] / (before - after)[crossed]
        found[crossed] = common[index] * (common[index + 1] / common[index]) ** share
    return Crossing(sure[-1] > 0, found)


def _subtract(curve: Curve, other: Curve) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that both have, `(counts,)`, and the differences in each repetition, `(repetitions, counts)`."""
    common, own, others = np.intersect1d(curve.tokens, other.tokens, return_indices=True)
    return common, curve.repeated[:, own] - other.repeated[:, others]
