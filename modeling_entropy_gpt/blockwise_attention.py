# SPDX-License-Identifier: Apache-2.0
"""Attention with row entropies in blocks of rows, out of torch's own matrix products: memory linear in the length.

A block holds some rows of some heads, with the keys that these rows may attend to and no others, and is small enough
to stay in the processor's caches. Nothing of it outlives it but the output, the entropy and the log-sum-exp of its
rows; the backward pass computes its scores again. With s the scores, P the probabilities, and upstream gradients do of
the output and g of the entropy,

    H_i     = lse_i - sum_j P_ij s_ij
    ds_ij   = P_ij (do_i . v_j  -  do_i . o_i  -  g_i (log P_ij + H_i))

so entropy adds no matrix product to those of attention, only passes over a block. Scores are kept to base 2, since
`exp2` is fast for every argument, where `exp` slows down a hundredfold where its result underflows. Memory for blocks
is kept from call to call: at short lengths, fresh memory would take as long as the arithmetic.
"""

import math
import re
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from types import SimpleNamespace

import torch
from torch import nn
from transformers.utils import is_triton_available
from transformers.utils.import_utils import is_tracing


LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
# The scores of pairs that are masked: far below any score, and far enough from the end of float32 that no product with
# it overflows.
MASKED = -1e20
# Rows with a maximum below this have nothing that they may attend to.
NOTHING_VISIBLE = MASKED / 10

# Sizes of blocks, by measurement (evaluation/benchmarks/entropy_attention.py).
BLOCK_ROWS = 64
BLOCK_ELEMENTS = 2**18
# Shapes whose memory each thread keeps, and the length up to which it does.
KEPT_SHAPES = 4
KEPT_LENGTH = 2**13
# The least elements of a sequence's blocks that are computed without those of other sequences.
FEW_ELEMENTS = 2**15
# Blocks of a shape of which the parts of that memory are kept cut.
KEPT_PARTS = 512

# What the kernel of triton_attention.py serves.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_HEAD_DIM = 256
LEAST_CAPABILITY = (8, 0)

# Two copies of this file may be loaded side by side, the package's and one that came with weights: an operator each.
OPERATOR = f"entropy_gpt::{re.sub(r'[^0-9a-zA-Z]', '_', __name__)}"


def blockwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    visible: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Attention, the entropy of its rows, and their log-sum-exp. Differentiable in query, key and value: once, and in
    reverse mode; torch raises `RuntimeError` for a second derivative and for one in forward mode.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, query_length, head_dim)`): Queries.
        key (`torch.Tensor` of shape `(batch, heads, key_length, head_dim)`): Keys.
        value (`torch.Tensor` of shape `(batch, heads, key_length, value_dim)`, *optional*):
            Values; without, entropies alone are computed.
        visible (`torch.Tensor` of `bool`, *optional*):
            True where a query may attend to a key; broadcastable to `(batch, heads, query_length, key_length)`.
        is_causal (`bool`): Whether a query attends to no later key; the last query stands at the last key.
        scaling (`float`): What the products are multiplied by.
        dropout (`float`): Dropout on the probabilities; entropies are taken before it.
        seed (`torch.Tensor` of one integer, *optional*): Seed of the dropout.

    Returns:
        `tuple`: Output, `(batch, heads, query_length, value_dim)`, of the values' dtype and laid out as
        `(batch, query_length, heads, value_dim)`; entropies in nats and log-sum-exp to base 2, both
        `(batch, heads, query_length)` and of at least float32. No entropy is negative.
    """
    # What `Function.apply` does first, for graphs and transforms alone, takes as long as a pass over short sequences.
    function = super(torch.autograd.Function, _BlockwiseAttention) if _is_plain(query) else _BlockwiseAttention
    return function.apply(query, key, value, visible, is_causal, scaling, dropout, seed)


def forward_pass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    visible: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward pass of [`blockwise_attention`]."""
    output, entropies, log_sum_exp = results = _empty_results(query, value)
    if obstacle_to_kernel(query.device, query.dtype, max(query.shape[-1], output.shape[-1])) is None:
        from .triton_attention import run_forward

        run_forward(query, key, value, visible, is_causal, scaling, dropout, seed, *results)
        return results
    plan = _plans.find(query, key, output.shape[-1], is_causal)
    with torch.autocast(query.device.type, enabled=False):
        blocks, hidden = plan.blocks(visible), _hidden_pairs(query, key, visible)
        for number, group in enumerate(plan.groups):
            queries, keys = plan.take("queries", query[group]), plan.take("keys", key[group])
            values = None if value is None else plan.take("values", value[group])
            for block in blocks:
                part = plan.cut(block)
                scores, weights = part.scores, part.weights
                torch.baddbmm(
                    scores, queries[:, part.rows], keys[:, part.keys].mT, beta=0, alpha=scaling * LOG2_E, out=scores
                )
                plan.hide(part, hidden, group)
                torch.amax(scores, -1, True, out=part.maximum)
                if hidden is not None:
                    part.maximum.clamp_(min=NOTHING_VISIBLE)
                torch.exp2(scores.sub_(part.maximum), out=weights)
                torch.sum(weights, -1, True, out=part.total)
                torch.sum(scores.mul_(weights), -1, True, out=part.product)
                if hidden is not None:
                    part.total.masked_fill_(part.total == 0, 1.0)  # of rows that see nothing
                if value is not None:
                    if dropout:
                        weights.mul_(_draw_kept(part.kept, dropout, seed, number * query.shape[2] + block[0]))
                    torch.bmm(weights, values[:, part.keys], out=part.attended)
                    output[group][..., part.rows, :] = plan.unflatten(part.attended.div_(part.total))
            log_total = plan.total.log2()
            log_sum_exp[group] = plan.unflatten(log_total + plan.maximum).squeeze(-1)
            entropies[group] = plan.unflatten(log_total.sub_(plan.product.div_(plan.total)).mul_(LN_2)).squeeze(-1)
    return results


def backward_pass(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    visible: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
    seed: torch.Tensor | None,
    output: torch.Tensor,
    entropies: torch.Tensor,
    log_sum_exp: torch.Tensor,
    grad_output: torch.Tensor | None,
    grad_entropies: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Gradients of query, key and value (without a value: an empty tensor), given what the forward pass took and gave.
    """
    gradients = grad_query, grad_key, grad_value = _empty_gradients(query, key, value)
    if obstacle_to_kernel(query.device, query.dtype, max(query.shape[-1], output.shape[-1])) is None:
        from .triton_attention import run_backward

        run_backward(
            query, key, value, visible, is_causal, scaling, dropout, seed, output, entropies, log_sum_exp,
            grad_output, grad_entropies, *gradients,
        )  # fmt: skip
        return gradients
    plan = _plans.find(query, key, output.shape[-1], is_causal)
    with torch.autocast(query.device.type, enabled=False):
        blocks, hidden = plan.blocks(visible), _hidden_pairs(query, key, visible)
        constants = grad_entropies * entropies
        if value is not None:
            constants += (grad_output.to(plan.dtype) * output).sum(dim=-1)
        slopes, constants, log_sums = (
            rows.unsqueeze(-1) for rows in (grad_entropies * -LN_2, -constants, log_sum_exp)
        )
        for number, group in enumerate(plan.groups):
            queries, keys = plan.take("queries", query[group]), plan.take("keys", key[group])
            slope, constant, log_sum = (plan.flatten(rows[group]) for rows in (slopes, constants, log_sums))
            grad_keys = plan.grad_keys.zero_()
            if value is not None:
                values, upstream = plan.take("values", value[group]), plan.take("upstream", grad_output[group])
                grad_values = plan.grad_values.zero_()
            for block in blocks:
                part = plan.cut(block)
                scores, weights, rows = part.scores, part.weights, part.rows
                block_keys = keys[:, part.keys]
                torch.baddbmm(scores, queries[:, rows], block_keys.mT, beta=0, alpha=scaling * LOG2_E, out=scores)
                plan.hide(part, hidden, group)
                torch.exp2(scores.sub_(log_sum[:, rows]), out=weights)  # of log2 of the probabilities
                torch.addcmul(constant[:, rows], scores, slope[:, rows], out=scores)
                if value is not None:
                    block_values, block_upstream = values[:, part.keys], upstream[:, rows]
                    if dropout:
                        kept = _draw_kept(part.kept, dropout, seed, number * query.shape[2] + block[0])
                        scores.addcmul_(torch.bmm(block_upstream, block_values.mT), kept)
                        kept.mul_(weights)
                    else:
                        scores.baddbmm_(block_upstream, block_values.mT)
                        kept = weights
                    torch.bmm(kept.mT, block_upstream, out=part.grad_values)
                    grad_values[:, part.keys].add_(part.grad_values)
                scores.mul_(weights)  # now the gradient of the scores
                torch.bmm(scores, block_keys, out=part.grad_queries)
                torch.mul(plan.unflatten(part.grad_queries), scaling, out=grad_query[group][..., rows, :])
                torch.bmm(scores.mT, queries[:, rows], out=part.grad_keys)
                grad_keys[:, part.keys].add_(part.grad_keys)
            torch.mul(plan.unflatten(grad_keys), scaling, out=grad_key[group])
            if value is not None:
                grad_value[group] = plan.unflatten(grad_values)
    return gradients


def obstacle_to_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel of triton_attention.py does not serve, so that blocks are computed; `None` if it does."""
    if device.type != "cuda":
        return f"there is none for {device.type}"
    if dtype not in KERNEL_DTYPES or head_dim > LARGEST_HEAD_DIM:
        return f"it takes {', '.join(map(str, KERNEL_DTYPES))} and up to {LARGEST_HEAD_DIM} numbers a head"
    if not is_triton_available():
        return "triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return "it needs compute capability {}.{}, and the device has {}.{}".format(
            *LEAST_CAPABILITY, *torch.cuda.get_device_capability(device)
        )
    return None


class _Plan:
    """
    How attention between tensors of some shapes is cut into equal groups of heads and blocks of rows, and memory for
    one group, which each group and each call overwrites. Its matrices are flat: `(heads of the group, length, width)`.
    """

    def __init__(self, query_shape: tuple, key_length: int, value_dim: int, dtype, device, is_causal: bool):
        batch_size, heads, query_length, head_dim = query_shape
        self.lengths, self.past, self.dtype = (query_length, key_length), key_length - query_length, dtype
        rows = max(1, min(BLOCK_ROWS, query_length))
        elements = max(1, rows * key_length)  # of one head
        if heads * elements < FEW_ELEMENTS:  # whole sequences, of which copies are made
            sequences = _divisor(batch_size, BLOCK_ELEMENTS // max(1, heads * elements))
            self._shape = (sequences, heads)
            self.groups = [(slice(first, first + sequences),) for first in range(0, batch_size, sequences)]
        else:
            self._shape = (_divisor(heads, BLOCK_ELEMENTS // elements),)
            firsts = range(0, heads, *self._shape)
            self.groups = [(b, slice(first, first + self._shape[0])) for b in range(batch_size) for first in firsts]
        starts = range(0, query_length, rows)
        ends = [min(start + rows, query_length) for start in starts]
        last_keys = [end + self.past if is_causal else key_length for end in ends]
        self._blocks = [(start, end, 0, last) for start, end, last in zip(starts, ends, last_keys, strict=True)]
        self._parts = {}

        sizes = dict.fromkeys(("scores", "weights", "kept"), rows * key_length)
        sizes |= {"attended": rows * value_dim, "block_grad_queries": rows * head_dim}
        sizes |= {"queries": query_length * head_dim, "upstream": query_length * value_dim}
        sizes |= dict.fromkeys(("keys", "grad_keys", "block_grad_keys"), key_length * head_dim)
        sizes |= dict.fromkeys(("values", "grad_values", "block_grad_values"), key_length * value_dim)
        sizes |= dict.fromkeys(("maximum", "total", "product"), query_length)
        self._size = math.prod(self._shape)
        with torch.inference_mode(False):  # so that it serves outside of it too
            empty = partial(torch.empty, dtype=dtype, device=device)
            self._memory = {name: empty(self._size * size) for name, size in sizes.items()}
            self._later_keys = empty(rows, rows).fill_(MASKED).triu_(1) if is_causal else None
        self.maximum, self.total, self.product = (self.view(name, query_length, 1) for name in [*sizes][-3:])
        self.grad_keys = self.view("grad_keys", key_length, head_dim)
        self.grad_values = self.view("grad_values", key_length, value_dim)

    def view(self, name: str, length: int, width: int) -> torch.Tensor:
        """Matrices in the memory of that name, as many as the group has heads."""
        return self._memory[name][: self._size * length * width].view(self._size, length, width)

    def take(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """A group's queries, keys, values or upstream gradients, flat: themselves or a copy."""
        if len(self._shape) == 1 and states.dtype == self.dtype:
            return states
        copy = self.view(name, *states.shape[-2:])
        self.unflatten(copy).copy_(states)
        return copy

    def flatten(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(self._size, -1, 1)

    def unflatten(self, matrices: torch.Tensor) -> torch.Tensor:
        return matrices.view(*self._shape, *matrices.shape[1:])

    def blocks(self, visible: torch.Tensor | None) -> list[tuple[int, int, int, int]]:
        """Where the rows of each block begin and end, and the keys that at least one of them may see."""
        if visible is None or visible.shape[-1] == 1:
            return self._blocks
        return [self._narrow(visible, *block) for block in self._blocks]

    def _narrow(self, visible: torch.Tensor, first_row: int, end_row: int, first_key: int, end_key: int):
        rows = visible if visible.shape[2] == 1 else visible[:, :, first_row:end_row]
        seen = rows[..., first_key:end_key].any(dim=0).any(dim=0).any(dim=0).nonzero()
        return first_row, end_row, *((seen[0].item(), seen[-1].item() + 1) if len(seen) else (0, 1))

    def cut(self, block: tuple[int, int, int, int]) -> SimpleNamespace:
        """A block's rows and keys, and its parts of the memory."""
        if block not in self._parts:
            if len(self._parts) == KEPT_PARTS:
                self._parts.clear()
            self._parts[block] = self._cut(*block)
        return self._parts[block]

    def _cut(self, first_row: int, end_row: int, first_key: int, end_key: int) -> SimpleNamespace:
        rows, keys = slice(first_row, end_row), slice(first_key, end_key)
        length, width = end_row - first_row, end_key - first_key
        head_dim, value_dim = self.grad_keys.shape[-1], self.grad_values.shape[-1]
        part = SimpleNamespace(
            rows=rows,
            keys=keys,
            **{name: self.view(name, length, width) for name in ("scores", "weights", "kept")},
            **{name: getattr(self, name)[:, rows] for name in ("maximum", "total", "product")},
            attended=self.view("attended", length, value_dim),
            grad_queries=self.view("block_grad_queries", length, head_dim),
            grad_keys=self.view("block_grad_keys", width, head_dim),
            grad_values=self.view("block_grad_values", width, value_dim),
            later_scores=None,
        )
        diagonal = first_row + self.past
        start = max(first_key, diagonal)
        if self._later_keys is not None and start < end_key:
            part.later_scores = part.scores[:, :, start - first_key :]
            part.later_keys = self._later_keys[:length, start - diagonal : end_key - diagonal]
        return part

    def hide(self, part: SimpleNamespace, hidden: torch.Tensor | None, group: tuple):
        """Keeps masked pairs out of a block's scores, in place."""
        if part.later_scores is not None:
            part.later_scores.add_(part.later_keys)
        if hidden is not None:
            self.unflatten(part.scores).masked_fill_(hidden[group][..., part.rows, part.keys], MASKED)


class _Plans(threading.local):
    """Each thread's plans for the shapes that it met last."""

    def __init__(self):
        self.keep = lru_cache(KEPT_SHAPES)(_Plan)

    def find(self, query: torch.Tensor, key: torch.Tensor, value_dim: int, is_causal: bool) -> _Plan:
        dtype, key_length = torch.promote_types(query.dtype, torch.float32), key.shape[2]
        plan = self.keep if key_length <= KEPT_LENGTH else _Plan
        return plan(tuple(query.shape), key_length, value_dim, dtype, query.device, is_causal)


_plans = _Plans()


def _divisor(total: int, most: int) -> int:
    """The largest number up to `most` that divides the total; at least 1."""
    return next((number for number in range(min(total, most), 1, -1) if total % number == 0), 1)


def _hidden_pairs(query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor | None:
    """What is not visible, for every query and key, without a copy for each."""
    return None if visible is None else (~visible).expand(*query.shape[:3], key.shape[2])


def _draw_kept(kept: torch.Tensor, dropout: float, seed: torch.Tensor, number: int) -> torch.Tensor:
    """Fills a matrix with 1 / (1 - dropout) where a probability is kept, else 0; the same in both passes."""
    generator = torch.Generator(kept.device).manual_seed(seed.item() + number)
    kept.bernoulli_(1 - dropout, generator=generator)
    return kept if dropout == 1 else kept.div_(1 - dropout)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether nothing records, transforms or intercepts what is computed with a tensor, so no operator is needed."""
    return not (
        is_tracing(tensor)
        or tensor.is_meta
        or type(tensor) not in (torch.Tensor, nn.Parameter)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def _empty_results(query: torch.Tensor, value: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch_size, heads, query_length, _ = query.shape
    value_dim = 0 if value is None else value.shape[-1]
    output = query.new_empty(batch_size, query_length, heads, value_dim).transpose(1, 2)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return output, *(query.new_empty(batch_size, heads, query_length, dtype=dtype) for _ in range(2))


def _empty_gradients(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    grad_value = query.new_empty(0) if value is None else torch.empty_like(value)
    return torch.empty_like(query), torch.empty_like(key), grad_value


blockwise_attention_forward = torch.library.custom_op(f"{OPERATOR}_forward", forward_pass, mutates_args=())
blockwise_attention_backward = torch.library.custom_op(f"{OPERATOR}_backward", backward_pass, mutates_args=())


@blockwise_attention_forward.register_fake
def _(query, key, value, visible, is_causal, scaling, dropout, seed):
    return _empty_results(query, value)


@blockwise_attention_backward.register_fake
def _(query, key, value, *rest):
    return _empty_gradients(query, key, value)


def _one_by_one(operator: Callable) -> Callable:
    """An operator's rule for `torch.vmap`: it is called for each example, whose dropout may have a seed of its own."""

    def rule(info, in_dims, *arguments):
        examples = [
            operator(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return tuple(torch.stack(results) for results in zip(*examples, strict=True)), (0, 0, 0)

    return rule


for _operator in (blockwise_attention_forward, blockwise_attention_backward):
    _operator.register_vmap(_one_by_one(_operator))


# The operators are differentiated by functions around them, and not by `register_autograd`, under which derivatives in
# forward mode are silently 0 and transforms of `torch.func` fail. A function without `jvp` refuses the former.
class _BlockwiseAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query, key, value, visible, is_causal, scaling, dropout, seed):
        run = forward_pass if _is_plain(query) else blockwise_attention_forward
        return run(query, key, value, visible, is_causal, scaling, dropout, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, visible, ctx.is_causal, ctx.scaling, ctx.dropout, seed = inputs
        ctx.save_for_backward(query, key, value, visible, seed, *output)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx, grad_output, grad_entropies, _):
        query, key, value, visible, seed, output, entropies, log_sum_exp = ctx.saved_tensors
        # A function of its own for the second derivative, which it refuses.
        is_last = _is_plain(grad_entropies) and not torch.is_grad_enabled()
        run = backward_pass if is_last else _BlockwiseAttentionBackward.apply
        grad_query, grad_key, grad_value = run(
            query, key, value, visible, ctx.is_causal, ctx.scaling, ctx.dropout, seed,
            output, entropies, log_sum_exp, grad_output, grad_entropies,
        )  # fmt: skip
        return grad_query, grad_key, None if value is None else grad_value, None, None, None, None, None


class _BlockwiseAttentionBackward(torch.autograd.Function):
    generate_vmap_rule = True

    # fmt: off
    @staticmethod
    def forward(  # by name, since captured graphs take no `*arguments` here
        query, key, value, visible, is_causal, scaling, dropout, seed,
        output, entropies, log_sum_exp, grad_output, grad_entropies,
    ):
        return blockwise_attention_backward(
            query, key, value, visible, is_causal, scaling, dropout, seed,
            output, entropies, log_sum_exp, grad_output, grad_entropies,
        )
    # fmt: on

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *upstream):
        raise RuntimeError("Attention with entropies has no second derivative: its autograd formula serves once.")


__all__ = ["blockwise_attention"]
