"""
A program in two phases: what does not depend on the prompt is done before it comes.

A product of numbers that come later is prepared with random ones in their place (Beaver, Crypto 1991; SecureML, S&P
2017, for matrices; Delphi, USENIX Security 2020, for the weights of a server). Each party draws a part of each mask,
and the protocol multiplies the masks, which nobody knows. Later a factor less its mask is revealed. It is uniformly
random in the ring, whatever the factor is, as long as no mask serves twice. All else of the product is local, but for
the truncation, which is that of one phase, of the same sum. With A and B the masks, D = X - A and E = Y - B:

    X Y = D Y + A E + A B        X W = D W + A W        X^2 = D (X + A) + A^2

A factor of a weight has a mask of the client's alone, and the server alone is shown the difference (Delphi), which
takes half the bytes. Zeros above the diagonal of the prompt's attention weights are neither masked nor revealed.

What is prepared for long prompts and answers serves shorter ones: masks and products are cut, and factors of products
of matrices filled up with zeros.
"""

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from entropy_gpt.evaluation.errors import PrivateInferenceError

from .arithmetic import Arithmetic
from .ciphertexts import SLOTS, count_product
from .counting import RING, SHARED_BATCHES, CountingArithmetic, Shape, Stock, make_shape
from .prices import load_prices, price_of
from .program import ProgramConfig, build_steps, is_factor
from .settings import SERVER, PrivateSettings
from .steps import Span, Step
from .variables import client_rank, program_variables
from .visible import put_apart, visible_keys


MATRICES, NUMBERS, SQUARES = "matrices", "numbers", "squares"
# Factors of weights less their masks, as both parties share them, and as the server knows them.
MASKED, SHOWN = "masked", "shown"
# Numbers of which those of a row have one factor in common.
ROWS = "rows"
# Numbers whose products are made at once: enough to fill ciphertexts, and no more than fit the engine's memory.
POOL = 2**18
# Rows that are multiplied as one matrix: of larger ones nearly all would be zeros.
MOST_ROWS = 128


