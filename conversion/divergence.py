"""How far a converted model is from the original: in its answers, and in what it knows of a text."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from modeling_entropy_gpt import EntropyGPTForCausalLM


# Logits at a time, so that a large vocabulary does not ask for gigabytes.
MOST_LOGITS = 2**24


@dataclass(frozen=True)
class Divergence:
    """
    A model beside the original, on one text.

    Args:
        kl (`float`): Mean of KL(original || model) of the next token's distribution, in nats.
        nats (`float`): The model's mean negative log-likelihood of a token.
    """

    kl: float
    nats: float

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats)


@torch.no_grad()
def measure_divergence(
    original: EntropyGPTForCausalLM,
    models: Sequence[EntropyGPTForCausalLM],
    batches: Iterable[torch.Tensor],
    on_blocks: Callable[[int], None] = lambda count: None,
) -> list[Divergence]:
    """
    Holds several models against the original, over the predictions of each block on its own.

    Args:
        original ([`EntropyGPTForCausalLM`]): What the models were made of, in evaluation mode as they.
        models (`Sequence[EntropyGPTForCausalLM]`): The models, which may contain the original.
        batches (`Iterable[torch.Tensor]`): Blocks of tokens, `(batch, context)`.
        on_blocks: Called with the number of blocks after each batch, for progress.

    Returns:
        `list[Divergence]`: One for each model.
    """
    kl, nats, tokens = [0.0] * len(models), [0.0] * len(models), 0
    rows = max(1, MOST_LOGITS // original.config.vocab_size)
    for input_ids in batches:
        input_ids = input_ids.to(original.device)
        labels = input_ids[:, 1:].flatten()
        reference, *states = (_last_hidden_states(model, input_ids) for model in (original, *models))
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            expected = original.lm_head(reference[part]).float().log_softmax(dim=-1)
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
