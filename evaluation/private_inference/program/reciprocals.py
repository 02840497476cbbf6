"""
The reciprocals of sums of softmax, which lie between 1 and the number of keys, in two forms.

Chords take one batch of comparisons. Chebyshev's steps take none, but more products: they are for few rows, where
waiting costs most.
"""

import math

import numpy as np

from .arithmetic import Arithmetic


# The chord of 1/x between a power of 2 and the next is up to 1/8 above it: lowered to err nearly as much on each side.
# Slopes of few bits are exact in the ring: large sums leave small estimates.
CHORD_SCALE = 241 / 256
# What Chebyshev's steps may leave of 1 - x y: one step of Newton's makes the square of it.
LEFT_BY_STEPS = 0.01
# The largest sum that they are for: of larger ones, their last factor has too few bits.
MOST_BY_STEPS = 256


def reciprocal_by_chords(ops: Arithmetic, sums, most: int):
    """
    1 / x of columns of numbers from 1 to `most`, within 2.1e-4 of it: chords between powers of 2, with a bend at each,
    and one step of third order. Half the bytes of the engine's reciprocal, which has to find the power of 2 first.
    """
    estimate = ops.public(1.5 * CHORD_SCALE) - ops.scale(sums, 0.5 * CHORD_SCALE)
    if most > 2:
        powers = 2.0 ** -np.arange(1, math.ceil(math.log2(most)))
        bends = ops.positive_part(ops.scale(sums, powers) - 1.0)
        estimate = estimate + ops.combine(bends, 1.5 * CHORD_SCALE * powers[:, None])
    error = 1.0 - ops.multiply(sums, estimate)
    return ops.multiply(estimate, 1.0 + error + ops.square(error))


def reciprocal_by_steps(ops: Arithmetic, sums, most: int):
    """
    1 / x of columns of numbers from 1 to `most`, within 2.1e-4 of it, without a comparison; `most` is at least 2, and
    at most `MOST_BY_STEPS`.

    With z = (most + 1 - 2 x) / (most - 1), the Chebyshev polynomial T_n(z) and its value c at x = 0, 1 - T_n(z) / c is
    x times a polynomial that is near 1 / x. From n to 2n, T becomes 2 T^2 - 1, and c times the polynomial becomes
    2 (c + T) times itself: both are one product, and the twos are left to the end. A step of Newton's takes away what
    rounding has added up.
    """
    size = (most + 1) / (most - 1)
    scaled = ops.scale(sums, 2 / (most - 1))
    # The engine's compiler makes one constant of two in a row.
    chebyshev, inverse = ops.public(size) - scaled, ops.public(2 * size) - scaled
    chebyshev, size, factor = _double(ops.square(chebyshev)), _double(size**2), 4 / (most - 1)
    while size * LEFT_BY_STEPS < 1:
        products = ops.multiply(
            ops.xp.concatenate([chebyshev, inverse]),
            ops.xp.concatenate([chebyshev, chebyshev + ops.public(size)]),
        )
        chebyshev, inverse = _double(products[: len(chebyshev)]), products[len(chebyshev) :]
        size, factor = _double(size**2), 2 * factor
    estimate = ops.scale(inverse, factor / size)
    return ops.multiply(estimate, 2.0 - ops.multiply(sums, estimate))


def _double(square):
    """T_2n of the square of T_n."""
    return square + square - 1.0
