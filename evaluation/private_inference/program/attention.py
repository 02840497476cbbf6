"""Attention in a program: heads, scores, softmax, and the sums of values by its weights."""

from collections.abc import Callable

import numpy as np

from .arithmetic import Arithmetic
from .attention_functions import reciprocal_between, weigh_visible_scores, whole_weights
from .linear import linear
from .visible import put_apart, visible_keys


# Below any score, in the search for the largest of a row: it is compared, and nothing else.
MASKED_SCORE = -(2.0**20)


def split_heads(ops: Arithmetic, hidden, weight, bias, *kept, heads: int, queries: int, is_apart: bool):
    """
    Queries of the last rows `(heads, queries, head size)`, and keys and values of all `(heads, keys, head size)`, from
    hidden states `(length, width)` or the stream. Keys and values kept from before come in front. Queries are a
    product of their own where `is_apart`.
    """
    width = weight.shape[0]
    if is_apart:
        query = linear(ops, hidden[-queries:], weight[:, :width], bias[:width])
        key_value = linear(ops, hidden, weight[:, width:], bias[width:])
    else:
        mapped = linear(ops, hidden, weight, bias)
        query, key_value = mapped[:, :width], mapped[:, width:]
    query, key, value = (
        part.reshape(part.shape[0], heads, -1).swapaxes(0, 1)
        for part in (query, key_value[:, :width], key_value[:, width:])
    )
    if kept:
        key = ops.xp.concatenate([kept[0], key], axis=1)
        value = ops.xp.concatenate([kept[1], value], axis=1)
    return query, key, value


def scale_queries(ops: Arithmetic, query, inverse_temperature, start: int, early: int):
    """Queries from position `start` on, but for the `early` first ones, times `(heads, positions)`."""
    end = start + query.shape[1]
    scaled = ops.multiply(query[:, early:], inverse_temperature[:, start + early : end, None])
    return ops.xp.concatenate([query[:, :early], scaled], axis=1) if early else scaled


def score(ops: Arithmetic, query, key):
    return ops.score(query, key)


def whole_softmax(ops: Arithmetic, scores, per_row: bool):
    """As `jax.nn.softmax` of masked scores, with a division of every number or with one reciprocal for each row."""
    visible = visible_keys(*scores.shape[1:])
    largest = ops.largest(ops.xp.where(visible, scores, MASKED_SCORE))
    exponentials = ops.exp(ops.xp.where(visible, scores - largest, 0.0))
    exponentials = ops.xp.where(visible, exponentials, 0.0)
    sums = exponentials.sum(axis=-1, keepdims=True)
    return ops.multiply(exponentials, ops.reciprocal(sums)) if per_row else ops.divide(exponentials, sums)


def weigh_and_merge(ops: Arithmetic, weights, value):
    return _merge(ops.weigh(weights, value))


def score_visible(ops: Arithmetic, query, key):
    """The scores of keys that their query may attend to, in one row a head: `(heads, visible)`."""
    scores = score(ops, query, key)
    heads, queries, keys = scores.shape
    return scores.reshape(heads, queries * keys)[:, np.flatnonzero(visible_keys(queries, keys))]


def score_shifted(ops: Arithmetic, query, key, shift, start: int):
    """Scores `(heads, queries, keys)` with what is added to those of each head and position, from `start` on."""
    return score(ops, query, key) + shift[:, start : start + query.shape[1], None]


def score_visible_shifted(ops: Arithmetic, query, key, shift, start: int):
    """The same of keys that their query may attend to, in one row a head: `(heads, visible)`."""
    rows = np.nonzero(visible_keys(query.shape[1], key.shape[1]))[0]
    return score_visible(ops, query, key) + shift[:, start + rows]


def visible_weights(ops: Arithmetic, visible, function: str, queries: int, keys: int):
    """Weights, before division, of visible scores `(heads, visible)`."""
    return weigh_visible_scores(ops, visible, np.nonzero(visible_keys(queries, keys))[0], function)


def whole_attention(ops: Arithmetic, scores, function: str, per_row: bool):
    """Attention weights of all scores `(heads, queries, keys)`."""
    return whole_weights(ops, scores, visible_keys(*scores.shape[1:]), function, per_row)


def scale_scores(ops: Arithmetic, visible, inverse_temperature, queries: int, keys: int, early: int):
    """Visible scores, those of the `early` first rows times `(heads, positions)`, from the first query's position."""
    mask, start = visible_keys(queries, keys), keys - queries
    count = mask[:early].sum()
    scaled = _scale_early(ops, visible[:, :count], mask[:early], inverse_temperature[:, start : start + early])
    return ops.xp.concatenate([scaled, visible[:, count:]], axis=1)


def _scale_early(ops: Arithmetic, visible, mask: np.ndarray, factors):
    """
    Visible scores `(heads, visible)` of the rows of a mask, less the first one of their row, which softmax does not
    notice, times the row's factor of `(heads, rows)`.
    """
    rows, columns = np.nonzero(mask)
    differences = visible - visible[:, np.flatnonzero(columns == 0)[rows]]
    rest = np.flatnonzero(columns)
    if not len(rest):
        return differences
    scaled = ops.multiply(differences[:, rest], factors[:, rows[rest]])
    zero = ops.xp.zeros((len(visible), 1), visible.dtype)
    return ops.xp.concatenate([zero, scaled], axis=1)[:, np.where(columns, np.cumsum(columns > 0), 0)]


def weigh_visible(ops: Arithmetic, visible, value, queries: int):
    """Sums of values by exponentials `(heads, queries, head size)`, and of exponentials `(heads, queries, 1)`."""
    exponentials = put_apart(ops, visible, visible_keys(queries, value.shape[1]))
    return ops.weigh(exponentials, value, is_causal=True), exponentials.sum(axis=-1, keepdims=True)


def divide_and_merge(ops: Arithmetic, attended, sums, keys: int, reciprocal: Callable):
    return _merge(ops.multiply(attended, reciprocal(ops, sums, keys)))


def divide_visible(ops: Arithmetic, visible, queries: int, keys: int, reciprocal: Callable):
    """Visible exponentials `(heads, visible)`, divided by the sums of their rows."""
    mask = visible_keys(queries, keys)
    inverses = reciprocal(ops, put_apart(ops, visible, mask).sum(axis=-1, keepdims=True), keys)
    return ops.multiply(visible, inverses[:, np.nonzero(mask)[0], 0])


def weigh_divided_and_merge(ops: Arithmetic, visible, value, queries: int):
    """Sums of values by attention weights."""
    weights = put_apart(ops, visible, visible_keys(queries, value.shape[1]))
    return _merge(ops.weigh(weights, value, is_causal=True))


def divide_widely_and_merge(ops: Arithmetic, attended, sums):
    return _merge(ops.multiply(attended, reciprocal_between(ops, sums)))


def _merge(attended):
    """`(heads, queries, head size)` to `(queries, width)`."""
    heads, queries, size = attended.shape
    return attended.swapaxes(0, 1).reshape(queries, heads * size)
