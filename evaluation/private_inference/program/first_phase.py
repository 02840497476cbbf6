"""What is made before the prompt comes: products of masks with weights, with one another and with themselves."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .arithmetic import Arithmetic
from .ciphertexts import SLOTS, count_product
from .counting import SHARED_BATCHES, CountingArithmetic, Shape, Stock, make_shape
from .demands import (
    KEPT,
    NUMBERS,
    SCORES,
    SQUARES,
    WEIGHTS,
    Bound,
    Demand,
    DemandingStep,
    Intercepting,
    Place,
    fill,
    flatten,
    join_masks,
    join_parts,
    split,
)
from .prices import load_prices, price_of
from .program import is_factor
from .settings import PrivateSettings
from .steps import Step


# Numbers of which those of a row have one factor in common.
ROWS = "rows"
# Numbers whose products are made at once: enough to fill ciphertexts, and no more than fit the engine's memory.
POOL = 2**18
# Rows that are multiplied as one matrix: of larger ones nearly all would be zeros.
MOST_ROWS = 128


@dataclass(frozen=True)
class Correlation:
    """
    What is prepared for a demand, by the names of its variables.

    Args:
        demand ([`Demand`]): What it is made for.
        masks (`tuple[tuple[str]]`): For each mask, its parts.
        product (`str`): The product of the masks, or of the mask and the weight.
    """

    demand: Demand
    masks: tuple[tuple[str, ...], ...]
    product: str

    @property
    def names(self) -> tuple[str, ...]:
        return (*(name for parts in self.masks for name in parts), self.product)


def multiply_weights(
    recorded: dict[Place, DemandingStep], made: dict[Place, tuple[Correlation, ...]]
) -> Iterator[Step]:
    """Steps that multiply masks with weights, those of all passes with one weight at once."""
    groups: dict[tuple, list[Place]] = defaultdict(list)
    for place, entry in recorded.items():
        if alike := tuple(demand.right for demand in entry.demands if demand.kind == WEIGHTS):
            groups[*place[1:], alike].append(place)
    for places in groups.values():
        entry = recorded[places[0]]
        found = [one for numbers in zip(*(made[place] for place in places), strict=True) for one in numbers]
        found = [one for one in found if one.demand.kind == WEIGHTS]
        step = entry.step
        factors = tuple(name for name in step.inputs if is_factor(name))
        blanks = tuple(
            None if name in factors else shape for name, shape in zip(step.inputs, entry.inputs, strict=True)
        )
        multiply = MultiplyWeights(Bound.of(step.function), entry.demands, len(places), blanks)
        masks = tuple(name for one in found for name in one.masks[0])
        yield Step(step.operation, step.layer, multiply, (*masks, *factors), tuple(one.product for one in found))


def multiply_kept(
    recorded: dict[Place, DemandingStep],
    made: dict[Place, tuple[Correlation, ...]],
    kept: dict[str, Iterable[tuple[str, ...]]],
) -> Iterator[Step]:
    """
    Steps that multiply masks with those of kept keys or values, those of all passes at once.

    Args:
        recorded, made: By the place of a step.
        kept (`dict[str, Iterable[tuple[str]]]`): For each variable that is kept, the parts of its mask, token after
            token.
    """
    groups: dict[tuple, list[Place]] = defaultdict(list)
    for place, entry in recorded.items():
        if entry.kept is not None:
            groups[place[1:]].append(place)
    for places in groups.values():
        step, rows = recorded[places[0]].step, tuple(kept[recorded[places[0]].kept])
        found = [one for place in places for one in made[place] if one.demand.kind in KEPT]
        multiply = MultiplyKept(tuple(one.demand for one in found), len(rows))
        masks = (name for parts in (*(one.masks[0] for one in found), *rows) for name in parts)
        yield Step(step.operation, step.layer, multiply, tuple(masks), tuple(one.product for one in found))


def multiply_pools(made: Iterable[Correlation]) -> Iterator[Step]:
    """
    Steps that multiply and square masks of numbers, whatever they are for: a few take as much as a ciphertext of them.
    """
    groups: dict[tuple, list[Correlation]] = defaultdict(list)
    for one in made:
        if one.demand.kind in (NUMBERS, SQUARES):
            groups[_choose_pool(one.demand)].append(one)
    for (kind, multiply, *_), wanted in groups.items():
        pool, size = [], 0
        for one in wanted:
            pool.append(one)
            size += math.prod(one.demand.product)
            if size >= POOL:
                yield _pool(kind, multiply, pool)
                pool, size = [], 0
        if pool:
            yield _pool(kind, multiply, pool)


def _pool(kind: str, multiply: Callable, pool: list[Correlation]) -> Step:
    masks = tuple(name for one in pool for name in one.names[:-1])
    return Step(kind, None, multiply, masks, tuple(one.product for one in pool))


def _choose_pool(demand: Demand) -> tuple:
    """With what it is multiplied: the kind, how, and what else such demands have in common."""
    if demand.kind == SQUARES:
        return SQUARES, square_numbers
    width = demand.left[-1]
    if demand.right == (*demand.left[:-1], 1) and _choose_rows(width):
        return ROWS, multiply_rows, width
    return NUMBERS, multiply_numbers


@functools.cache
def _choose_rows(width: int) -> int:
    """How many rows make a product of matrices that sends least a number; 0 if products of numbers send less."""
    prices = load_prices().bytes
    least, chosen = prices[SHARED_BATCHES] / SLOTS, 0
    for size in (2**power for power in range(1, MOST_ROWS.bit_length())):
        sent = 2 * price_of(count_product(size, size, width), prices) / (size * width)
        if sent < least:
            least, chosen = sent, size
    return chosen


@dataclass(frozen=True)
class MultiplyWeights:
    """
    Makes the products of masks with the weights of a step, for some passes at once: takes for each of these products
    and each pass the parts of the mask, then the server's factors.

    Args:
        function (`Callable`): The step's of one of the passes.
        demands (`tuple[Demand]`): Its demands.
        passes (`int`): How many there are.
        blanks (`tuple`): For each input of the step its shape, or `None` for a factor of the server's.
    """

    function: Callable
    demands: tuple[Demand, ...]
    passes: int
    blanks: tuple[tuple[int, ...] | None, ...]

    def __call__(self, ops: Arithmetic, *tensors):
        count = self.passes * sum(len(demand.parts) for demand in self.demands if demand.kind == WEIGHTS)
        masks, factors = tensors[:count], iter(tensors[count:])
        maker = _Maker(ops, self, masks)
        self.function(maker, *(next(factors) if shape is None else make_shape(shape) for shape in self.blanks))
        return tuple(maker.products)


class _Maker(Intercepting):
    """Multiplies masks with weights; the step itself runs on shapes, but for the server's factors."""

    def __init__(self, ops: Arithmetic, work: MultiplyWeights, masks: tuple):
        super().__init__(CountingArithmetic(PrivateSettings(), Stock()))
        self._makes, self._passes = ops, work.passes
        self._demands, self._masks = iter(work.demands), iter(masks)
        self.products: list = []

    def append_checksum(self, tensor):
        """All but the server's factors are shapes."""
        return (self._ops if isinstance(tensor, Shape) else self._makes).append_checksum(tensor)

    def take(self, kind: str, left, right=None, is_causal: bool = False):
        demand, ops = next(self._demands), self._makes
        if kind == WEIGHTS:
            masks = [mask for _ in range(self._passes) for mask in join_masks(ops, demand, self._masks)]
            product, begin = ops.ring_matmul(ops.xp.concatenate(masks, axis=-2), ops.as_ring(right)), 0
            for mask in masks:
                self.products.append(product[..., begin : begin + mask.shape[-2], :])
                begin += mask.shape[-2]
        return make_shape(demand.product)


