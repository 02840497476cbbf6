"""Attention with entropies, against its definition row by row."""

import math

import pytest
import torch

from modeling_entropy_gpt import entropy_attention, row_entropies


BATCH, HEADS, LENGTH, HEAD_DIM = 2, 3, 7, 5


def make_states(query_length=LENGTH, key_length=LENGTH, dtype=torch.float64):
    shapes = [(BATCH, HEADS, length, HEAD_DIM) for length in (query_length, key_length, key_length)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def naive(query, key, value, visible, scaling):
    """Softmax and entropy of one row at a time, over the keys that it may attend to and no others."""
    outputs, entropies = [], []
    for index in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])):
        b, h, i = index.tolist()
        keys = visible.expand(*query.shape[:3], key.shape[2])[b, h, i].nonzero().flatten()
        if not len(keys):
            outputs.append(0 * value[b, h, 0])
            entropies.append(0 * query[b, h, i, 0])
            continue
        probabilities = (key[b, h, keys] @ query[b, h, i] * scaling).softmax(dim=0)
        outputs.append(probabilities @ value[b, h, keys])
        entropies.append(-(probabilities * probabilities.log()).sum())
    shape = query.shape[:3]
    return torch.stack(outputs).view(*shape, -1), torch.stack(entropies).view(shape)


def causal(query_length, key_length):
    return torch.ones(query_length, key_length, dtype=torch.bool).tril(key_length - query_length)


def random_visible():
    visible = torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.5
    visible[0, :, 2] = False  # a row that may attend to nothing
    visible[1, :, 3] = False
    visible[1, :, 3, 4] = True  # and one that may attend to a single key
    return visible


def masks():
    """Masks as transformers' backends are given them, each with what it says."""
    visible = random_visible()
    additive = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    everything = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    return {
        "none": (None, False, everything),
        "causal": (None, True, causal(LENGTH, LENGTH)),
        "boolean": (visible, False, visible),
        "additive": (additive, False, visible),
        "minus infinity": (additive.masked_fill(~visible, -math.inf), False, visible),
        "boolean and causal": (visible, True, visible & causal(LENGTH, LENGTH)),
        "padding": (padding, True, padding[:, None, None].bool() & causal(LENGTH, LENGTH)),
    }


@pytest.mark.parametrize("kind", masks())
def test_outputs_and_every_gradient_equal_the_definition(kind):
    mask, is_causal, visible = masks()[kind]
    states = make_states()
    weights = torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM), torch.randn(BATCH, HEADS, LENGTH)

    def gradients(outputs, entropies):
        return torch.autograd.grad((outputs * weights[0]).sum() + (entropies * weights[1]).sum(), states)

    got = entropy_attention(*states, mask, is_causal=is_causal, scaling=0.9)
    expected = naive(*states, visible, 0.9)
    torch.testing.assert_close(got, expected)
    for name, ours, theirs in zip("qkv", gradients(*got), gradients(*expected), strict=True):
        torch.testing.assert_close(ours, theirs, msg=f"gradient of {name}")
    torch.testing.assert_close(row_entropies(*states[:2], mask, is_causal, 0.9), expected[1])


def test_the_last_query_stands_at_the_last_key():
    states = make_states(query_length=3, key_length=8)
    got = entropy_attention(*states, is_causal=True)
    torch.testing.assert_close(got, naive(*states, causal(3, 8), HEAD_DIM**-0.5))


def test_extreme_rows():
    key = torch.randn(1, 1, 6, 4)
    uniform = row_entropies(torch.zeros(1, 1, 6, 4), key, is_causal=True)
    torch.testing.assert_close(uniform[0, 0], torch.arange(1, 7).log())
    query = (key * 1e4).requires_grad_()
    collapsed = row_entropies(query, torch.nn.functional.normalize(key, dim=-1))
    torch.testing.assert_close(collapsed, torch.zeros(1, 1, 6))
    collapsed.sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_entropies_are_computed_in_float32(dtype):
    states = [state.detach().to(dtype) for state in make_states()]
    output, entropies = entropy_attention(*states, is_causal=True)
    assert (output.dtype, entropies.dtype) == (dtype, torch.float32)
    expected = entropy_attention(*(state.float() for state in states), is_causal=True)
    torch.testing.assert_close(entropies, expected[1], rtol=2e-2, atol=2e-2)


def test_dropout_acts_on_the_output_and_not_on_the_entropy():
    states = make_states()
    output, entropies = entropy_attention(*states, is_causal=True, dropout=0.5)
    plain_output, plain_entropies = entropy_attention(*states, is_causal=True)
    assert not torch.allclose(output, plain_output)
    torch.testing.assert_close(entropies, plain_entropies, rtol=0, atol=0)
