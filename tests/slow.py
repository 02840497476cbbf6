"""Which values of a parameter the default tests take, and which only the whole suite."""

import itertools
from collections.abc import Collection, Iterable, Sequence

import pytest


def slow_but(kept: Collection, values: Iterable) -> list:
    """The values of a parameter; tests of others than the kept ones are marked slow."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


def slow_cases(*cases: tuple) -> list:
    """Cases of several parameters, for the whole suite alone."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def in_turn(*parameters: Sequence) -> list:
    """
    All combinations of the values of some parameters. The default tests take each value of the parameter that has
    most, with the values of the others in turn.
    """
    count = max(map(len, parameters))
    kept = {tuple(values[number % len(values)] for values in parameters) for number in range(count)}
    return [
        pytest.param(*case, marks=() if case in kept else pytest.mark.slow) for case in itertools.product(*parameters)
    ]