@dataclass(frozen=True)
class MultiplyKept:
    """
    Makes the products of masks with that of kept keys or values: takes for each pass the parts of the mask of queries
    or weights, then those of the mask of what is kept, for some tokens after others.

    Args:
        demands (`tuple[Demand]`): Those of all passes.
        times (`int`): How often there are further tokens.
    """

    demands: tuple[Demand, ...]
    times: int

    def __call__(self, ops: Arithmetic, *tensors):
        tensors = iter(tensors)
        lefts = [mask for demand in self.demands for mask in join_masks(ops, demand, tensors)]
        kept = ops.xp.concatenate([join_parts(tensors) for _ in range(self.times)], axis=1)
        of_scores = self.demands[0].kind == SCORES
        if not of_scores:
            lefts = [fill(ops, left, -1, kept.shape[1]) for left in lefts]
        right = kept.swapaxes(1, 2) if of_scores else kept
        product, begin, products = ops.secret_ring_matmul(ops.xp.concatenate(lefts, axis=1), right), 0, []
        for demand in self.demands:
            _, rows, columns = demand.product
            products.append(product[:, begin : begin + rows, :columns])
            begin += rows
        return tuple(products)


def multiply_numbers(ops: Arithmetic, *masks):
    """Products of pairs of masks, each in two parts, all in one."""
    left = [masks[place] + masks[place + 1] for place in range(0, len(masks), 4)]
    right = [masks[place + 2] + masks[place + 3] for place in range(0, len(masks), 4)]
    shapes = [np.broadcast_shapes(one.shape, other.shape) for one, other in zip(left, right, strict=True)]
    flat = [
        flatten(ops, [ops.xp.broadcast_to(mask, shape) for mask, shape in zip(side, shapes, strict=True)])
        for side in (left, right)
    ]
    return tuple(split(ops.ring_multiply(*flat), shapes))


def multiply_rows(ops: Arithmetic, *masks):
    """
    Products of rows with a number each, in two parts all: as many rows as fill a ciphertext are a matrix, and their
    numbers are the diagonal of another one. Half the bytes of products of numbers.
    """
    width = masks[0].shape[-1]
    rows, factors = (
        ops.xp.concatenate(
            [(masks[place] + masks[place + 1]).reshape(-1, columns) for place in range(first, len(masks), 4)]
        )
        for first, columns in ((0, width), (2, 1))
    )
    size = _choose_rows(width)
    whole = len(rows) - len(rows) % size
    products = []
    if whole:
        diagonals = ops.xp.where(np.eye(size, dtype=bool), factors[:whole].reshape(-1, size, 1), 0)
        product = ops.ring_matmul(diagonals, rows[:whole].reshape(-1, size, width))
        products.append(product.reshape(whole, width))
    if whole < len(rows):
        products.append(ops.ring_multiply(rows[whole:], factors[whole:]))
    return tuple(split(flatten(ops, products), [mask.shape for mask in masks[::4]]))


def square_numbers(ops: Arithmetic, *masks):
    """
    Squares of masks in two parts, all in one: a product of what is one party's with what is shared takes two thirds of
    one of two shared numbers.
    """
    server, client = (flatten(ops, masks[part::2]) for part in (0, 1))
    mixed = ops.ring_multiply(server + client, server)
    squares = mixed + mixed - ops.ring_multiply(server, server) + ops.ring_multiply(client, client)
    return tuple(split(squares, [mask.shape for mask in masks[::2]]))
