"""The largest score of each row, by comparisons of pairs."""

import numpy as np

from .arithmetic import Arithmetic
from .visible import visible_keys


def subtract_maximum(ops: Arithmetic, visible, queries: int, keys: int):
    """Visible scores `(heads, visible)` less the largest one of their row."""
    mask = visible_keys(queries, keys)
    return visible - _largest(ops, visible, mask.sum(axis=1))[:, np.nonzero(mask)[0]]


def _largest(ops: Arithmetic, tensor, lengths: np.ndarray):
    """The largest of each part of the rows; the parts have these lengths, one after the other: `(heads, parts)`."""
    while lengths.max() > 1:
        starts, pairs = np.cumsum(lengths) - lengths, lengths // 2
        first = np.concatenate([start + 2 * np.arange(count) for start, count in zip(starts, pairs, strict=True)])
        larger = ops.larger(tensor[:, first], tensor[:, first + 1])
        # An odd part leaves one over, which goes behind the larger ones of its pairs.
        odd = np.flatnonzero(lengths % 2)
        tensor = ops.xp.concatenate([larger, tensor[:, (starts + lengths - 1)[odd]]], axis=1)
        lengths = pairs + lengths % 2
        places = np.argsort(np.concatenate([np.repeat(np.arange(len(pairs)), pairs), odd]), kind="stable")
        tensor = tensor[:, places]
    return tensor
