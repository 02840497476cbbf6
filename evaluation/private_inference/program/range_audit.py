"""
Whether a model's numbers fit the ring: a look at the range of every tensor.

The same run finds the bounds of the check that each private inference makes of itself.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from entropy_gpt.evaluation.errors import PrivateInferenceError
from modeling_entropy_gpt import EntropyGPTConfig

from .fixed_point import Float64Arithmetic, emulate_variables, exact_logits, exact_variables
from .program import LOGITS, OUT_OF_RANGE, STREAM, bounds_name, build_steps, checked_parts, sums_name, weight_shapes
from .range_report import Peak, RangeReport, TensorRange
from .settings import PrivateSettings
from .steps import Span, Step, run_steps


# Sequences of a text that an audit looks at.
MOST_WINDOWS = 4


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
    Runs the program in float64 and looks at every number that the ring has to hold, with prepared products too where
    these have other forms; then emulates the ring, to say what it does to the logits of all positions in one phase.

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
        unrounded, *others = (
            _run_observed(config, weights, settings, sequence, ops, prepared)
            for prepared in _list_phases(config, settings, len(sequence))
        )
        emulated = emulate_variables(config, weights, settings, sequence, len(sequence), seed + index)
        # Checksums are off by what is rounded, and by nothing else.
        for part, largest in largest_sums.items():
            for variables in (unrounded, *others, emulated):
                np.maximum(largest, np.abs(variables[sums_name(part)]).max(axis=0), out=largest)
        exact = exact_logits(config, weights, settings, sequence, len(sequence))
        errors.add(exact, unrounded[LOGITS], emulated[LOGITS])
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
        peak=ops.peak,
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


def _list_phases(config, settings, length: int) -> list[bool]:
    """Whether products are prepared: both, where some step has another form then."""
    plain, prepared = (
        [_describe_form(step) for step in build_steps(config, settings, Span(0, length, length), is_prepared)]
        for is_prepared in (False, True)
    )
    return [False] if plain == prepared else [False, True]


def _describe_form(step: Step) -> tuple:
    """What decides on a step's numbers. Whether queries are a product of their own does not."""
    options = dict(getattr(step.function, "keywords", {}))
    options.pop("is_apart", None)
    return step.operation, step.layer, getattr(step.function, "func", step.function), options


def _run_observed(config, weights, settings, tokens, ops: "_ObservedArithmetic", prepared) -> dict[str, np.ndarray]:
    """The program's variables without rounding."""
    variables = exact_variables(config, weights, settings, tokens, len(tokens))
    for step in build_steps(config, settings, Span(0, len(tokens), len(tokens)), prepared):
        ops.place = step.operation if step.layer is None else f"layer {step.layer}, {step.operation}"
        variables = run_steps([step], ops, variables)
        for name in step.outputs:
            if name != OUT_OF_RANGE:
                ops.observe(variables[name], "value")
            if name == STREAM:
                ops.observe_stream(variables[name][:, :-1], tokens)
    return variables


class _ObservedArithmetic(Float64Arithmetic):
    """float64, with a look at what the ring has to hold; `place` is the step that runs."""

    def __init__(self, fraction_bits: int):
        super().__init__(np)
        self.place = ""
        self.last_bit = 2.0**-fraction_bits
        self.peak = Peak(0.0, 0, 0, 0)
        self._tallies: dict[tuple[str, str], _Tally] = {}

    def observe(self, tensor, role: str, name: str | None = None):
        self._tallies.setdefault((name or self.place, role), _Tally()).add(tensor, self.last_bit)
        return tensor

    def observe_stream(self, stream: np.ndarray, tokens: np.ndarray):
        """The residual stream `(positions, width)` of some tokens after a step."""
        sizes = np.nan_to_num(np.abs(stream), nan=math.inf)
        position, column = np.unravel_index(sizes.argmax(), sizes.shape)
        if sizes[position, column] > self.peak.size:
            self.peak = Peak(float(sizes[position, column]), int(position), int(tokens[position]), int(column))

    def ranges(self) -> Iterator[TensorRange]:
        for (name, role), tally in self._tallies.items():
            yield tally.range(name, role)

    def matmul(self, left, right):
        return self.observe(super().matmul(left, right), "product")

    def multiply(self, left, right):
        return self.observe(super().multiply(left, right), "product")

    def scale(self, tensor, constant):
        return self.observe(super().scale(tensor, constant), "product")

    def combine(self, tensor, factors):
        return self.observe(super().combine(tensor, factors), "product")

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
