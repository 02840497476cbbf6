# SPDX-License-Identifier: Apache-2.0
"""The penalty on attention entropies (arXiv 2501.03489, Algorithm 1), as pure functions of entropies and thresholds.

    delta   = entropy - theta * maximum          theta: learnable, one for each head of each layer
    penalty = delta ** 2  where  |delta| > gamma * maximum,  else 0

The paper leaves open what a batch, padding, packing, accumulation and several ranks do to it. Here it is computed for
each sequence on its own, from its valid rows alone, and averaged with the weights of the cross-entropy, the
predicted tokens: so it does not depend on how a batch is split, nor on whether sequences are packed in one row.
"""

import torch

from .attention_masks import to_boolean


def count_visible_keys(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_length: int | None = None
) -> torch.Tensor:
    """
    How many keys each query may attend to under a causal mask, padding left out.

    Args:
        position_ids (`torch.Tensor` of shape `(batch or 1, query_length)`):
            Positions; without a mask and a cache, a sequence begins anew wherever they do not rise by one (packing).
        attention_mask (`torch.Tensor`, *optional*):
            The model's mask: `(batch, past_length + query_length)`, 0 at padding, or 4D, boolean or additive.
        past_length (`int`, *optional*): Number of keys in the cache, if there is one.

    Returns:
        `torch.Tensor` of shape `(batch or 1, query_length)`, integer; 0 where the query itself is padding.
    """
    query_length = position_ids.shape[-1]
    if attention_mask is not None and attention_mask.ndim == 4:
        return to_boolean(attention_mask)[:, 0].sum(dim=-1)
    if attention_mask is not None:
        valid = attention_mask.long()
        first = 0 if past_length is None else past_length
        return (valid.cumsum(dim=-1) * valid)[:, first : first + query_length]
    index = torch.arange(query_length, device=position_ids.device).expand_as(position_ids)
    if past_length is not None:
        return index + 1 + past_length
    begins = (position_ids != position_ids.roll(1, dims=-1) + 1) | (index == 0)
    return index - index.where(begins, 0).cummax(dim=-1).values + 1


