"""What the ring of 64 bits does to a model's numbers: the engine's arithmetic in numpy, and an audit of overflows."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic.dataclasses import dataclass

from evaluation.records import RECORD
from modeling_entropy_gpt import EntropyGPTConfig

from .arithmetic import Arithmetic
from .errors import PrivateInferenceError
from .program import EMBEDDINGS, LOGITS, TANH_GELUS, TOKENS, Span, build_steps, run_steps
from .settings import RING_BITS, PrivateSettings


# Numbers and products before their truncation have to be smaller than 2^62: two parties tell signs by what is above.
SAFE_BITS = RING_BITS - 2
# What may be recommended: fewer leave no precision, more no room before the point.
FRACTION_BITS = range(12, 23)
# The last bit of a tensor may be such a part of its typical value.
COARSEST = 2**-6
# A prompt that was not audited may make numbers larger by this factor.
SPARE = 2.0
# Typical error of logits that nobody notices: it costs about half its square in cross-entropy.
TOLERATED_ERROR = 0.02

# The engine's approximations: of 1/x on [0.5, 1), where one step of Goldschmidt's method follows another; of 1/sqrt(x)
# on [0.25, 0.5); of tanh as a sum of odd Chebyshev polynomials on [-5, 5]; of 1 - erf(x) = 1 / polynomial^4 on [0, 3].
RECIPROCAL_GUESS = (2.9142, -2.0)
ROOT_POLYNOMIAL = (0.0, -15.47994394, 38.4714796, -49.86605845, 26.02942339)
ROOT_CONSTANT = 4.14285016
TANH_BOUND = 5.0
TANH_SERIES = (
    *(1.2514045938932097, -0.3655987797163166, 0.17253141478140663, -0.08943445792774211, 0.047703017901250824),
    *(-0.025830290571688078, 0.014338801903468182, -0.008541730970059077, 0.0061230685785789475),
)
ERF_BOUND = 3.0
ERF_POLYNOMIAL = (1.0, 0.278393, 0.230389, 0.000972, 0.078108)
# From so many fraction bits on, the engine makes three steps of Goldschmidt's method at least.
FINE_BITS, FINE_ITERATIONS = 30, 3


class FixedPointArithmetic(Arithmetic):
    """
    The engine's arithmetic. Tensors are float64 and multiples of 2^-fraction_bits, exact up to 2^53 of them; what does
    not fit into the ring wraps around, as it does there. With "ref2k" the numbers are the engine's; with the other
    protocols the last bit of every product is left to chance, distributed as it is there.

    Args:
        settings ([`PrivateSettings`]): Protocol, fraction bits, squarings and iterations.
        seed (`int`): Of the chance.

    Attributes:
        overflows (`int`): Numbers so far that did not fit.
    """

    def __init__(self, settings: PrivateSettings, seed: int = 0):
        super().__init__(np)
        self.settings, self.overflows = settings, 0
        self._one = 2.0**settings.fraction_bits
        self._random = np.random.default_rng(seed)

    def encode(self, tensor) -> np.ndarray:
        """What the engine makes of numbers in float32: it cuts off what is behind the last bit."""
        bound = 2.0**SAFE_BITS
        last_bits = np.trunc(np.asarray(tensor, np.float32).astype(np.float64) * self._one)
        self._count_overflows(np.abs(last_bits) > bound)
        return np.clip(last_bits, -bound, bound) / self._one

    def public(self, constant: float):
        return self.encode(constant)

    def matmul(self, left, right):
        return self._truncate(np.matmul(self._fit(left), self._fit(right)))

    def multiply(self, left, right):
        return self._truncate(self._fit(left) * self._fit(right))

    def scale(self, tensor, constant: float):
        return self.multiply(tensor, self.encode(constant))

    def square(self, tensor):
        """With the efficient softmax by way of an exponential of one squaring, whose division by 2 errs too."""
        if self.settings.softmax == "efficient":
            return self._exp(tensor + tensor - 2.0, 1)
        return self._square(tensor)

    def exp(self, tensor):
        return self._exp(tensor, self.settings.exponential_squarings)

    def reciprocal(self, tensor):
        tensor = self._fit(tensor)
        normalized, factor = self._normalized_reciprocal(np.abs(tensor))
        return np.where(tensor < 0, -1.0, 1.0) * self.multiply(normalized, factor)

    def divide(self, tensor, divisor):
        tensor, divisor = np.broadcast_arrays(self._fit(tensor), self._fit(divisor))
        normalized, factor = self._normalized_reciprocal(np.abs(divisor))
        return np.where(divisor < 0, -1.0, 1.0) * self.multiply(self.multiply(normalized, tensor), factor)

    def reciprocal_root(self, tensor):
        """A polynomial on [0.25, 0.5), into which an even power of 2 brings the number."""
        tensor, bits = self._fit(tensor), self.settings.fraction_bits
        _, exponent = np.frexp(tensor)
        root = self._polynomial(self.multiply(tensor, self._power_of_two(-exponent - 1)), ROOT_POLYNOMIAL)
        place = exponent + bits
        # The root of that power as the engine has it: whole numbers, with and without a factor of about sqrt(2).
        even, odd = (2.0 ** (bits // 2) * 2**0.5, 2.0 ** (bits // 2))
        if bits % 2:
            even, odd = 2.0 ** ((bits + 3) // 2), 2.0 ** (bits // 2 + 1) * 2**0.5
        places = 2 * (bits // 2) - 1 - place // 2
        root_of_power = np.where(place % 2, np.floor(odd), np.floor(even)) * 2.0**places / self._one
        root_of_power = np.where((tensor > 0) & (places >= 0), root_of_power, 0.0)
        return self.multiply(root + self.encode(ROOT_CONSTANT), root_of_power)

    def tanh(self, tensor):
        bounded = self.scale(np.clip(self._fit(tensor), -TANH_BOUND, TANH_BOUND), 1 / TANH_BOUND)
        step = 4.0 * self._square(bounded) - 2.0
        terms = [bounded, self.multiply(bounded, step - 1.0)]
        while len(terms) < len(TANH_SERIES):
            terms.append(self.multiply(step, terms[-1]) - terms[-2])
        return self._truncate(sum(self.encode(factor) * term for factor, term in zip(TANH_SERIES, terms, strict=True)))

    def erf(self, tensor):
        tensor = self._fit(tensor)
        size = np.abs(tensor)
        near = size < ERF_BOUND
        complement = self.reciprocal(self._square(self._square(self._polynomial(near * size, ERF_POLYNOMIAL))))
        return np.where(tensor < 0, -1.0, 1.0) * np.where(near, 1.0 - complement, 1.0)

    def at_most(self, tensor, bound: float):
        return np.minimum(tensor, self.encode(bound))

    def _square(self, tensor):
        return self.multiply(tensor, tensor)

    def _exp(self, tensor, squarings: int):
        """(1 + x / 2^n)^(2^n)."""
        power = 1.0 + self._round(self._fit(tensor) / 2.0**squarings)
        for _ in range(squarings):
            power = self._square(power)
        return power

    def _normalized_reciprocal(self, size):
        """The reciprocal of a number's part in [0.5, 1), and the power of 2 that makes it that of the number."""
        factor = self._power_of_two(-np.frexp(size)[1]) * (size > 0)
        part = self.multiply(size, factor)
        constant, slope = RECIPROCAL_GUESS
        result = self.encode(constant) + slope * part
        error = 1.0 - self.multiply(part, result)
        iterations = self.settings.reciprocal_iterations
        if self.settings.fraction_bits >= FINE_BITS:
            iterations = max(iterations, FINE_ITERATIONS)
        for iteration in range(iterations):
            error = self._square(error) if iteration else error
            result = self.multiply(result, 1.0 + error)
        return result, factor

    def _power_of_two(self, exponent):
        """2^exponent where the engine can write it: with as many bits before the point as behind it; else 0."""
        bits = self.settings.fraction_bits
        return np.where((exponent >= -bits) & (exponent < bits), 2.0**exponent, 0.0)

    def _polynomial(self, tensor, coefficients):
        """Powers are squares, or such times the number, each truncated; their sum is truncated once."""
        powers = [np.ones_like(tensor), tensor]
        for degree in range(2, len(coefficients)):
            half = powers[degree // 2]
            powers.append(self.multiply(powers[degree - 1], tensor) if degree % 2 else self._square(half))
        return self._truncate(
            sum(self.encode(factor) * power for factor, power in zip(coefficients, powers, strict=True))
        )

    def _fit(self, tensor):
        """A sum as the ring holds it."""
        return self._wrap(tensor, RING_BITS)

    def _truncate(self, product):
        """A product of two numbers, which has twice the bits behind the point."""
        return self._round(self._wrap(product, RING_BITS - self.settings.fraction_bits))

    def _round(self, exact):
        last_bits = exact * self._one
        if self.settings.protocol == "ref2k":
            return np.floor(last_bits + 0.5) / self._one
        kept = np.floor(last_bits + self._random.random(last_bits.shape))
        if self.settings.protocol == "cheetah":
            kept -= self._random.integers(2, size=last_bits.shape)
        return kept / self._one

    def _wrap(self, tensor, bits: int):
        """Numbers modulo the ring, of which `bits` are left for them."""
        modulus = 2.0**bits / self._one
        self._count_overflows(np.abs(tensor) >= modulus * 2.0 ** (SAFE_BITS - RING_BITS))
        return tensor - modulus * np.round(tensor / modulus)

    def _count_overflows(self, found):
        self.overflows += int(np.count_nonzero(found))


def emulate(
    config: EntropyGPTConfig,
    weights: dict[str, np.ndarray],
    settings: PrivateSettings,
    tokens: np.ndarray,
    answers: int = 1,
    seed: int = 0,
) -> np.ndarray:
    """
    The logits that a private inference would answer with.

    Args:
        config ([`EntropyGPTConfig`]), weights (`dict`): Those of [`prepare_weights`].
        settings ([`PrivateSettings`]): Of the inference.
        tokens (`np.ndarray`): Ids of one sequence.
        answers (`int`): Of so many last positions.
        seed (`int`): Of the chance that decides on last bits.

    Returns:
        `np.ndarray`: Logits `(answers, vocabulary)`.

    Raises:
        `PrivateInferenceError`: As [`build_steps`].
    """
    ops = FixedPointArithmetic(settings, seed)
    steps = build_steps(config, settings, Span(0, len(tokens), answers))
    variables = {**weights, **_inputs(weights, settings, tokens)}
    return run_steps(steps, ops, {name: ops.encode(value) for name, value in variables.items()})[LOGITS]


def exact_logits(
    config: EntropyGPTConfig,
    weights: dict[str, np.ndarray],
    settings: PrivateSettings,
    tokens: np.ndarray,
    answers: int = 1,
) -> np.ndarray:
    """
    The logits of the model itself, with its own exponential and GELU, in float64; arguments as of [`emulate`]. They
    are NaN where scores are so far below those of masked keys that not even float64 can tell them apart.
    """
    gelu = "tanh" if config.activation_function in TANH_GELUS else "erf"
    steps = build_steps(config, replace(settings, softmax="stock", gelu=gelu), Span(0, len(tokens), answers))
    with np.errstate(divide="ignore", invalid="ignore"):
        return run_steps(steps, _Float64Arithmetic(np), _exact_variables(weights, settings, tokens))[LOGITS]


def _exact_variables(weights, settings, tokens) -> dict[str, np.ndarray]:
    variables = {**weights, **_inputs(weights, settings, tokens)}
    return {name: value.astype(np.float64) for name, value in variables.items()}


class _Float64Arithmetic(Arithmetic):
    """Without jax."""

    def erf(self, tensor):
        return np.vectorize(math.erf)(tensor)


def _inputs(weights: dict[str, np.ndarray], settings: PrivateSettings, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What the client gives."""
    if settings.embedding == "client_table":
        return {EMBEDDINGS: weights["wte"][tokens] + weights["wpe"][: len(tokens)]}
    return {TOKENS: (np.asarray(tokens)[:, None] == np.arange(len(weights["wte"]))).astype(np.float32)}


@dataclass(config=RECORD)
class TensorRange:
    """
    How large and how small the numbers of a tensor are, over all sequences.

    Args:
        name (`str`): Where it comes up, such as "layer 3, FFN" or "h.3.ffn.weight".
        role (`str`):
            "weight", "value" (what a step writes), "product" (before its truncation), "exponent" (what exp is taken
            of), "divisor" or "radicand" (what 1 / x or 1 / sqrt(x) is taken of).
        least, most (`float`): The smallest and the largest number.
        typical (`float`): Root of the mean square.
        lost (`float`): Share of the numbers other than 0 that are smaller than the last bit.
    """

    name: str
    role: Literal["weight", "value", "product", "exponent", "divisor", "radicand"]
    least: float
    most: float
    typical: float
    lost: float

    @property
    def size(self) -> float:
        """The largest magnitude."""
        return max(-self.least, self.most)


@dataclass(config=RECORD)
class RangeReport:
    """
    Whether a model's numbers fit the settings.

    Args:
        fraction_bits, exponential_squarings (`int`): The settings' own.
        positions (`int`): Logits were compared at so many.
        largest_error, typical_error (`float`):
            Of the emulated logits against the model's own, and the root of their mean square.
        rounding_error (`float`): The part of the typical error that rounding makes; the rest are approximations.
        agreement (`float`): Share of positions at which the most likely token is the same.
        tensors (`list[TensorRange]`): In the order in which they come up, weights first.
    """

    fraction_bits: int
    exponential_squarings: int
    positions: int
    largest_error: float
    typical_error: float
    rounding_error: float
    agreement: float
    tensors: list[TensorRange]

    @property
    def problems(self) -> list[str]:
        """A line for every tensor that does not fit: its name, what is wrong, and what to do."""
        found = self._tensor_problems()
        if not found and not self.rounding_error <= TOLERATED_ERROR:
            found = [f"logits: rounding makes errors of {self.rounding_error:.2g}; use {self._advice()}."]
        return found

    @property
    def recommended_fraction_bits(self) -> int | None:
        """The settings' own where they will do; else as many as precision asks for, or the most that fit, or none."""
        wanted = max([self.fraction_bits, *(_precise_bits(tensor) for tensor in self.tensors)])
        if self.rounding_error > TOLERATED_ERROR and not self._has_garbage:
            wanted = max(wanted, self.fraction_bits + math.ceil(math.log2(self.rounding_error / TOLERATED_ERROR)))
        fitting = list(filter(self._fits, FRACTION_BITS))
        return next((bits for bits in fitting if bits >= wanted), fitting[-1] if fitting else None)

    @property
    def recommended_squarings(self) -> int:
        """
        Of the stock and the tuned softmax: as many as weigh the error of the approximation, 0.27 / 2^n, against that
        of the last bit, 2^n of them; more where scores are so far apart that the approximation would not hold.
        """
        bits = self.recommended_fraction_bits or self.fraction_bits
        balanced = (bits - 1) // 2
        lowest = min((tensor.least for tensor in self.tensors if tensor.role == "exponent"), default=0.0)
        return next((n for n in range(balanced, RING_BITS) if lowest * SPARE >= lowest_exponent(n, bits)), RING_BITS)

    @property
    def _has_garbage(self) -> bool:
        """Whether a tensor is beyond what is computed at all, so that errors say nothing about rounding."""
        return any(self._too_large(tensor) or self._too_low(tensor) for tensor in self.tensors)

    def _tensor_problems(self) -> list[str]:
        lines = ((tensor.name, self._problem(tensor)) for tensor in self.tensors)
        return [f"{name}: {line}" for name, line in lines if line is not None]

    def _fits(self, bits: int) -> bool:
        return all(tensor.size * SPARE < _largest(tensor.role, bits) for tensor in self.tensors)

    def _too_large(self, tensor: TensorRange) -> bool:
        return not tensor.size < _largest(tensor.role, self.fraction_bits)

    def _too_low(self, tensor: TensorRange) -> bool:
        if tensor.role == "exponent":
            return not tensor.least >= lowest_exponent(self.exponential_squarings, self.fraction_bits)
        return tensor.role == "divisor" and not tensor.least >= COARSEST

    def _problem(self, tensor: TensorRange) -> str | None:
        if self._too_large(tensor):
            return self._say_too_large(tensor)
        if self._too_low(tensor):
            return self._say_low_exponent(tensor) if tensor.role == "exponent" else self._say_low_scores(tensor)
        return self._say_imprecise(tensor) if _precise_bits(tensor) > self.fraction_bits else None

    def _say_too_large(self, tensor: TensorRange) -> str:
        limit = _largest(tensor.role, self.fraction_bits)
        return (
            f"{tensor.size:.2g} ({tensor.role}) does not fit with {self.fraction_bits} fraction bits, where "
            f"{limit:.2g} is the limit; use {self._advice()}."
        )

    def _say_low_exponent(self, tensor: TensorRange) -> str:
        lowest = lowest_exponent(self.exponential_squarings, self.fraction_bits)
        return (
            f"exp({tensor.least:.4g}) is out of reach of {self.exponential_squarings} squarings, which are right from "
            f"{lowest:.4g} to 0; use exponential_squarings={self.recommended_squarings}."
        )

    def _say_low_scores(self, tensor: TensorRange) -> str:
        return (
            f"a sum of exponentials is {tensor.least:.2g} and has to be about 1 or more: the visible scores of a row "
            "are all far below that of masked keys; use a model with smaller scores."
        )

    def _say_imprecise(self, tensor: TensorRange) -> str:
        return (
            f"numbers of about {_small(tensor):.2g} lose precision where the last bit is "
            f"{2.0**-self.fraction_bits:.2g}, and {tensor.lost:.0%} vanish; use {self._advice()}."
        )

    def _advice(self) -> str:
        bits = self.recommended_fraction_bits
        if bits not in (None, self.fraction_bits):
            return f"fraction_bits={bits}"
        return "another model: no number of fraction bits leaves room for all of this one's"


def lowest_exponent(squarings: int, fraction_bits: int) -> float:
    """
    The lowest x for which (1 + x / 2^n)^(2^n) is 0 to the last bit: it is even about -2^n, and 1 again at -2^(n + 1).
    """
    return -(2.0 ** (squarings + 1)) + fraction_bits * math.log(2)


def largest_radicand(fraction_bits: int) -> float:
    """Of larger numbers the engine's 1 / sqrt(x) is 0; it has bits by twos."""
    return 2.0 ** (fraction_bits - (3 if fraction_bits % 2 else 1))


def _largest(role: str, fraction_bits: int) -> float:
    """The limit of a tensor's magnitude."""
    if role in ("divisor", "radicand"):
        return 2.0**fraction_bits if role == "divisor" else largest_radicand(fraction_bits)
    return 2.0 ** (SAFE_BITS - fraction_bits * (2 if role == "product" else 1))


def _small(tensor: TensorRange) -> float:
    """The number whose last bit matters most."""
    return tensor.least if tensor.role == "radicand" else tensor.typical


def _precise_bits(tensor: TensorRange) -> int:
    """The fraction bits that leave a tensor its precision."""
    if tensor.role not in ("weight", "radicand") or not 0 < _small(tensor) < math.inf:
        return 0
    return math.ceil(-math.log2(COARSEST * _small(tensor)))


def audit(
    config: EntropyGPTConfig,
    weights: dict[str, np.ndarray],
    settings: PrivateSettings,
    tokens: Iterable[np.ndarray],
    seed: int = 0,
) -> RangeReport:
    """
    Runs the program in float64 and looks at every number that the ring has to hold; then emulates the ring, to say
    what it does to the logits of all positions.

    Args:
        config ([`EntropyGPTConfig`]), weights (`dict`): Those of [`prepare_weights`].
        settings ([`PrivateSettings`]): What is asked for.
        tokens (`Iterable[np.ndarray]`): Ids of some sequences.
        seed (`int`): As in [`emulate`].

    Raises:
        `PrivateInferenceError`: If there is no sequence; or as [`build_steps`].
    """
    ops = _ObservedArithmetic(settings.fraction_bits)
    for name, weight in weights.items():
        ops.observe(weight, "weight" if weight.ndim > 1 else "value", name)
    exact, unrounded, emulated = [], [], []
    for sequence in tokens:
        exact.append(exact_logits(config, weights, settings, sequence, len(sequence)))
        unrounded.append(_run_observed(config, weights, settings, sequence, ops))
        emulated.append(emulate(config, weights, settings, sequence, len(sequence), seed + len(emulated)))
    if not exact:
        raise PrivateInferenceError("an audit needs a sequence of tokens or more: give some text.")
    exact, unrounded, emulated = (np.concatenate(logits) for logits in (exact, unrounded, emulated))
    return RangeReport(
        fraction_bits=settings.fraction_bits,
        exponential_squarings=settings.exponential_squarings,
        positions=len(exact),
        largest_error=float(np.abs(emulated - exact).max()),
        typical_error=_root_mean_square(emulated - exact),
        rounding_error=_root_mean_square(emulated - unrounded),
        agreement=float((emulated.argmax(-1) == exact.argmax(-1)).mean()),
        tensors=list(ops.ranges()),
    )


def _root_mean_square(tensor: np.ndarray) -> float:
    return float(np.sqrt(np.square(tensor).mean()))


def _run_observed(config, weights, settings, tokens, ops: "_ObservedArithmetic") -> np.ndarray:
    """The program's logits without rounding."""
    variables = _exact_variables(weights, settings, tokens)
    for step in build_steps(config, settings, Span(0, len(tokens), len(tokens))):
        ops.place = step.operation if step.layer is None else f"layer {step.layer}, {step.operation}"
        variables = run_steps([step], ops, variables)
        for name in step.outputs:
            ops.observe(variables[name], "value")
    return variables[LOGITS]


class _ObservedArithmetic(_Float64Arithmetic):
    """float64, with a look at what the ring has to hold; `place` is the step that runs."""

    def __init__(self, fraction_bits: int):
        super().__init__(np)
        self.place = ""
        self._resolution = 2.0**-fraction_bits
        self._tallies: dict[tuple[str, str], _Tally] = {}

    def observe(self, tensor, role: str, name: str | None = None):
        self._tallies.setdefault((name or self.place, role), _Tally()).add(tensor, self._resolution)
        return tensor

    def ranges(self) -> Iterator[TensorRange]:
        for (name, role), tally in self._tallies.items():
            yield tally.range(name, role)

    def matmul(self, left, right):
        return self.observe(super().matmul(left, right), "product")

    def multiply(self, left, right):
        return self.observe(super().multiply(left, right), "product")

    def scale(self, tensor, constant: float):
        return self.observe(super().scale(tensor, constant), "product")

    def square(self, tensor):
        return self.observe(super().square(tensor), "product")

    def exp(self, tensor):
        return super().exp(self.observe(tensor, "exponent"))

    def reciprocal(self, tensor):
        self.observe(tensor, "divisor")
        # As in the ring, 1 / 0 is 0.
        return np.divide(1.0, tensor, out=np.zeros_like(tensor), where=tensor != 0)

    def divide(self, tensor, divisor):
        return tensor * self.reciprocal(divisor)

    def reciprocal_root(self, tensor):
        return super().reciprocal_root(self.observe(tensor, "radicand"))


class _Tally:
    """Of the numbers of a tensor, over sequences."""

    def __init__(self):
        self.least, self.most = math.inf, -math.inf
        self.count = self.squares = self.nonzero = self.lost = 0

    def add(self, tensor: np.ndarray, resolution: float):
        size = np.abs(tensor)
        self.least, self.most = min(self.least, float(tensor.min())), max(self.most, float(tensor.max()))
        self.count += tensor.size
        self.squares += float(np.square(size, dtype=np.float64).sum())
        self.nonzero += int(np.count_nonzero(size))
        self.lost += int(np.count_nonzero((size > 0) & (size < resolution)))

    def range(self, name: str, role: str) -> TensorRange:
        typical = math.sqrt(self.squares / self.count)
        return TensorRange(name, role, self.least, self.most, typical, self.lost / max(1, self.nonzero))
