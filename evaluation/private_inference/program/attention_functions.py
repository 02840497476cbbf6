"""
Attention without a maximum in a private program: powers and the clamped exponential, and a reciprocal of wide range.

Numbers come as the weights prepare them ([`prepare_function`]): for a power n, `u = 1 + (score - shift) / n`, of which
`max(u, 0) ** n` is the weight; for the clamped exponential, the score less its shift and its upper bound, so that 0 is
the largest that counts. Each weight gets the model's floor of its row (modeling_entropy_gpt/attention_functions.py):
so the reciprocal has a least argument. Where fewer bits are kept behind the point, a floor is at least `LEAST_BITS`
last bits, since truncation may take one.
"""

from collections.abc import Callable

import numpy as np

from .arithmetic import LEAST_BITS, Arithmetic
from .nonlinear import exponentiate
from .reciprocals import CHORD_SCALE


POWERS = {"power4": 4, "power2": 2}
# As in the model: where it clamps, and the floors of a row's sum and of each weight.
LOWEST, HIGHEST = -7.4, 3.0
LEAST_SUM, LEAST_WEIGHT = 2.0**-8, 2.0**-17
# Doublings of the clamped exponential, which bring its sums to about 1.
DOUBLINGS = 4
# Binary logarithms of the range of sums that the reciprocal takes, and with them each private inference's own check.
LEAST_LOG, MOST_LOG = round(np.log2(LEAST_SUM)), 10
MOST_SUM = 2.0**MOST_LOG


def prepare_function(function: str, scaling: float, shift) -> tuple[float, object]:
    """What queries are multiplied by, and what is added to scores, `(heads, positions)`, for a function of a model."""
    if function == "clamped":
        return scaling, -shift - HIGHEST
    return scaling / POWERS[function], 1 - shift / POWERS[function]


def cheap_exponential(ops: Arithmetic, numbers):
    """exp from -14.8 to 0, by two comparisons and three squares: the square of a half's."""
    return ops.square(exponentiate(ops, ops.scale(numbers, 0.5)))


def weigh_scores(ops: Arithmetic, numbers, function: str, exponential: Callable = cheap_exponential):
    """
    The function of numbers of any shape: of power4 one comparison and two squares, of power2 one and one, of the
    clamped exponential two comparisons and an exponential.
    """
    if function == "clamped":
        clamped = ops.positive_part(ops.at_most(numbers, 0.0) + ops.public(HIGHEST - LOWEST))
        weights = exponential(ops, clamped - ops.public(HIGHEST - LOWEST))
        for _ in range(DOUBLINGS):
            weights = weights + weights
        return weights
    weights = ops.square(ops.positive_part(numbers))
    return ops.square(weights) if POWERS[function] == 4 else weights


def weigh_visible_scores(ops: Arithmetic, visible, rows: np.ndarray, function: str):
    """Weights of visible scores `(heads, visible)`, of which each belongs to a row; none is 0."""
    keys = np.bincount(rows)
    return weigh_scores(ops, visible, function) + weight_floors(ops, keys[rows], function)


def weight_floors(ops: Arithmetic, keys: np.ndarray, function: str):
    """What is added to each weight of rows that see this many keys: whole last bits."""
    floors = np.maximum(LEAST_SUM / keys, LEAST_WEIGHT)
    if function == "clamped":
        floors = floors * (2**DOUBLINGS * np.exp(-HIGHEST))
    return ops.public(np.maximum(np.ceil(floors / ops.last_bit), LEAST_BITS) * ops.last_bit)


def reciprocal_between(ops: Arithmetic, sums):
    """
    1 / x of columns of numbers from `LEAST_SUM` to `MOST_SUM`, within 2.1e-4 of it: chords between powers of 2, added
    up from the largest down, so that what a small number is made of does not cancel, and one step of third order.
    """
    powers = 2.0 ** np.arange(LEAST_LOG + 1, MOST_LOG + 1)
    slopes = 1.5 * CHORD_SCALE * powers**-2
    slopes[-1] *= 4 / 3  # behind which there is no chord
    bends = ops.positive_part(powers - ops.ranged(sums, MOST_SUM))
    # Slopes far below 1 are taken in two parts, which have the bits that they lack; others at once, so that the last
    # bit of a 0 is not multiplied. The first part is one product of all: of two products in a row with public numbers
    # the engine's compiler makes one, and these slopes would lack their bits again.
    is_large = powers > 1.0
    first = ops.scale(bends, np.where(is_large, 1 / powers, slopes))
    small = first[..., ~is_large].sum(axis=-1, keepdims=True)
    large = ops.scale(first[..., is_large], (slopes * powers)[is_large]).sum(axis=-1, keepdims=True)
    estimate = small + large + ops.public(CHORD_SCALE / MOST_SUM)
    error = 1.0 - ops.multiply(sums, estimate)
    return ops.multiply(estimate, 1.0 + error + ops.square(error))


def whole_weights(ops: Arithmetic, scores, visible: np.ndarray, function: str, per_row: bool):
    """Attention weights of scores `(heads, queries, keys)`, divided one by one or with one reciprocal for each row."""
    weights = weigh_scores(ops, scores, function, exponential=lambda ops, numbers: ops.exp(numbers))
    weights = weights + weight_floors(ops, visible.sum(axis=1, keepdims=True), function)
    weights = ops.xp.where(visible, weights, 0.0)
    sums = weights.sum(axis=-1, keepdims=True)
    return ops.multiply(weights, ops.reciprocal(sums)) if per_row else ops.divide(weights, sums)
