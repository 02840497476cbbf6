"""What is left when the prompt has come: factors less their masks are revealed, and products are added up at home."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .arithmetic import Arithmetic
from .demands import (
    KEPT,
    SCORES,
    SQUARES,
    VALUES,
    WEIGHTS,
    Demand,
    Intercepting,
    KeptTokens,
    cut,
    fill,
    flatten,
    join_masks,
    join_parts,
    split,
)
from .visible import put_apart


@dataclass(frozen=True)
class MaskFactors:
    """
    Takes the inputs of a step, then masks; makes the factors of its weights, less their masks, all in one.

    Args:
        function (`Callable`): The step's. What it multiplies by weights are its inputs, or parts of them.
        demands (`tuple[Demand]`): What it asks for.
    """

    function: Callable
    demands: tuple[Demand, ...]

    def __call__(self, ops: Arithmetic, *tensors):
        inputs = len(tensors) - sum(demand.kind == WEIGHTS for demand in self.demands)
        collector = _Collector(ops, self.demands)
        self.function(collector, *tensors[:inputs])
        pairs = zip(collector.factors, tensors[inputs:], strict=True)
        return flatten(ops, [ops.as_ring(factor) - cut(mask, factor.shape) for factor, mask in pairs])


class _Collector(Intercepting):
    """Collects the factors of weights; products are zeros."""

    def __init__(self, ops: Arithmetic, demands: tuple[Demand, ...]):
        super().__init__(ops)
        self._demands = iter(demands)
        self.factors: list = []

    def __getattr__(self, name: str):
        if name != "xp":
            raise TypeError(f"{name} comes before a product with a weight: make it a step of its own")
        return super().__getattr__(name)

    def take(self, kind: str, left, right=None, is_causal: bool = False):
        if kind == WEIGHTS:
            self.factors.append(left)
        return np.broadcast_to(np.float32(0), next(self._demands).product)


def show(ops: Arithmetic, masked):
    """What a party's engine has no operation for: each side does its part of it (`Party.run`)."""
    return ops.show(masked)


@dataclass(frozen=True)
class RevealKept:
    """
    Reveals the keys and values of new tokens less their masks, once for as long as they are kept. Takes keys and
    values of all tokens, the parts of the masks for those of the new ones, and what was revealed of earlier ones;
    makes what is revealed of all.

    Keys are in the order of the tokens. Values are in that of the masks: where there are fewer tokens than were
    prepared for, zeros stand for the others, since sums of all products are prepared.

    Args:
        new (`int`): New tokens.
    """

    new: int

    def __call__(self, ops: Arithmetic, keys, values, *tensors):
        masks, earlier = iter(tensors[:4]), tensors[4:]
        key_mask, value_mask = join_parts(masks), join_parts(masks)
        new_keys, new_values = (ops.as_ring(kept[:, -self.new :]) for kept in (keys, values))
        masked = [
            new_keys - key_mask[:, : self.new],
            fill(ops, new_values, 1, value_mask.shape[1]) - value_mask,
        ]
        revealed = split(ops.reveal(flatten(ops, masked)), [tensor.shape for tensor in masked])
        if earlier:
            revealed = [ops.xp.concatenate(pair, axis=1) for pair in zip(earlier, revealed, strict=True)]
        return tuple(revealed)


@dataclass(frozen=True)
class UsePrepared:
    """
    A step that uses what is prepared: takes the step's inputs, what [`MaskFactors`] made and the server was shown,
    what [`RevealKept`] revealed of keys or values, and for each demand the parts of its masks, unless it is one of a
    weight, then the product.

    Args:
        function (`Callable`): The step's.
        demands (`tuple[Demand]`): What it asks for.
        prepared (`tuple[Demand]`): What each of these is prepared for, the same or larger.
        tokens ([`KeptTokens`]): Whose keys and values there are.
    """

    function: Callable
    demands: tuple[Demand, ...]
    prepared: tuple[Demand, ...]
    tokens: KeptTokens

    def __call__(self, ops: Arithmetic, *tensors):
        kinds = [demand.kind for demand in self.demands]
        has_weights, has_kept = WEIGHTS in kinds, any(kind in KEPT for kind in kinds)
        inputs = len(tensors) - sum(demand.tensors for demand in self.prepared) - has_weights - has_kept
        given, rest = tensors[:inputs], iter(tensors[inputs:])
        lefts = [demand.left for demand in self.demands if demand.kind == WEIGHTS]
        shown = iter(split(next(rest), lefts) if has_weights else ())
        revealed = next(rest) if has_kept else None
        return self.function(_User(ops, self, shown, revealed, rest), *given)


class _User(Intercepting):
    """Uses what was made for a step."""

    def __init__(self, ops: Arithmetic, work: UsePrepared, shown: Iterator, revealed, tensors: Iterator):
        super().__init__(ops)
        self._pairs = iter(zip(work.demands, work.prepared, strict=True))
        self._tokens, self._shown, self._revealed, self._tensors = work.tokens, shown, revealed, tensors

    def take(self, kind: str, left, right=None, is_causal: bool = False):
        ops, (demand, prepared) = self._ops, next(self._pairs)
        if kind == WEIGHTS:
            product = cut(next(self._tensors), demand.product)
            return ops.truncate(product + ops.ring_matmul(next(self._shown), ops.as_ring(right)))
        masks, product = join_masks(ops, prepared, self._tensors), next(self._tensors)
        use = {SCORES: self._score, VALUES: self._weigh, SQUARES: self._square}.get(kind, self._multiply)
        factors = [ops.as_ring(factor) for factor in (left, right) if factor is not None]
        return ops.truncate(use(demand, prepared, masks, product, *factors))

    def _score(self, demand: Demand, prepared: Demand, masks: list, product, query, key):
        ops, mask = self._ops, cut(masks[0], query.shape)
        product = self._tokens.choose(ops, product[:, : demand.left[1]])
        difference = ops.reveal(query - mask)
        key, revealed = key.swapaxes(1, 2), self._revealed.swapaxes(1, 2)
        return product + ops.ring_matmul(difference, key) + ops.ring_matmul(mask, revealed)

    def _weigh(self, demand: Demand, prepared: Demand, masks: list, product, weights, value):
        """Zeros that are not masked are not revealed either."""
        ops, rows = self._ops, self._tokens.choose_rows(prepared, demand)
        mask, product = masks[0][:, rows], product[:, rows]
        visible = prepared.visible[rows][:, self._tokens.places]
        masked = (weights - self._tokens.choose(ops, mask)).reshape(len(weights), -1)
        difference = put_apart(ops, ops.reveal(masked[:, np.flatnonzero(visible)]), visible)
        return product + ops.ring_matmul(difference, value) + ops.ring_matmul(mask, self._revealed)

    def _square(self, demand: Demand, prepared: Demand, masks: list, product, factor):
        mask = cut(masks[0], factor.shape)
        return self._ops.ring_multiply(self._ops.reveal(factor - mask), factor + mask) + cut(product, demand.product)

    def _multiply(self, demand: Demand, prepared: Demand, masks: list, product, *factors):
        ops = self._ops
        masks = [cut(mask, factor.shape) for mask, factor in zip(masks, factors, strict=True)]
        masked = [factor - mask for factor, mask in zip(factors, masks, strict=True)]
        differences = split(ops.reveal(flatten(ops, masked)), [tensor.shape for tensor in masked])
        product = cut(product, demand.product)
        return product + ops.ring_multiply(differences[0], factors[1]) + ops.ring_multiply(masks[0], differences[1])
