"""How many corrupted inferences the check inside the protocol lets pass, and how many honest ones it stops."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from functools import partial

import numpy as np
from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD
from modeling_entropy_gpt import EntropyGPTConfig

from .program.fixed_point import FixedPointArithmetic
from .program.program import (
    LOGITS,
    OUT_OF_RANGE,
    STREAM,
    bounds_name,
    build_steps,
    checked_parts,
    find_out_of_range,
    sums_name,
)
from .program.settings import RING_BITS, PrivateSettings
from .program.steps import Span, Step, run_steps
from .program.variables import client_inputs


# Errors of single numbers: from the smallest to the largest that an engine was seen to make by itself.
SMALLEST_ERROR, LARGEST_ERROR = 64, 14603
LARGE_ERROR = 2.0**28
# Errors of single numbers by powers of 2 of last bits.
SHIFTED_BITS = range(4, 41)
# There are more subtle corruptions: each has one run for this many of a gross one.
SUBTLE_SHARE = 10


@dataclass(config=RECORD)
class Detection:
    """
    What became of runs that were corrupted in a block.

    Args:
        notation (`str`): The architecture.
        corruption (`str`): One of `CORRUPTIONS`.
        block (`int`): Where.
        runs (`int`): Corrupted runs.
        returned (`int`): Those that the check let pass.
        other_logits (`int`): Runs among these with a logit further off than is tolerated.
        other_token (`int`): Runs among these with another most likely token.
    """

    notation: str
    corruption: str
    block: int
    runs: int
    returned: int
    other_logits: int
    other_token: int


@dataclass(config=RECORD)
class FalseAlarms:
    """
    Honest runs.

    Args:
        notation (`str`): The architecture.
        length (`int`): Tokens of each.
        runs (`int`): Honest runs.
        stopped (`int`): Those that the check stopped.
        nearest (`float`): The largest sum in any of them, as a share of its bound.
    """

    notation: str
    length: int
    runs: int
    stopped: int
    nearest: float


def make_all_uniform(ops: FixedPointArithmetic, tensor: np.ndarray, random: np.random.Generator):
    tensor[:] = _uniform(ops, random, tensor.shape)


def make_one_uniform(ops: FixedPointArithmetic, tensor: np.ndarray, random: np.random.Generator):
    tensor[_choose(random, tensor)] = _uniform(ops, random, ())


def shift_column(ops: FixedPointArithmetic, tensor: np.ndarray, random: np.random.Generator):
    tensor[..., random.integers(tensor.shape[-1])] += LARGE_ERROR


def shift_column_in_last_bits(ops: FixedPointArithmetic, tensor: np.ndarray, random: np.random.Generator):
    tensor[..., random.integers(tensor.shape[-1])] += LARGE_ERROR / 2.0**ops.settings.fraction_bits


def shift_one(ops: FixedPointArithmetic, tensor: np.ndarray, random: np.random.Generator):
    """By an error of any order of magnitude, up or down."""
    size = np.exp(random.uniform(np.log(SMALLEST_ERROR), np.log(LARGEST_ERROR)))
    tensor[_choose(random, tensor)] += ops.encode(random.choice([-1, 1]) * size)


def shift_one_by(ops: FixedPointArithmetic, tensor: np.ndarray, random: np.random.Generator, bit: int):
    """By one power of 2 of last bits, up or down."""
    tensor[_choose(random, tensor)] += random.choice([-1, 1]) * 2.0 ** (bit - ops.settings.fraction_bits)


def scale_row(ops: FixedPointArithmetic, tensor: np.ndarray, random: np.random.Generator, factor: float):
    row = _choose(random, tensor)[:-1]
    tensor[row] = ops.scale(tensor[row], factor)


def flip_row(ops: FixedPointArithmetic, tensor: np.ndarray, random: np.random.Generator):
    tensor[_choose(random, tensor)[:-1]] *= -1


def flip_one(ops: FixedPointArithmetic, tensor: np.ndarray, random: np.random.Generator):
    tensor[_choose(random, tensor)] *= -1


def exchange_two(ops: FixedPointArithmetic, tensor: np.ndarray, random: np.random.Generator):
    one, other = _choose(random, tensor), _choose(random, tensor)
    tensor[one], tensor[other] = tensor[other], tensor[one]


@plain_dataclass(frozen=True)
class Corruption:
    """
    What is done to a tensor of a block.

    Args:
        variable (`str`): "hidden", the stream after the block with its checksums `(length, width + 1)`; "keys" or
            "values" of its heads; or "visible", its scores.
        function (`Callable`): Changes the tensor in place.
        is_gross (`bool`): Whether all of it has to be found: what leaves a plausible answer can't be.
    """

    variable: str
    function: Callable
    is_gross: bool


# In which a block computes what can be corrupted.
ORDER = ("keys", "values", "visible", STREAM)
ERROR = f"off by {SMALLEST_ERROR} to {LARGEST_ERROR:,}"
SHIFT = "one number off by 2^{bit} last bits"
CORRUPTIONS: dict[str, Corruption] = {
    "all numbers uniform": Corruption(STREAM, make_all_uniform, True),
    "one number uniform": Corruption(STREAM, make_one_uniform, True),
    "one column off by 2^28": Corruption(STREAM, shift_column, True),
    "one column off by 2^28 last bits": Corruption(STREAM, shift_column_in_last_bits, True),
    f"one number {ERROR}": Corruption(STREAM, shift_one, True),
    "one row times 2^10": Corruption(STREAM, partial(scale_row, factor=2.0**10), True),
    "all values uniform": Corruption("values", make_all_uniform, True),
    "all keys uniform": Corruption("keys", make_all_uniform, True),
    "all scores uniform": Corruption("visible", make_all_uniform, True),
    f"one value {ERROR}": Corruption("values", shift_one, False),
    f"one key {ERROR}": Corruption("keys", shift_one, False),
    f"one score {ERROR}": Corruption("visible", shift_one, False),
    "one row times 2": Corruption(STREAM, partial(scale_row, factor=2.0), False),
    "signs of one row flipped": Corruption(STREAM, flip_row, False),
    "sign of one number flipped": Corruption(STREAM, flip_one, False),
    "two numbers exchanged": Corruption(STREAM, exchange_two, False),
    **{SHIFT.format(bit=bit): Corruption(STREAM, partial(shift_one_by, bit=bit), False) for bit in SHIFTED_BITS},
}


def _uniform(ops: FixedPointArithmetic, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Any numbers of the ring."""
    half = 2 ** (RING_BITS - 1)
    return random.integers(-half, half, shape).astype(np.float64) / 2.0**ops.settings.fraction_bits


