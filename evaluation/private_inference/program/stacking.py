"""
Products of a batch of secret matrices, such as those of all heads, made in fewer.

Each product of the engine waits by itself, and fills ciphertexts of its own. Larger matrices, with zeros between,
hold several of a batch. What is added are zeros, so that the numbers stay what they are.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .ciphertexts import count_product, count_work
from .networks import parse_network
from .prices import load_prices, price_of, work_of


# A form that sends this many times as much as another one is not taken: bytes are known, and seconds of work roughly.
MOST_SENT = 1.5
# Numbers of the largest matrix that others are stacked to: its polynomials take some 24 bytes each.
MOST_STACKED = 2**23


@dataclass(frozen=True)
class Stacking:
    """
    How matrices `(batch, rows, inner)` and `(batch, inner, columns)` are multiplied.

    Args:
        form (`str`):
            "left" (the left ones are blocks along a diagonal, the right ones one below the other), "right" (the left
            ones are side by side, the right ones blocks along a diagonal) or "pairs" (the left ones are one below the
            other, the right ones side by side: the product has those of all pairs).
        group (`int`): How many are one product, of as many or more in a batch.
    """

    form: Literal["left", "right", "pairs"]
    group: int

    def sizes(self, rows: int, inner: int, columns: int) -> tuple[int, int, int]:
        """Those of one product."""
        return (
            rows if self.form == "right" else self.group * rows,
            inner if self.form == "pairs" else self.group * inner,
            columns if self.form == "left" else self.group * columns,
        )

    def join(self, xp, left, right):
        """The two factors `(batch / group, ...)`."""
        (batch, rows, inner), columns, group = left.shape, right.shape[-1], self.group
        sizes = self.sizes(rows, inner, columns)
        lefts, rights = left.reshape(-1, group, rows, inner), right.reshape(-1, group, inner, columns)
        if self.form == "left":
            lefts = _spread(xp, lefts)
        elif self.form == "right":
            lefts, rights = lefts.swapaxes(1, 2), _spread(xp, rights)
        else:
            rights = rights.swapaxes(1, 2)
        return lefts.reshape(batch // group, *sizes[:2]), rights.reshape(batch // group, *sizes[1:])

    def part(self, product, rows: int, columns: int):
        """The products `(batch, rows, columns)`."""
        group = self.group
        if self.form == "left":
            return product.reshape(-1, rows, columns)
        if self.form == "right":
            return product.reshape(-1, rows, group, columns).swapaxes(1, 2).reshape(-1, rows, columns)
        pairs = product.reshape(-1, group, rows, group, columns)
        return pairs[:, np.arange(group), :, np.arange(group)].swapaxes(0, 1).reshape(-1, rows, columns)


APART = Stacking("left", 1)


def _spread(xp, matrices):
    """Matrices `(products, group, rows, columns)` as blocks along diagonals."""
    group = matrices.shape[1]
    return xp.where(np.eye(group, dtype=bool)[:, None, :, None], matrices[:, :, :, None], 0)


@functools.lru_cache(maxsize=4096)
def choose_stacking(batch: int, rows: int, inner: int, columns: int, network: str) -> Stacking:
    """What takes least time on a network, by the cost model."""
    groups = [size for size in range(2, batch + 1) if batch % size == 0]
    possible = [Stacking(form, group) for group in groups for form in ("left", "right", "pairs")]
    sizes = (rows, inner, columns)
    fitting = [one for one in possible if _largest(*one.sizes(*sizes)) <= MOST_STACKED]
    sent = {one: _predict_bytes(batch // one.group, one.sizes(*sizes)) for one in (APART, *fitting)}
    cheap = [one for one, size in sent.items() if size <= MOST_SENT * min(sent.values())]
    return min(cheap, key=lambda one: _predict_seconds(batch // one.group, one.sizes(*sizes), network))


def _largest(rows: int, inner: int, columns: int) -> int:
    return max(rows * inner, inner * columns, rows * columns)


def _predict_seconds(products: int, sizes: tuple[int, int, int], network: str) -> float:
    """Both parties multiply at once, each by what the other one sends; each product waits for the one before."""
    work = products * work_of(count_product(*sizes) | count_work(*sizes))
    return parse_network(network).seconds(_predict_bytes(products, sizes), 2 * products - 1) + work


def _predict_bytes(products: int, sizes: tuple[int, int, int]) -> float:
    return 2 * products * price_of(count_product(*sizes), load_prices().bytes)
