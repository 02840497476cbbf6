"""What the ring of 64 bits does to a model's numbers: the engine's arithmetic in numpy, without the engine."""

import math
from dataclasses import replace

import numpy as np

from modeling_entropy_gpt import EntropyGPTConfig
from modeling_entropy_gpt.layers import TANH_GELUS

from .arithmetic import Arithmetic, CheapArithmetic
from .program import LOGITS, build_steps
from .settings import RING_BITS, PrivateSettings
from .steps import Span, run_steps
from .variables import client_inputs


# Numbers and products before truncation must be below 2^62: two parties read signs from the bits above.
SAFE_BITS = RING_BITS - 2

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
# Last bits below which the engine takes a public constant to have too few.
SMALL_CONSTANT = 4
# From this number of fraction bits on, the engine makes at least three steps of Goldschmidt's method.
FINE_BITS, FINE_ITERATIONS = 30, 3


class FixedPointArithmetic(CheapArithmetic):
    """
    The engine's arithmetic. Tensors are float64 and multiples of 2^-fraction_bits, exact up to 2^53 of them; what does
    not fit into the ring wraps around, as it does there. With "ref2k" the numbers are the engine's; with the other
    protocols the last bit of every product is left to chance, distributed as it is there.

    Args:
        settings ([`PrivateSettings`]): Protocol, fraction bits, squarings and iterations.
        seed (`int`): Seed of the random truncation.

    Attributes:
        overflows (`int`): Numbers so far that did not fit.
    """

    def __init__(self, settings: PrivateSettings, seed: int = 0):
        super().__init__(np, settings)
        self.overflows = 0
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

    def scale(self, tensor, constant):
        if np.ptp(constant) == 0 and 0 < np.abs(constant).max() < SMALL_CONSTANT / self._one:
            return self._scale_down(tensor, np.abs(constant).max())
        return self.multiply(tensor, self.encode(constant))

    def _scale_down(self, tensor, constant: float):
        """
        What the engine makes of one constant of few bits, whose sign it loses: it multiplies by a power of 2 of it,
        which has more bits, and cuts those of the power off too.
        """
        power = 2.0 ** (np.ceil(np.log2(1 / constant)) - 1)
        product = self._fit(tensor) * self.encode(constant * power)
        return self._round(self._wrap(product, RING_BITS - self.settings.fraction_bits) / power)

    def combine(self, tensor, factors):
        return self.matmul(tensor, self.encode(factors))

    def square_by_product(self, tensor):
        return self.multiply(tensor, tensor)

    def square_by_exp(self, tensor):
        """Its division by 2 errs too."""
        return self._exp(tensor + tensor - 2.0, 1)

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
        step = 4.0 * self.square_by_product(bounded) - 2.0
        terms = [bounded, self.multiply(bounded, step - 1.0)]
        while len(terms) < len(TANH_SERIES):
            terms.append(self.multiply(step, terms[-1]) - terms[-2])
        return self._truncate(sum(self.encode(factor) * term for factor, term in zip(TANH_SERIES, terms, strict=True)))

    def erf(self, tensor):
        tensor = self._fit(tensor)
        size = np.abs(tensor)
        near = size < ERF_BOUND
        root = self.square_by_product(self._polynomial(near * size, ERF_POLYNOMIAL))
        complement = self.reciprocal(self.square_by_product(root))
        return np.where(tensor < 0, -1.0, 1.0) * np.where(near, 1.0 - complement, 1.0)

    def at_most(self, tensor, bound: float):
        return np.minimum(tensor, self.encode(bound))

    def any_negative(self, tensor):
        return super().any_negative(self._fit(tensor))

    def as_ring(self, tensor):
        return (self._fit(tensor) * self._one).astype(np.int64)

    def truncate(self, product):
        return self._truncate(product / self._one**2)

    def _exp(self, tensor, squarings: int):
        """(1 + x / 2^n)^(2^n)."""
        power = 1.0 + self._round(self._fit(tensor) / 2.0**squarings)
        for _ in range(squarings):
            power = self.square_by_product(power)
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
            error = self.square_by_product(error) if iteration else error
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
            powers.append(self.multiply(powers[degree - 1], tensor) if degree % 2 else self.square_by_product(half))
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
        limit = modulus * 2.0 ** (SAFE_BITS - RING_BITS)
        size = np.abs(tensor)
        if size.max(initial=0.0) < limit:
            return tensor
        self._count_overflows(size >= limit)
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
        settings ([`PrivateSettings`]): Settings of the inference.
        tokens (`np.ndarray`): Ids of one sequence.
        answers (`int`): Number of last positions whose logits are computed.
        seed (`int`): Seed of the random truncation, which decides on last bits.

    Returns:
        `np.ndarray`: Logits `(answers, vocabulary)`.

    Raises:
        `PrivateInferenceError`: As [`build_steps`].
    """
    return emulate_variables(config, weights, settings, tokens, answers, seed)[LOGITS]


def emulate_variables(
    config: EntropyGPTConfig,
    weights: dict[str, np.ndarray],
    settings: PrivateSettings,
    tokens: np.ndarray,
    answers: int = 1,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """All variables of a private inference; arguments as of [`emulate`]."""
    ops = FixedPointArithmetic(settings, seed)
    steps = build_steps(config, settings, Span(0, len(tokens), answers))
    variables = {**weights, **_inputs(config, weights, settings, tokens, answers)}
    return run_steps(steps, ops, {name: ops.encode(value) for name, value in variables.items()})


def exact_logits(
    config: EntropyGPTConfig,
    weights: dict[str, np.ndarray],
    settings: PrivateSettings,
    tokens: np.ndarray,
    answers: int = 1,
) -> np.ndarray:
    """
    The logits of the model itself, with its own exponential and GELU, in float64; arguments as of [`emulate`]. They
    are NaN where scores are so far below those of masked keys that float64 cannot distinguish them.
    """
    gelu = "tanh" if config.activation_function in TANH_GELUS else "erf"
    steps = build_steps(config, replace(settings, softmax="stock", gelu=gelu), Span(0, len(tokens), answers))
    variables = exact_variables(config, weights, settings, tokens, answers)
    with np.errstate(divide="ignore", invalid="ignore"):
        return run_steps(steps, Float64Arithmetic(np), variables)[LOGITS]


def exact_variables(config, weights, settings, tokens, answers: int = 1) -> dict[str, np.ndarray]:
    """Weights and the client's inputs, in float64."""
    variables = {**weights, **_inputs(config, weights, settings, tokens, answers)}
    return {name: value.astype(np.float64) for name, value in variables.items()}


class Float64Arithmetic(Arithmetic):
    """Without rounding, on numpy's arrays of float64."""

    def erf(self, tensor):
        return np.vectorize(math.erf)(tensor)


def _inputs(config, weights, settings, tokens, answers: int) -> dict[str, np.ndarray]:
    return client_inputs(config, settings, Span(0, len(tokens), answers), tokens, weights)
