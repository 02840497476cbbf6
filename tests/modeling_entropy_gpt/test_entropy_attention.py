"""Attention with entropies against its definition with whole matrices."""

import importlib.util
import math
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_entropy_gpt import blockwise_attention as module
from modeling_entropy_gpt import entropy_attention, row_entropies
from modeling_entropy_gpt.attention_blocks import (
    BLOCK_ELEMENTS,
    BLOCK_ROWS,
    KEPT_LENGTH,
    KEPT_PARTS,
    KEPT_SHAPES,
    plans,
)
from modeling_entropy_gpt.blockwise_attention import blockwise_attention
from tests.slow import in_turn


BATCH, HEADS, LENGTH, HEAD_DIM = 2, 3, 7, 8
LENGTHS = [1, 2, 63, 64, 65, 200, 777]
SCALING = 0.4


def make_states(query_length=LENGTH, key_length=LENGTH, head_dim=HEAD_DIM, value_dim=None, dtype=torch.float64):
    shapes = [(query_length, head_dim), (key_length, head_dim), (key_length, value_dim or head_dim)]
    # Laid out as the model does: (batch, length, heads, head_dim), with the heads brought forward.
    states = [torch.randn(BATCH, length, HEADS, width, dtype=dtype).transpose(1, 2) for length, width in shapes]
    return [state.requires_grad_() for state in states]


def naive(query, key, value, visible, scaling):
    """The definition, in the inputs' dtype: matrices of (query length x key length), masked rows kept out by hand."""
    visible = visible.expand(*query.shape[:3], key.shape[2])
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~visible, -math.inf)
    scores = scores.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
    probabilities = scores.softmax(dim=-1).masked_fill(~visible, 0.0)
    logarithms = scores.log_softmax(dim=-1).masked_fill(~visible, 0.0)
    return probabilities @ value, -(probabilities * logarithms).sum(dim=-1)


def causal(query_length, key_length):
    return torch.ones(query_length, key_length, dtype=torch.bool).tril(key_length - query_length)


def assert_same(got, expected, states, **tolerances):
    """Both results, and the gradients of all states through both of them."""
    upstream = [torch.randn_like(result) for result in expected]
    results = [(*results, *torch.autograd.grad(results, states, upstream)) for results in (got, expected)]
    names = ("output", "entropies", *(f"gradient of {name}" for name in ("query", "key", "value")))
    for name, ours, theirs in zip(names, *results, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length, is_causal):
    states = make_states(length, length)
    visible = causal(length, length) if is_causal else torch.ones(length, length, dtype=torch.bool)
    got = entropy_attention(*states, is_causal=is_causal, scaling=SCALING)
    assert_same(got, naive(*states, visible, SCALING), states)
    entropies = row_entropies(*states[:2], is_causal=is_causal, scaling=SCALING)
    torch.testing.assert_close(entropies, got[1])


@pytest.mark.parametrize("head_dim", [8, 20, 64, 128])
def test_head_dims(head_dim):
    states = make_states(150, 150, head_dim=head_dim)
    got = entropy_attention(*states, is_causal=True)
    assert_same(got, naive(*states, causal(150, 150), head_dim**-0.5), states)


def test_values_of_another_width():
    states = make_states(70, 70, value_dim=5)
    assert_same(entropy_attention(*states, is_causal=True), naive(*states, causal(70, 70), HEAD_DIM**-0.5), states)


@pytest.mark.parametrize("query_length", [1, 3, 130])
def test_queries_shorter_than_keys(query_length):
    states = make_states(query_length, 200)
    got = entropy_attention(*states, is_causal=True, scaling=SCALING)
    assert_same(got, naive(*states, causal(query_length, 200), SCALING), states)


def random_visible(length):
    visible = torch.rand(BATCH, 1, length, length) < 0.5
    visible[0, :, 2] = False  # a row that may attend to nothing
    visible[1, :, 3] = False
    visible[1, :, 3, 4] = True  # and one that may attend to a single key
    return visible


def packed(length):
    """Documents one after the other, which don't see each other: whole blocks of keys are out of sight."""
    document = torch.arange(length) // (length // 3 + 1)
    return (document[:, None] == document)[None, None]


