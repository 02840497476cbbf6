"""What the attention heads of a model do, told by the Shannon entropy of their rows (arXiv 2501.03489, section 3)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from .perplexity import batches, evaluation_mode


# A head counts as overloaded from this part of the largest possible mean entropy on: the paper's highest quarter.
OVERLOAD = 3 / 4


@dataclass(frozen=True)
class HeadwiseEntropy:
    """
    Mean entropy of the attention rows of each head.

    Args:
        nats (`list[list[float]]`): Mean row entropy of each head of each layer, `(layers, heads)`.
        maximum (`float`):
            The largest possible mean, in nats: that of a head which spreads its attention evenly over the keys that
            the causal mask shows it, the mean of log i over rows with i keys. It is below log T, which no row but
            the last can reach.
    """

    nats: list[list[float]]
    maximum: float

    @property
    def mean(self) -> float:
        """Mean over all heads, in nats."""
        return torch.tensor(self.nats).mean().item()

    @property
    def overloaded_share(self) -> float:
        """Share of heads with at least 3/4 of the maximum: entropic overload."""
        return (torch.tensor(self.nats) >= OVERLOAD * self.maximum).float().mean().item()


def measure_headwise_entropy(
    model: PreTrainedModel,
    blocks: Dataset,
    batch_size: int = 32,
    on_blocks: Callable[[int], None] = lambda count: None,
) -> HeadwiseEntropy:
    """
    Averages the row entropies of every head over all rows of all blocks.

    Args:
        model (`PreTrainedModel`): An EntropyGPT of any head; evaluated without dropout.
        blocks (`Dataset`): Column `input_ids`, of equal length, as `training.data.pack` makes it.
        batch_size (`int`): Blocks in a forward pass.
        on_blocks: Called with the number of blocks after each forward pass, for progress.
    """
    total, maximum, rows = 0.0, 0.0, 0
    with evaluation_mode(model):
        for input_ids in batches(blocks, batch_size, model.device):
            outputs = model(input_ids, use_cache=False, output_entropies=True)
            entropies = torch.stack(outputs.attention_entropies).double()  # (layers, batch, heads, rows)
            total = total + entropies.sum(dim=(1, 3)).cpu()
            maximum += outputs.visible_keys.double().log().expand(input_ids.shape).sum().item()
            rows += input_ids.numel()
            on_blocks(len(input_ids))
    return HeadwiseEntropy((total / rows).tolist(), maximum / rows)
