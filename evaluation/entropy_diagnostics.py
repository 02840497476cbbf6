"""What the attention heads of a model do, told by the Shannon entropy of their rows (arXiv 2501.03489, section 3)."""

import math
from collections.abc import Callable

import torch
from datasets import Dataset
from pydantic.dataclasses import dataclass
from transformers import PreTrainedModel

from .perplexity import batches, evaluation_mode
from .records import RECORD


# A head counts as overloaded from this part of the largest possible mean entropy on: the paper's highest quarter.
OVERLOAD = 3 / 4
# And as collapsed below this part of it.
COLLAPSE = 0.05
# The paper's ranges, parts of a maximum: [0, 1/4), [1/4, 1/2), [1/2, 3/4), [3/4, 1]. Here is where all but the first
# begin.
RANGE_BEGINNINGS = (1 / 4, 1 / 2, OVERLOAD)


@dataclass(config=RECORD)
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
        return self.range_shares()[-1]

    @property
    def collapsed_share(self) -> float:
        """Share of heads with less than 5 % of the maximum: entropy collapse."""
        return (self._values < COLLAPSE * self.maximum).double().mean().item()

    @property
    def largest(self) -> float:
        """The largest value seen, in nats; NaN if no head has one."""
        return max((value for row in self.nats for value in row if not math.isnan(value)), default=math.nan)

    def range_shares(self, maximum: float | None = None) -> list[float]:
        """
        Shares of heads in [0, 1/4), [1/4, 1/2), [1/2, 3/4) and [3/4, 1] of a maximum. Heads without a value are in
        none of them, so the shares then sum to less than 1.

        Args:
            maximum (`float`, *optional*): In nats; the largest possible mean, if not given.
        """
        maximum = self.maximum if maximum is None else maximum
        beginnings = [-math.inf, *(part * maximum for part in RANGE_BEGINNINGS)]
        reached = [(self._values >= beginning).sum().item() for beginning in beginnings]
        return [
            (heads - above) / self._values.numel() for heads, above in zip(reached, [*reached[1:], 0], strict=True)
        ]

    @property
    def _values(self) -> torch.Tensor:
        return torch.tensor(self.nats, dtype=torch.float64)


@dataclass(config=RECORD)
class HeadDiagnostics:
    """
    What the attention heads of a model do on a text. Lists of heads are `(layers, heads)`.

    Args:
        entropy ([`HeadwiseEntropy`]): Mean row entropy of each head.
        quantile_levels (`list[float]`): Which quantiles are given, such as 0.05 and 0.5.
        entropy_quantiles (`list[list[list[float]]]`):
            Quantiles of each head's row entropies in nats, `(layers, heads, levels)`.
        sink_share (`list[list[float]]`): Mean probability of the first key, over rows that see others too.
        uniform_sink_share (`float`): The same of a head that spreads its attention evenly.
        diversity (`list[float]`):
            How much the heads of a layer differ: the Jensen-Shannon divergence of their rows in nats, the entropy of
            the heads' mean row less the mean of their entropies, averaged over rows; at most log(heads).
        logit_spectral_norms (`list[list[float]]`):
            Largest singular value of a head's matrix of attention logits, unmasked, averaged over sequences.
        rows (`int`): Rows of each head that were looked at.
        diversity_rows (`int`): Rows that the diversity was taken from, evenly spread over them.
    """

    entropy: HeadwiseEntropy
    quantile_levels: list[float]
    entropy_quantiles: list[list[list[float]]]
    sink_share: list[list[float]]
    uniform_sink_share: float
    diversity: list[float]
    logit_spectral_norms: list[list[float]]
    rows: int
    diversity_rows: int


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
        blocks (`Dataset`): Column `input_ids`, of equal length, as `training.packing.pack` makes it.
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
