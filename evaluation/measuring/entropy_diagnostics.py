"""What attention heads do: Shannon entropy of their rows (arXiv 2501.03489, section 3), sinks, diversity."""

import bisect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from pydantic.dataclasses import dataclass
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from entropy_gpt.evaluation.json_records import RECORD
from modeling_entropy_gpt import EntropyGPTPreTrainedModel
from modeling_entropy_gpt.attention_functions import log_function, row_floors
from modeling_entropy_gpt.attention_weights import LOG2_E
from modeling_entropy_gpt.entropy_attention import attend_rows

from .modes import evaluation_mode
from .perplexity import batches


if TYPE_CHECKING:
    from datasets import Dataset


# A head counts as overloaded from this part of the largest possible mean entropy on: the paper's highest quarter.
OVERLOAD = 3 / 4
# And as collapsed below this part of it.
COLLAPSE = 0.05
# The paper's ranges, parts of a maximum: [0, 1/4), [1/4, 1/2), [1/2, 3/4), [3/4, 1]. Here is where all but the first
# begin.
RANGE_BEGINNINGS = (1 / 4, 1 / 2, OVERLOAD)

QUANTILE_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
# For the quantiles, row entropies are counted by the nearest of 0, 1 / 4096, 2 / 4096 ... of log T.
ENTROPY_STEPS = 4096
# The largest number of rows of a sequence from which the diversity is taken.
DIVERSITY_ROWS = 64
# Enough for three right digits of a singular value, however close the others come (see `logit_spectral_norms`).
SQUARINGS = 10
# Longer than any sequence.
LONGEST = 1 << 24


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
    def length(self) -> int:
        """Tokens T of a sequence: those for which the mean of log i over rows with i keys is the maximum."""
        lengths = range(1, LONGEST)
        return lengths[bisect.bisect_left(lengths, self.maximum * (1 - 1e-10), key=uniform_mean)]

    def uniform_quantile(self, level: float) -> float:
        """
        A quantile of the row entropies of uniform attention, in nats.

        Args:
            level (`float`): Such as 0.5 for the median, which is above the mean: log i over rows with i keys.
        """
        rank = level * (self.length - 1)
        below, above = (math.log(1 + edge) for edge in (math.floor(rank), math.ceil(rank)))
        return below + (above - below) * (rank % 1)

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
    What attention heads do on a text. Lists of heads are `(layers, heads)`; a broken model gives NaN.

    Args:
        entropy ([`HeadwiseEntropy`]): Mean row entropy of each head.
        quantile_levels (`list[float]`): Which quantiles are given, such as 0.05 and 0.5.
        entropy_quantiles (`list[list[list[float]]]`):
            Quantiles of each head's row entropies in nats, `(layers, heads, levels)`, right to log(T) / 8192,
            with linear interpolation between two rows as in `torch.quantile`.
        sink_share (`list[list[float]]`): Mean probability of the first key, over rows that see others too.
        uniform_sink_share (`float`): The same of a head that spreads its attention evenly.
        diversity (`list[float]`):
            How much the heads of a layer differ: the Jensen-Shannon divergence of their rows in nats, the entropy of
            the heads' mean row less the mean of their entropies, averaged over rows; at most log(heads).
        logit_spectral_norms (`list[list[float]]`):
            Largest singular value of a head's matrix of attention logits, `(T, T)`, unmasked, with scaling and
            temperature, averaged over sequences; right to a thousandth.
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


def uniform_mean(length: int) -> float:
    """Mean row entropy of uniform attention to a sequence of this length, in nats: the mean of log i over its rows."""
    return math.lgamma(length + 1) / length


def diagnose_heads(
    model: EntropyGPTPreTrainedModel,
    blocks: "Dataset",
    batch_size: int = 32,
    on_blocks: Callable[[int], None] = lambda count: None,
) -> HeadDiagnostics:
    """
    Looks at every head's attention to a text. No attention matrix is kept: memory is linear in the length T of the
    sequences, and does not depend on their number. The numbers do not depend on how sequences are batched.

    Args:
        model ([`EntropyGPTPreTrainedModel`]):
            An EntropyGPT of any head, such as one converted from a GPT-2; evaluated as it stands, without dropout.
        blocks (`Dataset`): Column `input_ids`, sequences of one length without padding, each read from its beginning.
        batch_size (`int`): Blocks in a forward pass; it changes speed and memory alone.
        on_blocks: Called with the number of blocks after each forward pass, for progress.

    Raises:
        `ValueError`: If there are no blocks, or they are not of one length of at least 2 tokens.
    """
    length = _common_length(blocks)
    devices = [block.attn.c_attn.weight.device for block in model.base_model.h]
    layers = [_LayerSums(model.config.n_head, length, device) for device in devices]
    with evaluation_mode(model), _watched_attention(model, layers):
        for input_ids in batches(blocks, batch_size, model.device):
            model.base_model(input_ids, use_cache=False)
            on_blocks(len(input_ids))
    return HeadDiagnostics(
        entropy=HeadwiseEntropy([layer.mean_entropies() for layer in layers], uniform_mean(length)),
        quantile_levels=list(QUANTILE_LEVELS),
        entropy_quantiles=[layer.entropy_quantiles() for layer in layers],
        sink_share=[layer.sink_shares() for layer in layers],
        uniform_sink_share=sum(1 / keys for keys in range(2, length + 1)) / (length - 1),
        diversity=[layer.diversity() for layer in layers],
        logit_spectral_norms=[layer.spectral_norms() for layer in layers],
        rows=len(blocks) * length,
        diversity_rows=len(blocks) * min(DIVERSITY_ROWS, length),
    )


