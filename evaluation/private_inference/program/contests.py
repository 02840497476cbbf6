"""
The largest score of each row, by contests in which several scores meet at once.

A comparison waits for some ten round trips, and many side by side wait no longer. Of pairs, n scores need log2(n)
levels, one after the other. Where k scores meet at once, each with each, a level leaves one of k: more comparisons,
and fewer levels. The score that is less than no other one of its contest is kept, and the rest becomes 0.
"""

import functools
import math

import numpy as np

from .arithmetic import Arithmetic
from .counting import JOINED, JOINS, KEEPS, KEPT, ORDERED, ORDERS
from .forms import predict_seconds
from .visible import put_apart, visible_keys


# The most scores of a contest that are considered.
MOST_PLAYERS = 24


def subtract_maximum(ops: Arithmetic, visible, queries: int, keys: int, levels: tuple[int, ...]):
    """
    Visible scores `(heads, visible)` less the largest one of their row.

    Args:
        levels (`tuple[int]`): For each level, the most scores that meet in a contest, as of [`choose_levels`].
    """
    mask = visible_keys(queries, keys)
    largest, lengths = visible, mask.sum(axis=1)
    for most in levels:
        contests = -(-lengths // most)
        largest, lengths = hold_contests(ops, largest, seat(lengths, contests)), contests
    return visible - largest[:, np.nonzero(mask)[0]]


def seat(lengths: np.ndarray, contests: np.ndarray) -> np.ndarray:
    """How many scores each contest has, where rows of these lengths have contests of nearly the same size."""
    return np.repeat(lengths // contests, contests) + (_count_each(contests) < np.repeat(lengths % contests, contests))


def hold_contests(ops: Arithmetic, scores, players: np.ndarray):
    """The largest score of each contest `(heads, contests)`; players are the numbers of scores in each."""
    last = np.cumsum(players) - 1
    pairs = np.concatenate([_each_with_each(last[players == size], size) for size in np.unique(players)])
    is_less = ops.is_less(scores[:, pairs[:, 0]], scores[:, pairs[:, 1]])
    # All but the last of each contest: it is the largest if none of these is.
    others = np.setdiff1d(np.arange(scores.shape[1]), last)
    is_largest = _wins_all(ops, is_less, pairs, others)
    differences = scores[:, others] - scores[:, np.repeat(last, players - 1)]
    kept = put_apart(ops, ops.keep(differences, is_largest), np.arange(players.max() - 1) < players[:, None] - 1)
    return scores[:, last] + kept.sum(axis=-1)


def _each_with_each(last: np.ndarray, size: int) -> np.ndarray:
    """Pairs of the players of contests of a size, which end at these places."""
    pairs = np.stack(np.triu_indices(size, 1), axis=1) - (size - 1)
    return (last[:, None, None] + pairs).reshape(-1, 2)


def _wins_all(ops: Arithmetic, is_less, pairs: np.ndarray, players: np.ndarray):
    """
    Whether players are less than none that they meet `(heads, players)`.

    Args:
        is_less: Whether the first of each pair is less than the second `(heads, pairs)`.
        pairs (`np.ndarray`), players (`np.ndarray`): Their places; those of the players in order.
    """
    owners = pairs.T.reshape(-1)
    order = np.argsort(owners, kind="stable")
    order = order[np.isin(owners[order], players)]
    bits = ops.xp.concatenate([~is_less, is_less], axis=1)[:, order]
    _, lengths = np.unique(owners[order], return_counts=True)
    while lengths.max() > 1:
        starts, halves = np.cumsum(lengths) - lengths, lengths // 2
        first = np.repeat(starts, halves) + 2 * _count_each(halves)
        both = ops.both(bits[:, first], bits[:, first + 1])
        # An odd one is left over, and goes behind the pairs of its player.
        odd = np.flatnonzero(lengths % 2)
        places = np.argsort(np.concatenate([np.repeat(np.arange(len(halves)), halves), odd]), kind="stable")
        bits = ops.xp.concatenate([both, bits[:, (starts + lengths - 1)[odd]]], axis=1)[:, places]
        lengths = halves + lengths % 2
    return bits


def _count_each(numbers: np.ndarray) -> np.ndarray:
    """From 0 on, up to each of the numbers."""
    return np.arange(numbers.sum()) - np.repeat(np.cumsum(numbers) - numbers, numbers)


@functools.lru_cache(maxsize=4096)
def choose_levels(heads: int, queries: int, keys: int, network: str) -> tuple[int, ...]:
    """
    What takes least time on a network, by the cost model. How many scores are left in a row depends on the product of
    the levels before alone.
    """
    rows, found = np.arange(keys - queries, keys) + 1, {}

    def find(product: int) -> tuple[float, tuple[int, ...]]:
        """The seconds and the levels from there on."""
        if product >= keys:
            return 0.0, ()
        if product not in found:
            lengths, options = -(-rows // product), []
            for most in range(2, min(MOST_PLAYERS, lengths.max()) + 1):
                seconds, levels = find(product * most)
                options.append((seconds + _predict_level(heads, lengths, most, network), (most, *levels)))
            found[product] = min(options)
        return found[product]

    return find(1)[1]


def _predict_level(heads: int, lengths: np.ndarray, most: int, network: str) -> float:
    """Seconds of one level."""
    players = seat(lengths, -(-lengths // most))
    others = players - 1
    parts = {ORDERED: players * others / 2, JOINED: others * (others - 1), KEPT: others}
    waits = {ORDERS: 1, JOINS: math.ceil(math.log2(max(1, others.max()))), KEEPS: 1}
    return predict_seconds({part: heads * float(count.sum()) for part, count in parts.items()}, waits, network)
