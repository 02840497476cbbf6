# SPDX-License-Identifier: Apache-2.0
"""Attention with row entropies in blocks of rows, out of torch's own matrix products: memory linear in the length.

A block holds some rows of some heads, with the keys that these rows may attend to and no others, and is small enough
to stay in the processor's caches. Nothing of it outlives it but the output, the entropy and the log-sum-exp of its
rows; the backward pass computes its scores again. With s the scores, P the probabilities, and upstream gradients do of
the output and g of the entropy,

    H_i     = lse_i - sum_j P_ij s_ij
    ds_ij   = P_ij (do_i . v_j  -  do_i . o_i  -  g_i (log P_ij + H_i))

so entropy adds no matrix product to those of attention, only passes over a block. Scores are kept to base 2, since
`exp2` is fast for every argument, where `exp` slows down a hundredfold where its result underflows.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers.utils import is_triton_available


LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
# Added to the scores of pairs that are masked: far below any score, and far enough from the end of float32 that no
# product with it overflows.
MASKED = -1e20
# Rows with a maximum below this have nothing that they may attend to.
NOTHING_VISIBLE = MASKED / 10

# Sizes of blocks, by measurement (evaluation/benchmarks/entropy_attention.py).
BLOCK_ROWS = 64
BLOCK_ELEMENTS = 2**18

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
    return _BlockwiseAttention.apply(query, key, value, visible, is_causal, scaling, dropout, seed)


@torch.library.custom_op(f"{OPERATOR}_forward", mutates_args=())
def blockwise_attention_forward(
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
    output, entropies, log_sum_exp = _empty_results(query, value)
    if obstacle_to_kernel(query.device, query.dtype, max(query.shape[-1], output.shape[-1])) is None:
        from .triton_attention import run_forward

        run_forward(query, key, value, visible, is_causal, scaling, dropout, seed, output, entropies, log_sum_exp)
        return output, entropies, log_sum_exp
    plan = _Plan(query, key, visible, is_causal)

    def compute(group: _Group, buffers: _Buffers):
        queries = group.take(query, scaling * LOG2_E)
        keys = group.take(key).mT
        values = None if value is None else group.take(value)
        row_maximum, row_sum, row_product = group.columns(3)
        for block in plan.blocks:
            if block.is_empty:
                row_maximum[:, block.rows], row_sum[:, block.rows], row_product[:, block.rows] = 0.0, 0.0, 0.0
                group.of(output)[:, :, block.rows] = 0.0
                continue
            scores, exponentials, *kept = buffers.views(group, block)
            torch.bmm(queries[:, block.rows], keys[:, :, block.keys], out=scores)
            plan.mask(scores, group, block)
            maximum = torch.amax(scores, dim=-1, keepdim=True, out=row_maximum[:, block.rows])
            if visible is not None:
                maximum.clamp_(min=NOTHING_VISIBLE)
            torch.exp2(scores.sub_(maximum), out=exponentials)
            sums = torch.sum(exponentials, dim=-1, keepdim=True, out=row_sum[:, block.rows])
            torch.sum(scores.mul_(exponentials), dim=-1, keepdim=True, out=row_product[:, block.rows])
            if value is not None:
                if dropout:
                    exponentials.mul_(_draw_kept(kept[0], dropout, seed, group, block))
                attended = group.unflatten(torch.bmm(exponentials, values[:, block.keys]))
                torch.div(attended, group.unflatten(_positive(sums)), out=group.of(output)[:, :, block.rows])
        log_sum = _positive(row_sum).log2()
        rows_entropy = (log_sum - row_product / row_sum).mul_(LN_2).where(row_sum != 0, 0.0)
        group.of(entropies)[:] = group.unflatten(rows_entropy).squeeze(-1)
        group.of(log_sum_exp)[:] = group.unflatten(log_sum + row_maximum).squeeze(-1)

    plan.run(compute, buffers=3 if dropout else 2)
    return output, entropies, log_sum_exp


@torch.library.custom_op(f"{OPERATOR}_backward", mutates_args=())
def blockwise_attention_backward(
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
    plan = _Plan(query, key, visible, is_causal)
    row_constant = -grad_entropies * entropies
    if value is not None:
        row_constant -= (grad_output.to(plan.dtype) * output.to(plan.dtype)).sum(dim=-1)
    slope = grad_entropies * -LN_2

    def compute(group: _Group, buffers: _Buffers):
        queries = group.take(query, scaling * LOG2_E)
        keys = group.take(key)
        log_sums, slopes, constants = (group.take(rows.unsqueeze(-1)) for rows in (log_sum_exp, slope, row_constant))
        sum_key = torch.zeros_like(keys)
        if value is not None:
            values, upstream = group.take(value), group.take(grad_output)
            sum_value = torch.zeros_like(values)
        for block in plan.blocks:
            if block.is_empty:
                group.of(grad_query)[:, :, block.rows] = 0.0
                continue
            scores, probabilities, *kept = buffers.views(group, block)
            torch.bmm(queries[:, block.rows], keys[:, block.keys].mT, out=scores)
            plan.mask(scores, group, block)
            scores.sub_(log_sums[:, block.rows])  # log2 of the probabilities
            torch.exp2(scores, out=probabilities)
            scores.mul_(slopes[:, block.rows]).add_(constants[:, block.rows])
            if value is not None:
                block_upstream, block_values = upstream[:, block.rows], values[:, block.keys]
                if dropout:
                    factor = _draw_kept(kept[0], dropout, seed, group, block)
                    scores.add_((block_upstream @ block_values.mT).mul_(factor))
                    sum_value[:, block.keys] += (probabilities * factor).mT @ block_upstream
                else:
                    scores.baddbmm_(block_upstream, block_values.mT)
                    sum_value[:, block.keys].baddbmm_(probabilities.mT, block_upstream)
            scores.mul_(probabilities)  # now the gradient of the scores
            block_grad = group.unflatten(torch.bmm(scores, keys[:, block.keys]))
            torch.mul(block_grad, scaling, out=group.of(grad_query)[:, :, block.rows])
            sum_key[:, block.keys].baddbmm_(scores.mT, queries[:, block.rows])
        torch.mul(group.unflatten(sum_key), LN_2, out=group.of(grad_key))
        if value is not None:
            group.of(grad_value)[:] = group.unflatten(sum_value)

    plan.run(compute, buffers=3 if dropout else 2)
    return grad_query, grad_key, grad_value


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


@dataclass(frozen=True)
class _Block:
    """Rows, and the keys that at least one of them may attend to."""

    rows: slice
    keys: slice

    @property
    def is_empty(self) -> bool:
        return self.keys.start >= self.keys.stop


class _Group:
    """Some heads of some sequences, computed together: as `(batch, heads, ...)`, or flat as `(size, ...)`."""

    def __init__(self, plan: "_Plan", batch: slice, heads: slice):
        self.plan = plan
        self.batch = batch
        self.heads = heads
        self.shape = (batch.stop - batch.start, heads.stop - heads.start)
        self.size = self.shape[0] * self.shape[1]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This group's part of a tensor of shape `(batch, heads, ...)`."""
        return tensor[self.batch, self.heads]

    def flatten(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[0] if self.shape[0] == 1 else tensor.flatten(0, 1)

    def unflatten(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(*self.shape, *tensor.shape[1:])

    def take(self, tensor: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """This group's part, flat, in the dtype of the computation, times a factor."""
        part = self.flatten(self.of(tensor).to(self.plan.dtype))
        return part if factor == 1.0 else part * factor

    def columns(self, count: int) -> list[torch.Tensor]:
        """Uninitialised numbers, one for each row: `count` tensors of shape `(size, query_length, 1)`."""
        shape = (self.size, self.plan.query_length, 1)
        return [torch.empty(shape, dtype=self.plan.dtype, device=self.plan.device) for _ in range(count)]


class _Plan:
    """How the work is cut into groups of heads and blocks of rows, and what is masked in a block."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor | None, is_causal: bool):
        self.batch_size, self.heads, self.query_length, self.head_dim = query.shape
        self.key_length = key.shape[2]
        self.device = query.device
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.visible = visible
        self.is_causal = is_causal
        self.past = self.key_length - self.query_length
        self.block_rows = max(1, min(BLOCK_ROWS, self.query_length))
        heads = max(1, BLOCK_ELEMENTS // max(1, self.block_rows * self.key_length))
        self.group_heads = _equal_parts(self.heads, heads)
        self.group_batch = _equal_parts(self.batch_size, max(1, heads // self.heads))
        self.blocks = list(self._cut_rows())
        if is_causal:
            square = torch.full((self.block_rows, self.block_rows), MASKED, dtype=self.dtype, device=self.device)
            self.later_keys = square.triu(1)

    def run(self, compute: Callable[["_Group", "_Buffers"], None], buffers: int):
        """Computes all groups, one after the other."""
        memory = _Buffers(self, buffers)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for group in self._groups():
                compute(group, memory)

    def _groups(self) -> Iterator[_Group]:
        for batch in range(0, self.batch_size, self.group_batch):
            for head in range(0, self.heads, self.group_heads):
                yield _Group(
                    self,
                    slice(batch, min(batch + self.group_batch, self.batch_size)),
                    slice(head, min(head + self.group_heads, self.heads)),
                )

    def mask(self, scores: torch.Tensor, group: _Group, block: _Block):
        """Adds to the scores of a block, flat and in place, what keeps masked pairs out."""
        if self.is_causal:
            diagonal = block.rows.start + self.past
            start = max(block.keys.start, diagonal)
            if start < block.keys.stop:
                rows = block.rows.stop - block.rows.start
                later_keys = self.later_keys[:rows, start - diagonal : block.keys.stop - diagonal]
                scores[:, :, start - block.keys.start :].add_(later_keys)
        if self.visible is not None:
            visible = self.visible
            for dim, part in enumerate((group.batch, group.heads, block.rows, block.keys)):
                if visible.shape[dim] > 1:
                    visible = visible.narrow(dim, part.start, part.stop - part.start)
            group.unflatten(scores).add_(torch.zeros_like(visible, dtype=self.dtype).masked_fill_(~visible, MASKED))

    def _cut_rows(self) -> Iterator[_Block]:
        for start in range(0, self.query_length, self.block_rows):
            rows = slice(start, min(start + self.block_rows, self.query_length))
            last = min(self.key_length, rows.stop + self.past) if self.is_causal else self.key_length
            yield _Block(rows, self._visible_range(rows, last))

    def _visible_range(self, rows: slice, last: int) -> slice:
        """The keys before `last` from the first to the last that the mask lets any of these rows see."""
        if self.visible is None or self.visible.shape[-1] == 1:
            return slice(0, last)
        visible = self.visible if self.visible.shape[2] == 1 else self.visible[:, :, rows]
        seen = visible[..., :last].any(dim=0).any(dim=0).any(dim=0).nonzero()
        return slice(seen[0].item(), seen[-1].item() + 1) if len(seen) else slice(0, 0)


class _Buffers:
    """Memory for the matrices of one block, used again for each."""

    def __init__(self, plan: _Plan, count: int):
        size = plan.group_batch * plan.group_heads * plan.block_rows * plan.key_length
        self._buffers = [torch.empty(size, dtype=plan.dtype, device=plan.device) for _ in range(count)]

    def views(self, group: _Group, block: _Block) -> list[torch.Tensor]:
        """One matrix of shape `(group size, rows, keys)` from each buffer."""
        shape = (group.size, block.rows.stop - block.rows.start, block.keys.stop - block.keys.start)
        return [buffer[: math.prod(shape)].view(shape) for buffer in self._buffers]


def _equal_parts(total: int, largest: int) -> int:
    """The size of the parts when `total` is cut into as few as possible of at most `largest`, as equal as can be."""
    count = max(1, -(-total // largest))
    return max(1, -(-total // count))


def _positive(sums: torch.Tensor) -> torch.Tensor:
    """The sums, with the smallest number in place of 0, the sum of a row without a visible key."""
    return sums.clamp(min=torch.finfo(sums.dtype).tiny)


def _draw_kept(kept: torch.Tensor, dropout: float, seed: torch.Tensor, group: _Group, block: _Block) -> torch.Tensor:
    """Fills a matrix with 1 / (1 - dropout) where a probability is kept, else 0; the same in both passes."""
    place = (group.batch.start * group.plan.heads + group.heads.start) * group.plan.query_length + block.rows.start
    generator = torch.Generator(kept.device).manual_seed(seed.item() + place)
    kept.bernoulli_(1 - dropout, generator=generator)
    return kept if dropout == 1 else kept.div_(1 - dropout)


def _empty_results(query: torch.Tensor, value: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch_size, heads, query_length, _ = query.shape
    value_dim = 0 if value is None else value.shape[-1]
    output = query.new_empty(batch_size, query_length, heads, value_dim).transpose(1, 2)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return output, *(query.new_empty(batch_size, heads, query_length, dtype=dtype) for _ in range(2))


def _empty_gradients(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    grad_value = query.new_empty(0) if value is None else torch.empty_like(value)
    return torch.empty_like(query), torch.empty_like(key), grad_value


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
        return blockwise_attention_forward(query, key, value, visible, is_causal, scaling, dropout, seed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, visible, ctx.is_causal, ctx.scaling, ctx.dropout, seed = inputs
        ctx.save_for_backward(query, key, value, visible, seed, *output)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx, grad_output, grad_entropies, _):
        query, key, value, visible, seed, output, entropies, log_sum_exp = ctx.saved_tensors
        grad_query, grad_key, grad_value = _BlockwiseAttentionBackward.apply(
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