def padding(length):
    """On the left of the first sequence, on the right of the second."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[0, : length // 2] = 0
    mask[1, -length // 3 :] = 0
    return mask


def masks(length):
    """Masks as transformers' backends are given them, whether causal too, and what that comes to."""
    visible = random_visible(length)
    additive = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    later = causal(length, length)
    keys = padding(length)[:, None, None].bool()
    per_head = torch.rand(BATCH, HEADS, length, length) < 0.3
    block_mask = create_block_mask(lambda b, h, q, k: (q >= k) & (k % 5 != b), BATCH, None, length, length, "cpu")
    block_visible = torch.stack([later & (torch.arange(length) % 5 != b) for b in range(BATCH)])[:, None]
    return {
        "boolean": (visible, False, visible),
        "one for each head": (per_head, False, per_head),
        "additive": (additive, False, visible),
        "minus infinity": (additive.masked_fill(~visible, -math.inf), False, visible),
        "boolean and causal": (visible, True, visible & later),
        "packed": (packed(length) & later, False, packed(length) & later),
        "padding": (padding(length), True, keys & later),
        "padding in four dimensions": (keys, True, keys & later),
        "nothing": (torch.zeros(BATCH, length), True, torch.zeros(length, length, dtype=torch.bool)),
        "longer than the keys": (torch.nn.functional.pad(visible, (0, 3), value=True), False, visible),
        "block mask": (block_mask, False, block_visible),
    }


@pytest.mark.parametrize("length", [LENGTH, 2 * BLOCK_ROWS + 9])
@pytest.mark.parametrize("kind", masks(LENGTH))
def test_masks(kind, length):
    mask, is_causal, visible = masks(length)[kind]
    states = make_states(length, length)
    got = entropy_attention(*states, mask, is_causal=is_causal, scaling=SCALING)
    assert_same(got, naive(*states, visible, SCALING), states)
    torch.testing.assert_close(row_entropies(*states[:2], mask, is_causal, SCALING), got[1])


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_by_finite_differences(dropout):
    def attend(*states):
        torch.manual_seed(1)
        return entropy_attention(*states, mask, is_causal=True, dropout=dropout)

    mask = random_visible(LENGTH)
    states = make_states()
    assert gradcheck(attend, states)
    with pytest.raises(RuntimeError, match="autograd"):  # not differentiable twice, and it says so
        gradgradcheck(attend, states)


def test_gradients_of_entropies_alone():
    states = make_states(150, 150)[:2]
    assert gradcheck(lambda *pair: row_entropies(*pair, is_causal=True), make_states()[:2])
    expected = naive(*states, states[1], causal(150, 150), HEAD_DIM**-0.5)[1]
    for ours, theirs in zip(
        torch.autograd.grad(row_entropies(*states, is_causal=True).sum(), states),
        torch.autograd.grad(expected.sum(), states),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_result_without_a_gradient_costs_nothing_but_itself():
    states = make_states()
    for index in range(2):
        got = entropy_attention(*states, is_causal=True)[index]
        expected = naive(*states, causal(LENGTH, LENGTH), HEAD_DIM**-0.5)[index]
        for ours, theirs in zip(
            torch.autograd.grad(got.sum(), states, allow_unused=True, materialize_grads=True),
            torch.autograd.grad(expected.sum(), states, allow_unused=True, materialize_grads=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_keys_that_share_an_offset(dtype):
    """The inputs are rounded alike for both sides, so what is compared is the computation: float32 inside."""
    states = make_states(200, 200, head_dim=32)
    with torch.no_grad():
        states[1] += 3.0
    states = [state.detach().to(dtype).requires_grad_() for state in states]
    wide = [state.detach().double().requires_grad_() for state in states]
    got = entropy_attention(*states, is_causal=True)
    expected = naive(*wide, causal(200, 200), 32**-0.5)
    assert (got[0].dtype, got[1].dtype) == (dtype, torch.float32)
    rounding = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(got[0].double(), expected[0], rtol=0, atol=rounding)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=0, atol=1e-5)
    assert (got[1] >= 0).all()
    for ours, theirs in zip(
        torch.autograd.grad(got[0].double().sum() + got[1].sum(), states),
        torch.autograd.grad(expected[0].sum() + expected[1].sum(), wide),
        strict=True,
    ):
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 0.002), (torch.float16, 0.0003), (torch.float32, 0.00002)]
)
def test_error_with_large_logits(dtype, share):
    """As the documentation has it, with logits of deviation 20."""
    query, key, value = (state.detach() for state in make_states(200, 200, head_dim=64))
    states = [state.to(dtype).requires_grad_() for state in (20 * query, key, value)]
    wide = [state.detach().double().requires_grad_() for state in states]
    got = entropy_attention(*states, is_causal=True)[1]
    expected = naive(*wide, causal(200, 200), 64**-0.5)[1]
    errors = [(got.double() - expected).abs().max()]
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), states[:2]), torch.autograd.grad(expected.sum(), wide[:2]), strict=True
    ):
        errors.append((ours.double() - theirs).norm() / theirs.norm())
    assert (got >= 0).all()
    for error, bound in zip(errors, (1e-5, share, share), strict=True):
        assert error < bound


