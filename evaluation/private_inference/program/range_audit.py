"""
Whether a model's numbers fit the ring: the range of every tensor, what overflows, and which settings would do.

The same run finds the bounds of the check that each private inference makes of itself.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.json_records import RECORD
from modeling_entropy_gpt import EntropyGPTConfig

from .attention_functions import MOST_SUM
from .fixed_point import SAFE_BITS, Float64Arithmetic, emulate, exact_logits, exact_variables
from .program import (
    CHECKED,
    LOGITS,
    OUT_OF_RANGE,
    Span,
    bounds_name,
    build_steps,
    checked_parts,
    run_steps,
    sums_name,
    weight_shapes,
)
from .settings import RING_BITS, PrivateSettings


# What may be recommended: fewer leave no precision, more no room before the point.
FRACTION_BITS = range(12, 23)
# The last bit of a tensor may be such a part of its typical value.
COARSEST = 2**-6
# Sequences of a text that an audit looks at.
MOST_WINDOWS = 4
# A prompt that was not audited may make the stream larger by this factor.
SPARE = 2.0
# What grows as the square of the stream at most: variances, scores, and all that is made of them. Sums of exponentials
# are at most as large as the number of keys.
GROWING = ("value", "product", "radicand", "exponent")
# Typical rounding error of logits that nobody notices: it costs about half its square in cross-entropy.
TOLERATED_ROUNDING = 0.02
# The tolerated error of a single logit: a constant and a share of a typical logit. The largest logit is no measure:
# one token with a large embedding would excuse errors of all others.
TOLERATED_ERROR, TOLERATED_SHARE = 0.05, 0.015
# With fewer most likely tokens that agree, the server says so.
EXPECTED_AGREEMENT = 0.99
# The bounds of the check are the largest sums of the audit times a margin, at most this one. Each is at least this
# quantile of them times the margin: other prompts make large what was small here. A few may be far above all others.
LARGEST_MARGIN, USUAL_SUM = 4.0, 0.97
# The margin of sums of scores: those of a row have both signs, and a text's may be many times those of random tokens.
# With a margin of 4, 19 of 500 honest runs were stopped. Garbage in keys or scores is found with a far larger one.
SCORES_MARGIN = 256.0


@dataclass(config=RECORD)
class TensorRange:
    """
    How large and how small the numbers of a tensor are, over all sequences.

    Args:
        name (`str`): Where it comes up, such as "layer 3, FFN" or "h.3.ffn.weight".
        role (`str`):
            "weight", "value" (what a step writes), "product" (before its truncation), "exponent" (what exp is taken
            of), "divisor" or "radicand" (what 1 / x or 1 / sqrt(x) is taken of), or "sum" (of attention weights, from
            a range that is the same for all models).
        least, most (`float`): The smallest and the largest number.
        typical (`float`): Root of the mean square.
        lost (`float`): Share of the numbers other than 0 that are smaller than the last bit.
    """

    name: str
    role: Literal["weight", "value", "product", "exponent", "divisor", "radicand", "sum"]
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
        positions (`int`): Number of positions whose logits were compared.
        typical_logit (`float`): Root of the mean square of the model's own.
        largest_error, typical_error (`float`):
            Of the emulated logits against the model's own, and the root of their mean square.
        rounding_error (`float`): The part of the typical error that rounding makes; the rest are approximations.
        agreement (`float`): Share of positions at which the most likely token is the same.
        tensors (`list[TensorRange]`): In the order in which they come up, weights first.
        largest_sums (`dict[str, list[float]]`): By part of `checked_parts`, the largest magnitude of each of its sums.
    """

    fraction_bits: int
    exponential_squarings: int
    positions: int
    typical_logit: float
    largest_error: float
    typical_error: float
    rounding_error: float
    agreement: float
    tensors: list[TensorRange]
    largest_sums: dict[str, list[float]]

    @property
    def problems(self) -> list[str]:
        """A line for every tensor that does not fit: its name, what is wrong, and what to do."""
        found = self._tensor_problems()
        if not found and not self.rounding_error <= TOLERATED_ROUNDING:
            found = [f"logits: rounding makes errors of {self.rounding_error:.2g}; use {self._advice()}."]
        if not found and not self.largest_error <= (tolerated := tolerated_error(self.typical_logit)):
            found = [
                f"logits: an error of {self.largest_error:.2g} was found, {tolerated:.2g} is tolerated, and the most "
                f"likely token is the same at {self.agreement:.1%} of the positions; {self._advice_for_errors()}."
            ]
        return found

    @property
    def warnings(self) -> list[str]:
        """What does not prevent answers, but is to be known."""
        if self.agreement >= EXPECTED_AGREEMENT:
            return []
        return [
            f"private answers have another most likely token at {1 - self.agreement:.1%} of the audited positions, "
            f"where two are nearly as likely: logits differ by up to {self.largest_error:.2g}"
        ]

    @property
    def margin(self) -> float:
        """
        By how much larger than in the audit the check lets stream and logits be. Numbers in between, which it does not
        look at, still fit the ring then.
        """
        return min([LARGEST_MARGIN, *(self._room(tensor, self.fraction_bits) for tensor in self.tensors)])

    @property
    def bounds(self) -> dict[str, np.ndarray]:
        """The bounds of the check, which are weights of the program."""
        return {
            bounds_name(part): np.float32(
                (self.margin if part in CHECKED else SCORES_MARGIN) * np.maximum(sums, np.quantile(sums, USUAL_SUM))
            )
            for part, sums in self.largest_sums.items()
        }

    @property
    def recommended_fraction_bits(self) -> int | None:
        """The settings' own where they will do; else as many as precision asks for, or the most that fit, or none."""
        wanted = max([self.fraction_bits, *(_precise_bits(tensor) for tensor in self.tensors)])
        if self.rounding_error > TOLERATED_ROUNDING and not self._has_garbage:
            wanted = max(wanted, self.fraction_bits + math.ceil(math.log2(self.rounding_error / TOLERATED_ROUNDING)))
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
        fitting = (n for n in range(balanced, RING_BITS) if lowest * SPARE**2 >= lowest_exponent(n, bits))
        return next(fitting, RING_BITS)

    @property
    def _has_garbage(self) -> bool:
        """Whether a tensor is beyond what is computed at all, so that errors say nothing about rounding."""
        return any(self._too_large(tensor) or self._too_low(tensor) for tensor in self.tensors)

    def _tensor_problems(self) -> list[str]:
        lines = ((tensor.name, self._problem(tensor)) for tensor in self.tensors)
        return [f"{name}: {line}" for name, line in lines if line is not None]

    def _room(self, tensor: TensorRange, bits: int) -> float:
        """The factor by which the stream may grow until a tensor does not fit."""
        if tensor.role not in GROWING or not tensor.size:
            return math.inf
        limit, size = _largest(tensor.role, bits), tensor.size
        if tensor.role == "exponent":
            limit, size = -lowest_exponent(self.exponential_squarings, bits), max(-tensor.least, 1.0)
        return math.sqrt(limit / size)

    def _fits(self, bits: int) -> bool:
        # A sum of attention weights has the same limit whatever the bits.
        tensors = [tensor for tensor in self.tensors if tensor.role not in ("exponent", "sum")]
        return all(
            tensor.size < _largest(tensor.role, bits) and self._room(tensor, bits) >= SPARE for tensor in tensors
        )

    def _too_large(self, tensor: TensorRange) -> bool:
        return not tensor.size < _largest(tensor.role, self.fraction_bits)

    def _too_low(self, tensor: TensorRange) -> bool:
        if tensor.role == "exponent":
            return not tensor.least >= lowest_exponent(self.exponential_squarings, self.fraction_bits)
        return tensor.role == "divisor" and not tensor.least >= COARSEST

    def _problem(self, tensor: TensorRange) -> str | None:
        if self._too_large(tensor):
            return _say_large_sum(tensor) if tensor.role == "sum" else self._say_too_large(tensor)
        if self._too_low(tensor):
            return self._say_low_exponent(tensor) if tensor.role == "exponent" else self._say_low_scores(tensor)
        if not self._room(tensor, self.fraction_bits) >= SPARE:
            return self._say_low_exponent(tensor) if tensor.role == "exponent" else self._say_little_room(tensor)
        return self._say_imprecise(tensor) if _precise_bits(tensor) > self.fraction_bits else None

    def _say_too_large(self, tensor: TensorRange) -> str:
        limit = _largest(tensor.role, self.fraction_bits)
        return (
            f"{tensor.size:.2g} ({tensor.role}) does not fit with {self.fraction_bits} fraction bits, where "
            f"{limit:.2g} is the limit; use {self._advice()}."
        )

    def _say_little_room(self, tensor: TensorRange) -> str:
        return (
            f"{tensor.size:.2g} ({tensor.role}) leaves too little room with {self.fraction_bits} fraction bits: other "
            f"prompts may make it {SPARE**2:g} times larger, and {_largest(tensor.role, self.fraction_bits):.2g} is "
            f"the limit; use {self._advice()}."
        )

    def _say_low_exponent(self, tensor: TensorRange) -> str:
        lowest = lowest_exponent(self.exponential_squarings, self.fraction_bits)
        return (
            f"exp({tensor.least:.4g}), or of {SPARE**2:g} times as much, is out of reach of "
            f"{self.exponential_squarings} squarings, which are right from {lowest:.4g} to 0; use "
            f"exponential_squarings={self.recommended_squarings}."
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

    def _advice_for_errors(self) -> str:
        """More bits help against rounding alone."""
        if 2 * self.rounding_error > self.typical_error and self.fraction_bits + 1 in filter(
            self._fits, FRACTION_BITS
        ):
            return f"use --fraction-bits {self.fraction_bits + 1} or more"
        return "use another model: its numbers are too large for the approximations"

    def _advice(self) -> str:
        bits = self.recommended_fraction_bits
        if bits not in (None, self.fraction_bits):
            return f"--fraction-bits {bits}"
        return "another model: no number of fraction bits leaves room for all of this one's"


def _say_large_sum(tensor: TensorRange) -> str:
    return (
        f"a sum of attention weights is {tensor.most:.4g}, and may be up to {MOST_SUM:,.0f}; use a model trained with "
        "a log_sum_coefficient, or a larger one."
    )


def lowest_exponent(squarings: int, fraction_bits: int) -> float:
    """
    The lowest x for which (1 + x / 2^n)^(2^n) is 0 to the last bit: it is even about -2^n, and 1 again at -2^(n + 1).
    """
    return -(2.0 ** (squarings + 1)) + fraction_bits * math.log(2)


def largest_radicand(fraction_bits: int) -> float:
    """The largest number whose 1 / sqrt(x) the engine does not compute as 0; it has bits by twos."""
    return 2.0 ** (fraction_bits - (3 if fraction_bits % 2 else 1))


def _largest(role: str, fraction_bits: int) -> float:
    """The limit of a tensor's magnitude."""
    if role == "sum":
        return MOST_SUM
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


def tolerated_error(typical_logit: float) -> float:
    """How far a private logit may be from the one in the clear, whose root of the mean square is given."""
    return TOLERATED_ERROR + TOLERATED_SHARE * typical_logit


def choose_sequences(
    config: EntropyGPTConfig, weights: dict[str, np.ndarray], text: Sequence[int] = (), seed: int = 0
) -> list[np.ndarray]:
    """
    What an audit looks at: every position with random tokens, every position with the tokens whose embeddings are
    largest and smallest, and some text.

    Args:
        config ([`EntropyGPTConfig`]), weights (`dict`): Those of [`prepare_weights`].
        text (`Sequence[int]`): Tokens, such as those of a user's own text; as many as fit `MOST_WINDOWS` sequences.
        seed (`int`): Seed of the choice of tokens and of their order.
    """
    random, length = np.random.default_rng(seed), config.n_positions
    by_size = np.argsort(np.linalg.norm(weights["wte"], axis=1))
    extremes = np.concatenate([by_size[: length // 2], by_size[-((length + 1) // 2) :]])
    windows = (np.asarray(text[start : start + length]) for start in range(0, MOST_WINDOWS * length, length))
    sequences = [random.integers(0, config.vocab_size, length), random.permutation(extremes), *windows]
    return [sequence for sequence in sequences if len(sequence)]


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
        tokens (`Iterable[np.ndarray]`): Ids of some sequences, such as [`choose_sequences`] chooses.
        seed (`int`): As in [`emulate`].

    Raises:
        `PrivateInferenceError`: If there is no sequence; or as [`build_steps`].
    """
    ops = _ObservedArithmetic(settings.fraction_bits)
    parts, shapes = checked_parts(config), weight_shapes(config)
    bounds = set(map(bounds_name, parts))
    for name, weight in weights.items():
        if name not in bounds:
            ops.observe(weight, "weight" if weight.ndim > 1 else "value", name)
    largest_sums = {part: np.zeros(shapes[bounds_name(part)]) for part in parts}
    errors = _Errors()
    for index, sequence in enumerate(tokens):
        variables = _run_observed(config, weights, settings, sequence, ops)
        for part, largest in largest_sums.items():
            np.maximum(largest, np.abs(variables[sums_name(part)]).max(axis=0), out=largest)
        errors.add(
            exact_logits(config, weights, settings, sequence, len(sequence)),
            variables[LOGITS],
            emulate(config, weights, settings, sequence, len(sequence), seed + index),
        )
    if not errors.positions:
        raise PrivateInferenceError("an audit needs a sequence of tokens or more: give some text.")
    return RangeReport(
        fraction_bits=settings.fraction_bits,
        exponential_squarings=settings.exponential_squarings,
        positions=errors.positions,
        typical_logit=math.sqrt(errors.exact_squares / errors.logits),
        largest_error=errors.largest,
        typical_error=math.sqrt(errors.squares / errors.logits),
        rounding_error=math.sqrt(errors.rounding_squares / errors.logits),
        agreement=errors.agreeing / errors.positions,
        tensors=list(ops.ranges()),
        largest_sums={part: largest.tolist() for part, largest in largest_sums.items()},
    )


def bound(
    config: EntropyGPTConfig, weights: dict[str, np.ndarray], settings: PrivateSettings, text: Sequence[int] = ()
) -> tuple[dict[str, np.ndarray], RangeReport]:
    """
    The weights with the bounds of the check, and the audit that found them; arguments as of [`choose_sequences`].

    Raises:
        `PrivateInferenceError`: If the model's numbers do not fit.
    """
    report = audit(config, weights, settings, choose_sequences(config, weights, text))
    if report.problems:
        raise PrivateInferenceError(f"the model does not fit the ring: {report.problems[0]}")
    return weights | report.bounds, report


class _Errors:
    """Statistics of the errors of logits, over sequences; not the logits, of which there may be many."""

    def __init__(self):
        self.positions = self.logits = self.agreeing = 0
        self.largest = self.squares = self.rounding_squares = self.exact_squares = 0.0

    def add(self, exact: np.ndarray, unrounded: np.ndarray, emulated: np.ndarray):
        """Logits `(positions, vocabulary)` of the model, of the program without rounding, and of the ring."""
        self.positions += len(exact)
        self.logits += exact.size
        self.agreeing += int((emulated.argmax(-1) == exact.argmax(-1)).sum())
        self.exact_squares += float(np.square(exact).sum())
        self.largest = float(np.maximum(self.largest, np.abs(emulated - exact).max()))
        self.squares += float(np.square(emulated - exact).sum())
        self.rounding_squares += float(np.square(emulated - unrounded).sum())


def _run_observed(config, weights, settings, tokens, ops: "_ObservedArithmetic") -> dict[str, np.ndarray]:
    """The program's variables without rounding."""
    variables = exact_variables(config, weights, settings, tokens)
    for step in build_steps(config, settings, Span(0, len(tokens), len(tokens))):
        ops.place = step.operation if step.layer is None else f"layer {step.layer}, {step.operation}"
        variables = run_steps([step], ops, variables)
        for name in step.outputs:
            if name != OUT_OF_RANGE:
                ops.observe(variables[name], "value")
    return variables


class _ObservedArithmetic(Float64Arithmetic):
    """float64, with a look at what the ring has to hold; `place` is the step that runs."""

    def __init__(self, fraction_bits: int):
        super().__init__(np)
        self.place = ""
        self.last_bit = 2.0**-fraction_bits
        self._tallies: dict[tuple[str, str], _Tally] = {}

    def observe(self, tensor, role: str, name: str | None = None):
        self._tallies.setdefault((name or self.place, role), _Tally()).add(tensor, self.last_bit)
        return tensor

    def ranges(self) -> Iterator[TensorRange]:
        for (name, role), tally in self._tallies.items():
            yield tally.range(name, role)

    def matmul(self, left, right):
        return self.observe(super().matmul(left, right), "product")

    def multiply(self, left, right):
        return self.observe(super().multiply(left, right), "product")

    def scale(self, tensor, constant):
        return self.observe(super().scale(tensor, constant), "product")

    def square(self, tensor):
        return self.observe(super().square(tensor), "product")

    def exp(self, tensor):
        return super().exp(self.observe(tensor, "exponent"))

    def ranged(self, tensor, most: float):
        return self.observe(tensor, "sum")

    def reciprocal(self, tensor):
        self.observe(tensor, "divisor")
        # As in the ring, 1 / 0 is 0.
        return np.divide(1.0, tensor, out=np.zeros_like(tensor), where=tensor != 0)

    def divide(self, tensor, divisor):
        return tensor * self.reciprocal(divisor)

    def reciprocal_root(self, tensor):
        return super().reciprocal_root(self.observe(tensor, "radicand"))


class _Tally:
    """Statistics of the numbers of a tensor, over sequences."""

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
