"""How many corrupted inferences the check inside the protocol lets pass, and how many honest ones it stops."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from pydantic.dataclasses import dataclass

from entropy_gpt.conversion.folding import absorb_linear_ffns, fold
from entropy_gpt.evaluation.json_records import RECORD
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .program.arithmetic import Arithmetic
from .program.fixed_point import FixedPointArithmetic
from .program.program import (
    CHECKED,
    LOGITS,
    Span,
    Step,
    bounds_name,
    build_steps,
    find_out_of_range,
    run_steps,
    sum_alternating,
    sum_neighbours,
    sums_name,
)
from .program.settings import RING_BITS, PrivateSettings
from .program.variables import client_input, input_shape


# Errors of single numbers: from the smallest to the largest that an engine was seen to make by itself.
SMALLEST_ERROR, LARGEST_ERROR = 64, 14603
LARGE_ERROR = 2.0**28
# Honest runs at once.
BATCH = 64


@dataclass(config=RECORD)
class Detection:
    """
    What became of runs whose residual stream was corrupted after a block.

    Args:
        notation (`str`): The architecture.
        corruption (`str`): One of `CORRUPTIONS`.
        block (`int`): After which the stream was corrupted.
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
        runs (`int`): Honest runs.
        stopped (`int`): Those that the check stopped.
        nearest (`float`): The largest sum in any of them, as a share of its bound.
    """

    notation: str
    runs: int
    stopped: int
    nearest: float


def corrupt_all(ops: FixedPointArithmetic, hidden: np.ndarray, random: np.random.Generator):
    hidden[:] = _uniform(ops, random, hidden.shape)


def corrupt_one(ops: FixedPointArithmetic, hidden: np.ndarray, random: np.random.Generator):
    hidden[_choose(random, hidden)] = _uniform(ops, random, ())


def shift_column(ops: FixedPointArithmetic, hidden: np.ndarray, random: np.random.Generator):
    hidden[:, random.integers(hidden.shape[1])] += LARGE_ERROR


def shift_column_in_last_bits(ops: FixedPointArithmetic, hidden: np.ndarray, random: np.random.Generator):
    hidden[:, random.integers(hidden.shape[1])] += LARGE_ERROR / 2.0**ops.settings.fraction_bits


def shift_one(ops: FixedPointArithmetic, hidden: np.ndarray, random: np.random.Generator):
    """By an error of any order of magnitude, up or down."""
    size = np.exp(random.uniform(np.log(SMALLEST_ERROR), np.log(LARGEST_ERROR)))
    hidden[_choose(random, hidden)] += ops.encode(random.choice([-1, 1]) * size)


# What is done to the numbers `(length, width)` after a block.
CORRUPTIONS: dict[str, Callable] = {
    "all numbers uniform": corrupt_all,
    "one number uniform": corrupt_one,
    "one column off by 2^28": shift_column,
    "one column off by 2^28 last bits": shift_column_in_last_bits,
    f"one number off by {SMALLEST_ERROR} to {LARGEST_ERROR:,}": shift_one,
}


def _uniform(ops: FixedPointArithmetic, random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Any numbers of the ring."""
    half = 2 ** (RING_BITS - 1)
    return random.integers(-half, half, shape).astype(np.float64) / 2.0**ops.settings.fraction_bits


