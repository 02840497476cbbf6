"""Inferences of random models: measured between two processes, and kept with their conditions."""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from entropy_gpt.evaluation.private_inference.inference import (
    NETWORKS,
    TIMEOUT_SECONDS,
    TWO_PARTY,
    serve_on_loopback,
)
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.session import Outcome
from entropy_gpt.evaluation.private_inference.parties.slow_link import SlowLink
from entropy_gpt.evaluation.private_inference.parties.terms import Offer, Terms
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost
from entropy_gpt.evaluation.private_inference.program.networks import LOOPBACK, Network
from entropy_gpt.evaluation.private_inference.program.program import build_steps, check_config
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .cost_model import PredictedStep, predict, predict_phases, program_config


# Embeddings so far apart that attention is not uniform.
EMBEDDING_SCALE = 20
# What distinguishes a record from those of other inferences.
CONDITIONS = (
    "notation",
    "n_layer",
    "n_embd",
    "n_head",
    "vocab_size",
    "context",
    "answers",
    "network",
    "git_revision",
    "machine",
)


@dataclass(frozen=True)
class Inference:
    """
    An inference that can be measured: random weights, a random prompt, and the logits of its last position.

    Args:
        title (`str`): What it is called.
        config ([`EntropyGPTConfig`]): The model.
        settings ([`PrivateSettings`]): The form of each operation.
        context (`int`): Tokens of the prompt.
        is_prepared (`bool`): Whether what needs no prompt is done before it comes.
    """

    title: str
    config: EntropyGPTConfig
    settings: PrivateSettings
    context: int
    is_prepared: bool = False

    def predict(self) -> list[PredictedStep]:
        """What its steps take, by the cost model, those before the prompt first."""
        span = Span(0, self.context)
        if not self.is_prepared:
            return predict(self.config, self.settings, span)
        before, after = predict_phases(self.config, self.settings, [span])
        return before + after

    def predict_bytes(self) -> float:
        """What both parties send, by the cost model."""
        return sum(step.total_bytes for step in self.predict())

    def measure(
        self,
        new_tokens: int = 1,
        timeout_seconds: int = TIMEOUT_SECONDS,
        on_event: Callable[[dict], None] = lambda event: None,
    ) -> InferenceCost:
        """
        Runs it between two processes over this machine's loopback.

        Args:
            new_tokens (`int`): Number of tokens in the answer.
            timeout_seconds (`int`): For which nothing may happen.
            on_event (`Callable`): As of [`Client.ask`].

        Raises:
            `PrivateInferenceError`: If the engine fails.
        """
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared" if self.is_prepared else None
            with self._served(timeout_seconds, prepared) as address:
                return self._ask(address, new_tokens, timeout_seconds, on_event, prepared)

    def measure_slowed(self, network: Network, layer: int) -> InferenceCost:
        """
        As [`Inference.measure`], with the loopback slowed to a network while one layer is computed.

        Args:
            network ([`Network`]): As of [`SlowLink`].
            layer (`int`): The layer, of a program without the FFNs that are absorbed.

        Raises:
            `PrivateInferenceError`: If the engine fails.
        """
        steps = build_steps(program_config(self.config), self.settings, Span(0, self.context))
        slow = iter([*(step.layer == layer for step in steps), False])
        next(slow)
        with (
            self._served(TIMEOUT_SECONDS) as address,
            contextlib.closing(SlowLink(address)) as link,
        ):

            def change_network(event: dict):
                if event["event"] == "step":
                    link.network = network if next(slow) else LOOPBACK

            cost = self._ask(link.address, 1, TIMEOUT_SECONDS, change_network)
        return replace(cost, network=f"{cost.network}, layer {layer} slowed to {network.name}")

    def _served(
        self, timeout_seconds: int, prepared: Path | None = None
    ) -> contextlib.AbstractContextManager[tuple[str, int]]:
        config, weights = prepare_weights(make_random_model(self.config))
        offer = Offer(config, weights, self.config.notation, self.settings, "")
        return serve_on_loopback(offer, timeout_seconds, prepared)

    def _ask(
        self,
        address: tuple[str, int],
        new_tokens: int,
        timeout_seconds: int,
        on_event: Callable[[dict], None],
        prepared: Path | None = None,
    ) -> InferenceCost:
        prompt = np.random.default_rng(0).integers(0, self.config.vocab_size, self.context).tolist()
        with contextlib.closing(Client(*address, None, timeout_seconds, prepared=prepared)) as client:
            if self.is_prepared:
                client.prepare(len(prompt), new_tokens, on_event=on_event)
            outcome = client.ask(Question(prompt, new_tokens), on_event, require_prepared=self.is_prepared)
        return self._record(outcome, new_tokens)

    def load_measured(self, path: Path) -> InferenceCost | None:
        """
        What an earlier run has saved of it, if it has.

        Raises:
            `ValueError`: If the record is broken, or of other conditions.
        """
        if not path.exists():
            return None
        cost = InferenceCost.load(path)
        then, now = _conditions(cost), _conditions(self._record(Outcome(), 1))
        changed = [
            f"{name} {then.get(name)} then, {value} now" for name, value in now.items() if then.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{path} was measured under other conditions ({'; '.join(changed)}): delete it, or measure into "
                "another folder."
            )
        return cost

    def _record(self, outcome: Outcome, new_tokens: int) -> InferenceCost:
        terms = Terms(self.config, self.config.notation, self.settings, "")
        return outcome.cost(terms, self.context, new_tokens, NETWORKS[TWO_PARTY])


def _conditions(cost: InferenceCost) -> dict[str, object]:
    settings = asdict(cost.settings)
    settings["forms for"] = settings.pop("network")  # not what connected the parties
    return {name: getattr(cost, name) for name in CONDITIONS} | settings | cost.versions


def make_random_model(config: EntropyGPTConfig) -> EntropyGPTForCausalLM:
    """Random weights, with embeddings so far apart that attention is not uniform."""
    torch.manual_seed(0)
    model = EntropyGPTForCausalLM(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight *= EMBEDDING_SCALE
    return model


def make_config(notation: str, context: int, **sizes) -> EntropyGPTConfig:
    """
    A model with random weights and without special tokens.

    Raises:
        `ValueError`: If the notation is not known, or the sizes do not fit.
        `PrivateInferenceError`: If an operation has no private form.
    """
    tokens = {"n_positions": context, "bos_token_id": None, "eos_token_id": None}
    config = EntropyGPTConfig.from_notation(notation, **sizes, **tokens)
    check_config(config)
    return config
