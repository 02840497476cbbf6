"""
Bytes of a private inference from the configuration alone: no weights, no engine, no second party.

What Cheetah sends follows from shapes: so many ciphertexts for each product, so many bits of oblivious transfer for
each comparison. [`CountingArithmetic`] runs the program on shapes and counts these parts as the engine would need
them; what each of them takes was measured (`prices.json`; `python -m evaluation.private_inference.cost_model --fit`
measures anew).
"""

import argparse
import copy
import functools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from pydantic.dataclasses import dataclass

from conversion.folding import fold
from evaluation.records import RECORD, StoredRecord
from evaluation.results import git_revision, machine_name
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .arithmetic import Arithmetic
from .cost import MEGA, StepCost
from .engine import SQUARE_BY_EXP_FROM, EngineLog, Party, check_engine, compile_steps, engine_versions
from .errors import PrivateInferenceError
from .participant import input_shape
from .program import Span, Step, build_steps, weight_shapes
from .settings import PrivateSettings


PRICES = Path(__file__).parent / "prices.json"
SERVER, CLIENT = 0, 1

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

SLOTS = 8192
# Products of shares below this use triples that were made in stock, from a batch of products of owned factors.
DIRECT_FROM = 2 * SLOTS
TRIPLES = SLOTS // 2
# The engine's own estimate of what is cheap, by which it cuts matrices: a ciphertext, in units of its computations.
CIPHERTEXT_PRICE, ROTATION_PRICE, PRODUCT_PRICE = 1000.0, 1.0, 0.1
# Products within the engine's own forms: of shares, and squares.
RECIPROCAL_PRODUCTS, RECIPROCAL_PRODUCTS_A_STEP, ROOT_PRODUCTS, TANH_PRODUCTS, ERF_PRODUCTS = 3, 2, 5, 8, 8
RECIPROCAL_SQUARES, TANH_SQUARES, ERF_SQUARES = 1, 1, 3
# Messages of a step in which oblivious transfers are made in stock, which none of the others comes near.
STOCKING_MESSAGES = 1000


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


