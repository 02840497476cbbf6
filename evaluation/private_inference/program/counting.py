"""
What the engine does for a step, counted on shapes: no weights, no engine, no second party.

What Cheetah sends follows from shapes: a number of ciphertexts for each product, of bits of oblivious transfer for
each comparison. And so does how often it waits: operations come one after the other, and each has round trips of its
own. These depend on how many matrices there are, and on whether there are few numbers to multiply, for which there are
triples in stock, but no further on how long tensors are.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from .arithmetic import CheapArithmetic
from .ciphertexts import HALVES, SLOTS, Counts, count_product, count_work
from .settings import SERVER, PrivateSettings
from .steps import Step


# What bytes are counted in, besides the ciphertexts of products of matrices (ciphertexts.py). Products of numbers, in
# batches of as many as a ciphertext has slots: of what two parties own each, and of shares.
OWNED_BATCHES, SHARED_BATCHES, OPENED = "batches of owned factors", "batches of shares", "opened pairs"
# Numbers that go through oblivious transfer.
TRUNCATED, HALVED, COMPARED = "truncated numbers", "halved numbers", "compared numbers"
CHOSEN, CHECKED = "numbers compared with their places", "numbers compared for one bit"
ORDERED, JOINED, KEPT = "numbers put in order", "bits multiplied", "numbers kept or not"
REVEALED = "revealed numbers"
RECIPROCALS, ROOTS, TANHS, ERFS = "reciprocals", "reciprocal roots", "hyperbolic tangents", "error functions"
# What round trips are counted in: operations, of which one waits for the other.
PRODUCTS, TRUNCATIONS, HALVINGS = "products of matrices", "truncations", "halvings"
OWNED_FACTORS, SHARED_FACTORS, OPENINGS, SQUARES = "owned factors", "shared factors", "openings", "squares"
COMPARISONS, CHOICES, CHECKS = "comparisons", "comparisons with places", "checks"
ORDERS, JOINS, KEEPS = "comparisons for bits", "products of bits", "choices by bits"
# Round trips of SPU 0.9.5, measured over a link that has nothing but a delay (the tests repeat it): those of the
# engine's own operations, without the products and squares within.
ROUND_TRIPS = {
    PRODUCTS: 1.0,
    TRUNCATIONS: 0.5,
    HALVINGS: 0.5,
    OWNED_FACTORS: 2.5,
    SHARED_FACTORS: 4.0,
    OPENINGS: 0.5,
    SQUARES: 3.5,
    COMPARISONS: 10.5,
    CHOICES: 33.5,
    CHECKS: 17.0,
    ORDERS: 9.5,
    JOINS: 1.0,
    KEEPS: 1.0,
    RECIPROCALS: 26.5,
    ROOTS: 19.0,
    TANHS: 26.5,
    ERFS: 51.5,
}
# Products of shares below this use triples that were made in stock, from a batch of products of owned factors.
DIRECT_FROM = HALVES
TRIPLES = SLOTS // 2
# Products within the engine's own forms: of shares, and squares.
RECIPROCAL_PRODUCTS, RECIPROCAL_PRODUCTS_A_STEP, ROOT_PRODUCTS, TANH_PRODUCTS, ERF_PRODUCTS = 3, 2, 5, 8, 8
RECIPROCAL_SQUARES, TANH_SQUARES, ERF_SQUARES = 1, 1, 3


# What a variable holds: fixed-point numbers, or integers of the ring that are no such numbers.
NUMBER, RING = np.float32, np.int64
# The owner of what all parties know.
PUBLIC = -1


class Shape(np.ndarray):
    """
    A tensor of which the shape matters, and who owns it: what is computed of one party's tensors and of public numbers
    stays with this party, as it does in the engine.
    """

    owner: int | None = None

    def __array_finalize__(self, source):
        self.owner = getattr(source, "owner", None)

    def __array_ufunc__(self, function, method, *inputs, **options):
        owners = {operand.owner for operand in inputs if isinstance(operand, Shape)} - {PUBLIC} or {PUBLIC}
        plain = [np.asarray(operand) if isinstance(operand, Shape) else operand for operand in inputs]
        return make_shape(getattr(function, method)(*plain, **options), owners.pop() if len(owners) == 1 else None)

    def __array_function__(self, function, types, inputs, options):
        result = super().__array_function__(function, types, inputs, options)
        if function is not np.concatenate:
            return result
        owners = {part.owner if isinstance(part, Shape) else PUBLIC for part in inputs[0]}
        return make_shape(result, owners.pop() if len(owners) == 1 else None)


def make_shape(tensor: np.ndarray | tuple[int, ...], owner: int | None = None, dtype: type = NUMBER) -> Shape:
    """A tensor of an owner, or one of zeros that takes no memory: of numbers, or of integers of the ring."""
    tensor = np.broadcast_to(dtype(0), tensor) if isinstance(tensor, tuple) else np.asarray(tensor)
    shape = tensor.view(Shape)
    shape.owner = owner
    return shape


@dataclass(frozen=True)
class StepCounts:
    """
    What a step consists of.

    Args:
        parts (`Counts`): What has a price in bytes.
        waits (`Counts`): What there are `ROUND_TRIPS` of.
        work (`Counts`): What a party computes for its side of products of matrices.
    """

    parts: Counts
    waits: Counts
    work: Counts

    @property
    def round_trips(self) -> float:
        """How often a message has to travel there and back before the next one can leave."""
        return sum(ROUND_TRIPS[part] * count for part, count in self.waits.items())


class Stock:
    """The triples that the engine keeps for small products of shares; the set-up leaves it about full."""

    def __init__(self):
        self.triples = TRIPLES

    def take(self, numbers: int) -> int:
        """How many batches these products take."""
        batches = 0
        if self.triples < numbers:
            batches = math.ceil(numbers / TRIPLES)
            self.triples += batches * TRIPLES
        self.triples -= numbers
        return batches


class CountingArithmetic(CheapArithmetic):
    """
    What each operation sends under Cheetah, and what it waits for, in parts that have a price; results are zeros.

    Args:
        settings ([`PrivateSettings`]): The form of each operation.
        stock ([`Stock`]): As the steps before left it.
    """

    def __init__(self, settings: PrivateSettings, stock: Stock):
        super().__init__(np, settings)
        self.stock, self.counts, self.waits, self.work = stock, Counter(), Counter(), Counter()

    def matmul(self, left, right):
        return self._multiply_batch(self._matmul, left, right)

    def _matmul(self, left, right):
        return self._truncated(self.ring_matmul(left, right).shape)

    def multiply(self, left, right):
        product = self.ring_multiply(left, right)
        return make_shape(product.shape, product.owner) if _is_local(left, right) else self._truncated(product.shape)

    def append_checksum(self, tensor):
        """Without the memory of a matrix."""
        return make_shape((*tensor.shape[:-1], tensor.shape[-1] + 1), _owner(tensor))

    def as_ring(self, tensor):
        return make_shape(tensor.shape, _owner(tensor), RING)

    def truncate(self, product):
        return self._truncated(product.shape)

    def reveal(self, masked):
        self.counts[REVEALED] += masked.size
        self.waits[OPENINGS] += 1
        return make_shape(masked.shape, PUBLIC, RING)

    def show(self, masked):
        self.counts[REVEALED] += masked.size / 2
        self.waits[OPENINGS] += 1
        return make_shape(masked.shape, SERVER, RING)

    def ring_matmul(self, left, right):
        shape = (*left.shape[:-1], right.shape[-1])
        if _is_local(left, right):
            return make_shape(shape, _owner_of_both(left, right), RING)
        rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
        matrices = math.prod(left.shape[:-2])
        # With two shared factors, each party multiplies its share by both of the other's.
        times = matrices * (2 if _owner(left) is None and _owner(right) is None else 1)
        product = count_product(rows, inner, columns)
        for part, count in product.items():
            self.counts[part] += times * count
        # Both parties multiply at once.
        for part, count in (product | count_work(rows, inner, columns)).items():
            self.work[part] += matrices * count
        # Those of a batch come one after the other, with a round trip between.
        self.waits[PRODUCTS] += 2 * matrices - 1
        return make_shape(shape, None, RING)

    def ring_multiply(self, left, right):
        shape = np.broadcast_shapes(left.shape, right.shape)
        if _is_local(left, right):
            return make_shape(shape, _owner_of_both(left, right), RING)
        if _owner(left) is None and _owner(right) is None:
            self._multiply_shares(math.prod(shape))
        else:
            self.counts[OWNED_BATCHES] += math.ceil(math.prod(shape) / SLOTS)
            self.waits[OWNED_FACTORS] += 1
        return make_shape(shape, None, RING)

    def scale(self, tensor, constant):
        shape = np.broadcast_shapes(tensor.shape, np.shape(constant))
        return self._truncated(shape) if _owner(tensor) is None else make_shape(shape, tensor.owner)

    def combine(self, tensor, factors):
        shape = (*tensor.shape[:-1], np.shape(factors)[-1])
        return self._truncated(shape) if _owner(tensor) is None else make_shape(shape, tensor.owner)

    def square_by_product(self, tensor):
        return self.multiply(tensor, tensor)

    def square_by_exp(self, tensor):
        self._halve(tensor.size)
        self._square(tensor.size)
        return self._truncated(tensor.shape)

    def exp(self, tensor):
        self._halve(tensor.size)
        for _ in range(self.settings.exponential_squarings):
            self._square(tensor.size)
            self._truncated(tensor.shape)
        return make_shape(tensor.shape)

    def reciprocal(self, tensor):
        products = RECIPROCAL_PRODUCTS + RECIPROCAL_PRODUCTS_A_STEP * self.settings.reciprocal_iterations
        return self._function(tensor, RECIPROCALS, products, RECIPROCAL_SQUARES)

    def divide(self, tensor, divisor):
        # A division of every number, whatever the divisor's shape.
        return self.multiply(tensor, self.reciprocal(make_shape(tensor.shape)))

    def reciprocal_root(self, tensor):
        return self._function(tensor, ROOTS, ROOT_PRODUCTS, 0)

    def tanh(self, tensor):
        return self._function(tensor, TANHS, TANH_PRODUCTS, TANH_SQUARES)

    def erf(self, tensor):
        return self._function(tensor, ERFS, ERF_PRODUCTS, ERF_SQUARES)

    def largest(self, tensor):
        rows = tensor.size // tensor.shape[-1]
        self.counts[COMPARED] += tensor.size - rows
        self.waits[COMPARISONS] += _levels(tensor.shape[-1])
        return make_shape((*tensor.shape[:-1], 1))

    def is_less(self, left, right):
        self.counts[ORDERED] += left.size
        self.waits[ORDERS] += 1
        return make_shape(left.shape, None, bool)

    def both(self, left, right):
        self.counts[JOINED] += left.size
        self.waits[JOINS] += 1
        return make_shape(left.shape, None, bool)

    def keep(self, numbers, bits):
        self.counts[KEPT] += numbers.size
        self.waits[KEEPS] += 1
        return make_shape(numbers.shape)

    def positive_part(self, tensor):
        self.counts[COMPARED] += tensor.size
        self.waits[COMPARISONS] += 1
        return make_shape(tensor.shape)

    def at_most(self, tensor, bound: float):
        return self.positive_part(tensor)

    def index_of_largest(self, tensor):
        rows = tensor.size // tensor.shape[-1]
        self.counts[CHOSEN] += tensor.size - rows
        self.waits[CHOICES] += _levels(tensor.shape[-1])
        return make_shape(tensor.shape[:-1])

    def any_negative(self, tensor):
        self.counts[CHECKED] += tensor.size
        self.waits[CHECKS] += 1
        return make_shape(())

    def _function(self, tensor, part: str, products: int, squares: int) -> Shape:
        self.counts[part] += tensor.size
        self.waits[part] += 1
        for _ in range(products):
            self._multiply_shares(tensor.size)
        for _ in range(squares):
            self._square(tensor.size)
        return make_shape(tensor.shape)

    def _multiply_shares(self, numbers: int):
        if numbers < DIRECT_FROM:
            made = self.stock.take(numbers)
            self.counts[OPENED] += numbers
            self.counts[OWNED_BATCHES] += made
            self.waits[OPENINGS] += 1
            self.waits[OWNED_FACTORS] += min(made, 1)
        else:
            self.counts[SHARED_BATCHES] += _halves(numbers)
            self.waits[SHARED_FACTORS] += 1

    def _square(self, numbers: int):
        self.counts[OWNED_BATCHES] += 1 if numbers <= SLOTS else _halves(numbers)
        self.waits[SQUARES] += 1

    def _halve(self, numbers: int):
        self.counts[HALVED] += numbers
        self.waits[HALVINGS] += 1

    def _truncated(self, shape: tuple[int, ...]) -> Shape:
        self.counts[TRUNCATED] += math.prod(shape)
        self.waits[TRUNCATIONS] += 1
        return make_shape(shape)


def _owner(tensor) -> int | None:
    return getattr(tensor, "owner", None)


def _is_local(left, right) -> bool:
    """Whether a product takes no message: a factor is public, or both are one party's."""
    owners = (_owner(left), _owner(right))
    return PUBLIC in owners or (owners[0] is not None and owners[0] == owners[1])


