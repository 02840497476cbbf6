"""How far a converted model is from the original: in its answers, and in what it knows of a text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modeling_entropy_gpt import EntropyGPTForCausalLM


# Logits at a time, so that a large vocabulary does not ask for gigabytes.
MOST_LOGITS = 2**24


@dataclass(frozen=True)
class Divergence:
    """
    A model compared with the original, on one text.

    Args:
        kl (`float`): Mean of KL(original || model) of the next token's distribution, in nats.
        nats (`float`): The model's mean negative log-likelihood of a token.
    """

    kl: float
    nats: float

    @property
    def is_finite(self) -> bool:
        """Whether the model gave numbers at all."""
        return math.isfinite(self.kl) and math.isfinite(self.nats)


class Reference:
    """
    The original, whose states over a text are computed once, and what else is held against it.

    Args:
        original ([`EntropyGPTForCausalLM`]): What the models are made of, in evaluation mode as they.
        batches (`Sequence[torch.Tensor]`): Blocks of tokens, `(batch, context)`, predicted each on its own. The
            original's last hidden states are kept for each of these tokens.
    """

    def __init__(self, original: EntropyGPTForCausalLM, batches: Sequence[torch.Tensor]):
        self.original, self.batches = original, batches
        self._states: list[torch.Tensor] = []

    @torch.no_grad()
    def compare(
        self, models: Sequence[EntropyGPTForCausalLM], on_blocks: Callable[[int], None] = lambda count: None
    ) -> list[Divergence]:
        """
        Holds several models against the original.

        Args:
            models (`Sequence[EntropyGPTForCausalLM]`): The models, which may contain the original.
            on_blocks: Called with the number of blocks after each batch, for progress.

        Returns:
            `list[Divergence]`: One for each model.
        """
        kl, nats, tokens = [0.0] * len(models), [0.0] * len(models), 0
        rows = max(1, MOST_LOGITS // self.original.config.vocab_size)
        for number, input_ids in enumerate(self.batches):
            input_ids = input_ids.to(self.original.device)
            labels = input_ids[:, 1:].flatten()
            if number == len(self._states):
                self._states.append(_last_hidden_states(self.original, input_ids))
            reference = self._states[number]
            states = [
                reference if model is self.original else _last_hidden_states(model, input_ids) for model in models
            ]
            for start in range(0, len(labels), rows):
                part = slice(start, start + rows)
                expected = self.original.lm_head(reference[part]).float().log_softmax(dim=-1)
                for index, model in enumerate(models):
                    found = model.lm_head(states[index][part]).float().log_softmax(dim=-1)
                    divergence = nn.functional.kl_div(found, expected, reduction="none", log_target=True).sum(dim=-1)
                    kl[index] += divergence.double().sum().item()
                    nats[index] -= found.gather(-1, labels[part, None]).double().sum().item()
            tokens += len(labels)
            on_blocks(len(input_ids))
        return [Divergence(kl[index] / tokens, nats[index] / tokens) for index in range(len(models))]


def _last_hidden_states(model: EntropyGPTForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """What the head reads for each prediction, `(predictions, n_embd)`."""
    return model.transformer(input_ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