class CountingArithmetic(Arithmetic):
    """
    What each operation sends under Cheetah, in parts that have a price; results are zeros.

    Args:
        settings ([`PrivateSettings`]): The form of each operation.
        stock ([`Stock`]): As the steps before left it.
    """

    def __init__(self, settings: PrivateSettings, stock: Stock):
        super().__init__(np)
        self.settings, self.stock, self.counts = settings, stock, Counter()

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

    def scale(self, tensor, constant: float):
        return self._truncated(tensor.shape) if _owner(tensor) is None else make_shape(tensor.shape, tensor.owner)

    def square(self, tensor):
        by_exp = self.settings.softmax == "efficient" and tensor.size >= SQUARE_BY_EXP_FROM
        if _owner(tensor) is None and by_exp:
            # As `EngineArithmetic` writes it.
            self.counts[HALVED] += tensor.size
            self._square(tensor.size)
            return self._truncated(tensor.shape)
        return self.multiply(tensor, tensor)

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
    """The config of [`prepare_weights`] from that of the model: what folding makes of the smallest one of its kind."""
    sizes = {name: getattr(config, name) for name in ("n_embd", "n_inner", "vocab_size", "n_positions")}
    smallest = copy.deepcopy(config)
    for name, size in {"n_embd": config.n_head, "n_inner": None, "vocab_size": 2, "n_positions": 1}.items():
        setattr(smallest, name, size)
    smallest.bos_token_id = smallest.eos_token_id = smallest.pad_token_id = None
    folded = copy.deepcopy(fold(EntropyGPTForCausalLM(smallest)).config)
    for name, size in sizes.items():
        setattr(folded, name, size)
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
    for layer in range(config.n_layer if span.start else 0):
        kept = (config.n_head, span.start, config.n_embd // config.n_head)
        variables |= {f"h.{layer}.keys": make_shape(kept), f"h.{layer}.values": make_shape(kept)}
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
        config ([`EntropyGPTConfig`]): Any architecture, folded or not.
        settings ([`PrivateSettings`]): Of the protocol "cheetah".
        span ([`Span`]): The tokens.
        prices ([`Prices`], *optional*): Those of this package, if none are given.

    Raises:
        `PrivateInferenceError`: As [`count_steps`].
    """
    prices = prices or load_prices()
    return [
        PredictedStep(step.operation, step.layer, _price(counts, prices.bytes))
        for step, counts in count_steps(config, settings, span)
    ]


@functools.lru_cache(maxsize=1)
def load_prices() -> Prices:
    """The prices that come with this package."""
    return Prices.load(PRICES)


def _price(counts: Counts, prices: dict[str, float]) -> float:
    return sum(prices[part] * count for part, count in counts.items())


def fit(samples: list[Sample]) -> dict[str, float]:
    """
    The prices that explain measured bytes with the least squares of relative errors.

    Raises:
        `ValueError`: If the samples leave a price open.
    """
    parts = sorted({part for sample in samples for part in sample.counts})
    weights = np.array([1 / sample.measured_bytes for sample in samples])
    counts = np.array([[sample.counts.get(part, 0) for part in parts] for sample in samples]) * weights[:, None]
    scales = np.abs(counts).max(axis=0)
    solution, _, rank, _ = np.linalg.lstsq(counts / scales, np.ones(len(samples)), rcond=None)
    if rank < len(parts):
        raise ValueError(f"{len(samples)} samples do not tell {len(parts)} prices apart: measure more shapes.")
    return dict(zip(parts, (solution / scales).tolist(), strict=True))


# A case of the fit: a name, a function of an arithmetic and of tensors, and the tensors' shapes and owners.
Case = tuple[str, Callable, list[tuple[tuple[int, ...], int | None]]]


def fitting_cases() -> list[Case]:
    """Operations alone, at shapes of which each price shows somewhere."""
    return [
        *(
            _product_case(*sizes, None, SERVER)
            for sizes in ((32, 192, 192), (48, 768, 96), (1, 768, 768), (5, 100, 3))
        ),
        *(_product_case(*sizes, CLIENT, SERVER) for sizes in ((16, 101, 48), (24, 1024, 192))),
        *(_product_case(*sizes, None, None) for sizes in ((12, 12, 12), (32, 64, 32), (64, 64, 64), (1, 64, 64))),
        *(_case(lambda ops, a, b: ops.multiply(a, b), n, None, None) for n in (100, 1000, 4000, 8192, 16384, 65536)),
        *(_case(lambda ops, a, b: ops.multiply(a, b), n, None, SERVER) for n in (100, 8192, 30000)),
        *(_case(lambda ops, a: ops.square(a), n, None) for n in (100, 8192, 30000)),
        *(_case(lambda ops, a: ops.scale(a, 0.3), n, None) for n in (1000, 20000, 60000)),
        *(_case(lambda ops, a: ops.positive_part(a), n, None) for n in (1000, 20000, 60000)),
        *(_case(lambda ops, a: ops.reciprocal(a), n, None) for n in (32, 1000, 4000)),
        *(_case(lambda ops, a: ops.reciprocal_root(a), n, None) for n in (32, 1000, 4000)),
        *(_case(lambda ops, a: ops.tanh(a), n, None) for n in (1000, 20000)),
        *(_case(lambda ops, a: ops.erf(a), n, None) for n in (1000, 20000)),
        *(_case(lambda ops, a: ops.index_of_largest(a), n, None) for n in (500, 2000)),
    ]


def _product_case(rows: int, inner: int, columns: int, left: int | None, right: int | None) -> Case:
    name = f"product {rows}x{inner}x{columns}, owners {left} and {right}"
    return name, lambda ops, a, b: ops.matmul(a, b), [((rows, inner), left), ((inner, columns), right)]


def _case(function: Callable, numbers: int, *owners: int | None) -> Case:
    shape = (1, numbers)
    code = function.__code__
    return f"{code.co_names[0]} of {numbers}, owners {owners}", function, [(shape, owner) for owner in owners]


def measure_samples(cases: list[Case], settings: PrivateSettings, log: EngineLog) -> list[Sample]:
    """Runs cases between two threads, each twice in one connection: what the second time takes is no set-up."""
    check_engine()
    stock = Stock()
    stock.triples = 0
    programs = [_case_program(case, settings) for case in cases]
    costs = _run_pair(programs, settings, log)
    samples = []
    for (name, function, tensors), repeated in zip(cases, costs, strict=True):
        for _ in repeated:
            arithmetic = CountingArithmetic(settings, stock)
            function(arithmetic, *(make_shape(shape, owner) for shape, owner in tensors))
        cost = repeated[-1]
        if max(cost.sent_messages, cost.received_messages) < STOCKING_MESSAGES:
            samples.append(Sample(name, dict(arithmetic.counts), cost.total_bytes))
    return samples


def _case_program(case: Case, settings: PrivateSettings) -> tuple[dict, list]:
    """The variables that the parties set, and the compiled steps: shares are sums of one of each party."""
    name, function, tensors = case
    variables, steps = {}, []
    for index, (shape, owner) in enumerate(tensors):
        tensor = f"{name} {index}"
        if owner is not None:
            variables[tensor] = (shape, owner)
            continue
        parts = (f"{tensor} of the server", f"{tensor} of the client")
        variables |= {parts[SERVER]: (shape, SERVER), parts[CLIENT]: (shape, CLIENT)}
        steps.append(Step("share", None, _add, parts, (tensor,)))
    inputs = tuple(f"{name} {index}" for index in range(len(tensors)))
    steps.append(Step(name, None, function, inputs, ("result",)))
    return variables, compile_steps(steps, {part: shape for part, (shape, _) in variables.items()}, settings)


def _add(ops: Arithmetic, left, right):
    return left + right


def _run_pair(
    programs: Iterable[tuple[dict, list]], settings: PrivateSettings, log: EngineLog
) -> list[list[StepCost]]:
    """What the last step of each program took, the first and the second time."""
    from spu import libspu

    description = libspu.link.Desc()
    description.recv_timeout_ms = 600_000
    for rank in (SERVER, CLIENT):
        description.add_party(f"party{rank}", f"thread{rank}")
    costs: list[list[StepCost]] = []

    def take_part(rank: int):
        party = Party(libspu.link.create_mem(description, rank), settings, log if rank == SERVER else None)
        for variables, steps in programs:
            for name, (shape, owner) in variables.items():
                if owner == rank:
                    party.set_own(name, np.full(shape, 0.6, np.float32))
                else:
                    party.set_foreign(name, shape, owner)
            taken = [[party.run(step) for step in steps][-1] for _ in range(2)]
            if rank == SERVER:
                costs.append(taken)

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in (SERVER, CLIENT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return costs


def measure_prices(log: EngineLog) -> Prices:
    """Measures all cases and fits the prices."""
    settings = PrivateSettings()
    samples = measure_samples(fitting_cases(), settings, log)
    found = fit(samples)
    for sample in samples:
        sample.fitted_bytes = _price(sample.counts, found)
    return Prices(found, samples, settings, engine_versions(), git_revision(), machine_name(torch.device("cpu")))


def main():
    parser = argparse.ArgumentParser(description="Measures what the parts of a private inference send.")
    parser.add_argument("--fit", action="store_true", required=True, help=f"measure, and replace {PRICES.name}")
    parser.parse_args()
    prices = measure_prices(EngineLog())
    prices.save(PRICES)
    for sample in prices.samples:
        error = sample.fitted_bytes / sample.measured_bytes - 1
        print(f"{sample.name:60} {sample.measured_bytes / MEGA:10.3f} MB {error:+8.2%}")
    for part, price in prices.bytes.items():
        print(f"{part:40} {price:14,.2f} bytes")


if __name__ == "__main__":
    main()
