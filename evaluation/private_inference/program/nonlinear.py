"""The non-linear functions of single numbers, in the forms that send least: comparisons, squares and lines."""

import numpy as np

from .arithmetic import Arithmetic


# exp(x) from x = -7.4 to 0, by two comparisons and two squares: with u = max(x + EXP_BENDS[0], 0), v = max(x +
# EXP_BENDS[1], 0) and q = (EXP_INNER (u, v) + EXP_SHIFT)^2 + EXP_MIDDLE (u, v) + EXP_CONSTANT it is
# q^2 + EXP_OUTER (u, v), less what that is for u = v = 0. Fitted to the least largest error, 6.2e-4, which trained
# models hardly notice: of two, at 128 tokens, 1023 in 1024 most likely tokens stayed the same, and perplexities to
# 2e-4 of them.
EXP_BENDS = (7.443062637742506, 2.504870299882945)
EXP_INNER, EXP_SHIFT = (-0.13665166043822496, 0.4693018508627517), 0.16591457375358323
EXP_MIDDLE, EXP_CONSTANT = (0.0, 0.30060851359661667), 0.0029208727842226757
EXP_OUTER = (0.002757497837690257, 0.09512614424340396)
# GELU(x) = ReLU(x) - p(u) with u = min(|x|, 3.3) and p the polynomial of degree 4 that is nearest, and 0 at 3.3. With
# v = GELU_SLOPE u + GELU_SHIFT it is p = -((v^2 + GELU_SQUARE)^2 + GELU_LINEAR v + GELU_CONSTANT).
GELU_BOUND = 3.3
GELU_SLOPE, GELU_SHIFT = 0.3777780668836579, -0.8330145716979632
GELU_SQUARE, GELU_LINEAR, GELU_CONSTANT = -0.21878836646562239, 0.17917759105886627, -0.07639067708182529
# Degree 8, not 0 at its end: q = (v^2 + FINE_INNER)^2 + FINE_MIDDLE (v, 1) and p = q^2 + FINE_OUTER (v^2, v, 1).
FINE_BOUND = 3.8
FINE_SLOPE, FINE_SHIFT = 0.30812359334976314, -0.9088541478893041
FINE_INNER, FINE_MIDDLE = -0.5112167443241215, (0.21462289509977858, -0.4640370578216004)
FINE_OUTER = (-0.28647581700744773, 0.04416789387057613, -0.0367051143386775)
LEAKY_RELU_SLOPE = 0.01


def exponentiate(ops: Arithmetic, visible):
    """
    exp of numbers `(heads, visible)` that are not positive, within 7e-4, and 0 below -7.4: two comparisons and two
    squares.
    """
    bent = ops.positive_part(ops.xp.concatenate([visible + ops.public(bend) for bend in EXP_BENDS]))
    ends = ops.xp.stack([bent[: len(visible)], bent[len(visible) :]], axis=-1)
    combined = ops.combine(ends, np.stack([EXP_INNER, EXP_MIDDLE, EXP_OUTER], axis=-1))
    inner, middle, outer = (combined[..., place] for place in range(3))
    square = ops.square(inner + ops.public(EXP_SHIFT))
    power = ops.square(square + middle + ops.public(EXP_CONSTANT))
    return power + outer - ops.public((EXP_SHIFT**2 + EXP_CONSTANT) ** 2)


def relu(ops: Arithmetic, inner):
    return ops.positive_part(inner)


def leaky_relu(ops: Arithmetic, inner):
    return ops.scale(inner, LEAKY_RELU_SLOPE) + ops.scale(ops.positive_part(inner), 1 - LEAKY_RELU_SLOPE)


def learnable_leaky_relu(ops: Arithmetic, inner, positive, slope):
    """Of numbers and their positive parts."""
    return positive + ops.scale_all(inner - positive, slope)


def piecewise_gelu(ops: Arithmetic, inner):
    """Two comparisons and two squares; within 0.0025 of GELU."""
    positive, shifted = _bounded_size(ops, inner, GELU_BOUND, GELU_SLOPE, GELU_SHIFT)
    fourth = ops.square(ops.square(shifted) + ops.public(GELU_SQUARE))
    return positive + fourth + ops.scale(shifted, GELU_LINEAR) + ops.public(GELU_CONSTANT)


def fine_gelu(ops: Arithmetic, inner):
    """Two comparisons and three squares; within 0.00012 of GELU by tanh, and 0.0006 of the exact one."""
    positive, shifted = _bounded_size(ops, inner, FINE_BOUND, FINE_SLOPE, FINE_SHIFT)
    square = ops.square(shifted)
    fourth = ops.square(square + ops.public(FINE_INNER)) + ops.scale(shifted, FINE_MIDDLE[0])
    eighth = ops.square(fourth + ops.public(FINE_MIDDLE[1]))
    rest = ops.scale(square, FINE_OUTER[0]) + ops.scale(shifted, FINE_OUTER[1]) + ops.public(FINE_OUTER[2])
    return positive - eighth - rest


def _bounded_size(ops: Arithmetic, inner, bound: float, slope: float, shift: float):
    """ReLU(x), and min(|x|, bound) on a line."""
    positive = ops.positive_part(inner)
    size = ops.at_most(positive + positive - inner, bound)
    return positive, ops.scale(size, slope) + ops.public(shift)


def tanh_gelu(ops: Arithmetic, inner):
    cubed = ops.multiply(ops.square(inner), inner)
    bounded = ops.tanh(ops.scale(inner + ops.scale(cubed, 0.044715), (2 / np.pi) ** 0.5))
    return ops.multiply(ops.scale(inner, 0.5), 1.0 + bounded)


def erf_gelu(ops: Arithmetic, inner):
    return ops.multiply(ops.scale(inner, 0.5), 1.0 + ops.erf(ops.scale(inner, 0.5**0.5)))