def _choose(random: np.random.Generator, hidden: np.ndarray) -> tuple[int, int]:
    return tuple(random.integers(size) for size in hidden.shape)


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
    Corrupts runs in the emulated ring, by each of `CORRUPTIONS` after each block.

    Args:
        notation (`str`): The architecture.
        config ([`EntropyGPTConfig`]), weights (`dict`): Those of [`prepare_weights`], with the audit's bounds.
        prompts (`Sequence[np.ndarray]`): Tokens, taken in turns, as many in each.
        runs (`int`): Runs of each corruption after each block.
        tolerated (`float`): An error of a logit that nobody would notice.
        settings ([`PrivateSettings`], *optional*): The defaults without.
        seed (`int`): Seed of what is corrupted, and of the ring's truncations.
    """
    settings, random = settings or PrivateSettings(), np.random.default_rng(seed)
    ops, steps = FixedPointArithmetic(settings, seed), build_steps(config, settings, Span(0, len(prompts[0])))
    variables = [_begin(ops, config, settings, weights, prompt) for prompt in prompts]
    honest = [run_steps(steps, ops, begun)[LOGITS] for begun in variables]
    done = 0
    for block in range(config.n_layer):
        begin, done = done, 1 + max(index for index, step in enumerate(steps) if step.layer == block)
        variables = [run_steps(steps[begin:done], ops, begun) for begun in variables]
        for name, corrupt in CORRUPTIONS.items():
            detection = Detection(notation, name, block, runs, 0, 0, 0)
            for run in range(runs):
                turn = run % len(prompts)
                hidden = variables[turn]["hidden"].copy()
                corrupt(ops, hidden, random)
                logits = _finish(steps[done:], ops, variables[turn] | {"hidden": hidden})
                if logits is not None:
                    detection.returned += 1
                    detection.other_logits += bool(np.abs(logits - honest[turn]).max() > tolerated)
                    detection.other_token += bool((logits.argmax(-1) != honest[turn].argmax(-1)).any())
            yield detection


@torch.no_grad()
def measure_false_alarms(
    model: EntropyGPTForCausalLM, bounds: dict[str, np.ndarray], prompts: np.ndarray
) -> FalseAlarms:
    """
    Looks at the sums of honest runs, computed by torch and many at once: rounding moves none of them by as much as a
    hundredth of its bound.

    Args:
        model ([`EntropyGPTForCausalLM`]): A trained model.
        bounds (`dict`): The audit's.
        prompts (`np.ndarray`): Tokens `(runs, length)`.
    """
    folded = fold(copy.deepcopy(model).double()).eval()
    absorb_linear_ffns(folded)
    folded.float()
    last, stream = folded.transformer.h[-1], {}
    last.register_forward_pre_hook(lambda block, inputs: stream.update(before=inputs[0]))
    last.register_forward_hook(lambda block, inputs, output: stream.update(after=output))
    stopped, nearest = 0, 0.0
    for batch in np.array_split(prompts, math.ceil(len(prompts) / BATCH)):
        logits = folded(torch.from_numpy(batch), use_cache=False).logits[:, -1]
        looked_at = {"before": stream["before"], "after": stream["after"][:, -1], LOGITS: logits}
        shares = np.max([_shares(part, tensor, bounds) for part, tensor in looked_at.items()], axis=0)
        stopped += int((shares > 1).sum())
        nearest = max(nearest, float(shares.max()))
    return FalseAlarms(model.config.notation, len(prompts), stopped, nearest)


def _shares(part: str, tensor: torch.Tensor, bounds: dict[str, np.ndarray]) -> np.ndarray:
    """For each run, its largest sum of a part as a share of the bound."""
    rows = tensor.reshape(-1, tensor.shape[-1]).numpy()
    sums = (sum_alternating if part == LOGITS else sum_neighbours)(Arithmetic(np), rows, CHECKED[part])
    return (np.abs(sums) / bounds[bounds_name(part)]).reshape(len(tensor), -1).max(axis=1)


def _begin(ops: FixedPointArithmetic, config, settings: PrivateSettings, weights: dict, prompt: np.ndarray) -> dict:
    """Encoded weights and prompt."""
    span = Span(0, len(prompt))
    name, _ = input_shape(config, settings, span)
    inputs = weights | {name: client_input(config, settings, span, prompt, weights)}
    return {name: ops.encode(value) for name, value in inputs.items()}


def _finish(steps: list[Step], ops: FixedPointArithmetic, variables: dict) -> np.ndarray | None:
    """The logits of the rest of a run, or nothing as soon as it is certain that the check will stop it."""
    parts = {sums_name(part): bounds_name(part) for part in CHECKED}
    for step in steps:
        variables = run_steps([step], ops, variables)
        for name in step.outputs:
            if name in parts and find_out_of_range(ops, variables[name], variables[parts[name]]):
                return None
    return variables[LOGITS]
