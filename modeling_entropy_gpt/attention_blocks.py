# SPDX-License-Identifier: Apache-2.0
"""
How blockwise_attention.py cuts attention into blocks: the rows and keys of each, and the memory that all of them use.
"""

import math
import threading
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import torch

from .attention_functions import MASKED


# Sizes of blocks, by measurement (evaluation/benchmarks/entropy_attention.py).
BLOCK_ROWS = 64
BLOCK_ELEMENTS = 2**18
# Shapes whose memory each thread keeps, and the number of queries and of keys up to which it does.
KEPT_SHAPES = 4
KEPT_LENGTH = 2**13
# Blocks of a shape of which the parts of that memory are kept cut.
KEPT_PARTS = 512


class Block(NamedTuple):
    """Where some rows begin and end, and the keys that at least one of them may attend to."""

    first_row: int
    end_row: int
    first_key: int
    end_key: int


MATRICES = ("scores", "weights", "kept", "derivative")


class _Plan:
    """
    How attention between tensors of some shapes is cut into equal groups of heads, and the memory for one group, which
    each group of each call overwrites: tensors of shape `(batch, heads, length, width)`, and their parts for a block,
    with batch and heads flat.
    """

    def __init__(self, query_shape: tuple, key_length: int, value_dim: int, dtype, device, is_causal: bool):
        batch_size, heads, self.query_length, head_dim = query_shape
        self.is_causal, self.past = is_causal, key_length - self.query_length
        block_rows = max(1, min(BLOCK_ROWS, self.query_length))
        most = max(1, BLOCK_ELEMENTS // (BLOCK_ROWS * max(1, self.query_length, key_length)))
        self.shape = (_divisor(batch_size, most // max(1, heads)), _divisor(heads, most))
        self.groups = [
            (slice(batch, batch + self.shape[0]), slice(head, head + self.shape[1]))
            for batch in range(0, batch_size, self.shape[0])
            for head in range(0, heads, self.shape[1])
        ]
        rows = {"queries": head_dim, "upstream": value_dim, "attended": value_dim}
        rows |= dict.fromkeys(("maximum", "total", "product", "shift", "floor", "root", "inverse"), 1)
        keys = {"keys": head_dim, "grad_keys": head_dim, "values": value_dim, "grad_values": value_dim}
        options, size = {"dtype": dtype, "device": device}, math.prod(self.shape)
        # Results of products with memory of their own: whether there is one for each key, else row, and its width.
        self._products = {"outputs": (0, value_dim), "query_product": (0, head_dim)}
        self._products |= {"value_product": (1, value_dim), "key_product": (1, head_dim)}
        with torch.inference_mode(False):  # so that it serves with gradients too
            self._rows = {
                name: torch.empty(*self.shape, self.query_length, dim, **options) for name, dim in rows.items()
            }
            self._keys = {name: torch.empty(*self.shape, key_length, dim, **options) for name, dim in keys.items()}
            self._matrices = {name: torch.empty(size * block_rows * key_length, **options) for name in MATRICES}
            self._product = torch.empty(size * max(block_rows, key_length) * max(head_dim, value_dim), **options)
            self._later_keys = torch.full((block_rows, block_rows), MASKED, **options).triu_(1)
            self._earlier_keys = torch.ones(block_rows, block_rows, **options).tril_()
        vars(self).update(self._rows | self._keys)
        self._parts = {}

    def load(self, group: tuple[slice, slice], **tensors: torch.Tensor | None):
        """Fills the memory of these names with a group's part of tensors."""
        for name, tensor in tensors.items():
            if tensor is not None:
                part = tensor[group]
                vars(self)[name].copy_(part if part.ndim == 4 else part.unsqueeze(-1))

    def cut(self, block: Block) -> SimpleNamespace:
        """A block's part of the memory; `later_keys` is what is added to `later_scores`, if the block has any."""
        if block not in self._parts:
            if len(self._parts) == KEPT_PARTS:
                self._parts.clear()
            self._parts[block] = self._cut(*block)
        return self._parts[block]

    def _cut(self, first_row: int, end_row: int, first_key: int, end_key: int) -> SimpleNamespace:
        rows, keys, size = lengths = end_row - first_row, end_key - first_key, math.prod(self.shape)
        part = SimpleNamespace(later_keys=None)
        for name, tensor in self._rows.items():
            setattr(part, name, tensor.flatten(0, 1)[:, first_row:end_row])
        for name, tensor in self._keys.items():
            setattr(part, name, tensor.flatten(0, 1)[:, first_key:end_key])
        for name, tensor in self._matrices.items():
            setattr(part, name, tensor[: size * rows * keys].view(size, rows, keys))
        for name, (along, dim) in self._products.items():
            setattr(part, name, self._product[: size * lengths[along] * dim].view(size, lengths[along], dim))
        for name in ("scores", "weights", "derivative", "outputs", "query_product", "total", "root"):
            setattr(part, f"whole_{name}", getattr(part, name).unflatten(0, self.shape))
        diagonal = first_row + self.past
        start = max(first_key, diagonal)
        if self.is_causal and start < end_key:
            for name in ("scores", "weights", "derivative"):
                setattr(part, f"later_{name}", getattr(part, name)[:, :, start - first_key :])
            for name in ("later_keys", "earlier_keys"):
                matrix = getattr(self, f"_{name}")
                setattr(part, name, matrix[:rows, start - diagonal : end_key - diagonal])
        return part


class _Plans(threading.local):
    """
    Each thread's plans for the shapes that it met last; not those with one query, of which decoding has another for
    each token.
    """

    def __init__(self):
        self.keep = lru_cache(KEPT_SHAPES)(_Plan)

    def find(
        self, query: torch.Tensor, key_length: int, value_dim: int, visible: torch.Tensor | None, is_causal: bool
    ) -> tuple[_Plan, list[Block], torch.Tensor | None]:
        """The plan, the blocks, and the mask, unless it hides no more than all keys that are later or nothing."""
        lengths = query.shape[2], key_length
        if visible is None:
            blocks = _cut_rows(*lengths, is_causal)
        else:
            visible, is_causal, blocks = _read_mask(visible, is_causal, *lengths)
        dtype = torch.promote_types(query.dtype, torch.float32)
        is_kept = query.shape[2] > 1 and max(lengths) <= KEPT_LENGTH
        plan = (self.keep if is_kept else _Plan)(query.shape, key_length, value_dim, dtype, query.device, is_causal)
        return plan, blocks, visible


plans = _Plans()


def _read_mask(
    visible: torch.Tensor, is_causal: bool, query_length: int, key_length: int
) -> tuple[torch.Tensor | None, bool, list[Block]]:
    """The mask, or `None` if it hides later keys or nothing; whether all later keys are hidden; and the blocks."""
    bits = visible.view(torch.uint8)  # whose extremes are found ten times as fast as those of booleans
    seen_by_one, seen_by_all = bits.amax((0, 1)), bits.amin((0, 1))
    if query_length <= key_length:
        later = torch.ones(query_length, key_length, dtype=torch.uint8, device=visible.device)
        later = later.triu_(1 + key_length - query_length)
        if (seen_by_all | later).amin():
            if is_causal or not (seen_by_one & later).amax():
                return None, True, _cut_rows(query_length, key_length, True)
            if seen_by_all.amin():
                return None, False, _cut_rows(query_length, key_length, False)
    blocks = _cut_rows(query_length, key_length, is_causal)
    return visible, is_causal, blocks if visible.shape[-1] == 1 else [_narrow(block, seen_by_one) for block in blocks]


@lru_cache(KEPT_SHAPES)
def _cut_rows(query_length: int, key_length: int, is_causal: bool) -> list[Block]:
    starts = range(0, query_length, BLOCK_ROWS)
    ends = [min(start + BLOCK_ROWS, query_length) for start in starts]
    last_keys = [min(key_length, end + key_length - query_length) if is_causal else key_length for end in ends]
    return [Block(*rows, 0, key) for *rows, key in zip(starts, ends, last_keys, strict=True)]


def _narrow(block: Block, seen: torch.Tensor) -> Block:
    """The block without the keys before the first and after the last that any of its rows sees."""
    rows = seen[block.first_row : block.end_row] if len(seen) > 1 else seen
    keys = rows[:, : block.end_key].amax(0).nonzero()
    first, end = (keys[0].item(), keys[-1].item() + 1) if len(keys) else (0, 1)
    return block._replace(first_key=first, end_key=end)


def _divisor(total: int, most: int) -> int:
    """The largest number up to `most` that divides the total; at least 1."""
    return next((number for number in range(min(total, most), 1, -1) if total % number == 0), 1)
