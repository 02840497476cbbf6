"""The operations that a private program consists of, and the forms in which the engine computes them most cheaply."""

from collections.abc import Callable

import numpy as np

from .ciphertexts import HALVES, SLOTS
from .settings import PrivateSettings
from .stacking import choose_stacking


# From this many numbers on the engine's square is cheaper by way of its exponential: that takes a whole batch of
# ciphertexts, of which products of fewer numbers share one.
SQUARE_BY_EXP_FROM = 4096
# The least that is added to a weight without a maximum, in last bits: a truncation may take one.
LEAST_BITS = 2


def alternate(xp, tensor):
    """
    Rows with the sign of every second number changed: what all numbers of a row have in common does not count in their
    sum. Sums of every second number would be the same, but the engine makes shares of them.
    """
    return xp.where(np.arange(tensor.shape[-1]) % 2 == 0, tensor, -tensor)


def checksum(xp, tensor):
    """The alternating sum of each row, `(..., 1)`, which each party adds up alone."""
    return alternate(xp, tensor).sum(axis=-1, keepdims=True)


class Arithmetic:
    """
    What a protocol charges for or rounds; sums, slices and products with public 0 and 1 are written as they are.

    Args:
        xp: `jax.numpy`, from which the engine's program is traced, or `numpy`.
    """

    # The step between numbers; where they are not rounded, next to nothing.
    last_bit = 2.0**-100

    def __init__(self, xp):
        self.xp = xp

    def public(self, constant: float):
        """A number to add: where numbers are encoded, so is this."""
        return constant

    def matmul(self, left, right):
        return self.xp.matmul(left, right)

    def append_checksum(self, tensor):
        """
        Rows with their checksum behind. A product with a matrix of such rows has them too, and computes them apart
        from its other columns (Huang and Abraham, IEEE Transactions on Computers 1984).
        """
        return self.xp.concatenate([tensor, checksum(self.xp, tensor)], axis=-1)

    def score(self, query, key):
        """Scores `(heads, queries, keys)` of `(heads, queries, size)` and `(heads, keys, size)`."""
        return self.matmul(query, key.swapaxes(1, 2))

    def weigh(self, weights, value, is_causal: bool = False):
        """
        Sums of values `(heads, keys, size)` by weights `(heads, queries, keys)`.

        Args:
            weights, value: As said.
            is_causal (`bool`): Whether weights of keys that a query does not see are exactly 0.
        """
        return self.matmul(weights, value)

    def multiply(self, left, right):
        return left * right

    def scale(self, tensor, constant):
        """The product with a public number, or with a row of them."""
        return tensor * constant

    def combine(self, tensor, factors):
        """The product with a public matrix: a sum of products is cut off once, where `scale` cuts off each."""
        return self.xp.matmul(tensor, self.xp.asarray(factors, tensor.dtype))

    def square(self, tensor):
        return self.xp.square(tensor)

    def scale_all(self, tensor, factor):
        """The product with one number `(1,)` that one party owns."""
        return self.multiply(tensor, factor)

    def exp(self, tensor):
        return self.xp.exp(tensor)

    def reciprocal(self, tensor):
        return 1.0 / tensor

    def divide(self, tensor, divisor):
        return tensor / divisor

    def reciprocal_root(self, tensor):
        return 1.0 / self.xp.sqrt(tensor)

    def tanh(self, tensor):
        return self.xp.tanh(tensor)

    def erf(self, tensor):
        from jax.scipy.special import erf

        return erf(tensor)

    def largest(self, tensor):
        """The largest of each row, as a row of one."""
        return self.xp.max(tensor, axis=-1, keepdims=True)

    def is_less(self, left, right):
        """Bits, of which `~` is local."""
        return left < right

    def both(self, left, right):
        """Products of bits."""
        return left & right

    def keep(self, numbers, bits):
        """Numbers where bits are 1, and 0 elsewhere."""
        return self.xp.where(bits, numbers, 0.0)

    def positive_part(self, tensor):
        return self.xp.maximum(tensor, 0.0)

    def at_most(self, tensor, bound: float):
        return self.xp.minimum(tensor, bound)

    def index_of_largest(self, tensor):
        return self.xp.argmax(tensor, axis=-1)

    def ranged(self, tensor, most: float):
        """A tensor of which what follows takes for granted that it is positive, and not above a bound."""
        return tensor

    def any_negative(self, tensor):
        """One bit. Counting waits less often than a tree of ORs, whatever the length."""
        return self.xp.sum((tensor < 0).astype(self.xp.int32)) != 0

    def as_ring(self, tensor):
        """Numbers as the integers of the ring that they are."""
        raise NotImplementedError

    def truncate(self, product):
        """The number that a product of two numbers is, both taken as integers of the ring."""
        raise NotImplementedError

    def reveal(self, masked):
        """Integers of the ring that all parties may see."""
        return masked

    def show(self, masked):
        """Integers of the ring that the server may see."""
        return masked

    def ring_matmul(self, left, right):
        """Of integers of the ring."""
        return self.xp.matmul(left, right)

    def secret_ring_matmul(self, left, right):
        """Of integers of the ring, none of which one party knows."""
        return self.ring_matmul(left, right)

    def ring_multiply(self, left, right):
        """Of integers of the ring."""
        return left * right


class CheapArithmetic(Arithmetic):
    """
    The forms that send least under Cheetah, where the softmax of the settings is "efficient".

    Args:
        xp: `jax.numpy` or `numpy`.
        settings ([`PrivateSettings`]): The form of each operation.
    """

    def __init__(self, xp, settings: PrivateSettings):
        super().__init__(xp)
        self.settings = settings
        self.last_bit = 2.0**-settings.fraction_bits
        self._is_cheap = settings.softmax == "efficient"

    def matmul(self, left, right):
        """Those of a batch are of two secret factors, and made in as few products as is fastest (stacking.py)."""
        return self._multiply_batch(super().matmul, left, right)

    def secret_ring_matmul(self, left, right):
        return self._multiply_batch(self.ring_matmul, left, right)

    def _multiply_batch(self, multiply: Callable, left, right):
        if left.ndim < 3 or not self._is_cheap:
            return multiply(left, right)
        columns = right.shape[-1]
        stacking = choose_stacking(*left.shape, columns, self.settings.network)
        product = multiply(*stacking.join(self.xp, left, right))
        return stacking.part(product, left.shape[1], columns)

    def square(self, tensor):
        """Long tensors in whole halves, and the rest apart, where it would take two more ciphertexts."""
        if not self._is_cheap or tensor.size < SQUARE_BY_EXP_FROM:
            return self.square_by_product(tensor)
        rest = tensor.size % HALVES
        if tensor.size < HALVES or not 0 < rest <= SLOTS:
            return self.square_by_exp(tensor)
        flat = tensor.reshape(-1)
        parts = [self.square_by_exp(flat[:-rest]), self.square(flat[-rest:])]
        return self.xp.concatenate(parts).reshape(tensor.shape)

    def square_by_product(self, tensor):
        return super().square(tensor)

    def square_by_exp(self, tensor):
        """By the engine's exponential, which has one squaring then: (1 + x / 2)^2."""
        return self.exp(tensor + tensor - 2.0)

    def scale_all(self, tensor, factor):
        """A product with a matrix of one number takes a quarter of the bytes of as many products of numbers."""
        if not self._is_cheap:
            return super().scale_all(tensor, factor)
        return self.matmul(tensor.reshape(-1, 1), factor.reshape(1, 1)).reshape(tensor.shape)
