"""Functions of single numbers: as near to what they stand for as they say."""

import numpy as np
import pytest
import torch

from entropy_gpt.evaluation.private_inference.program.arithmetic import Arithmetic
from entropy_gpt.evaluation.private_inference.program.fixed_point import FixedPointArithmetic
from entropy_gpt.evaluation.private_inference.program.nonlinear import (
    exponentiate,
    fine_gelu,
    piecewise_gelu,
)
from entropy_gpt.evaluation.private_inference.program.reciprocals import (
    MOST_BY_STEPS,
    reciprocal_by_chords,
    reciprocal_by_steps,
)
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings


def test_exponential_and_gelu_are_as_near_as_they_say():
    ops = Arithmetic(np)
    below = np.linspace(-12, 0, 100_001)[None]
    assert np.abs(exponentiate(ops, below) - np.exp(below)).max() < 6.3e-4
    assert np.abs(exponentiate(ops, np.linspace(-1e4, -7.45, 1000)[None])).max() < 1e-9
    numbers = torch.linspace(-30, 30, 100_001, dtype=torch.double)
    for approximate, fine in (("none", 6e-4), ("tanh", 1.2e-4)):
        gelu = torch.nn.functional.gelu(numbers, approximate=approximate).numpy()
        assert np.abs(piecewise_gelu(ops, numbers.numpy()) - gelu).max() < 2.5e-3
        assert np.abs(fine_gelu(ops, numbers.numpy()) - gelu).max() < fine


@pytest.mark.parametrize(
    ("form", "most"),
    [
        *((reciprocal_by_chords, most) for most in (1, 2, 3, 128, 1000)),
        *((reciprocal_by_steps, most) for most in (2, 3, 32, 128, MOST_BY_STEPS)),
    ],
)
def test_reciprocals_of_sums_are_as_near_as_they_say(form, most):
    sums = np.linspace(1, most, 10_001)[:, None]
    assert np.abs(form(Arithmetic(np), sums, most) * sums - 1).max() < 2.1e-4
    ring = FixedPointArithmetic(PrivateSettings())
    sums = ring.encode(sums)
    assert np.abs(form(ring, sums, most) * sums - 1).max() < 3e-4 + most * 2.0**-16
