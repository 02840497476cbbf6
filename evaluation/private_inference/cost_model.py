"""
Bytes of a private inference from the configuration alone: no weights, no engine, no second party.

What Cheetah sends follows from shapes: so many ciphertexts for each product, so many bits of oblivious transfer for
each comparison. [`CountingArithmetic`] runs the program on shapes and counts these parts as the engine would need
them; what each of them takes was measured (`prices.json`; `price_fitting.py` measures anew).
"""

import copy
import functools
import math
from collections import Counter
from pathlib import Path

import numpy as np
from pydantic.dataclasses import dataclass

from conversion.folding import fold, list_absorbable_ffns
from evaluation.records import RECORD, StoredRecord
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .arithmetic import HALVES, SLOTS, CheapArithmetic
from .engine import CLIENT, SERVER
from .errors import PrivateInferenceError
from .participant import input_shape, kept_shapes
from .program import Span, Step, build_steps, weight_shapes
from .settings import PrivateSettings


PRICES = Path(__file__).parent / "prices.json"

# What bytes are counted in. Ciphertexts of products of matrices: those that one party sends, and the answers, of which
# one may be full or hold no more than some coefficients.
INPUTS, ANSWERS, LONE_ANSWERS, COEFFICIENTS = "input ciphertexts", "answers", "lone answers", "coefficients"
# Products of numbers, in batches of as many as a ciphertext has slots: of what two parties own each, and of shares.
OWNED_BATCHES, SHARED_BATCHES, OPENED = "batches of owned factors", "batches of shares", "opened pairs"
# Numbers that go through oblivious transfer.
TRUNCATED, HALVED, COMPARED = "truncated numbers", "halved numbers", "compared numbers"
CHOSEN = "numbers compared with their places"
RECIPROCALS, ROOTS, TANHS, ERFS = "reciprocals", "reciprocal roots", "hyperbolic tangents", "error functions"
# A part, or what it takes to multiply so many shares, which depends on what was multiplied before.
Counts = dict[str, float]

# Products of shares below this use triples that were made in stock, from a batch of products of owned factors.
DIRECT_FROM = HALVES
TRIPLES = SLOTS // 2
# The engine's own estimate of what is cheap, by which it cuts matrices: a ciphertext, in units of its computations.
CIPHERTEXT_PRICE, ROTATION_PRICE, PRODUCT_PRICE = 1000.0, 1.0, 0.1
# Products within the engine's own forms: of shares, and squares.
RECIPROCAL_PRODUCTS, RECIPROCAL_PRODUCTS_A_STEP, ROOT_PRODUCTS, TANH_PRODUCTS, ERF_PRODUCTS = 3, 2, 5, 8, 8
RECIPROCAL_SQUARES, TANH_SQUARES, ERF_SQUARES = 1, 1, 3


@dataclass(config=RECORD)
class Sample:
    """
    A measured step of the fit.

    Args:
        name (`str`): The operation and its shapes.
        counts (`dict[str, float]`): What it consists of.
        measured_bytes (`int`): Sent by both parties.
        fitted_bytes (`float`): By the prices.
    """

    name: str
    counts: dict[str, float]
    measured_bytes: int
    fitted_bytes: float = 0.0


@dataclass(config=RECORD)
class Prices(StoredRecord):
    """
    What Cheetah sends, by what it is counted in.

    Args:
        bytes (`dict[str, float]`): Of each part, sent by both parties.
        samples (`list[Sample]`): What the prices were fitted on.
        settings ([`PrivateSettings`]): Of these runs; prices hold for other forms of the operations too.
        versions (`dict[str, str]`): Of the packages that computed.
        git_revision (`str`, *optional*): Of this project.
        machine (`str`): Processor and number of threads.
    """

    KIND = "prices of the secure engine"
    SCHEMA_VERSION = 1

    bytes: dict[str, float]
    samples: list[Sample]
    settings: PrivateSettings
    versions: dict[str, str]
    git_revision: str | None
    machine: str


@dataclass(config=RECORD, frozen=True)
class PredictedStep:
    """
    Args:
        operation (`str`): As in [`StepCost`].
        layer (`int`, *optional*): `None` around the blocks.
        total_bytes (`float`): Sent by both parties.
    """

    operation: str
    layer: int | None
    total_bytes: float


class Shape(np.ndarray):
    """
    A tensor of which the shape matters, and who owns it: what is computed of one party's tensors and of public numbers
    stays with this party, as it does in the engine.
    """

    owner: int | None = None

    def __array_finalize__(self, source):
        self.owner = getattr(source, "owner", None)

    def __array_ufunc__(self, function, method, *inputs, **options):
        owners = {operand.owner for operand in inputs if isinstance(operand, Shape)}
        plain = [np.asarray(operand) if isinstance(operand, Shape) else operand for operand in inputs]
        return make_shape(getattr(function, method)(*plain, **options), owners.pop() if len(owners) == 1 else None)


