"""Headwise entropies against means over everything at once."""

import math

import pytest
import torch
from datasets import Dataset

from evaluation.entropy_diagnostics import HeadwiseEntropy, measure_headwise_entropy
from tests.architectures import make_model, make_tokens


def test_means_over_batches_are_those_of_everything_at_once():
    model = make_model("SM+LN+G")
    tokens = make_tokens(7, 12)
    seen = []
    got = measure_headwise_entropy(model, Dataset.from_dict({"input_ids": tokens.tolist()}), 3, seen.append)
    expected = torch.stack(model(tokens, output_entropies=True).attention_entropies).mean(dim=(1, 3))
    torch.testing.assert_close(torch.tensor(got.nats), expected, rtol=1e-5, atol=1e-6)
    assert got.maximum == pytest.approx(math.log(math.factorial(12)) / 12)
    assert seen == [3, 3, 1]


def test_uniform_heads_are_overloaded_and_reach_the_maximum():
    model = make_model("SM+LN+G")
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[:, : 2 * 48] = 0
        model.transformer.h[1].attn.c_attn.bias[: 2 * 48] = 0
    got = measure_headwise_entropy(model, Dataset.from_dict({"input_ids": make_tokens(2, 12).tolist()}))
    assert got.nats[1] == pytest.approx([got.maximum] * 4, rel=1e-5)


def test_share_and_mean():
    entropy = HeadwiseEntropy([[1.0, 2.9], [3.0, 4.0]], maximum=4.0)
    assert entropy.overloaded_share == 0.5
    assert entropy.mean == pytest.approx(2.725)
