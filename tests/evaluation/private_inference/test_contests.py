"""The largest of each row by contests of several scores: what they find, count, and choose."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_gpt.evaluation.private_inference.program.arithmetic import Arithmetic
from entropy_gpt.evaluation.private_inference.program.contests import choose_levels, seat, subtract_maximum
from entropy_gpt.evaluation.private_inference.program.counting import (
    JOINS,
    KEPT,
    ORDERED,
    ORDERS,
    CountingArithmetic,
    Stock,
    make_shape,
)
from entropy_gpt.evaluation.private_inference.program.forms import predict_seconds
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings


def draw_levels(data, keys: int) -> tuple[int, ...]:
    """Any that leave one score of each row."""
    levels = []
    while math.prod(levels) < keys:
        levels.append(data.draw(st.integers(2, 6)))
    return tuple(levels)


@given(st.data())
def test_the_largest_visible_score_is_taken_off(data):
    heads, queries = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    keys = queries + data.draw(st.integers(0, 5))
    # Few values, so that many scores are equal.
    scores = np.random.default_rng(0).integers(-3, 3, (heads, queries, keys)).astype(float)
    visible = np.tri(queries, keys, keys - queries, dtype=bool)
    largest = np.where(visible, scores, -np.inf).max(axis=-1, keepdims=True)
    found = subtract_maximum(Arithmetic(np), scores[:, visible], queries, keys, draw_levels(data, keys))
    assert np.array_equal(found, (scores - largest)[:, visible])


@given(st.lists(st.integers(1, 40), min_size=1), st.integers(1, 9))
def test_contests_of_a_row_have_nearly_the_same_size(lengths, most):
    lengths = np.array(lengths)
    contests = -(-lengths // most)
    players = np.split(seat(lengths, contests), np.cumsum(contests)[:-1])
    for row, length in zip(players, lengths, strict=True):
        assert row.sum() == length
        assert row.min() >= 1 and row.max() <= min(most, row.min() + 1)


def count(queries: int, keys: int, levels: tuple[int, ...]) -> CountingArithmetic:
    ops = CountingArithmetic(PrivateSettings(), Stock())
    visible = np.tri(queries, keys, keys - queries).sum()
    subtract_maximum(ops, make_shape((2, int(visible))), queries, keys, levels)
    return ops


def test_pairs_take_the_fewest_comparisons_and_contests_wait_less():
    pairs, fours, all_at_once = (count(1, 16, levels) for levels in ((2, 2, 2, 2), (4, 4), (16,)))
    assert [ops.counts[ORDERED] for ops in (pairs, fours, all_at_once)] == [2 * 15, 2 * 30, 2 * 120]
    assert [ops.waits[ORDERS] for ops in (pairs, fours, all_at_once)] == [4, 2, 1]
    assert [ops.waits[JOINS] for ops in (pairs, fours, all_at_once)] == [0, 4, 4]
    assert len({ops.counts[KEPT] for ops in (pairs, fours, all_at_once)}) == 1


@pytest.mark.parametrize("keys", [2, 16, 100, 128])
def test_the_farther_away_the_fewer_levels(keys):
    near, far = (choose_levels(12, keys, keys, network) for network in ("loopback", "WAN"))
    assert math.prod(near) >= keys and math.prod(far) >= keys
    assert set(near) == {2}
    assert len(far) < len(near) or keys == 2


def test_the_chosen_levels_are_the_fastest_of_all_that_are_possible():
    """Those of up to three levels, counted on shapes."""

    def seconds(levels: tuple[int, ...]) -> float:
        ops = count(16, 16, levels)
        return predict_seconds(ops.counts, ops.waits, "300Mbps,10ms")

    possible = [levels for length in (1, 2, 3) for levels in itertools.product(range(2, 17), repeat=length)]
    fastest = min(seconds(levels) for levels in possible if math.prod(levels[:-1]) < 16 <= math.prod(levels))
    assert seconds(choose_levels(2, 16, 16, "300Mbps,10ms")) <= fastest * (1 + 1e-9)
