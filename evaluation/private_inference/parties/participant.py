"""One party's side of an inference on the engine, over any link."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from entropy_gpt.evaluation.private_inference.program.arithmetic import Arithmetic
from entropy_gpt.evaluation.private_inference.program.cost import StepCost
from entropy_gpt.evaluation.private_inference.program.counting import make_shape
from entropy_gpt.evaluation.private_inference.program.program import (
    ProgramConfig,
    Span,
    Step,
    build_steps,
    weight_shapes,
)
from entropy_gpt.evaluation.private_inference.program.settings import SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.variables import client_rank, input_shape, program_variables

from .engine import CompiledStep, EngineLog, Party, compile_steps


SET_UP = "set-up"


def compile_pass(config: ProgramConfig, settings: PrivateSettings, span: Span) -> list[CompiledStep]:
    """
    The engine's code of the program for some tokens, from what is public alone.

    Raises:
        `PrivateInferenceError`: As [`build_steps`].
    """
    return compile_steps(build_steps(config, settings, span), program_variables(config, settings, span), settings)


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
        for name, shape in weight_shapes(config).items():
            if link.rank == SERVER:
                self.party.set_own(name, weights[name])
            else:
                self.party.set_foreign(name, shape, SERVER)

    def set_up(self) -> list[StepCost]:
        """
        Runs one program of each kind so that one-off set-up (keys, oblivious transfers) is paid here. Round trips are
        not reported, because the counts assume that set-up is done.
        """
        value = np.full((2, 2), 0.5, np.float32)
        client = client_rank(self.settings)
        for name, owner in (("server's", SERVER), ("client's", client)):
            if self.party.link.rank == owner:
                self.party.set_own(name, value)
            else:
                self.party.set_foreign(name, value.shape, owner)
        step = Step(SET_UP, None, _touch_everything, ("server's", "client's"), ("touched",))
        variables = {"server's": make_shape(value.shape, SERVER), "client's": make_shape(value.shape, client)}
        (compiled,) = compile_steps([step], variables, self.settings)
        cost = self.party.run(compiled)
        self.party.forget("touched")
        return [replace(cost, round_trips=0.0)]

    def infer(
        self,
        program: list[CompiledStep],
        span: Span,
        value: np.ndarray | None,
        on_step: Callable[[StepCost], None] = lambda cost: None,
    ) -> list[StepCost]:
        """
        Runs a program together with the other parties; each has its share of the answer then.

        Args:
            program (`list[CompiledStep]`): Result of [`compile_pass`].
            span ([`Span`]): The tokens.
            value (`np.ndarray`, *optional*): The client's input; `None` at the others.
            on_step (`Callable`): Called with what each step took.
        """
        name, shape = input_shape(self.config, self.settings, span)
        if self.is_client:
            self.party.set_own(name, value)
        else:
            self.party.set_foreign(name, shape, client_rank(self.settings))
        costs = []
        for step in program:
            costs.append(self.party.run(step))
            on_step(costs[-1])
        return costs


def _touch_everything(ops: Arithmetic, server, client):
    both = server + client
    total = ops.matmul(both, both) + ops.matmul(both, server) + ops.matmul(client, server)
    total = total + ops.multiply(both, both) + ops.multiply(both, server) + ops.square(both) + ops.scale(both, 0.3)
    return total + ops.positive_part(both) + ops.largest(both) + ops.reciprocal(both) + ops.reciprocal_root(both)
