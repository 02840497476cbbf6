"""Which values of a parameter the default tests take, and which only the whole suite."""

from collections.abc import Collection, Iterable

import pytest


def slow_but(kept: Collection, values: Iterable) -> list:
    """The values of a parameter; tests of others than the kept ones are marked slow."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]
