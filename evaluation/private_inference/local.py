"""All parties in one process: the protocols for measuring, and the same arithmetic without them for checking."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from modeling_entropy_gpt import EntropyGPTConfig

from .cost import StepCost
from .engine import EngineLog, check_engine
from .participant import Participant, answer_name, compile_pass, encode_tokens
from .program import Span
from .settings import PARTIES, PrivateSettings


TIMEOUT_MS = 3_600_000


@dataclass(frozen=True)
class LocalRun:
    """
    Args:
        answers (`list[np.ndarray]`): Of each prompt, `(positions, vocabulary)`.
        set_up (`list[StepCost]`): Of all together.
        steps (`list[list[StepCost]]`): Of each prompt.
        seconds (`list[float]`): Of each prompt.
    """

    answers: list[np.ndarray]
    set_up: list[StepCost]
    steps: list[list[StepCost]]
    seconds: list[float]


def infer_locally(
    config: EntropyGPTConfig,
    weights: dict[str, np.ndarray],
    settings: PrivateSettings,
    prompts: Sequence[Sequence[int]],
    answers: int = 1,
    log: EngineLog | None = None,
    on_step: Callable[[StepCost], None] = lambda cost: None,
) -> LocalRun:
    """
    Runs all parties as threads: the set-up once, then one prompt after another.

    Args:
        config, weights: Of [`prepare_weights`].
        settings ([`PrivateSettings`]): Any protocol.
        prompts (`Sequence[Sequence[int]]`): Tokens, as many in each.
        answers (`int`): Of so many last positions the logits are wanted.
        log ([`EngineLog`], *optional*): Without it, costs have no bytes.
        on_step (`Callable`): Called with what each step took, by the server's count.

    Raises:
        `PrivateInferenceError`: If the engine is not installed, or the prompts are too long.
    """
    check_engine()
    from spu import libspu

    span = Span(0, len(prompts[0]), answers)
    program = compile_pass(config, settings, span)
    description = libspu.link.Desc()
    description.recv_timeout_ms = TIMEOUT_MS
    ranks = range(PARTIES[settings.protocol])
    for rank in ranks:
        description.add_party(f"party{rank}", f"thread{rank}")
    parties, errors = {}, []

    def take_part(rank: int):
        try:
            link = libspu.link.create_mem(description, rank)
            participant = Participant(link, config, settings, weights, log if rank == 0 else None)
            parties[rank] = _run(participant, program, span, prompts, weights, on_step if rank == 0 else _ignore)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    participant, set_up, steps, seconds, _ = parties[0]
    shares = zip(*(parties[rank][4] for rank in ranks), strict=True)
    return LocalRun([participant.party.reconstruct(list(parts)) for parts in shares], set_up, steps, seconds)


def _run(participant: Participant, program, span: Span, prompts, weights, on_step) -> tuple:
    settings, config = participant.settings, participant.config
    set_up, steps, seconds, shares = participant.set_up(), [], [], []
    for tokens in prompts:
        value = None
        if participant.is_client:
            value = encode_tokens(list(tokens), config.vocab_size)
            if settings.embedding == "client_table":
                value = weights["wte"][list(tokens)] + weights["wpe"][: len(tokens)]
        started = time.perf_counter()
        steps.append(participant.infer(program, span, value, on_step))
        seconds.append(time.perf_counter() - started)
        shares.append(participant.party.share(answer_name(settings)))
    return participant, set_up, steps, seconds, shares


def _ignore(cost: StepCost):
    pass
