"""One party's side of an inference on the engine, over any link."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from entropy_gpt.evaluation.private_inference.program.arithmetic import Arithmetic
from entropy_gpt.evaluation.private_inference.program.cost import StepCost
from entropy_gpt.evaluation.private_inference.program.counting import NUMBER, RING, make_shape
from entropy_gpt.evaluation.private_inference.program.program import ProgramConfig, build_steps
from entropy_gpt.evaluation.private_inference.program.settings import SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, Step
from entropy_gpt.evaluation.private_inference.program.two_phases import Preparation
from entropy_gpt.evaluation.private_inference.program.variables import (
    client_rank,
    cut_back,
    held_shapes,
    input_shapes,
    kept_shapes,
    program_variables,
)

from .engine import CompiledStep, EngineLog, Party, compile_steps
from .preparations import draw_mask


SET_UP = "set-up"
# Oblivious transfers run in as many instances as there are processors, up to a limit, each for a number of numbers.
MOST_INSTANCES, INSTANCE_NUMBERS = 48, 2048


def compile_pass(
    config: ProgramConfig, settings: PrivateSettings, span: Span, kept: int | None = None
) -> list[CompiledStep]:
    """
    The engine's code of the program for some tokens, from what is public alone.

    Args:
        config ([`ProgramConfig`]), settings ([`PrivateSettings`]), span ([`Span`]): As of [`build_steps`].
        kept (`int`, *optional*):
            Tokens whose keys and values there are: those from the span's start on are cut off. Default: none.

    Raises:
        `PrivateInferenceError`: As [`build_steps`].
    """
    steps, variables = build_steps(config, settings, span), program_variables(config, settings, span)
    if kept not in (None, span.start):
        steps, variables = [cut_back(config, span.start), *steps], variables | kept_shapes(config, kept)
    return compile_steps(steps, variables, settings)


def compile_preparation(
    config: ProgramConfig, settings: PrivateSettings, preparation: Preparation
) -> list[CompiledStep]:
    """The engine's code of a first phase."""
    weights = {name: make_shape(shape, SERVER) for name, shape in held_shapes(config, settings, SERVER).items()}
    return compile_steps(preparation.steps, weights | preparation.masks, settings)


def compile_prepared_pass(
    settings: PrivateSettings, preparation: Preparation, number: int, span: Span
) -> list[CompiledStep]:
    """
    The engine's code of a pass of a second phase.

    Raises:
        `PrivateInferenceError`: If this is not prepared.
    """
    return compile_steps(preparation.use(number, span), preparation.variables(number, span), settings)


class Participant:
    """
    One party of an inference.

    Args:
        link: SPU's link.
        config ([`ProgramConfig`]): That of [`prepare_weights`], public.
        settings ([`PrivateSettings`]): Public.
        weights (`dict`, *optional*): The server's alone.
        log ([`EngineLog`], *optional*): As for [`Party`].
    """

    def __init__(
        self,
        link,
        config: ProgramConfig,
        settings: PrivateSettings,
        weights: dict[str, np.ndarray] | None,
        log: EngineLog | None = None,
    ):
        self.config, self.settings = config, settings
        self.party = Party(link, settings, log)
        self.is_client = link.rank == client_rank(settings)
        for name, shape in held_shapes(config, settings, SERVER).items():
            if link.rank == SERVER:
                self.party.set_own(name, weights[name])
            else:
                self.party.set_foreign(name, shape, SERVER)

    def set_up(self) -> list[StepCost]:
        """
        Runs one program of each kind so that one-off set-up (keys, oblivious transfers) is paid here. Round trips are
        not reported, because the counts assume that set-up is done.
        """
        client = client_rank(self.settings)
        variables = {
            "server's": make_shape((2, 2), SERVER),
            "client's": make_shape((2, 2), client),
            "client's row": make_shape((MOST_INSTANCES * INSTANCE_NUMBERS,), client),
        }
        for name, variable in variables.items():
            if self.party.link.rank == variable.owner:
                self.party.set_own(name, np.full(variable.shape, 0.5, np.float32))
            else:
                self.party.set_foreign(name, variable.shape, variable.owner)
        step = Step(SET_UP, None, _touch_everything, tuple(variables), ("touched", "truncated"))
        (compiled,) = compile_steps([step], variables, self.settings)
        cost = self.party.run(compiled)
        for name in (*step.inputs, *step.outputs):
            self.party.forget(name)
        return [replace(cost, round_trips=0.0)]

    def prepare(
        self,
        program: list[CompiledStep],
        preparation: Preparation,
        seed: bytes,
        on_step: Callable[[StepCost], None] = lambda cost: None,
    ) -> dict:
        """
        The first phase of an inference, together with the other parties.

        Args:
            program (`list[CompiledStep]`): The compiled steps of the preparation.
            preparation ([`Preparation`]): What is prepared.
            seed (`bytes`): Secret and random, of which this party's parts of the masks are drawn.
            on_step (`Callable`): Called with what each step took.

        Returns:
            `dict`: This party's share of each product.
        """
        self._set_masks(preparation, seed)
        for step in program:
            on_step(self.party.run(step))
        shares = {name: self.party.share(name) for name in preparation.products}
        self.forget(preparation)
        return shares

    def load(self, preparation: Preparation, seed: bytes, shares: dict):
        """Sets what [`Participant.prepare`] left, for the second phase."""
        self._set_masks(preparation, seed)
        for name in preparation.products:
            self.party.runtime.set_var(name, shares[name])

    def forget(self, preparation: Preparation):
        """Nothing of a preparation is used a second time."""
        for name in (*preparation.masks, *preparation.products):
            self.party.forget(name)

    def _set_masks(self, preparation: Preparation, seed: bytes):
        for name, mask in preparation.masks.items():
            if mask.owner == self.party.link.rank:
                self.party.set_own(name, draw_mask(seed, name, mask.shape))
            else:
                self.party.set_foreign(name, mask.shape, mask.owner, RING)

    def infer(
        self,
        program: list[CompiledStep],
        span: Span,
        values: dict[str, np.ndarray],
        on_step: Callable[[StepCost], None] = lambda cost: None,
    ) -> list[StepCost]:
        """
        Runs a program together with the other parties; each has its share of the answer then.

        Args:
            program (`list[CompiledStep]`): Result of [`compile_pass`].
            span ([`Span`]): The tokens.
            values (`dict`): The client's inputs; the others have none.
            on_step (`Callable`): Called with what each step took.
        """
        # What a preparation leaves is as wide as the ring's integers, and the engine joins only numbers of one width.
        number = np.float64 if any(step.executable is None for step in program) else NUMBER
        for name, shape in input_shapes(self.config, self.settings, span).items():
            if self.is_client:
                self.party.set_own(name, values[name].astype(number))
            else:
                self.party.set_foreign(name, shape, client_rank(self.settings), number)
        costs = []
        for step in program:
            costs.append(self.party.run(step))
            on_step(costs[-1])
        return costs


def _touch_everything(ops: Arithmetic, server, client, row):
    both = server + client
    total = ops.matmul(both, both) + ops.matmul(both, server) + ops.matmul(client, server)
    total = total + ops.multiply(both, both) + ops.multiply(both, server) + ops.square(both) + ops.scale(both, 0.3)
    total = total + ops.positive_part(both) + ops.largest(both) + ops.reciprocal(both) + ops.reciprocal_root(both)
    # Truncations, the cheapest of the operations that need oblivious transfers, in every instance.
    return total, ops.scale(row + server[0, 0], 0.3)