def _choose(random: np.random.Generator, tensor: np.ndarray) -> tuple[int, ...]:
    return tuple(random.integers(size) for size in tensor.shape)


def measure_detection(
    notation: str,
    config: EntropyGPTConfig,
    weights: dict[str, np.ndarray],
    prompts: Sequence[np.ndarray],
    runs: int,
    tolerated: float,
    settings: PrivateSettings | None = None,
    seed: int = 0,
) -> Iterator[Detection]:
    """
    Corrupts runs in the emulated ring, by each of `CORRUPTIONS` in each block.

    Args:
        notation (`str`): The architecture.
        config ([`EntropyGPTConfig`]), weights (`dict`): Those of [`prepare_weights`], with the audit's bounds.
        prompts (`Sequence[np.ndarray]`): Tokens, taken in turns, as many in each.
        runs (`int`): Runs of each corruption in each block.
        tolerated (`float`): An error of a logit that nobody would notice.
        settings ([`PrivateSettings`], *optional*): The defaults without.
        seed (`int`): Seed of what is corrupted, and of the ring's truncations.
    """
    settings, random = settings or PrivateSettings(), np.random.default_rng(seed)
    ops, steps = FixedPointArithmetic(settings, seed), build_steps(config, settings, Span(0, len(prompts[0])))
    encoded = _encode(ops, weights)
    variables = [encoded | _encode(ops, _inputs(config, settings, weights, prompt)) for prompt in prompts]
    honest = [run_steps(steps, ops, begun)[LOGITS] for begun in variables]
    done = 0
    for block in range(config.n_layer):
        for name, corruption in sorted(CORRUPTIONS.items(), key=lambda item: ORDER.index(item[1].variable)):
            variable, end = _find(corruption.variable, steps, block)
            if end > done:
                variables = [run_steps(steps[done:end], ops, begun) for begun in variables]
                done = end
            chosen = runs if corruption.is_gross else max(1, runs // SUBTLE_SHARE)
            detection = Detection(notation, name, block, chosen, 0, 0, 0)
            for run in range(chosen):
                turn = run % len(prompts)
                tensor = variables[turn][variable].copy()
                corruption.function(ops, tensor, random)
                logits = _finish(steps[done:], ops, variables[turn] | {variable: tensor})
                if logits is not None:
                    detection.returned += 1
                    detection.other_logits += bool(np.abs(logits - honest[turn]).max() > tolerated)
                    detection.other_token += bool((logits.argmax(-1) != honest[turn].argmax(-1)).any())
            yield detection


def _find(part: str, steps: list[Step], block: int) -> tuple[str, int]:
    """A variable of a block, and the number of steps after which it is to be corrupted: the stream after all."""
    variable = f"h.{block}.{part}" if part in ("keys", "values") else part
    done = [1 + index for index, step in enumerate(steps) if step.layer == block and variable in step.outputs]
    return variable, done[-1] if part == STREAM else done[0]


def measure_false_alarms(
    notation: str,
    config: EntropyGPTConfig,
    weights: dict[str, np.ndarray],
    prompts: np.ndarray,
    settings: PrivateSettings | None = None,
    seed: int = 0,
) -> FalseAlarms:
    """
    Runs without an error in the emulated ring.

    Args:
        notation, config, weights, settings: As of [`measure_detection`].
        prompts (`np.ndarray`): Tokens `(runs, length)`.
        seed (`int`): Seed of the ring's truncations.
    """
    settings = settings or PrivateSettings()
    ops, steps = FixedPointArithmetic(settings, seed), build_steps(config, settings, Span(0, prompts.shape[1]))
    encoded, stopped, nearest = _encode(ops, weights), 0, 0.0
    for prompt in prompts:
        variables = run_steps(steps, ops, encoded | _encode(ops, _inputs(config, settings, weights, prompt)))
        stopped += bool(variables[OUT_OF_RANGE])
        shares = (np.abs(variables[sums_name(part)]) / weights[bounds_name(part)] for part in checked_parts(config))
        nearest = max(nearest, *(float(share.max()) for share in shares))
    return FalseAlarms(notation, prompts.shape[1], len(prompts), stopped, nearest)


def _encode(ops: FixedPointArithmetic, variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: ops.encode(value) for name, value in variables.items()}


def _inputs(config, settings: PrivateSettings, weights: dict, prompt: np.ndarray) -> dict[str, np.ndarray]:
    return client_inputs(config, settings, Span(0, len(prompt)), prompt, weights)


def _finish(steps: list[Step], ops: FixedPointArithmetic, variables: dict) -> np.ndarray | None:
    """The logits of the rest of a run, or nothing as soon as it is certain that the check will stop it."""
    *_, last = steps
    attention_sums = last.inputs[len(last.inputs) - last.function.keywords["attention_sums"] :]
    paired = last.inputs[: len(last.inputs) - len(attention_sums)]
    bounds = dict(zip(paired[::2], paired[1::2], strict=True))
    for step in steps:
        variables = run_steps([step], ops, variables)
        for name in bounds.keys() & set(step.outputs):
            if find_out_of_range(ops, variables[name], variables[bounds[name]]):
                return None
        for name in set(attention_sums) & set(step.outputs):
            if find_out_of_range(ops, variables[name], attention_sums=1):
                return None
    return variables[LOGITS]
