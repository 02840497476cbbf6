"""Which keys a query may attend to, and numbers of these pairs alone, in rows of one after the other."""

import numpy as np

from .arithmetic import Arithmetic


def visible_keys(queries: int, keys: int) -> np.ndarray:
    """Which keys each of the last queries may attend to; public."""
    return np.tri(queries, keys, keys - queries, dtype=bool)


def put_apart(ops: Arithmetic, numbers, mask: np.ndarray):
    """Numbers `(heads, visible)` in their places of `(heads, *mask.shape)`, and 0 in all others."""
    # The place of each among the visible ones, or behind them, where a 0 is.
    places = np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, mask.sum())
    zero = ops.xp.zeros((len(numbers), 1), numbers.dtype)
    return ops.xp.concatenate([numbers, zero], axis=1)[:, places]