def make_shape(tensor: np.ndarray | tuple[int, ...], owner: int | None = None) -> Shape:
    """A tensor of an owner, or one of zeros that takes no memory."""
    tensor = np.broadcast_to(np.float32(0), tensor) if isinstance(tensor, tuple) else np.asarray(tensor)
    shape = tensor.view(Shape)
    shape.owner = owner
    return shape


class Stock:
    """The triples that the engine keeps for small products of shares; the set-up leaves it about full."""

    def __init__(self):
        self.triples = TRIPLES

    def take(self, numbers: int) -> int:
        """How many batches have to be made for so many products."""
        batches = 0
        if self.triples < numbers:
            batches = math.ceil(numbers / TRIPLES)
            self.triples += batches * TRIPLES
        self.triples -= numbers
        return batches


class CountingArithmetic(CheapArithmetic):
    """
    What each operation sends under Cheetah, in parts that have a price; results are zeros.

    Args:
        settings ([`PrivateSettings`]): The form of each operation.
        stock ([`Stock`]): As the steps before left it.
    """

    def __init__(self, settings: PrivateSettings, stock: Stock):
        super().__init__(np, settings)
        self.stock, self.counts = stock, Counter()

    def matmul(self, left, right):
        shape = (*left.shape[:-1], right.shape[-1])
        rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
        matrices = math.prod(left.shape[:-2])
        # Of two shared factors, each party multiplies its share with both of the other's.
        times = matrices * (2 if _owner(left) is None and _owner(right) is None else 1)
        for part, count in count_product(rows, inner, columns).items():
            self.counts[part] += times * count
        return self._truncated(shape)

    def multiply(self, left, right):
        shape = np.broadcast_shapes(left.shape, right.shape)
        owners = (_owner(left), _owner(right))
        if owners[0] is not None and owners[0] == owners[1]:
            return make_shape(shape, owners[0])
        if owners == (None, None):
            self._multiply_shares(math.prod(shape))
        else:
            self.counts[OWNED_BATCHES] += math.ceil(math.prod(shape) / SLOTS)
        return self._truncated(shape)

    def scale(self, tensor, constant):
        shape = np.broadcast_shapes(tensor.shape, np.shape(constant))
        return self._truncated(shape) if _owner(tensor) is None else make_shape(shape, tensor.owner)

    def square_by_product(self, tensor):
        return self.multiply(tensor, tensor)

    def square_by_exp(self, tensor):
        self.counts[HALVED] += tensor.size
        self._square(tensor.size)
        return self._truncated(tensor.shape)

    def exp(self, tensor):
        for _ in range(self.settings.exponential_squarings):
            self._square(tensor.size)
        self.counts[HALVED] += tensor.size
        self.counts[TRUNCATED] += self.settings.exponential_squarings * tensor.size
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
        return make_shape((*tensor.shape[:-1], 1))

    def larger(self, left, right):
        return self.positive_part(left)

    def positive_part(self, tensor):
        self.counts[COMPARED] += tensor.size
        return make_shape(tensor.shape)

    def at_most(self, tensor, bound: float):
        return self.positive_part(tensor)

    def index_of_largest(self, tensor):
        rows = tensor.size // tensor.shape[-1]
        self.counts[CHOSEN] += tensor.size - rows
        return make_shape(tensor.shape[:-1])

    def _function(self, tensor, part: str, products: int, squares: int) -> Shape:
        self.counts[part] += tensor.size
        for _ in range(products):
            self._multiply_shares(tensor.size)
        for _ in range(squares):
            self._square(tensor.size)
        return make_shape(tensor.shape)

    def _multiply_shares(self, numbers: int):
        if numbers < DIRECT_FROM:
            self.counts[OPENED] += numbers
            self.counts[OWNED_BATCHES] += self.stock.take(numbers)
        else:
            self.counts[SHARED_BATCHES] += _halves(numbers)

    def _square(self, numbers: int):
        self.counts[OWNED_BATCHES] += 1 if numbers <= SLOTS else _halves(numbers)

    def _truncated(self, shape: tuple[int, ...]) -> Shape:
        self.counts[TRUNCATED] += math.prod(shape)
        return make_shape(shape)


def _owner(tensor) -> int | None:
    return getattr(tensor, "owner", None)


def _halves(numbers: int) -> int:
    """Batches of two halves, which the engine computes side by side."""
    half = numbers // 2
    return math.ceil(half / SLOTS) + math.ceil((numbers - half) / SLOTS)


@functools.lru_cache(maxsize=4096)
def count_product(rows: int, inner: int, columns: int) -> Counts:
    """Ciphertexts of the product of one party's matrix with the other's."""
    tile = _choose_tile(rows, inner, columns, packed=True)
    blocks = _blocks((rows, inner, columns), tile)
    lone = blocks[0] * blocks[2] == 1
    if lone:
        tile = _choose_tile(rows, inner, columns, packed=False)
        blocks = _blocks((rows, inner, columns), tile)
    inputs, outputs = blocks[1] * min(blocks[0], blocks[2]), blocks[0] * blocks[2]
    if lone:
        return {INPUTS: inputs, LONE_ANSWERS: outputs, COEFFICIENTS: outputs * tile[0] * tile[2]}
    by_coefficient = tile[1] >= rows * columns
    return {INPUTS: inputs, ANSWERS: math.ceil(rows * columns / SLOTS if by_coefficient else outputs / tile[1])}


