"""One model asked in four ways that answer alike: in the clear, emulated, in one process, and between two."""

import contextlib
import copy
import functools
import itertools
import queue
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.engine import EngineLog, check_engine
from entropy_gpt.evaluation.private_inference.parties.limits import UNLIMITED
from entropy_gpt.evaluation.private_inference.parties.local import infer_locally
from entropy_gpt.evaluation.private_inference.parties.question import Question, check_prompt, check_request
from entropy_gpt.evaluation.private_inference.parties.server import Server
from entropy_gpt.evaluation.private_inference.parties.session import Outcome
from entropy_gpt.evaluation.private_inference.parties.terms import Offer, Terms
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost
from entropy_gpt.evaluation.private_inference.program.fixed_point import emulate
from entropy_gpt.evaluation.private_inference.program.range_audit import bound
from entropy_gpt.evaluation.private_inference.program.settings import PARTIES, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from modeling_entropy_gpt import EntropyGPTForCausalLM


PLAINTEXT, EMULATED, IN_PROCESS, TWO_PARTY = MODES = ("plaintext", "emulated", "in_process", "two_party")
# Those that the engine computes, and what connects its parties.
NETWORKS = {IN_PROCESS: "threads of one process", TWO_PARTY: "loopback, two processes"}
TIMEOUT_SECONDS = 1200
# Seconds in which a server may say why it ended; its client may know of the end earlier.
SILENCE_SECONDS = 2


@dataclass(frozen=True)
class InferenceResult:
    """
    What a model says to some prompts.

    Args:
        mode (`str`): One of `MODES`.
        answers (`list[np.ndarray]`): For each prompt, logits `(answers, vocabulary)` in float32.
        seconds (`float`): By the clock for all prompts, with compiling and set-up.
        costs (`list[InferenceCost]`, *optional*):
            Of each prompt; `None` where nothing is sent. Prompts of one length that follow one another share their
            set-up in one process, and all prompts do between two.
    """

    mode: str
    answers: list[np.ndarray]
    seconds: float
    costs: list[InferenceCost] | None


