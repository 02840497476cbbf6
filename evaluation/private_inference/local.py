"""All parties in one process: the protocols for measuring, and the same arithmetic without them for checking."""

import threading
import time
from collections.abc import Callable

import numpy as np

from modeling_entropy_gpt import EntropyGPTConfig

from .cost import StepCost
from .engine import EngineLog, check_engine
from .participant import Participant, answer_name, client_rank, compile_pass, encode_tokens
from .program import Span
from .settings import PARTIES, PrivateSettings


TIMEOUT_MS = 3_600_000


def infer_locally(
    config: EntropyGPTConfig,
    weights: dict[str, np.ndarray],
    settings: PrivateSettings,
    tokens: list[int],
    answers: int = 1,
    log: EngineLog | None = None,
    on_step: Callable[[StepCost], None] = lambda cost: None,
) -> tuple[np.ndarray, list[StepCost], list[StepCost], float]:
    """
    Runs all parties as threads.

    Args:
        config, weights: Of [`prepare_weights`].
        settings ([`PrivateSettings`]): Any protocol.
        tokens (`list[int]`): The prompt.
        answers (`int`): Of so many last positions the logits are wanted.
        log ([`EngineLog`], *optional*): Without it, costs have no bytes.
        on_step (`Callable`): Called with what each step took, by the server's count.

    Returns:
        `tuple`: The answer, what the set-up took, what each step took, and the seconds of the steps.

    Raises:
        `PrivateInferenceError`: If the engine is not installed, or the prompt is too long.
    """
    check_engine()
    from spu import libspu

    span = Span(0, len(tokens), answers)
    program = compile_pass(config, settings, span)
    description = libspu.link.Desc()
    description.recv_timeout_ms = TIMEOUT_MS
    for rank in range(PARTIES[settings.protocol]):
        description.add_party(f"party{rank}", f"thread{rank}")
    value = encode_tokens(tokens, config.vocab_size)
    if settings.embedding == "client_table":
        value = weights["wte"][tokens] + weights["wpe"][: len(tokens)]
    done, errors = {}, []

    def take_part(rank: int):
        try:
            link = libspu.link.create_mem(description, rank)
            participant = Participant(link, config, settings, weights, log if rank == 0 else None)
            set_up = participant.set_up()
            started = time.perf_counter()
            own = value if rank == client_rank(settings) else None
            costs = participant.infer(program, span, own, on_step if rank == 0 else lambda cost: None)
            seconds = time.perf_counter() - started
            done[rank] = (participant.party.share(answer_name(settings)), participant, set_up, costs, seconds)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in range(PARTIES[settings.protocol])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    _, participant, set_up, costs, seconds = done[0]
    answer = participant.party.reconstruct([done[rank][0] for rank in sorted(done)])
    return answer, set_up, costs, seconds
