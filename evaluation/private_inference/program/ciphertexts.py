"""How many ciphertexts a product of matrices takes under Cheetah: the engine cuts them by a price of its own."""

import functools
import math

import numpy as np


# Numbers of one ciphertext, and of the two halves into which the engine cuts longer tensors.
SLOTS = 8192
HALVES = 2 * SLOTS
# What bytes are counted in. Ciphertexts of products of matrices: those that one party sends, and the answers, of which
# one may be full or hold no more than some coefficients.
INPUTS, ANSWERS, LONE_ANSWERS, COEFFICIENTS = "input ciphertexts", "answers", "lone answers", "coefficients"
# What is computed at home: products of the polynomials that blocks of matrices become, and steps of packing answers.
POLYNOMIALS, PACKINGS = "products of polynomials", "packings"
# The engine's own estimate of what is cheap, by which it cuts matrices: a ciphertext, in units of its computations.
CIPHERTEXT_PRICE, ROTATION_PRICE, PRODUCT_PRICE = 1000.0, 1.0, 0.1

# So many of a part.
Counts = dict[str, float]


@functools.lru_cache(maxsize=4096)
def count_product(rows: int, inner: int, columns: int) -> Counts:
    """Ciphertexts of the product of one party's matrix with the other's."""
    sizes = (rows, inner, columns)
    tile, blocks = _cut(sizes)
    inputs, outputs = blocks[1] * min(blocks[0], blocks[2]), blocks[0] * blocks[2]
    if outputs == 1:
        return {INPUTS: inputs, LONE_ANSWERS: outputs, COEFFICIENTS: outputs * tile[0] * tile[2]}
    by_coefficient = tile[1] >= rows * columns
    return {INPUTS: inputs, ANSWERS: math.ceil(rows * columns / SLOTS if by_coefficient else outputs / tile[1])}


@functools.lru_cache(maxsize=4096)
def count_work(rows: int, inner: int, columns: int) -> Counts:
    """What the other party computes for it."""
    tile, blocks = _cut((rows, inner, columns))
    packings = 0 if blocks[0] * blocks[2] == 1 else math.ceil(rows * columns / SLOTS) * tile[1]
    return {POLYNOMIALS: math.prod(blocks), PACKINGS: packings}


@functools.lru_cache(maxsize=4096)
def _cut(sizes: tuple[int, int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The edges of blocks, and how many there are in each direction."""
    tile = _choose_tile(sizes, packed=True)
    blocks = _blocks(sizes, tile)
    if blocks[0] * blocks[2] == 1:
        tile = _choose_tile(sizes, packed=False)
        blocks = _blocks(sizes, tile)
    return tile, blocks


def _choose_tile(sizes: tuple[int, int, int], packed: bool) -> tuple[int, int, int]:
    """How the engine cuts matrices (`MatMatProtocol::GetSubMatShape`); of equal prices, the last."""
    rows, inner, columns = sizes
    best, chosen = math.inf, (1, 1, 1)
    depths = 2 ** np.arange(SLOTS.bit_length()) if packed else np.arange(1, SLOTS + 1)
    depths = depths[depths <= inner]
    for height in range(1, min(SLOTS, rows) + 1):
        fitting = depths[: np.searchsorted(depths, SLOTS // height, side="right")]
        widths = np.minimum(columns, SLOTS // height // fitting)
        prices = _tile_prices(sizes, height, fitting, widths, packed)
        last = len(prices) - 1 - int(prices[::-1].argmin())
        if prices[last] <= best:
            best, chosen = prices[last], (height, int(fitting[last]), int(widths[last]))
    return chosen


def _tile_prices(sizes: tuple[int, int, int], height: int, depths, widths, packed: bool) -> np.ndarray:
    rows, inner, columns = sizes
    high, deep, wide = -(-rows // height), -(-inner // depths), -(-columns // widths)
    ciphertexts = np.minimum(high, wide) * deep + -(-high * wide // depths)
    rotations = math.ceil(rows * columns / SLOTS) * depths if packed else 0
    return CIPHERTEXT_PRICE * ciphertexts + ROTATION_PRICE * rotations + PRODUCT_PRICE * high * deep * wide


def _blocks(sizes: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // edge) for size, edge in zip(sizes, tile, strict=True))
