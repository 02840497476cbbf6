"""What an audit has found of a model's numbers: which do not fit the ring, and which settings would do."""

import math
from typing import Literal

import numpy as np
from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD

from .attention_functions import MOST_SUM
from .fixed_point import SAFE_BITS
from .program import bounds_name, is_scores
from .settings import RING_BITS


# What may be recommended: fewer leave no precision, more no room before the point.
FRACTION_BITS = range(12, 23)
# The last bit of a tensor may be such a part of its typical value.
COARSEST = 2**-6
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
class Peak:
    """The largest magnitude of the residual stream: at which position, at which token there, in which column."""

    size: float
    position: int
    token: int
    column: int


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
        peak ([`Peak`]): Of the residual stream. Trained models with LayerNorm often have one at position 0.
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
    peak: Peak

    @property
    def problems(self) -> list[str]:
        """A line for every tensor that does not fit: its name, what is wrong, and what to do."""
        found = self._tensor_problems()
        if not found and not self.rounding_error <= TOLERATED_ROUNDING:
            found = [f"logits: rounding makes errors of {self.rounding_error:.2g}; {self._advice()}."]
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
                (SCORES_MARGIN if is_scores(part) else self.margin) * np.maximum(sums, np.quantile(sums, USUAL_SUM))
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
            f"{limit:.2g} is the limit{self._cause(tensor)}; {self._advice(tensor)}."
        )

    def _say_little_room(self, tensor: TensorRange) -> str:
        return (
            f"{tensor.size:.2g} ({tensor.role}) leaves too little room with {self.fraction_bits} fraction bits: other "
            f"prompts may make it {SPARE**2:g} times larger, and {_largest(tensor.role, self.fraction_bits):.2g} is "
            f"the limit{self._cause(tensor)}; {self._advice(tensor)}."
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
            f"{2.0**-self.fraction_bits:.2g}, and {tensor.lost:.0%} vanish; {self._advice(tensor)}."
        )

    def _advice_for_errors(self) -> str:
        """More bits help against rounding alone."""
        if 2 * self.rounding_error > self.typical_error and self.fraction_bits + 1 in filter(
            self._fits, FRACTION_BITS
        ):
            return f"use --fraction-bits {self.fraction_bits + 1} or more"
        return "use another model: its numbers are too large for the approximations"

    def _cause(self, tensor: TensorRange) -> str:
        """A LayerNorm squares the stream, of which one number may be far larger than all others."""
        if not _is_norm(tensor):
            return ""
        peak = self.peak
        place = f"position {peak.position}, token {peak.token}, column {peak.column}"
        return f" (the stream reaches {peak.size:,.0f} at {place})"

    def _advice(self, tensor: TensorRange | None = None) -> str:
        bits = self.recommended_fraction_bits
        if bits not in (None, self.fraction_bits):
            return f"use --fraction-bits {bits}"
        if tensor is not None and _is_norm(tensor) and tensor.name != "norm":
            return (
                "no number of fraction bits leaves room for its square: convert the model to one without LayerNorm "
                "(entropy-gpt convert)"
            )
        return "use another model: no number of fraction bits leaves room for all of this one's"


def _is_norm(tensor: TensorRange) -> bool:
    return tensor.name.endswith("norm")


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