def test_float32_agrees_to_a_hundred_thousandth():
    states = make_states(512, 512, head_dim=64)
    single = [state.detach().float().requires_grad_() for state in states]
    got = entropy_attention(*single, is_causal=True)
    expected = naive(*states, causal(512, 512), 64**-0.5)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits(size):
    """One key takes all: probabilities of exactly 0 beside one of 1, and no NaN."""
    query, key, value = (torch.randn(BATCH, HEADS, 150, 4) for _ in range(3))
    query = (query.sign() * size).requires_grad_()
    key.requires_grad_()
    output, entropies = entropy_attention(query, key.sign(), value, is_causal=True, scaling=1.0)
    (output.sum() + entropies.sum()).backward()
    expected = naive(query.double(), key.double().sign(), value.double(), causal(150, 150), 1.0)
    rounding = 8 * torch.finfo(torch.float32).eps * 4 * size  # that of the logits themselves
    torch.testing.assert_close(output.double(), expected[0], rtol=0, atol=rounding)
    torch.testing.assert_close(entropies.double(), expected[1], rtol=0, atol=rounding)
    assert query.grad.isfinite().all()


def test_uniform_attention_has_the_logarithm_of_the_number_of_keys():
    entropies = row_entropies(torch.zeros(1, 1, 300, 4), torch.randn(1, 1, 300, 4), is_causal=True)
    torch.testing.assert_close(entropies[0, 0], torch.arange(1, 301).log())


def test_dropout_acts_on_the_output_alone_and_keeps_its_mean():
    states = make_states(300, 300)
    ones = torch.ones_like(states[2])
    plain_entropies = entropy_attention(*states, is_causal=True)[1]
    outputs, entropies = entropy_attention(*states[:2], ones, is_causal=True, dropout=0.5)
    torch.testing.assert_close(entropies, plain_entropies, rtol=0, atol=0)
    assert outputs.std() > 0.01  # without dropout, each would be 1
    many = torch.stack([entropy_attention(*states[:2], ones, is_causal=True, dropout=0.5)[0] for _ in range(50)])
    assert many.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (entropy_attention(*states, dropout=1.0)[0] == 0).all()


