"""
A program in two phases: what does not depend on the prompt is done before it comes.

A product of numbers that come later is prepared with random ones in their place (Beaver, Crypto 1991; SecureML, S&P
2017, for matrices; Delphi, USENIX Security 2020, for the weights of a server). Each party draws a part of each mask,
and the protocol multiplies the masks, which nobody knows. Later a factor less its mask is revealed. It is uniformly
random in the ring, whatever the factor is, as long as no mask serves twice. All else of the product is local, but for
the truncation, which is that of one phase, of the same sum. With A and B the masks, D = X - A and E = Y - B:

    X Y = D Y + A E + A B        X W = D W + A W        X^2 = D (X + A) + A^2

A factor of a weight has a mask of the client's alone, and the server alone is shown the difference (Delphi), which
takes half the bytes. Keys and values are factors of many products, and have one mask as long as they are kept: they
less it are revealed once. Zeros above the diagonal of the prompt's attention weights are neither masked nor revealed.

What is prepared for long prompts and answers serves all shorter ones: masks and products are cut, and values filled up
with zeros.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence

from entropy_gpt.evaluation.errors import PrivateInferenceError

from .counting import PUBLIC, RING, Shape, make_shape
from .demands import BOTH, WEIGHTS, Bound, Demand, DemandingStep, KeptTokens, Place, list_demands
from .first_phase import Correlation, multiply_kept, multiply_pools, multiply_weights
from .program import ProgramConfig
from .second_phase import MaskFactors, RevealKept, UsePrepared, show
from .settings import SERVER, PrivateSettings
from .steps import Span, Step
from .variables import client_rank, kept_shapes, program_variables


# Factors of weights less their masks, as both parties share them, and as the server knows them.
MASKED, SHOWN = "masked", "shown"


class Preparation:
    """
    What both parties prepare for prompts and answers up to some lengths.

    Args:
        config ([`ProgramConfig`]), settings ([`PrivateSettings`]): As of [`build_steps`].
        spans (`Sequence[Span]`): Those of the passes, of which each begins where the one before ends. What is kept
            from before the first has been masked and revealed.

    Attributes:
        masks (`dict[str, Shape]`): Random integers of the ring, of which each party draws its own.
        products (`dict[str, Shape]`): What the first phase leaves for the second.

    Raises:
        `PrivateInferenceError`: As [`build_steps`].
    """

    def __init__(self, config: ProgramConfig, settings: PrivateSettings, spans: Sequence[Span]):
        self._config, self._settings, self._spans = config, settings, tuple(spans)
        self.masks: dict[str, Shape] = {}
        self.products: dict[str, Shape] = {}
        self._recorded = dict(
            entry for number, span in enumerate(spans) for entry in list_demands(config, settings, number, span)
        )
        self._made: dict[Place, tuple[Correlation, ...]] = {}
        for place, entry in self._recorded.items():
            self._made[place] = tuple(self._name(place, *numbered) for numbered in enumerate(entry.demands))
        # For each variable that is kept, the parts of its mask, of the tokens before and of those of each pass.
        lengths = {"before": self._spans[0].start, **{number: span.length for number, span in enumerate(spans)}}
        self._kept = {
            name: {
                number: self._draw(f"{number}/{name}", self._kept_shape(length), BOTH)
                for number, length in lengths.items()
                if length
            }
            for name in kept_shapes(config, 1)
        }

    @functools.cached_property
    def steps(self) -> list[Step]:
        """The first phase."""
        made = itertools.chain(*self._made.values())
        return [
            *multiply_weights(self._recorded, self._made),
            *multiply_kept(self._recorded, self._made, {name: parts.values() for name, parts in self._kept.items()}),
            *multiply_pools(made),
        ]

    def use(self, number: int, span: Span) -> list[Step]:
        """
        The second phase of a pass.

        Args:
            number (`int`): Which of the passes of the preparation.
            span ([`Span`]): As that one, or after a shorter prompt, or a shorter prompt.

        Raises:
            `PrivateInferenceError`: If this was prepared for less.
        """
        tokens, steps = self._tokens(number, span), []
        for place, entry in list_demands(self._config, self._settings, number, span):
            made, step = self._made.get(place, ()), entry.step
            if not _cover(made, entry.demands):
                raise self._too_small(span)
            steps += self._use_step(made, entry, tokens) if made else [step]
            if kept := [name for name in step.outputs if name in self._kept]:
                steps.append(self._reveal(number, span, step, kept))
        return steps

    def variables(self, number: int, span: Span) -> dict[str, Shape]:
        """What there is before the second phase of a pass, and whose it is."""
        found = program_variables(self._config, self._settings, span) | self.masks | self.products
        if not span.start:
            return found
        for name in self._kept:
            length = span.start if name.endswith("keys") else self._spans[number].start
            found[_revealed(name)] = make_shape(self._kept_shape(length), PUBLIC, RING)
        return found

    def _tokens(self, number: int, span: Span) -> KeptTokens:
        """
        Raises:
            `PrivateInferenceError`: If it is no such pass.
        """
        if number >= len(self._spans):
            raise self._too_small(span)
        first, made = self._spans[0], self._spans[number]
        prepared = first.start or first.length
        further = made.end - prepared
        tokens = KeptTokens(span.end - further, prepared, further)
        if not 1 <= tokens.prompt <= prepared or (span.start and span.length != made.length):
            raise self._too_small(span)
        return tokens

    @staticmethod
    def _too_small(span: Span) -> PrivateInferenceError:
        return PrivateInferenceError(
            f"the preparation is for less: it does not have what {span.end} tokens and {span.answers} answers need."
        )

    def _use_step(self, made: tuple[Correlation, ...], entry: DemandingStep, tokens: KeptTokens) -> Iterator[Step]:
        step, function = entry.step, Bound.of(entry.step.function)
        inputs = step.inputs
        if masks := tuple(name for one in made if one.demand.kind == WEIGHTS for name in one.masks[0]):
            mask = MaskFactors(function, entry.demands)
            yield Step(step.operation, step.layer, mask, (*step.inputs, *masks), (MASKED,))
            yield Step(step.operation, step.layer, show, (MASKED,), (SHOWN,))
            inputs = (*inputs, SHOWN)
        if entry.kept is not None:
            inputs = (*inputs, _revealed(entry.kept))
        names = (name for one in made for name in one.names[-one.demand.tensors :])
        use = UsePrepared(function, entry.demands, tuple(one.demand for one in made), tokens)
        yield Step(step.operation, step.layer, use, (*inputs, *names), step.outputs)

    def _reveal(self, number: int, span: Span, step: Step, kept: list[str]) -> Step:
        revealed = tuple(map(_revealed, kept))
        masks = (part for name in kept for part in self._kept[name][number])
        inputs = (*kept, *masks, *(revealed if span.start else ()))
        return Step(step.operation, step.layer, RevealKept(span.length), inputs, revealed)

    def _name(self, place: Place, number: int, demand: Demand) -> Correlation:
        name = "/".join(map(str, (*place, number)))
        masks = tuple(
            self._draw(f"{name}/{side}", shape, demand.parts)
            for side, shape in zip(("left", "right"), demand.masks, strict=False)
        )
        self.products[f"{name}/product"] = make_shape(demand.product, None, RING)
        return Correlation(demand, masks, f"{name}/product")

    def _draw(self, name: str, shape: tuple[int, ...], parts: tuple[str, ...]) -> tuple[str, ...]:
        """The parts of a mask."""
        owners = {"server": SERVER, "client": client_rank(self._settings)}
        names = {f"{name}/{part}": owners[part] for part in parts}
        self.masks |= {variable: make_shape(shape, owner, RING) for variable, owner in names.items()}
        return tuple(names)

    def _kept_shape(self, length: int) -> tuple[int, int, int]:
        return (self._config.n_head, length, self._config.n_embd // self._config.n_head)


def _revealed(kept: str) -> str:
    """The variable with what is revealed of another one, which is kept."""
    return f"{kept} less mask"


def _cover(made: tuple[Correlation, ...], demands: tuple[Demand, ...]) -> bool:
    if len(made) != len(demands):
        return False
    return all(one.demand.covers(demand) for one, demand in zip(made, demands, strict=True))