@dataclass(frozen=True)
class Demand:
    """
    A product that a step needs.

    Args:
        kind (`str`): "matrices", "numbers" or "squares".
        left (`tuple[int]`): Shape of a factor that comes later.
        right (`tuple[int]`, *optional*): Shape of the other one, if there is one.
        is_weight (`bool`): Whether the other one is a matrix of the server's, which is there beforehand.
        is_causal (`bool`): Whether the first one has a row for each query, with zeros for keys that it does not see.
    """

    kind: str
    left: tuple[int, ...]
    right: tuple[int, ...] | None = None
    is_weight: bool = False
    is_causal: bool = False

    @property
    def masks(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the masks."""
        return (self.left,) if self.right is None or self.is_weight else (self.left, self.right)

    @property
    def parts(self) -> tuple[str, ...]:
        """Who draws a part of each mask."""
        return ("client",) if self.is_weight else ("server", "client")

    @property
    def tensors(self) -> int:
        """How many the second phase takes: the parts of masks of what is revealed, and the product."""
        return 1 if self.is_weight else len(self.parts) * len(self.masks) + 1

    @property
    def product(self) -> tuple[int, ...]:
        """Shape of the product."""
        if self.kind == MATRICES:
            return (*self.left[:-1], self.right[-1])
        return np.broadcast_shapes(self.left, self.right or self.left)

    def covers(self, other: "Demand") -> bool:
        """Whether what is prepared for this one serves the other one."""
        if replace(self, left=other.left, right=other.right) != other:
            return False
        if self.is_weight and self.right != other.right:
            return False
        return all(
            len(shape) == len(wanted) and all(most >= size for most, size in zip(shape, wanted, strict=True))
            for shape, wanted in zip(self.masks, other.masks, strict=True)
        )


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


@dataclass(frozen=True)
class _DemandingStep:
    """A step with what it demands, in order, and the shapes of its inputs."""

    step: Step
    demands: tuple[Demand, ...]
    inputs: tuple[tuple[int, ...], ...]


# The number of a pass; then a step's layer, its operation, its function, and which of such steps it is.
Place = tuple[int, int | None, str, str, int]


class Preparation:
    """
    What both parties prepare for prompts and answers up to some lengths.

    Args:
        config ([`ProgramConfig`]), settings ([`PrivateSettings`]): As of [`build_steps`].
        spans (`Sequence[Span]`): Those of the passes.

    Attributes:
        steps (`list[Step]`): The first phase.
        masks (`dict[str, Shape]`): Random integers of the ring, of which each party draws its own.
        products (`dict[str, Shape]`): What the first phase leaves for the second.

    Raises:
        `PrivateInferenceError`: As [`build_steps`].
    """

    def __init__(self, config: ProgramConfig, settings: PrivateSettings, spans: Sequence[Span]):
        self._config, self._settings, self._spans = config, settings, tuple(spans)
        self.masks: dict[str, Shape] = {}
        self.products: dict[str, Shape] = {}
        self._made: dict[Place, tuple[Correlation, ...]] = {}
        recorded = {place: entry for number, span in enumerate(spans) for place, entry in self._record(number, span)}
        for place, entry in recorded.items():
            self._made[place] = tuple(self._name(place, *numbered) for numbered in enumerate(entry.demands))
        self.steps = [*self._multiply_weights(recorded), *self._multiply_matrices(recorded), *self._multiply_pools()]

    def use(self, number: int, span: Span) -> list[Step]:
        """
        The second phase of a pass.

        Args:
            number (`int`): Which of the passes of the preparation.
            span ([`Span`]): As that one, or shorter.

        Raises:
            `PrivateInferenceError`: If this was prepared for less.
        """
        steps = []
        for place, entry in self._record(number, span):
            made = self._made.get(place, ())
            step = entry.step
            if not _cover(made, entry.demands):
                raise PrivateInferenceError(
                    f"the preparation is for less: it does not have what {step.operation} needs for {span.end} tokens "
                    f"and {span.answers} answers."
                )
            if not made:
                steps.append(step)
                continue
            names = tuple(name for one in made for name in one.names[-one.demand.tensors :])
            shown = ()
            if masks := tuple(name for one in made if one.demand.is_weight for name in one.masks[0]):
                mask = MaskFactors(Bound.of(step.function), entry.demands)
                steps.append(Step(step.operation, step.layer, mask, (*step.inputs, *masks), (MASKED,)))
                steps.append(Step(step.operation, step.layer, show, (MASKED,), (SHOWN,)))
                shown = (SHOWN,)
            use = UsePrepared(Bound.of(step.function), entry.demands, tuple(one.demand for one in made))
            steps.append(Step(step.operation, step.layer, use, (*step.inputs, *shown, *names), step.outputs))
        return steps

    def serves(self, spans: Sequence[Span]) -> bool:
        """Whether it has what these passes need."""
        if len(spans) > len(self._spans):
            return False
        return all(self._covers(number, span) for number, span in enumerate(spans))

    def _covers(self, number: int, span: Span) -> bool:
        recorded = self._record(number, span)
        return all(_cover(self._made.get(place, ()), entry.demands) for place, entry in recorded)

    def _record(self, number: int, span: Span) -> Iterator[tuple[Place, _DemandingStep]]:
        """The steps of a pass with their demands, by running it on shapes."""
        variables, seen = program_variables(self._config, self._settings, span), defaultdict(int)
        for step in build_steps(self._config, self._settings, span, prepared=True):
            recorder = _Recorder(self._settings)
            inputs = tuple(variables[name] for name in step.inputs)
            results = step.function(recorder, *inputs)
            variables.update(zip(step.outputs, results if isinstance(results, tuple) else (results,), strict=True))
            name = Bound.of(step.function).function.__name__
            index = seen[step.layer, step.operation, name]
            seen[step.layer, step.operation, name] += 1
            entry = _DemandingStep(step, tuple(recorder.demands), tuple(value.shape for value in inputs))
            yield (number, step.layer, step.operation, name, index), entry

    def _name(self, place: Place, number: int, demand: Demand) -> Correlation:
        name = "/".join(map(str, (*place, number)))
        owners, masks = {"server": SERVER, "client": client_rank(self._settings)}, []
        for side, shape in zip(("left", "right"), demand.masks, strict=False):
            parts = {part: f"{name}/{side}/{part}" for part in demand.parts}
            self.masks |= {variable: make_shape(shape, owners[part], RING) for part, variable in parts.items()}
            masks.append(tuple(parts.values()))
        self.products[f"{name}/product"] = make_shape(demand.product, None, RING)
        return Correlation(demand, tuple(masks), f"{name}/product")

    def _multiply_weights(self, recorded: dict[Place, _DemandingStep]) -> Iterator[Step]:
        """Those of all passes with one weight at once."""
        groups: dict[tuple, list[Place]] = defaultdict(list)
        for place, entry in recorded.items():
            if any(demand.is_weight for demand in entry.demands):
                alike = tuple(demand.right for demand in entry.demands if demand.is_weight)
                groups[*place[1:], alike].append(place)
        for places in groups.values():
            entry = recorded[places[0]]
            made = [one for numbers in zip(*(self._made[place] for place in places), strict=True) for one in numbers]
            made = [one for one in made if one.demand.is_weight]
            factors = tuple(name for name in entry.step.inputs if is_factor(name))
            blanks = tuple(
                None if name in factors else shape for name, shape in zip(entry.step.inputs, entry.inputs, strict=True)
            )
            multiply = MultiplyWeights(Bound.of(entry.step.function), entry.demands, len(places), blanks)
            masks = tuple(name for one in made for name in one.masks[0])
            step = entry.step
            yield Step(step.operation, step.layer, multiply, (*masks, *factors), tuple(one.product for one in made))

    def _multiply_matrices(self, recorded: dict[Place, _DemandingStep]) -> Iterator[Step]:
        for place, entry in recorded.items():
            for one in self._made[place]:
                if one.demand.kind == MATRICES and not one.demand.is_weight:
                    multiply, names = MultiplyMatrices(one.demand), one.names
                    yield Step(entry.step.operation, entry.step.layer, multiply, names[:-1], names[-1:])

    def _multiply_pools(self) -> Iterator[Step]:
        """Products and squares of numbers, whatever they are for: a few take as much as a ciphertext of them."""
        groups: dict[tuple, list[Correlation]] = defaultdict(list)
        for one in (one for made in self._made.values() for one in made if one.demand.kind != MATRICES):
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


def _cover(made: tuple[Correlation, ...], demands: tuple[Demand, ...]) -> bool:
    if len(made) != len(demands):
        return False
    return all(one.demand.covers(demand) for one, demand in zip(made, demands, strict=True))


def _pool(kind: str, multiply: Callable, pool: list[Correlation]) -> Step:
    masks = tuple(name for one in pool for name in one.names[:-1])
    return Step(kind, None, multiply, masks, tuple(one.product for one in pool))


@dataclass(frozen=True)
class Bound:
    """A step's function, equal to those that compute the same: partials are not by themselves."""

    function: Callable
    arguments: tuple[tuple[str, object], ...]

    @classmethod
    def of(cls, function: Callable) -> "Bound":
        if isinstance(function, partial):
            return cls(function.func, tuple(sorted(function.keywords.items())))
        return cls(function, ())

    def __call__(self, *tensors):
        return self.function(*tensors, **dict(self.arguments))


@dataclass(frozen=True)
class MultiplyMatrices:
    """
    Makes the product of the masks of two matrices.

    Args:
        demand ([`Demand`]): What it is for.
    """

    demand: Demand

    def __call__(self, ops: Arithmetic, *tensors):
        return ops.secret_ring_matmul(*_join_masks(ops, self.demand, iter(tensors)))


def _join_masks(ops: Arithmetic, demand: Demand, tensors: Iterator) -> list:
    """The masks of a demand out of their parts, which come next."""
    masks = [functools.reduce(operator.add, (next(tensors) for _ in demand.parts)) for _ in demand.masks]
    if demand.is_causal:
        masks[0] = ops.xp.where(visible_keys(*demand.left[-2:]), masks[0], 0)
    return masks


def multiply_numbers(ops: Arithmetic, *masks):
    """Products of pairs of masks, each in two parts, all in one."""
    left = [masks[place] + masks[place + 1] for place in range(0, len(masks), 4)]
    right = [masks[place + 2] + masks[place + 3] for place in range(0, len(masks), 4)]
    shapes = [np.broadcast_shapes(one.shape, other.shape) for one, other in zip(left, right, strict=True)]
    flat = [
        _flatten(ops, [ops.xp.broadcast_to(mask, shape) for mask, shape in zip(side, shapes, strict=True)])
        for side in (left, right)
    ]
    return tuple(_split(ops.ring_multiply(*flat), shapes))


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
    return tuple(_split(_flatten(ops, products), [mask.shape for mask in masks[::4]]))


def square_numbers(ops: Arithmetic, *masks):
    """
    Squares of masks in two parts, all in one: a product of what is one party's with what is shared takes two thirds of
    one of two shared numbers.
    """
    server, client = (_flatten(ops, masks[part::2]) for part in (0, 1))
    mixed = ops.ring_multiply(server + client, server)
    squares = mixed + mixed - ops.ring_multiply(server, server) + ops.ring_multiply(client, client)
    return tuple(_split(squares, [mask.shape for mask in masks[::2]]))


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
        count = self.passes * sum(len(demand.parts) for demand in self.demands if demand.is_weight)
        masks, factors = tensors[:count], iter(tensors[count:])
        maker = _Maker(ops, self, masks)
        self.function(maker, *(next(factors) if shape is None else make_shape(shape) for shape in self.blanks))
        return tuple(maker.products)


@dataclass(frozen=True)
class UsePrepared:
    """
    A step that uses what is prepared: takes the step's inputs, what [`MaskFactors`] made and the server was shown, and
    for each demand the parts of its masks, unless it is one of a weight, then the product.

    Args:
        function (`Callable`): The step's.
        demands (`tuple[Demand]`): What it asks for.
        prepared (`tuple[Demand]`): What each of these is prepared for, the same or larger.
    """

    function: Callable
    demands: tuple[Demand, ...]
    prepared: tuple[Demand, ...]

    def __call__(self, ops: Arithmetic, *tensors):
        inputs = len(tensors) - sum(demand.tensors for demand in self.prepared)
        shown = iter(())
        if shapes := [demand.left for demand in self.demands if demand.is_weight]:
            inputs -= 1
            shown = iter(_split(tensors[inputs], shapes))
            tensors = (*tensors[:inputs], *tensors[inputs + 1 :])
        return self.function(_User(ops, self, tensors[inputs:], shown), *tensors[:inputs])


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
        inputs = len(tensors) - sum(demand.is_weight for demand in self.demands)
        collector = _Collector(ops, self.demands)
        self.function(collector, *tensors[:inputs])
        pairs = zip(collector.factors, tensors[inputs:], strict=True)
        return _flatten(ops, [ops.as_ring(factor) - _cut(mask, factor.shape) for factor, mask in pairs])


def show(ops: Arithmetic, masked):
    """What a party's engine has no operation for: each side does its part of it (`Party.run`)."""
    return ops.show(masked)


class _Intercepting:
    """An arithmetic whose products of two factors, and squares, go another way; all else is left to another one."""

    def __init__(self, ops: Arithmetic):
        self._ops = ops

    def __getattr__(self, name: str):
        return getattr(self._ops, name)

    def append_checksum(self, tensor):
        return self._ops.append_checksum(tensor)

    def matmul(self, left, right):
        return self.take(MATRICES, left, right)

    def causal_matmul(self, left, right):
        return self.take(MATRICES, left, right, is_causal=True)

    def multiply(self, left, right):
        return self.take(NUMBERS, left, right)

    def square(self, tensor):
        return self.take(SQUARES, tensor)

    def scale_all(self, tensor, factor):
        return self.matmul(tensor.reshape(-1, 1), factor.reshape(1, 1)).reshape(tensor.shape)


class _Recorder(_Intercepting):
    """Notes what a step demands; runs on shapes."""

    def __init__(self, settings: PrivateSettings):
        super().__init__(CountingArithmetic(settings, Stock()))
        self.demands: list[Demand] = []

    def take(self, kind: str, left, right=None, is_causal: bool = False):
        shape = None if right is None else right.shape
        # Numbers of the server's may be others at each length, such as temperatures: they are masked as others are.
        is_weight = kind == MATRICES and getattr(right, "owner", None) == SERVER
        demand = Demand(kind, left.shape, shape, is_weight, is_causal)
        self.demands.append(demand)
        return make_shape(demand.product)


class _Maker(_Intercepting):
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
        if demand.is_weight:
            masks = [mask for _ in range(self._passes) for mask in _join_masks(ops, demand, self._masks)]
            product, begin = ops.ring_matmul(ops.xp.concatenate(masks, axis=-2), ops.as_ring(right)), 0
            for mask in masks:
                self.products.append(product[..., begin : begin + mask.shape[-2], :])
                begin += mask.shape[-2]
        return make_shape(demand.product)


class _Collector(_Intercepting):
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
        demand = next(self._demands)
        if demand.is_weight:
            self.factors.append(left)
        return np.broadcast_to(np.float32(0), demand.product)


class _User(_Intercepting):
    """Uses what was made for a step."""

    def __init__(self, ops: Arithmetic, work: UsePrepared, tensors: tuple, shown: Iterator):
        super().__init__(ops)
        self._pairs, self._tensors = iter(zip(work.demands, work.prepared, strict=True)), iter(tensors)
        self._shown = shown

    def take(self, kind: str, left, right=None, is_causal: bool = False):
        ops, (demand, prepared) = self._ops, next(self._pairs)
        if demand.is_weight:
            product = _cut(next(self._tensors), demand.product)
            return ops.truncate(product + ops.ring_matmul(next(self._shown), ops.as_ring(right)))
        masks, product = _join_masks(ops, prepared, self._tensors), next(self._tensors)
        factors = [ops.as_ring(left)] if right is None else [ops.as_ring(left), ops.as_ring(right)]
        if kind == MATRICES:
            # What a sum of products has too many of is 0.
            inner = prepared.left[-1]
            factors = [_fill(ops, factors[0], -1, inner), _fill(ops, factors[1], -2, inner)]
        if is_causal:
            first = _first_row(demand, prepared)
            masks[0], product = masks[0][..., first:, :], product[..., first:, :]
        masks = [_cut(mask, factor.shape) for mask, factor in zip(masks, factors, strict=False)]
        masked = [factor - mask for factor, mask in zip(factors, masks, strict=False)]
        if is_causal:
            visible = visible_keys(*prepared.left[-2:])[first : first + len(masked[0][0])]
            masked[0] = masked[0].reshape(len(masked[0]), -1)[:, np.flatnonzero(visible)]
        differences = _split(ops.reveal(_flatten(ops, masked)), [tensor.shape for tensor in masked])
        if is_causal:
            differences[0] = put_apart(ops, differences[0], visible)
        multiply = ops.ring_matmul if kind == MATRICES else ops.ring_multiply
        product = _cut(product, demand.product)
        if kind == SQUARES:
            return ops.truncate(multiply(differences[0], factors[0] + masks[0]) + product)
        return ops.truncate(product + multiply(differences[0], factors[1]) + multiply(masks[0], differences[1]))


def _first_row(demand: Demand, prepared: Demand) -> int:
    """From which row on a causal mask sees as many keys as the rows of a smaller factor do."""
    (queries, keys), (most_queries, most_keys) = demand.left[-2:], prepared.left[-2:]
    return max(0, (keys - queries) - (most_keys - most_queries))


def _fill(ops: Arithmetic, tensor, axis: int, size: int):
    """With zeros behind, so that the axis has a size."""
    missing = list(tensor.shape)
    missing[axis] = size - missing[axis]
    return ops.xp.concatenate([tensor, np.zeros(missing, RING)], axis=axis) if missing[axis] else tensor


def _cut(tensor, shape: tuple[int, ...]):
    """The first numbers of each axis."""
    return tensor[tuple(slice(size) for size in shape)]


def _flatten(ops: Arithmetic, tensors: Sequence):
    return ops.xp.concatenate([tensor.reshape(-1) for tensor in tensors])


def _split(flat, shapes: list[tuple[int, ...]]) -> list:
    """What [`_flatten`] has joined."""
    parts, begin = [], 0
    for shape in shapes:
        size = math.prod(shape)
        parts.append(flat[begin : begin + size].reshape(shape))
        begin += size
    return parts