def _common_length(blocks: "Dataset") -> int:
    """The length of all blocks; `ValueError` if there is no such one, or it is too short."""
    if not len(blocks):
        raise ValueError("There are no blocks: give at least one, of at least 2 tokens.")
    import pyarrow.compute  # the datasets' own: a model's records are read without it

    rows = blocks.with_format("arrow")[:]["input_ids"]
    lengths = sorted(pyarrow.compute.unique(pyarrow.compute.list_value_length(rows)).to_pylist())
    if len(lengths) > 1:
        raise ValueError(f"The blocks have {lengths[0]} to {lengths[-1]} tokens: cut them to one length.")
    if lengths[0] < 2:
        raise ValueError(f"Blocks of {lengths[0]} token have no row with a choice between keys: give at least 2.")
    return lengths[0]


@contextmanager
def _watched_attention(model: EntropyGPTPreTrainedModel, layers: "list[_LayerSums]") -> Iterator[None]:
    """Causal attention that adds up what it sees, layer by layer, for the body; afterwards the model's own again."""

    def attend(module, query, key, value, attention_mask, scaling, shift=None, **kwargs):
        function = module.config.attention_function
        output, entropies, log_sums = attend_rows(query, key, value, None, True, scaling, 0.0, function, shift)
        layers[module.layer_idx].add(Rows(query, key, log_sums, scaling, function, shift), entropies)
        return output.transpose(1, 2), None

    attend.serves_every_function = True
    own = model.config._attn_implementation
    watched = f"watched_{id(layers)}"  # two models may be looked at in two threads
    ALL_ATTENTION_FUNCTIONS[watched] = attend
    model.config._attn_implementation = watched
    try:
        yield
    finally:
        model.config._attn_implementation = own
        del ALL_ATTENTION_FUNCTIONS[watched]