def number_sequences(visible_keys: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Which of the sequences packed in its row of the batch each position belongs to. One ends where no later position
    attends to it or to what stands before.

    Args:
        visible_keys (`torch.Tensor` of shape `(batch or 1, rows)`): Result of [`count_visible_keys`], without a past.
        attention_mask (`torch.Tensor`, *optional*):
            A 4D mask, boolean or additive. `None`: each position attends to the `visible_keys` up to itself.

    Returns:
        `torch.Tensor` of shape `(batch or 1, rows)`, integer: 0 for the first sequence of a row. Padding belongs to
        the sequence before it or, at a row's beginning, to the first.
    """
    index = torch.arange(visible_keys.shape[-1], device=visible_keys.device)
    is_valid = visible_keys > 0
    if attention_mask is None:
        first_keys = index + 1 - visible_keys
    else:
        first_keys = to_boolean(attention_mask)[:, 0].byte().argmax(dim=-1)
    first_keys = first_keys.where(is_valid, visible_keys.shape[-1])
    earliest_from_here = first_keys.flip(-1).cummin(dim=-1).values.flip(-1)
    begins = is_valid & (earliest_from_here >= index)
    return (begins.cumsum(dim=-1) - 1).clamp(min=0)


def entropy_penalty(
    entropies: torch.Tensor,
    thresholds: torch.Tensor,
    visible_keys: torch.Tensor,
    tolerance: float,
    maximum: str = "context",
    penalty: str = "head_mean",
    sequences: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The penalty of each sequence, averaged over layers and heads (Algorithm 1).

    Args:
        entropies (`torch.Tensor` of shape `(layers, batch, heads, rows)`): Row entropies in nats.
        thresholds (`torch.Tensor` of shape `(layers, heads)`): Theta, as a part of the largest entropy.
        visible_keys (`torch.Tensor` of shape `(batch or 1, rows)`):
            Number of keys a row attends to; rows with 0 are padding and left out.
        tolerance (`float`): Gamma, the margin as a part of the largest entropy.
        maximum (`str`):
            `"context"`: log T, with T the sequence's longest row (the paper), or `"causal"`: log i for the row with i
            visible keys, which is the most that it can have.
        penalty (`str`):
            `"head_mean"`: of each head's mean entropy (Algorithm 1); `"row_mean"`: of each row's entropy, averaged;
            `"row_sum"`: of each row's entropy, summed (the paper's public code).
        sequences (`torch.Tensor` of shape `(batch or 1, rows)`, *optional*):
            Result of [`number_sequences`], where several may be packed in one row of the batch.

    Returns:
        `torch.Tensor` of shape `(batch,)`; with `sequences`, of shape `(batch, rows)`: the penalty of each sequence
        that a row of the batch holds, and 0 where there is no such sequence.
    """
    deviation, exceeds, valid = _deviation(entropies, thresholds, visible_keys, tolerance, maximum, penalty, sequences)
    excess = torch.where(exceeds, deviation.square(), 0.0)
    if penalty == "row_mean":
        excess = _mean_over_rows(excess, valid, sequences)
    elif penalty == "row_sum":
        excess = _sum_over_rows(excess * valid, sequences)
    penalties = excess.mean(dim=(0, 2))
    return penalties.squeeze(-1) if sequences is None else penalties


def log_sum_penalty(
    deviations: torch.Tensor, visible_keys: torch.Tensor, sequences: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The mean square of what rows' log-sum-exp of scores is off their shift, of each sequence: over layers, heads and
    valid rows.

    Args:
        deviations (`torch.Tensor` of shape `(layers, batch, heads, rows)`): Log-sum-exp less shift, in nats.
        visible_keys, sequences: As for [`entropy_penalty`].

    Returns:
        `torch.Tensor` of the shape that [`entropy_penalty`] has.
    """
    valid = (visible_keys > 0).to(deviations.dtype)[:, None]
    penalties = _mean_over_rows(deviations.square(), valid, sequences).mean(dim=(0, 2))
    return penalties.squeeze(-1) if sequences is None else penalties


def penalized_share(
    entropies: torch.Tensor,
    thresholds: torch.Tensor,
    visible_keys: torch.Tensor,
    tolerance: float,
    maximum: str = "context",
    penalty: str = "head_mean",
    sequences: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The share of each sequence's heads, over all layers, whose deviation exceeds the margin; where rows are penalised
    one by one (`"row_mean"` and `"row_sum"`), the share of the valid rows of all heads.

    Args:
        entropies, thresholds, visible_keys, tolerance, maximum, penalty, sequences: As for [`entropy_penalty`].

    Returns:
        `torch.Tensor` of the shape that [`entropy_penalty`] has; 0 where no row is valid.
    """
    _, exceeds, valid = _deviation(entropies, thresholds, visible_keys, tolerance, maximum, penalty, sequences)
    share = exceeds.to(entropies.dtype)
    if penalty != "head_mean":
        share = _mean_over_rows(share, valid, sequences)
    shares = share.mean(dim=(0, 2))
    return shares.squeeze(-1) if sequences is None else shares


def _deviation(entropies, thresholds, visible_keys, tolerance, maximum, penalty, sequences):
    """
    Delta, whether it exceeds the margin, and which rows are valid, as numbers. The first two are of shape
    `(layers, batch, heads, 1)` for `"head_mean"` (with `sequences`, `rows` in place of 1), else
    `(layers, batch, heads, rows)`.
    """
    valid = (visible_keys > 0).to(entropies.dtype)[:, None]  # (batch or 1, 1, rows)
    keys = visible_keys.clamp(min=1)
    if maximum == "context":
        keys = _largest_over_rows(keys, sequences)
    row_maximum = keys.to(entropies.dtype).log()[:, None]
    thresholds = thresholds.to(entropies.dtype)[:, None, :, None]  # (layers, 1, heads, 1)

    if penalty == "head_mean":
        entropies = _mean_over_rows(entropies, valid, sequences)
        row_maximum = _mean_over_rows(row_maximum, valid, sequences)
    deviation = entropies - thresholds * row_maximum
    return deviation, deviation.abs() > tolerance * row_maximum, valid


def _largest_over_rows(keys: torch.Tensor, sequences: torch.Tensor | None) -> torch.Tensor:
    """Of each sequence the largest number, at all of its rows; `(batch or 1, rows)` to the same."""
    if sequences is None:
        return keys.amax(dim=-1, keepdim=True).expand_as(keys)
    return torch.zeros_like(keys).scatter_reduce(-1, sequences, keys, "amax").gather(-1, sequences)


def _sum_over_rows(values: torch.Tensor, sequences: torch.Tensor | None) -> torch.Tensor:
    """
    Sum over the rows, `(..., batch or 1, n, rows)`, which are 1 then; or, with `sequences`, the sum over those of each
    sequence, and 0 where there is no such sequence.
    """
    if sequences is None:
        return values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(values).scatter_add(-1, sequences[:, None].expand_as(values), values)


def _mean_over_rows(values: torch.Tensor, valid: torch.Tensor, sequences: torch.Tensor | None) -> torch.Tensor:
    """Mean over the valid rows, in the shape of [`_sum_over_rows`]; 0 where no row is valid."""
    return _sum_over_rows(values * valid, sequences) / _sum_over_rows(valid, sequences).clamp(min=1)


def count_tokens(predicted: torch.Tensor, sequences: torch.Tensor | None = None) -> torch.Tensor:
    """
    The number of predicted tokens of each sequence, by which sequences are weighted.

    Args:
        predicted (`torch.Tensor` of shape `(batch, rows)`): Whether the cross-entropy is of the token after each row.
        sequences (`torch.Tensor` of shape `(batch or 1, rows)`, *optional*): As for [`entropy_penalty`].

    Returns:
        `torch.Tensor` of the shape that [`entropy_penalty`] has, integer.
    """
    if sequences is None:
        return predicted.sum(dim=-1)
    sequences = sequences.expand_as(predicted)
    return torch.zeros_like(sequences).scatter_add(-1, sequences, predicted.long())


def mean_over_sequences(values: torch.Tensor, sequences: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of values of the shape that [`entropy_penalty`] has, in which all sequences weigh the same."""
    if sequences is None:
        return values.mean()
    return values.sum() / (sequences[:, -1] + 1).expand(len(values)).sum()


def reduce_over_batch(
    penalties: torch.Tensor,
    predicted_tokens: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    penalty: str,
) -> torch.Tensor:
    """
    One number for the batch, such that the parts of a split batch add up to that of the whole.

    Args:
        penalties (`torch.Tensor` of shape `(batch,)` or `(batch, rows)`): Result of [`entropy_penalty`].
        predicted_tokens (`torch.Tensor` of the same shape): Result of [`count_tokens`].
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Predicted tokens of the whole batch, over all its parts and ranks. `None`: this is the whole batch.
        penalty (`str`): As for [`entropy_penalty`]; `"row_sum"` is a sum over the batch too, the others are means.
    """
    if penalty == "row_sum":
        return penalties.sum()
    return mean_over_tokens(penalties, predicted_tokens, num_items_in_batch)


def mean_over_tokens(
    values: torch.Tensor, predicted_tokens: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """
    The mean of values of sequences, weighted by their predicted tokens; parts of a batch add up. The shapes are those
    of [`reduce_over_batch`].
    """
    if num_items_in_batch is None:
        num_items_in_batch = predicted_tokens.sum().clamp(min=1)
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(values.device)
    return (values * predicted_tokens).sum() / num_items_in_batch


__all__ = [
    "count_tokens",
    "count_visible_keys",
    "entropy_penalty",
    "log_sum_penalty",
    "mean_over_sequences",
    "mean_over_tokens",
    "number_sequences",
    "penalized_share",
    "reduce_over_batch",
]
