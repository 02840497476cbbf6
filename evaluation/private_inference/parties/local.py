"""All parties in one process: the protocols for measuring, and the same arithmetic without them for checking."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from entropy_gpt.evaluation.private_inference.program.cost import StepCost
from entropy_gpt.evaluation.private_inference.program.program import OUT_OF_RANGE
from entropy_gpt.evaluation.private_inference.program.settings import PARTIES, SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from entropy_gpt.evaluation.private_inference.program.variables import answer_name, client_inputs
from modeling_entropy_gpt import EntropyGPTConfig

from .engine import EngineLog, check_engine
from .participant import Participant, compile_pass


TIMEOUT_MS = 3_600_000


@dataclass(frozen=True)
class LocalRun:
    """
    Args:
        answers (`list[np.ndarray]`): For each prompt, logits `(positions, vocabulary)`.
        out_of_range (`list[bool]`): For each prompt, whether the check found numbers out of range.
        set_up (`list[StepCost]`): Cost of the set-up, shared by all prompts.
        steps (`list[list[StepCost]]`): For each prompt, the cost of its steps.
        seconds (`list[float]`): Seconds of each prompt.
    """

    answers: list[np.ndarray]
    out_of_range: list[bool]
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
) -> LocalRun:
    """
    Runs all parties as threads: the set-up once, then one prompt after another.

    Args:
        config, weights: Of [`prepare_weights`].
        settings ([`PrivateSettings`]): Any protocol.
        prompts (`Sequence[Sequence[int]]`): Tokens, as many in each.
        answers (`int`): Number of last positions whose logits are wanted.
        log ([`EngineLog`], *optional*): Log of the server's counts; without it, costs have no bytes.

    Raises:
        `PrivateInferenceError`: If the engine is not installed, or the prompts are too long.
    """
    check_engine()
    span = Span(0, len(prompts[0]), answers)
    program = compile_pass(config, settings, span)

    def take_part(link) -> tuple:
        participant = Participant(link, config, settings, weights, log if link.rank == SERVER else None)
        return participant, participant.set_up(), [_answer(participant, program, span, p, weights) for p in prompts]

    parties = run_parties(settings, take_part)
    participant, set_up, ours = parties[SERVER]

    def reconstruct(name: str) -> list[np.ndarray]:
        shares = zip(*([shares[name] for shares, _, _ in answered] for _, _, answered in parties), strict=True)
        return [participant.party.reconstruct(list(parts)) for parts in shares]

    return LocalRun(
        answers=reconstruct(answer_name(settings)),
        out_of_range=[bool(found) for found in reconstruct(OUT_OF_RANGE)],
        set_up=set_up,
        steps=[steps for _, steps, _ in ours],
        seconds=[seconds for _, _, seconds in ours],
    )


def _answer(participant: Participant, program, span: Span, tokens, weights) -> tuple:
    """One party's shares of the answer to a prompt and of its check, what each step took, and the seconds."""
    settings = participant.settings
    values = client_inputs(participant.config, settings, span, tokens, weights) if participant.is_client else {}
    started = time.perf_counter()
    steps = participant.infer(program, span, values)
    seconds = time.perf_counter() - started
    return {name: participant.party.share(name) for name in (answer_name(settings), OUT_OF_RANGE)}, steps, seconds


def run_parties(settings: PrivateSettings, take_part: Callable) -> list:
    """
    Runs each party of a protocol in a thread.

    Args:
        settings ([`PrivateSettings`]): Its protocol determines the number of parties.
        take_part (`Callable`): Called with a party's link to the others.

    Returns:
        `list`: What it returned, by rank.

    Raises:
        What it raised.
    """
    from spu import libspu

    ranks = range(PARTIES[settings.protocol])
    description = libspu.link.Desc()
    description.recv_timeout_ms = TIMEOUT_MS
    for rank in ranks:
        description.add_party(f"party{rank}", f"thread{rank}")
    with ThreadPoolExecutor(len(ranks)) as pool:
        parties = [
            pool.submit(lambda rank=rank: take_part(libspu.link.create_mem(description, rank))) for rank in ranks
        ]
        return [party.result() for party in parties]
