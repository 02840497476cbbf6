"""
Bytes and round trips of a private inference from the configuration alone: no weights, no engine, no second party.

`counting.py` runs the program on shapes and counts its parts as the engine would need them; what each of them sends
was measured (`program/prices.json`; `price_fitting.py` measures anew).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

from pydantic.dataclasses import dataclass

from entropy_gpt.conversion.folding import fold, list_absorbable_ffns
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.json_records import RECORD
from entropy_gpt.evaluation.private_inference.program.counting import (
    CountingArithmetic,
    Shape,
    StepCounts,
    Stock,
    count_step,
    make_shape,
)
from entropy_gpt.evaluation.private_inference.program.prices import Prices, load_prices, price_of, seconds_of
from entropy_gpt.evaluation.private_inference.program.program import FASTEST, Forms, build_steps
from entropy_gpt.evaluation.private_inference.program.settings import SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, Step
from entropy_gpt.evaluation.private_inference.program.two_phases import Preparation
from entropy_gpt.evaluation.private_inference.program.variables import held_shapes, program_variables
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM


# Bytes of keys and oblivious transfers, once a connection, sent by both parties: the same for all models.
SET_UP_BYTES = 27.4e6


@dataclass(config=RECORD, frozen=True)
class PredictedStep:
    """
    Args:
        operation (`str`): As in [`StepCost`].
        layer (`int`, *optional*): `None` around the blocks.
        total_bytes (`float`): Sent by both parties.
        round_trips (`float`): As in [`StepCost`].
        seconds (`float`): That two processes compute on two cores, about, without what a network takes.
    """

    operation: str
    layer: int | None
    total_bytes: float
    round_trips: float
    seconds: float

    def times(self, count: float) -> Self:
        """The step, this many times."""
        measures = ("total_bytes", "round_trips", "seconds")
        return replace(self, **{name: count * getattr(self, name) for name in measures})


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


def count_steps(
    config: EntropyGPTConfig,
    settings: PrivateSettings,
    span: Span,
    forms: Forms = FASTEST,
    counting: type[CountingArithmetic] = CountingArithmetic,
) -> list[tuple[Step, StepCounts]]:
    """
    What each step of a program consists of; arguments as of [`predict`].

    Raises:
        `PrivateInferenceError`: As [`build_steps`], or for another protocol than Cheetah.
    """
    _check_counted(settings)
    return _count_pass(program_config(config), settings, span, forms, counting)


def predict(
    config: EntropyGPTConfig,
    settings: PrivateSettings,
    span: Span,
    prices: Prices | None = None,
    forms: Forms = FASTEST,
    counting: type[CountingArithmetic] = CountingArithmetic,
) -> list[PredictedStep]:
    """
    What each step takes, without the set-up.

    Args:
        config ([`EntropyGPTConfig`]): Any architecture, folded or not. Linear FFNs count as [`program_config`] has it.
        settings ([`PrivateSettings`]): Settings with the protocol "cheetah".
        span ([`Span`]): The tokens.
        prices ([`Prices`], *optional*): Those of this package, if none are given.
        forms ([`Forms`]): What chooses the forms of operations.
        counting (`type`): What counts.

    Raises:
        `PrivateInferenceError`: As [`count_steps`].
    """
    return _price(count_steps(config, settings, span, forms, counting), prices)


def predict_passes(
    config: EntropyGPTConfig, settings: PrivateSettings, passes: Mapping[Span, float]
) -> list[PredictedStep]:
    """
    What the steps of several passes take.

    Args:
        config, settings: As of [`predict`].
        passes (`Mapping[Span, float]`): How often each is computed, or is to be expected.

    Raises:
        `PrivateInferenceError`: As [`count_steps`].
    """
    _check_counted(settings)
    config = program_config(config)
    return [
        step.times(count) for span, count in passes.items() for step in _price(_count_pass(config, settings, span))
    ]


def predict_phases(
    config: EntropyGPTConfig, settings: PrivateSettings, spans: Sequence[Span]
) -> tuple[list[PredictedStep], list[PredictedStep]]:
    """
    What each step takes before the prompt comes, and after it, without the set-up.

    Args:
        config, settings: As of [`predict`].
        spans (`Sequence[Span]`): The tokens of each pass.

    Raises:
        `PrivateInferenceError`: As [`count_steps`].
    """
    _check_counted(settings)
    config = program_config(config)
    preparation = Preparation(config, settings, spans)
    weights = {name: make_shape(shape, SERVER) for name, shape in held_shapes(config, settings, SERVER).items()}
    before = _count(preparation.steps, weights | preparation.masks, settings)
    after = []
    for number, span in enumerate(spans):
        after += _count(preparation.use(number, span), preparation.variables(number, span), settings)
    return _price(before), _price(after)


def _count_pass(
    config: EntropyGPTConfig,
    settings: PrivateSettings,
    span: Span,
    forms: Forms = FASTEST,
    counting: type[CountingArithmetic] = CountingArithmetic,
) -> list[tuple[Step, StepCounts]]:
    """Of a [`program_config`]."""
    steps = build_steps(config, settings, span, forms=forms)
    return _count(steps, program_variables(config, settings, span), settings, counting)


def _count(
    steps: list[Step],
    variables: dict[str, Shape],
    settings: PrivateSettings,
    counting: type[CountingArithmetic] = CountingArithmetic,
) -> list[tuple[Step, StepCounts]]:
    stock = Stock()
    return [(step, count_step(step, variables, settings, stock, counting)) for step in steps]


def _price(counted: list[tuple[Step, StepCounts]], prices: Prices | None = None) -> list[PredictedStep]:
    prices = (prices or load_prices()).bytes
    return [
        PredictedStep(
            step.operation,
            step.layer,
            price_of(counts.parts, prices),
            counts.round_trips,
            seconds_of(counts.parts, counts.work, prices),
        )
        for step, counts in counted
    ]


def _check_counted(settings: PrivateSettings):
    if settings.protocol != "cheetah":
        raise PrivateInferenceError(
            f"costs are predicted for the protocol cheetah, not for {settings.protocol!r}: measure them."
        )
