"""The products that a pass of a program demands: what can be prepared for them, and what serves shorter passes."""

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from .arithmetic import Arithmetic
from .counting import CountingArithmetic, Stock, make_shape
from .program import ProgramConfig, build_steps
from .settings import SERVER, PrivateSettings
from .steps import Span, Step
from .variables import program_variables
from .visible import visible_keys


# Kinds: what comes later by a matrix of the server's, by kept keys or values, by other numbers, and by itself.
WEIGHTS, SCORES, VALUES, NUMBERS, SQUARES = "weights", "scores", "values", "numbers", "squares"
KEPT = (SCORES, VALUES)
# Who draws a part of a mask.
BOTH = ("server", "client")
# The number of a pass; then a step's layer, its operation, its function, and which of such steps it is.
Place = tuple[int, int | None, str, str, int]


@dataclass(frozen=True)
class Demand:
    """
    A product that a step needs.

    Args:
        kind (`str`): "weights", "scores", "values", "numbers" or "squares".
        left (`tuple[int]`): Shape of the factor that comes later.
        right (`tuple[int]`, *optional*): Shape of the other one, if there is one.
        is_causal (`bool`): Whether the first one has a row for each query, with zeros for keys that it does not see.
    """

    kind: str
    left: tuple[int, ...]
    right: tuple[int, ...] | None = None
    is_causal: bool = False

    @property
    def masks(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the masks that it has for itself. Those of kept keys and values last as long as these."""
        return (self.left, self.right) if self.kind == NUMBERS else (self.left,)

    @property
    def parts(self) -> tuple[str, ...]:
        """Who draws a part of each mask."""
        return ("client",) if self.kind == WEIGHTS else BOTH

    @property
    def tensors(self) -> int:
        """How many the second phase takes: the parts of masks of what is revealed, and the product."""
        return 1 if self.kind == WEIGHTS else len(self.parts) * len(self.masks) + 1

    @property
    def product(self) -> tuple[int, ...]:
        """Shape of the product."""
        if self.kind == SCORES:
            return (*self.left[:-1], self.right[-2])
        if self.kind in (WEIGHTS, VALUES):
            return (*self.left[:-1], self.right[-1])
        return np.broadcast_shapes(self.left, self.right or self.left)

    def covers(self, other: "Demand") -> bool:
        """Whether what is prepared for this one serves the other one."""
        if replace(self, left=other.left, right=other.right) != other:
            return False
        if self.kind == WEIGHTS and self.right != other.right:
            return False
        return _has(self.left, other.left) and _has(self.right or (), other.right or ())

    @property
    def visible(self) -> np.ndarray:
        """Which keys `(queries, keys)` are weighed by numbers that may be other than 0; public."""
        queries, keys = self.left[-2:]
        return visible_keys(queries, keys) if self.is_causal else np.ones((queries, keys), bool)


def _has(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(most >= size for most, size in zip(shape, wanted, strict=True))


@dataclass(frozen=True)
class KeptTokens:
    """
    Whose keys and values a pass has, among those for which masks are prepared.

    Args:
        prompt (`int`): Tokens of the prompt.
        prepared (`int`): The most that were prepared for.
        further (`int`): Tokens after it.
    """

    prompt: int
    prepared: int
    further: int

    @property
    def places(self) -> np.ndarray:
        """Of each token among all that are prepared for."""
        return np.concatenate([np.arange(self.prompt), self.prepared + np.arange(self.further)])

    def choose(self, ops: Arithmetic, tensor):
        """What belongs to these tokens, of a tensor that has a column for each that is prepared for."""
        begin = tensor[..., : self.prompt]
        if not self.further:
            return begin
        return ops.xp.concatenate([begin, tensor[..., self.prepared : self.prepared + self.further]], axis=-1)

    def choose_rows(self, prepared: Demand, demand: Demand) -> slice:
        """The rows of prepared weights that see all keys that those of a demand do."""
        seen, visible = prepared.visible[:, self.places], demand.visible
        count = len(visible)
        first = next(row for row in range(len(seen)) if (seen[row : row + count] >= visible).all())
        return slice(first, first + count)


@dataclass(frozen=True)
class DemandingStep:
    """A step with what it demands, in order, and the shapes of its inputs."""

    step: Step
    demands: tuple[Demand, ...]
    inputs: tuple[tuple[int, ...], ...]

    @property
    def kept(self) -> str | None:
        """The variable of kept keys or values among the factors, if there is one."""
        of_kept = any(demand.kind in KEPT for demand in self.demands)
        return self.step.inputs[1] if of_kept else None


def list_demands(
    config: ProgramConfig, settings: PrivateSettings, number: int, span: Span
) -> Iterator[tuple[Place, DemandingStep]]:
    """
    The steps of a pass with their demands, by running it on shapes.

    Args:
        config ([`ProgramConfig`]), settings ([`PrivateSettings`]): As of [`build_steps`].
        number (`int`): Which pass it is.
        span ([`Span`]): Its tokens.

    Raises:
        `PrivateInferenceError`: As [`build_steps`].
    """
    variables, seen = program_variables(config, settings, span), defaultdict(int)
    for step in build_steps(config, settings, span, prepared=True):
        recorder = _Recorder(settings)
        inputs = tuple(variables[name] for name in step.inputs)
        results = step.function(recorder, *inputs)
        variables.update(zip(step.outputs, results if isinstance(results, tuple) else (results,), strict=True))
        name = Bound.of(step.function).function.__name__
        index = seen[step.layer, step.operation, name]
        seen[step.layer, step.operation, name] += 1
        entry = DemandingStep(step, tuple(recorder.demands), tuple(value.shape for value in inputs))
        yield (number, step.layer, step.operation, name, index), entry


@dataclass(frozen=True)
class Bound:
    """A step's function, equal to those that compute the same: partials are not by themselves."""

    function: Callable
    arguments: tuple[tuple[str, object], ...]

    @classmethod
    def of(cls, function: Callable) -> "Bound":
        if isinstance(function, partial):
            return cls(function.func, tuple(sorted(function.keywords.items())))
        return cls(function, ())

    def __call__(self, *tensors):
        return self.function(*tensors, **dict(self.arguments))


class Intercepting:
    """An arithmetic whose products of two factors, and squares, go another way; all else is left to another one."""

    def __init__(self, ops: Arithmetic):
        self._ops = ops

    def __getattr__(self, name: str):
        return getattr(self._ops, name)

    def take(self, kind: str, left, right=None, is_causal: bool = False):
        """The product."""
        raise NotImplementedError

    def append_checksum(self, tensor):
        return self._ops.append_checksum(tensor)

    def matmul(self, left, right):
        return self.take(WEIGHTS, left, right)

    def score(self, query, key):
        return self.take(SCORES, query, key)

    def weigh(self, weights, value, is_causal: bool = False):
        return self.take(VALUES, weights, value, is_causal)

    def multiply(self, left, right):
        return self.take(NUMBERS, left, right)

    def square(self, tensor):
        return self.take(SQUARES, tensor)

    def scale_all(self, tensor, factor):
        return self.matmul(tensor.reshape(-1, 1), factor.reshape(1, 1)).reshape(tensor.shape)


class _Recorder(Intercepting):
    """Notes what a step demands; runs on shapes."""

    def __init__(self, settings: PrivateSettings):
        super().__init__(CountingArithmetic(settings, Stock()))
        self.demands: list[Demand] = []

    def take(self, kind: str, left, right=None, is_causal: bool = False):
        if kind == WEIGHTS and getattr(right, "owner", None) != SERVER:
            raise TypeError("a product with a matrix that is neither the server's nor of kept keys or values")
        # Numbers of the server's may be others at each length, such as temperatures: they are masked as others are.
        self.demands.append(Demand(kind, left.shape, None if right is None else right.shape, is_causal))
        return make_shape(self.demands[-1].product)


def join_masks(ops: Arithmetic, demand: Demand, tensors: Iterator) -> list:
    """The masks of a demand out of their parts, which come next."""
    masks = [join_parts(tensors, demand.parts) for _ in demand.masks]
    if demand.is_causal:
        masks[0] = ops.xp.where(demand.visible, masks[0], 0)
    return masks


def join_parts(tensors: Iterator, parts: tuple[str, ...] = BOTH):
    """The sum of the next tensors, one of each party that has a part."""
    return functools.reduce(operator.add, (next(tensors) for _ in parts))


def fill(ops: Arithmetic, tensor, axis: int, size: int):
    """With zeros behind, so that the axis has a size."""
    missing = list(tensor.shape)
    missing[axis] = size - missing[axis]
    return ops.xp.concatenate([tensor, np.zeros(missing, tensor.dtype)], axis=axis) if missing[axis] else tensor


def cut(tensor, shape: tuple[int, ...]):
    """The first numbers of each axis."""
    return tensor[tuple(slice(size) for size in shape)]


def flatten(ops: Arithmetic, tensors):
    """All numbers in one row."""
    return ops.xp.concatenate([tensor.reshape(-1) for tensor in tensors])


def split(flat, shapes: list[tuple[int, ...]]) -> list:
    """What [`flatten`] has joined."""
    parts, begin = [], 0
    for shape in shapes:
        size = math.prod(shape)
        parts.append(flat[begin : begin + size].reshape(shape))
        begin += size
    return parts
