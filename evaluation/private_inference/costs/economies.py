"""
What each economy of a private inference saves alone: a program in which all other operations have their oldest forms,
counted on shapes, and computed in the emulated ring.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from entropy_gpt.evaluation.private_inference.program.counting import CountingArithmetic
from entropy_gpt.evaluation.private_inference.program.division import choose_division
from entropy_gpt.evaluation.private_inference.program.fixed_point import FixedPointArithmetic
from entropy_gpt.evaluation.private_inference.program.program import FASTEST, LOGITS, Forms, build_steps
from entropy_gpt.evaluation.private_inference.program.reciprocals import reciprocal_by_chords
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, run_steps
from entropy_gpt.evaluation.private_inference.program.variables import client_inputs, kept_shapes
from modeling_entropy_gpt import EntropyGPTConfig

from .cost_model import PredictedStep, predict


def pair_scores(heads: int, queries: int, keys: int, network: str) -> tuple[int, ...]:
    """Levels of contests between two; arguments as of [`choose_levels`]."""
    return (2,) * (keys - 1).bit_length()


class CountingHeadsApart(CountingArithmetic):
    """With a product for each matrix of a batch."""

    def _multiply_batch(self, multiply: Callable, left, right):
        return multiply(left, right)


LATE, BY_CHORDS = {"places": (False,)}, {"reciprocals": (reciprocal_by_chords,)}
OLDEST = Forms(pair_scores, partial(choose_division, **LATE, **BY_CHORDS))


@dataclass(frozen=True)
class Variant:
    """
    A program with some of the economies.

    Args:
        forms ([`Forms`]): Of its softmax.
        counting (`type`): Counts the products of its heads.
        embedding (`str`): As of [`PrivateSettings`].
    """

    forms: Forms = OLDEST
    counting: type[CountingArithmetic] = CountingHeadsApart
    embedding: str = "one_hot"

    def settings(self, network: str) -> PrivateSettings:
        return PrivateSettings(network=network, embedding=self.embedding)


NONE, ALL = "none", "all"
VARIANTS = {
    NONE: Variant(),
    "heads as one product": Variant(counting=CountingArithmetic),
    "contests of more than two": Variant(replace(OLDEST, levels=FASTEST.levels)),
    "division early or late": Variant(replace(OLDEST, division=partial(choose_division, **BY_CHORDS))),
    "reciprocals without comparisons": Variant(replace(OLDEST, division=partial(choose_division, **LATE))),
    "public embeddings": Variant(embedding="public"),
    ALL: Variant(FASTEST, CountingArithmetic, "public"),
}


def predict_variant(config: EntropyGPTConfig, variant: Variant, span: Span, network: str) -> list[PredictedStep]:
    """
    What each step takes under Cheetah, without the set-up.

    Args:
        config ([`EntropyGPTConfig`]), span ([`Span`]): As of [`predict`].
        variant ([`Variant`]): The forms of operations.
        network (`str`): What forms are chosen for, where there is a choice.
    """
    return predict(config, variant.settings(network), span, forms=variant.forms, counting=variant.counting)


def emulate_variant(
    config: EntropyGPTConfig,
    weights: dict[str, np.ndarray],
    variant: Variant,
    spans: Sequence[Span],
    tokens: Sequence[int],
    network: str,
) -> np.ndarray:
    """
    The logits `(vocabulary,)` that a private inference would answer with after the last token. That heads are one
    product changes no number: only zeros are added.

    Args:
        config ([`EntropyGPTConfig`]), weights (`dict`): Those of [`prepare_weights`].
        variant ([`Variant`]), network (`str`): As of [`predict_variant`].
        spans (`Sequence[Span]`): The passes over the tokens, one after another.
        tokens (`Sequence[int]`): Those of all passes.
    """
    settings = variant.settings(network)
    ops = FixedPointArithmetic(settings)
    encoded = {name: ops.encode(weight) for name, weight in weights.items()}
    variables = {}
    for span in spans:
        inputs = client_inputs(config, settings, span, tokens[span.start : span.end], weights)
        kept = {name: variables[name] for name in kept_shapes(config, span.start)}
        given = encoded | kept | {name: ops.encode(value) for name, value in inputs.items()}
        variables = run_steps(build_steps(config, settings, span, forms=variant.forms), ops, given)
    return variables[LOGITS][-1]
