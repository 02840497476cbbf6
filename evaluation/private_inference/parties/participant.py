"""One party's side of an inference on the engine, over any link."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from entropy_gpt.evaluation.private_inference.program.arithmetic import Arithmetic
from entropy_gpt.evaluation.private_inference.program.cost import StepCost
from entropy_gpt.evaluation.private_inference.program.counting import Shape, make_shape
from entropy_gpt.evaluation.private_inference.program.program import (
    EMBEDDINGS,
    LOGITS,
    TOKEN,
    TOKENS,
    ProgramConfig,
    Span,
    Step,
    build_steps,
    weight_shapes,
)
from entropy_gpt.evaluation.private_inference.program.settings import PARTIES, PrivateSettings

from .engine import SERVER, CompiledStep, EngineLog, Party, compile_steps


SET_UP = "set-up"


def client_rank(settings: PrivateSettings) -> int:
    """The client's; a third party, and the only one of "ref2k", has nothing of its own or everything."""
    return min(1, PARTIES[settings.protocol] - 1)


def input_shape(config: ProgramConfig, settings: PrivateSettings, span: Span) -> tuple[str, tuple[int, int]]:
    """The client's input: its variable and its shape."""
    if settings.embedding == "one_hot":
        return TOKENS, (span.length, config.vocab_size)
    return EMBEDDINGS, (span.length, config.n_embd)


def kept_shapes(config: ProgramConfig, span: Span) -> dict[str, tuple[int, int, int]]:
    """Of the keys and values that a pass finds."""
    shape = (config.n_head, span.start, config.n_embd // config.n_head)
    layers = range(config.n_layer if span.start else 0)
    return {f"h.{layer}.{name}": shape for layer in layers for name in ("keys", "values")}


def program_variables(config: ProgramConfig, settings: PrivateSettings, span: Span) -> dict[str, Shape]:
    """What there is before a pass, and whose it is."""
    variables = {name: make_shape(shape, SERVER) for name, shape in weight_shapes(config).items()}
    name, shape = input_shape(config, settings, span)
    variables[name] = make_shape(shape, client_rank(settings))
    return variables | {name: make_shape(shape) for name, shape in kept_shapes(config, span).items()}


def answer_name(settings: PrivateSettings) -> str:
    return LOGITS if settings.answer == "logits" else TOKEN


def compile_pass(config: ProgramConfig, settings: PrivateSettings, span: Span) -> list[CompiledStep]:
    """
    The engine's code of the program for some tokens, from what is public alone.

    Raises:
        `PrivateInferenceError`: As [`build_steps`].
    """
    return compile_steps(build_steps(config, settings, span), program_variables(config, settings, span), settings)


def encode_tokens(tokens: Sequence[int], vocabulary: int) -> np.ndarray:
    """One-hot rows."""
    return (np.asarray(tokens)[:, None] == np.arange(vocabulary)).astype(np.float32)


def client_input(
    config: ProgramConfig, settings: PrivateSettings, span: Span, tokens: Sequence[int], tables: dict
) -> np.ndarray:
    """
    What the client gives.

    Args:
        config ([`ProgramConfig`]), settings ([`PrivateSettings`]): Of the program.
        span ([`Span`]): Where the tokens stand.
        tokens (`Sequence[int]`): As many.
        tables (`dict`): With "client_table", the embeddings "wte" and "wpe".
    """
    if settings.embedding == "one_hot":
        return encode_tokens(tokens, config.vocab_size)
    return tables["wte"][np.asarray(tokens)] + tables["wpe"][span.start : span.end]


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
        What is paid once a connection: keys and oblivious transfers, brought forward by a program of every kind. Round
        trips are not known of it: those that are counted are of a program for which all that is there.
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
            program (`list[CompiledStep]`): Of [`compile_pass`].
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