def logit_spectral_norms(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    Largest singular value of the logits S = scaling * Q K^T of every query and every key, later ones too.

    Its square is the largest eigenvalue of M = scaling^2 (Q^T Q)(K^T K), which has the size of a head whatever the
    length. tr(M^(n+1)) / tr(M^n) is the mean of M's eigenvalues, none of which is negative, weighted by their n-th
    powers. With n = 2^11, reached by squaring, its root is too small by a thousandth at most for heads of up to 256,
    and hardly at all if the largest eigenvalue stands alone.

    Args:
        query, key (`torch.Tensor` of shape `(..., rows, head_dim)`): With temperatures, without scaling.
        scaling (`float`): What the products are multiplied by.

    Returns:
        `torch.Tensor` of shape `(...,)`, float64.
    """
    query, key = (states.to(torch.float64, memory_format=torch.contiguous_format) for states in (query, key))
    product = (query.mT @ query) @ (key.mT @ key)
    tiny = torch.finfo(product.dtype).tiny  # of a matrix of zeros, 0 is left
    power = product
    for _ in range(SQUARINGS):
        power = power / torch.linalg.matrix_norm(power)[..., None, None].clamp(min=tiny)
        power = power @ power
    weight = (power * power.mT).sum(dim=(-2, -1))
    weighted = (power @ product * power.mT).sum(dim=(-2, -1))
    return scaling * (weighted / weight.clamp(min=tiny)).clamp(min=0).sqrt()


class Rows(NamedTuple):
    """
    Causal attention of some sequences, of which any part of the probabilities can be had.

    Args:
        query, key (`torch.Tensor` of shape `(batch, heads, rows, head_dim)`): With temperatures, without scaling.
        log_sums (`torch.Tensor` of shape `(batch, heads, rows)`):
            Logarithm to base 2 of the sum of the attention function over each row.
        scaling (`float`): What the products are multiplied by.
        function (`str`): The attention function.
        shift (`torch.Tensor`, broadcastable to `(batch, heads, rows)`, *optional*): The shift of each row's scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    log_sums: torch.Tensor
    scaling: float
    function: str = "softmax"
    shift: torch.Tensor | None = None

    def probabilities(self, rows: torch.Tensor, keys: slice) -> torch.Tensor:
        """Those of some rows and keys, `(batch, heads, rows, keys)`, as if no key were hidden."""
        dtype = self.log_sums.dtype
        logits = torch.matmul(self.query[:, :, rows].to(dtype), self.key[:, :, keys].to(dtype).mT).mul_(self.scaling)
        if self.function != "softmax":
            floors = row_floors(None, True, self.query.shape[2], self.key.shape[2], logits.device)
            logits = log_function(logits - self.shift[:, :, rows, None], self.function, floors[:, :, rows, None])
        return logits.mul_(LOG2_E).sub_(self.log_sums[:, :, rows, None]).exp2_()


def first_key_probabilities(attention: Rows) -> torch.Tensor:
    """The probability of the first key in each row but the first, of shape `(batch, heads, rows - 1)`."""
    rows = torch.arange(1, attention.query.shape[2], device=attention.query.device)
    return attention.probabilities(rows, slice(1)).squeeze(-1)


def head_divergences(attention: Rows, entropies: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """
    How much the heads differ in some rows: H(mean over heads of P) - mean over heads of H(P), the Jensen-Shannon
    divergence in nats, of shape `(batch, len(rows))`.

    Args:
        attention ([`Rows`]): The attention of the heads.
        entropies (`torch.Tensor` of shape `(batch, heads, rows)`): In nats.
        rows (`torch.Tensor` of integers): Which rows.
    """
    later = torch.arange(attention.key.shape[2], device=rows.device) > rows[:, None]
    probabilities = attention.probabilities(rows, slice(None)).masked_fill_(later, 0.0)
    entropy_of_mean = torch.special.entr(probabilities.mean(dim=1)).sum(dim=-1)
    return (entropy_of_mean - entropies[:, :, rows].mean(dim=1)).clamp(min=0)  # below 0 by rounding alone


class _LayerSums:
    """
    Sums over sequences of what the heads of a layer do.

    Args:
        heads (`int`): Number of heads in the layer.
        length (`int`): Rows of a sequence.
        device (`torch.device`): Where the sums are kept.
    """

    def __init__(self, heads: int, length: int, device: torch.device):
        self.sequences, self.length = 0, length
        self._entropies, self._first_key, self._norms = torch.zeros(3, heads, dtype=torch.float64, device=device)
        self._divergence = torch.zeros((), dtype=torch.float64, device=device)
        self._histogram = torch.zeros(heads, ENTROPY_STEPS + 1, dtype=torch.int64, device=device)
        count = min(DIVERSITY_ROWS, length)
        self._rows = ((torch.arange(count, device=device) + 0.5) * length / count).long()

    def add(self, attention: Rows, entropies: torch.Tensor):
        """Adds a batch of sequences; arguments as for [`head_divergences`]."""
        self.sequences += len(entropies)
        self._entropies += entropies.sum(dim=(0, 2), dtype=torch.float64)
        self._first_key += first_key_probabilities(attention).sum(dim=(0, 2), dtype=torch.float64)
        self._norms += logit_spectral_norms(attention.query, attention.key, attention.scaling).sum(dim=0)
        divergences = head_divergences(attention, entropies, self._rows)
        self._divergence += divergences.sum(dtype=torch.float64)
        self._histogram += self._count(entropies)

    def _count(self, entropies: torch.Tensor) -> torch.Tensor:
        """How many rows of each head are nearest to each step."""
        steps = entropies * (ENTROPY_STEPS / math.log(self.length))
        steps = steps.nan_to_num().round().long().clamp(0, ENTROPY_STEPS)
        heads, width = self._histogram.shape
        steps += width * torch.arange(heads, device=steps.device)[:, None]
        return torch.bincount(steps.flatten(), minlength=heads * width).view(heads, width)

    def mean_entropies(self) -> list[float]:
        """In nats, `(heads,)`."""
        return (self._entropies / (self.sequences * self.length)).tolist()

    def entropy_quantiles(self) -> list[list[float]]:
        """In nats, `(heads, levels)`; NaN for a head with a row that has no entropy."""
        ranks = torch.tensor(QUANTILE_LEVELS, dtype=torch.float64) * (self.sequences * self.length - 1)
        reached = self._histogram.cumsum(dim=1).double().cpu()
        below, above = (
            torch.searchsorted(reached, rank.expand(len(reached), -1).contiguous(), right=True).double()
            for rank in (ranks.floor(), ranks.ceil())
        )
        quantiles = below.lerp(above, ranks.frac()) * (math.log(self.length) / ENTROPY_STEPS)
        return quantiles.where(~self._entropies.isnan().cpu()[:, None], math.nan).tolist()

    def sink_shares(self) -> list[float]:
        """`(heads,)`."""
        return (self._first_key / (self.sequences * (self.length - 1))).tolist()

    def diversity(self) -> float:
        """In nats."""
        return (self._divergence / (self.sequences * len(self._rows))).item()

    def spectral_norms(self) -> list[float]:
        """`(heads,)`."""
        return (self._norms / self.sequences).tolist()