class PrivateModel:
    """
    A model as it is now, with the settings of its private inference; what becomes of the model later is not seen.

    Before the first answer of an engine, the model is audited, as a server does: the check of each answer has its
    bounds from there. "emulated" answers are not checked.

    Args:
        model ([`EntropyGPTForCausalLM`]): Such as [`load_language_model`] loads, a GPT-2 too.
        settings ([`PrivateSettings`], *optional*): The defaults without.
        text (`Sequence[int]`): Tokens that the audit looks at too, such as those of a user's own text.

    Raises:
        `PrivateInferenceError`: If an operation of the model has no private form, the answers are tokens alone, or the
            embeddings are to be public.
        `ConversionError`: As [`prepare_weights`].
    """

    def __init__(
        self, model: EntropyGPTForCausalLM, settings: PrivateSettings | None = None, text: Sequence[int] = ()
    ):
        self.settings, self._text = settings or PrivateSettings(), text
        if self.settings.answer != "logits":
            raise PrivateInferenceError(f"answer={self.settings.answer!r} can't be compared: use answer='logits'.")
        if self.settings.embedding == "public":
            raise PrivateInferenceError(
                "embedding='public' is for a client that has a copy: use 'client_table', which computes the same."
            )
        self.config, self.weights = prepare_weights(model)
        self._model = copy.deepcopy(model).float().eval()

    @property
    def modes(self) -> tuple[str, ...]:
        """Those of `MODES` that the protocol has."""
        return tuple(mode for mode in MODES if mode != TWO_PARTY or PARTIES[self.settings.protocol] == 2)

    def infer(self, prompts: Sequence[Sequence[int]], mode: str, answers: int = 1) -> InferenceResult:
        """
        Args:
            prompts (`Sequence[Sequence[int]]`): Tokens of each.
            mode (`str`):
                "plaintext" (the model itself), "emulated" (the ring in numpy), "in_process" (all parties of the
                protocol as threads; the engine's log of this process is taken over) or "two_party" (a server and a
                client on the loopback, whose engines are processes of their own).
            answers (`int`): Number of last positions whose logits are wanted.

        Raises:
            `PrivateInferenceError`: If the protocol has no such mode, the model can't answer so much, its numbers do
                not fit the ring, the engine is not installed, or it fails.
        """
        prompts = [[int(token) for token in prompt] for prompt in prompts]
        self._check(prompts, mode, answers)
        ask = {
            PLAINTEXT: self._compute,
            EMULATED: self._emulate,
            IN_PROCESS: self._ask_threads,
            TWO_PARTY: self._ask_processes,
        }
        started = time.perf_counter()
        found = list(ask[mode](prompts, answers))
        seconds, costs = time.perf_counter() - started, None
        if mode in NETWORKS:
            terms = Terms(self.config, self._model.config.notation, self.settings, "")
            costs = [
                outcome.cost(terms, len(prompt), answers, NETWORKS[mode])
                for prompt, outcome in zip(prompts, found, strict=True)
            ]
        return InferenceResult(mode, [outcome.logits[0].astype(np.float32) for outcome in found], seconds, costs)

    @functools.cached_property
    def _bounded_weights(self) -> dict[str, np.ndarray]:
        weights, report = bound(self.config, self.weights, self.settings, self._text)
        for line in report.warnings:
            warnings.warn(line, stacklevel=5)
        return weights

    def _check(self, prompts: list[list[int]], mode: str, answers: int):
        if mode not in self.modes:
            raise PrivateInferenceError(
                f"mode={mode!r} is not possible with the protocol {self.settings.protocol}, which has "
                f"{', '.join(self.modes)}."
            )
        if answers < 1:
            raise PrivateInferenceError(f"answers={answers} is no positive number.")
        for prompt in prompts:
            check_request(self.config, self.settings, len(prompt), 1, answers)
            check_prompt(prompt, self.config.vocab_size)
        if mode in NETWORKS:
            check_engine()

    @torch.no_grad()
    def _compute(self, prompts: list[list[int]], answers: int) -> Iterator[Outcome]:
        for prompt in prompts:
            logits = self._model(torch.tensor([prompt]), use_cache=False).logits[0, -answers:]
            yield Outcome(logits=[logits.numpy()])

    def _emulate(self, prompts: list[list[int]], answers: int) -> Iterator[Outcome]:
        for seed, prompt in enumerate(prompts):
            yield Outcome(logits=[emulate(self.config, self.weights, self.settings, prompt, answers, seed)])

    def _ask_threads(self, prompts: list[list[int]], answers: int) -> Iterator[Outcome]:
        log = EngineLog()
        for _, alike in itertools.groupby(prompts, key=len):
            run = infer_locally(self.config, self._bounded_weights, self.settings, list(alike), answers, log)
            if any(run.out_of_range):
                raise PrivateInferenceError("numbers were out of range: see the audit of the model.")
            for logits, steps in zip(run.answers, run.steps, strict=True):
                yield Outcome(logits=[logits], set_up=run.set_up, steps=steps)

    def _ask_processes(self, prompts: list[list[int]], answers: int) -> Iterator[Outcome]:
        notation = self._model.config.notation
        offer = Offer(self.config, self._bounded_weights, notation, self.settings, "")
        with (
            serve_on_loopback(offer) as address,
            contextlib.closing(Client(*address, None, TIMEOUT_SECONDS, self.settings.protocol)) as client,
        ):
            for prompt in prompts:
                yield client.ask(Question(prompt, answers=answers))


@contextlib.contextmanager
def serve_on_loopback(
    offer: Offer, timeout_seconds: int = TIMEOUT_SECONDS, prepared: Path | None = None
) -> Iterator[tuple[str, int]]:
    """
    A server in a thread of this process, for as long as the context lasts.

    Args:
        offer ([`Offer`]): What it offers.
        timeout_seconds (`int`): For which nothing may happen in an inference.
        prepared (`Path`, *optional*): Folder for its halves of preparations.

    Returns:
        `tuple[str, int]`: Its address.

    Raises:
        `PrivateInferenceError`: What is raised within, with the server's last word.
    """
    said: queue.Queue[str] = queue.Queue()
    server = Server(offer, "127.0.0.1", 0, None, timeout_seconds, UNLIMITED, said.put, prepared=prepared)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.address
    except PrivateInferenceError as error:
        raise PrivateInferenceError(f"{error} The server: {_last_word(said)}") from error
    finally:
        server.close()


def _last_word(said: queue.Queue) -> str:
    """The last line, once there comes no other."""
    word = "nothing"
    with contextlib.suppress(queue.Empty):
        while True:
            word = said.get(timeout=SILENCE_SECONDS)
    return word
