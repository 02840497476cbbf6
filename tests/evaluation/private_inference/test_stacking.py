"""Products of a batch made in fewer: the same numbers, in the form that is fastest on a network."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_gpt.evaluation.private_inference.costs.cost_model import predict
from entropy_gpt.evaluation.private_inference.costs.measured_inference import make_config
from entropy_gpt.evaluation.private_inference.program.ciphertexts import count_product
from entropy_gpt.evaluation.private_inference.program.prices import load_prices, price_of
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.stacking import APART, Stacking, choose_stacking
from entropy_gpt.evaluation.private_inference.program.steps import Span


GPT2_SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}


@pytest.mark.parametrize("form", ["left", "right", "pairs"])
@given(data=st.data())
def test_every_form_gives_the_products_of_a_batch(form, data):
    group, groups, rows, inner, columns = (data.draw(st.integers(1, most)) for most in (4, 3, 5, 5, 5))
    random, batch = np.random.default_rng(0), group * groups
    left, right = (
        random.integers(-(2**63), 2**63 - 1, shape) for shape in ((batch, rows, inner), (batch, inner, columns))
    )
    stacking = Stacking(form, group)
    joined = stacking.join(np, left, right)
    sizes = stacking.sizes(rows, inner, columns)
    assert [factor.shape for factor in joined] == [(groups, *sizes[:2]), (groups, *sizes[1:])]
    assert np.array_equal(stacking.part(np.matmul(*joined), rows, columns), np.matmul(left, right))


def sent(stacking: Stacking, *sizes: int) -> float:
    """Bytes of the products of 12 heads."""
    return 12 // stacking.group * price_of(count_product(*stacking.sizes(*sizes)), load_prices().bytes)


@pytest.mark.parametrize(("queries", "keys"), [(1, 128), (7, 7), (16, 16)])
def test_few_queries_send_less_than_half_over_a_wan(queries, keys):
    for sizes in ((queries, 64, keys), (queries, keys, 64)):
        chosen = choose_stacking(12, *sizes, "WAN")
        assert chosen.group >= 6
        assert sent(chosen, *sizes) < 0.5 * sent(APART, *sizes)


def test_many_queries_are_fewer_products_where_waiting_costs_most():
    groups = [choose_stacking(12, 128, 64, 128, network).group for network in ("loopback", "WAN", "100Mbps,1s")]
    assert groups == [1, 3, 12]


def test_no_matrix_outgrows_memory():
    for network in ("loopback", "100Gbps,10s"):
        stacking = choose_stacking(12, 1024, 1024, 64, network)
        rows, inner, columns = stacking.sizes(1024, 1024, 64)
        assert max(rows * inner, inner * columns, rows * columns) <= 2**23


def predict_totals(length: int, network: str) -> tuple[float, float]:
    """Bytes and round trips of a prompt."""
    config = make_config("SM+ScFuFFN", length, **GPT2_SMALL)
    steps = predict(config, PrivateSettings(network=network), Span(0, length))
    return math.fsum(step.total_bytes for step in steps), math.fsum(step.round_trips for step in steps)


def test_a_network_that_is_far_away_waits_less_often():
    near, far = predict_totals(128, "loopback"), predict_totals(128, "WAN")
    assert far[0] < 1.05 * near[0]
    assert far[1] < 0.9 * near[1]