def _choose_tile(rows: int, inner: int, columns: int, packed: bool) -> tuple[int, int, int]:
    """How the engine cuts matrices (`MatMatProtocol::GetSubMatShape`); of equal prices, the last."""
    best, chosen = math.inf, (1, 1, 1)
    for height in range(1, min(SLOTS, rows) + 1):
        depth = 1
        while depth <= inner and height * depth <= SLOTS:
            tile = (height, depth, min(columns, SLOTS // height // depth))
            price = _tile_price((rows, inner, columns), tile, packed)
            if price <= best:
                best, chosen = price, tile
            depth = depth * 2 if packed else depth + 1
    return chosen


def _tile_price(sizes: tuple[int, int, int], tile: tuple[int, int, int], packed: bool) -> float:
    blocks = _blocks(sizes, tile)
    ciphertexts = min(blocks[0], blocks[2]) * blocks[1] + math.ceil(blocks[0] * blocks[2] / tile[1])
    rotations = math.ceil(sizes[0] * sizes[2] / SLOTS) * tile[1] if packed else 0
    return CIPHERTEXT_PRICE * ciphertexts + ROTATION_PRICE * rotations + PRODUCT_PRICE * math.prod(blocks)


def _blocks(sizes: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // edge) for size, edge in zip(sizes, tile, strict=True))


def program_config(config: EntropyGPTConfig) -> EntropyGPTConfig:
    """
    The config of [`prepare_weights`] from that of the model: what folding makes of the smallest one of its kind, and
    without the FFNs that [`absorb_linear_ffns`] absorbs, if the weights are such that it does.
    """
    sizes = {name: getattr(config, name) for name in ("n_embd", "n_inner", "vocab_size", "n_positions")}
    smallest = copy.deepcopy(config)
    for name, size in {"n_embd": config.n_head, "n_inner": None, "vocab_size": 2, "n_positions": 1}.items():
        setattr(smallest, name, size)
    smallest.bos_token_id = smallest.eos_token_id = smallest.pad_token_id = None
    folded = copy.deepcopy(fold(EntropyGPTForCausalLM(smallest)).config)
    for name, size in sizes.items():
        setattr(folded, name, size)
    folded.pruned_ffn_layers = sorted([*folded.pruned_ffn_layers, *list_absorbable_ffns(folded)])
    return folded


def count_steps(config: EntropyGPTConfig, settings: PrivateSettings, span: Span) -> list[tuple[Step, Counts]]:
    """
    What each step of a program consists of.

    Raises:
        `PrivateInferenceError`: As [`build_steps`], or for another protocol than Cheetah.
    """
    if settings.protocol != "cheetah":
        raise PrivateInferenceError(
            f"bytes are predicted for the protocol cheetah, not for {settings.protocol!r}: measure it."
        )
    config = program_config(config)
    variables = {name: make_shape(shape, SERVER) for name, shape in weight_shapes(config).items()}
    name, shape = input_shape(config, settings, span)
    variables[name] = make_shape(shape, CLIENT)
    variables |= {name: make_shape(shape) for name, shape in kept_shapes(config, span).items()}
    stock = Stock()
    return [(step, _count(step, variables, settings, stock)) for step in build_steps(config, settings, span)]


def _count(step: Step, variables: dict[str, Shape], settings: PrivateSettings, stock: Stock) -> Counts:
    """Counts a step, and sets what it computes."""
    arithmetic = CountingArithmetic(settings, stock)
    results = step.function(arithmetic, *(variables[name] for name in step.inputs))
    results = results if isinstance(results, tuple) else (results,)
    variables.update(zip(step.outputs, results, strict=True))
    return dict(arithmetic.counts)


def predict(
    config: EntropyGPTConfig, settings: PrivateSettings, span: Span, prices: Prices | None = None
) -> list[PredictedStep]:
    """
    The bytes of each step, without the set-up.

    Args:
        config ([`EntropyGPTConfig`]): Any architecture, folded or not. Linear FFNs count as [`program_config`] has it.
        settings ([`PrivateSettings`]): Of the protocol "cheetah".
        span ([`Span`]): The tokens.
        prices ([`Prices`], *optional*): Those of this package, if none are given.

    Raises:
        `PrivateInferenceError`: As [`count_steps`].
    """
    prices = prices or load_prices()
    return [
        PredictedStep(step.operation, step.layer, price_of(counts, prices.bytes))
        for step, counts in count_steps(config, settings, span)
    ]


@functools.lru_cache(maxsize=1)
def load_prices() -> Prices:
    """The prices that come with this package."""
    return Prices.load(PRICES)


def price_of(counts: Counts, prices: dict[str, float]) -> float:
    return sum(prices[part] * count for part, count in counts.items())