def _owner_of_both(left, right) -> int | None:
    """Of a product that takes no message."""
    return ({_owner(left), _owner(right)} - {PUBLIC} or {PUBLIC}).pop()


def _levels(numbers: int) -> int:
    """Comparisons of the engine's search for the largest: halves against each other, then what odd sizes left over."""
    return numbers.bit_length() + numbers.bit_count() - 2


def _halves(numbers: int) -> int:
    """Batches of two halves, which the engine computes side by side."""
    half = numbers // 2
    return math.ceil(half / SLOTS) + math.ceil((numbers - half) / SLOTS)


def count_step(step: Step, variables: dict[str, Shape], settings: PrivateSettings, stock: Stock) -> StepCounts:
    """
    What a step consists of.

    Args:
        step ([`Step`]): Any.
        variables (`dict[str, Shape]`): Its inputs among them; what it computes is added.
        settings ([`PrivateSettings`]): The form of each operation.
        stock ([`Stock`]): As the steps before left it.
    """
    arithmetic = CountingArithmetic(settings, stock)
    results = step.function(arithmetic, *(variables[name] for name in step.inputs))
    results = results if isinstance(results, tuple) else (results,)
    variables.update(zip(step.outputs, results, strict=True))
    return StepCounts(dict(arithmetic.counts), dict(arithmetic.waits), dict(arithmetic.work))