def test_dropout_follows_the_seed():
    states = make_states(200, 200)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(entropy_attention(*states, is_causal=True, dropout=0.5)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_nothing_quadratic_is_kept_for_the_backward_pass():
    length = 1024
    states = make_states(length, length, head_dim=16, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        entropy_attention(*states, is_causal=True, dropout=0.1)
    assert kept
    assert max(kept) <= states[0].numel()


def test_under_autocast_all_come_to_its_dtype():
    states = make_states(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = entropy_attention(states[0], states[1].bfloat16(), states[2], is_causal=True)
    half = entropy_attention(*(state.bfloat16() for state in states), is_causal=True)
    for ours, theirs in zip(mixed, half, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_under_autocast_double_stays_double():
    """As for torch's own attention."""
    states = make_states()
    expected = entropy_attention(*states, is_causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.nn.functional.scaled_dot_product_attention(*states).dtype == torch.float64
        got = entropy_attention(*states, is_causal=True)
        torch.testing.assert_close(row_entropies(*states[:2], is_causal=True), expected[1], rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"have torch\.bfloat16, torch\.float64, torch\.float64"):
            entropy_attention(states[0].float(), *states[1:])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("mask", [None, torch.ones(BATCH, LENGTH), torch.zeros(BATCH, 1, LENGTH, LENGTH)])
def test_passes_on_a_device_without_numbers(mask):
    states = [state.detach().to("meta").requires_grad_() for state in make_states()]
    mask = None if mask is None else mask.to("meta")
    output, entropies = entropy_attention(*states, mask, is_causal=True, dropout=0.1)
    (output.sum() + entropies.sum()).backward()
    assert [state.grad.shape for state in states] == [state.shape for state in states]


@pytest.mark.parametrize(("with_value", "function"), in_turn([True, False], ["softmax", "power4"]))
def test_the_operators_are_well_made(with_value, function):
    query, key, value = (state.detach() for state in make_states(9, 12, value_dim=5, dtype=torch.float32))
    mask, seed = torch.ones(BATCH, 1, 1, 12, dtype=torch.bool), torch.tensor([3])
    arguments = (query, key, value if with_value else None, mask, True, SCALING, 0.1, seed)
    torch.library.opcheck(module.blockwise_attention_forward, arguments)
    last = (function, None if function == "softmax" else torch.randn_like(query[..., 0]))
    torch.library.opcheck(module.blockwise_attention_forward, (*arguments, *last))
    results = module.blockwise_attention_forward(*arguments, *last)
    upstream = (torch.randn_like(results[0]) if with_value else None, *map(torch.randn_like, results[1:]))
    torch.library.opcheck(module.blockwise_attention_backward, (*arguments, *results, *upstream, *last))


@pytest.mark.parametrize("index", [0, 1], ids=["output", "entropies"])
def test_derivatives_in_forward_mode_are_refused(index):
    query, key, value = (state.detach() for state in make_states())

    def attend(query):
        return entropy_attention(query, key, value, is_causal=True)[index].sum()

    def with_dual_numbers(query):
        with forward_ad.dual_level():
            return attend(forward_ad.make_dual(query, query))

    derivatives = [
        with_dual_numbers,
        lambda query: torch.func.jvp(attend, (query,), (query,)),
        torch.func.jacfwd(attend),
        torch.func.hessian(attend),
    ]
    for derivative in derivatives:
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            derivative(query)


def test_derivatives_of_examples_all_at_once():
    """As `torch.func` takes the gradients of every example of a batch; each has a mask of its own."""
    query, key, value = (state.detach()[:, None] for state in make_states())
    mask = random_visible(LENGTH)[:, None]

    def attend(query, key, value, mask):
        output, entropies = entropy_attention(query, key, value, mask, is_causal=True)
        return output.square().sum() + entropies.square().sum()

    gradients = torch.func.grad(attend, argnums=(0, 1, 2))
    together = torch.vmap(gradients)(query, key, value, mask)
    apart = [gradients(*example) for example in zip(query, key, value, mask, strict=True)]
    for ours, theirs in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda query: gradients(query, key[0], value[0], mask[0])[0].sum())(query[0])


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_of_examples_all_at_once(randomness):
    query, key, value = (state.detach()[0] for state in make_states())
    states = [state.expand(2, 1, *state.shape) for state in (query, key, value)]
    attend = torch.vmap(lambda *states: entropy_attention(*states, dropout=0.5)[0], randomness=randomness)
    first, second = attend(*states)
    assert torch.equal(first, second) == (randomness == "same")


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_in_one_graph(dropout):
    def attend(*states):
        output, entropies = entropy_attention(*states, is_causal=True, dropout=dropout)
        return output.square().sum() + entropies.sum()

    states = make_states(65, 65, dtype=torch.float32)
    torch.manual_seed(0)
    expected = torch.autograd.grad(attend(*states), states)
    torch.manual_seed(0)
    got = torch.autograd.grad(torch.compile(attend, fullgraph=True, backend="aot_eager")(*states), states)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_query_that_is_no_number_has_results_that_are_none():
    query, key, value = make_states(6)
    query = query.detach().clone()
    query[0, 0, 2] = math.nan
    output, entropies = entropy_attention(query, key, value, is_causal=True)
    for result in (output[0, 0].mean(dim=-1), entropies[0, 0]):
        assert result.isnan().tolist() == [False, False, True, False, False, False]


def test_two_copies_of_the_file_live_side_by_side():
    """As when the package is imported, and a model brings its own copy of it."""
    specification = importlib.util.spec_from_file_location("modeling_entropy_gpt.a_copy", module.__file__)
    copy = importlib.util.module_from_spec(specification)
    sys.modules["modeling_entropy_gpt.a_copy"] = copy
    specification.loader.exec_module(copy)
    states = make_states()
    for attend in (copy.blockwise_attention, blockwise_attention):
        torch.autograd.grad(attend(*states, None, True, SCALING, 0.0, None)[0].sum(), states)


def attend_and_differentiate(states, is_causal=True):
    results = entropy_attention(*states, is_causal=is_causal)
    return *results, *torch.autograd.grad((results[0].sum(), results[1].sum()), states)


def test_memory_that_is_used_again_keeps_nothing():
    """Neither do results change with the next call, nor does what was there change results."""
    states = make_states(150, 150, dtype=torch.float32)
    first = attend_and_differentiate(states)
    expected = [result.clone() for result in first]
    broken = [torch.full_like(state, math.nan).requires_grad_() for state in states]
    assert all(result.isnan().all() for result in attend_and_differentiate(broken))
    for kept, again, result in zip(first, attend_and_differentiate(states), expected, strict=True):
        assert torch.equal(kept, result)
        assert torch.equal(again, result)


def test_memory_of_inference_serves_training():
    states = make_states(11, 11)
    with torch.inference_mode():
        expected = entropy_attention(*states, is_causal=True)
    torch.testing.assert_close(attend_and_differentiate(states)[:2], expected)


def test_memory_is_kept_for_few_shapes_and_for_each_thread():
    (state, *_), find = make_states(), plans.find
    made = {id(find(state, length, 8, None, False)[0]) for length in range(LENGTH, LENGTH + 20)}
    assert plans.keep.cache_info().currsize == KEPT_SHAPES < len(made)
    plan, *_ = find(state, LENGTH, 8, None, False)
    assert find(state, LENGTH, 8, None, False)[0] is plan
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(find, state, LENGTH, 8, None, False).result()[0] is not plan


def test_memory_is_small_and_not_kept_where_no_call_comes_back_to_it():
    """Of many keys, of many queries, and of decoding, which has one query and another number of keys each time."""
    few, long = 8, KEPT_LENGTH + 1
    for queries, keys in ((few, long), (long, few), (1, 1024)):
        query = torch.empty(16, 12, queries, 8, device="meta")
        plan, *_ = plans.find(query, keys, 8, None, False)
        assert plan is not plans.find(query, keys, 8, None, False)[0]
        assert math.prod(plan.shape) * max(queries, keys) <= max(long, BLOCK_ELEMENTS // BLOCK_ROWS)


def test_many_blocks_of_masks_are_not_kept():
    states, visible = make_states(2, 700), torch.zeros(1, 1, 2, 700, dtype=torch.bool)
    for last in range(KEPT_PARTS + 2):
        visible[..., last] = True
        entropies = row_entropies(*states[:2], visible)
    torch.testing.assert_close(entropies, naive(*states, visible, HEAD_DIM**-0.5)[1])
    assert len(plans.find(states[0], 700, 0, None, False)[0]._parts) <= KEPT_PARTS


@pytest.mark.parametrize("lengths", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_attend_with_or_to(lengths):
    states = make_states(*lengths)
    output, entropies, *gradients = attend_and_differentiate(states, is_causal=False)
    assert (output.shape, entropies.shape) == ((BATCH, HEADS, lengths[0], HEAD_DIM), (BATCH, HEADS, lengths[0]))
    assert not any(result.any() for result in (output, entropies, *gradients))


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("length", [LENGTH, 2 * BLOCK_ROWS + 9])
def test_gradients_that_nobody_asks_for_are_not_computed(length, asked):
    states = make_states(length, length)
    whole = torch.autograd.grad(sum(result.sum() for result in entropy_attention(*states, is_causal=True)), states)
    for index, state in enumerate(states):
        state.requires_grad_(index in asked)
    results = entropy_attention(*states, is_causal=True)
    with mock.patch.object(module, "_add_product", wraps=module._add_product) as add_product:
        some = torch.autograd.grad(sum(result.sum() for result in results), [states[index] for index in asked])
    blocks = -(-length // BLOCK_ROWS)
    assert add_product.call_count == blocks * len({1, 2} & {*asked})
    torch.testing.assert_close(list(some), [whole[index] for index in asked])


@pytest.mark.parametrize("lengths", [(LENGTH, LENGTH), (70, 150), (1, 5)])
@pytest.mark.parametrize("kind", ["causal", "causal, of numbers", "for each head", "all", "padding of none"])
def test_a_mask_that_hides_later_keys_alone_is_none(kind, lengths):
    later, numbers = causal(*lengths), torch.zeros(lengths, dtype=torch.float64)
    mask = {
        "causal": later[None, None],
        "causal, of numbers": numbers.masked_fill(~later, torch.finfo(torch.float64).min)[None, None],
        "for each head": later.expand(BATCH, HEADS, *lengths),
        "all": torch.ones(1, 1, *lengths, dtype=torch.bool),
        "padding of none": torch.ones(BATCH, lengths[1]),
    }[kind]
    states = make_states(*lengths)
    is_causal = kind == "padding of none"
    visible = torch.ones(lengths, dtype=torch.bool) if kind == "all" else later
    with mock.patch.object(module, "_seen", wraps=module._seen) as seen:
        assert_same(entropy_attention(*states, mask, is_causal, SCALING), naive(*states, visible, SCALING), states)
    assert {call.args[0] for call in seen.call_args_list} == {None}


@pytest.mark.parametrize("how", ["numpy", "data", "inference mode"])
def test_a_mask_that_changes_uncounted_is_read_anew(how):
    states, visible = make_states(150, 150), causal(150, 150)[None, None].clone()
    with torch.inference_mode(how == "inference mode"):
        mask = visible.clone()
        changed = {"numpy": mask.numpy(), "data": mask.data}.get(how, mask)
        for _ in range(3):
            results = entropy_attention(*states, mask, scaling=SCALING)
            torch.testing.assert_close(results, naive(*states, visible, SCALING))
            version = None if mask.is_inference() else mask._version
            for each in (changed, visible):
                each[..., 1:, :5] = ~each[..., 1:, :5]
            assert mask.is_inference() or mask._version == version


def test_a_batch_of_none_has_a_mask_of_none():
    states = [state[:0] for state in make_states()]
    output, entropies = entropy_attention(*states, random_visible(LENGTH)[:1].expand(0, -1, -1, -1))
    assert (len(output), len(entropies)) == (0, 0)


def test_many_gradients_at_once():
    states = make_states()
    results = entropy_attention(*states, is_causal=True)
    upstream = [torch.randn(3, *result.shape, dtype=result.dtype) for result in results]
    together = torch.autograd.grad(results, states, upstream, is_grads_batched=True, retain_graph=True)
    for i, rows in enumerate(zip(*upstream, strict=True)):
        apart = torch.autograd.grad(results, states, rows, retain_graph=True)
        torch.testing.assert_close([gradient[i] for gradient in together], list(apart))


def test_what_intercepts_operations_sees_one():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        attend_and_differentiate(make_states())
    assert sum(name.startswith("entropy_gpt") for name in seen) == 2
    assert not any("bmm" in name for name in seen)


def test_outside_of_graphs_no_operator_is_called():
    """They take as long as the arithmetic at short lengths."""
    operators = ("blockwise_attention_forward", "blockwise_attention_backward")
    with mock.patch.multiple(module, **dict.fromkeys(operators)):
        attend_and_differentiate(make_states())


@pytest.mark.slow
def test_threads_do_not_change_the_result():
    code = (
        "import torch, sys; from modeling_entropy_gpt import entropy_attention as attend;"
        "torch.set_num_threads(int(sys.argv[1])); torch.manual_seed(0);"
        "states = [torch.randn(2, 4, 300, 16, requires_grad=True) for _ in range(3)];"
        "output, entropies = attend(*states, is_causal=True, dropout=0.1);"
        "(output.sum() + entropies.sum()).backward();"
        "print(*(f'{x.double().square().sum().item():.4f}' for x in (output, entropies, *(s.grad for s in states))))"
    )
    one, two = (subprocess.check_output([sys.executable, "-c", code, count], text=True) for count in "12")
    assert one == two


STATES = [torch.zeros(2, 3, 4, 8)] * 3


@pytest.mark.parametrize(
    ("states", "options", "message"),
    [
        ((torch.zeros(3, 4, 8), *STATES[1:]), {}, r"Expected \(batch, heads, length, head_dim\).*query \(3, 4, 8\)"),
        ((STATES[0], torch.zeros(2, 2, 4, 8), STATES[2]), {}, r"one batch and heads for all.*key \(2, 2, 4, 8\)"),
        ((STATES[0], torch.zeros(2, 3, 4, 7), STATES[2]), {}, r"same head_dim.*key \(2, 3, 4, 7\)"),
        ((*STATES[:2], torch.zeros(2, 3, 5, 8)), {}, r"same length.*value \(2, 3, 5, 8\)"),
        ((*STATES[:2], STATES[2].double()), {}, r"one floating point dtype.*torch\.float64"),
        ((torch.zeros(2, 3, 5, 8), *STATES[1:]), {"is_causal": True}, r"more queries than keys.*\(2, 3, 5, 8\)"),
        (STATES, {"attention_mask": torch.ones(4)}, r"shape \(4,\).*expected \(batch, keys\)"),
        (STATES, {"attention_mask": torch.ones(3, 4)}, r"shape \(3, 4\).*expected \(2 or 1, 4 or more\)"),
        (STATES, {"attention_mask": torch.ones(2, 3)}, r"shape \(2, 3\).*expected \(2 or 1, 4 or more\)"),
        (STATES, {"attention_mask": torch.ones(2, 2, 4, 4)}, r"expected \(2 or 1, 3 or 1, 4 or 1, 4 or more\)"),
        (STATES, {"attention_mask": torch.ones(2, 1, 4, 4, dtype=torch.long)}, r"torch\.int64.*boolean.*or additive"),
        (STATES, {"attention_mask": torch.full((1, 1, 4, 4), -0.5)}, r"holds -0\.5: an additive mask has 0"),
        (STATES, {"dropout": 1.5}, r"dropout=1\.5 has to be between 0 and 1"),
    ],
)
def test_bad_inputs_are_named(states, options, message):
    with pytest.raises(ValueError, match=message):
        entropy_attention(*states, **options)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "installed", "capability", "message"),
    [
        ("cpu", torch.float32, 64, True, (9, 0), "there is none for cpu"),
        ("meta", torch.float32, 64, True, (9, 0), "there is none for meta"),
        ("cuda", torch.float64, 64, True, (9, 0), r"takes torch\.float32, torch\.float16, torch\.bfloat16"),
        ("cuda", torch.float32, 300, True, (9, 0), "up to 256 numbers a head"),
        ("cuda", torch.float32, 256, False, (9, 0), "triton is not installed"),
        ("cuda", torch.float32, 256, True, (7, 5), r"needs compute capability 8\.0, and the device has 7\.5"),
        ("cuda", torch.bfloat16, 256, True, (8, 0), None),
    ],
)
def test_where_the_kernel_serves(device, dtype, head_dim, installed, capability, message, monkeypatch):
    monkeypatch.setattr(module, "is_triton_available", lambda: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    obstacle = module.obstacle_to_kernel(torch.device(device), dtype, head_dim)
    assert obstacle is None if message is None else re.search(message, obstacle)
