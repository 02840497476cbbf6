# SPDX-License-Identifier: Apache-2.0
"""The penalty on attention entropies (arXiv 2501.03489, Algorithm 1), as pure functions of entropies and thresholds.

    delta   = entropy - theta * maximum          theta: learnable, one for each head of each layer
    penalty = delta ** 2  where  |delta| > gamma * maximum,  else 0

The paper leaves open what a batch, padding, accumulation and several ranks do to it. Here it is computed for each
sequence on its own, from its valid rows alone, and averaged with the weights of the cross-entropy beside it, the
predicted tokens: so it does not depend on how a batch is split.
"""

import torch

from .attention_masks import to_boolean


def count_visible_keys(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, past_length: int = 0
) -> torch.Tensor:
    """
    How many keys each query may attend to under a causal mask, padding left out.

    Args:
        position_ids (`torch.Tensor` of shape `(batch or 1, query_length)`):
            Positions; without a mask and a past, a sequence begins anew wherever they do not rise by one (packing).
        attention_mask (`torch.Tensor`, *optional*):
            The model's mask: `(batch, past_length + query_length)`, 0 at padding, or 4D, boolean or additive.
        past_length (`int`): Number of keys in the cache.

    Returns:
        `torch.Tensor` of shape `(batch or 1, query_length)`, integer; 0 where the query itself is padding.
    """
    query_length = position_ids.shape[-1]
    if attention_mask is not None and attention_mask.ndim == 4:
        return to_boolean(attention_mask)[:, 0].sum(dim=-1)
    if attention_mask is not None:
        valid = attention_mask.long()
        return (valid.cumsum(dim=-1) * valid)[:, past_length : past_length + query_length]
    index = torch.arange(query_length, device=position_ids.device).expand_as(position_ids)
    if past_length:
        return index + 1 + past_length
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    return index - index.where(begins, 0).cummax(dim=-1).values + 1


def entropy_penalty(
    entropies: torch.Tensor,
    thresholds: torch.Tensor,
    visible_keys: torch.Tensor,
    tolerance: float,
    maximum: str = "context",
    penalty: str = "head_mean",
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

    Returns:
        `torch.Tensor` of shape `(batch,)`.
    """
    deviation, exceeds, valid = _deviation(entropies, thresholds, visible_keys, tolerance, maximum, penalty)
    excess = torch.where(exceeds, deviation.square(), 0.0)
    if penalty == "row_mean":
        excess = _mean_over_rows(excess, valid)
    elif penalty == "row_sum":
        excess = (excess * valid).sum(dim=-1, keepdim=True)
    return excess.squeeze(-1).mean(dim=(0, 2))


def penalized_share(
    entropies: torch.Tensor,
    thresholds: torch.Tensor,
    visible_keys: torch.Tensor,
    tolerance: float,
    maximum: str = "context",
    penalty: str = "head_mean",
) -> torch.Tensor:
    """
    The share of each sequence's heads, over all layers, whose deviation exceeds the margin; where rows are penalised
    one by one (`"row_mean"` and `"row_sum"`), the share of the valid rows of all heads.

    Args:
        entropies, thresholds, visible_keys, tolerance, maximum, penalty: As for [`entropy_penalty`].

    Returns:
        `torch.Tensor` of shape `(batch,)`; 0 where no row is valid.
    """
    _, exceeds, valid = _deviation(entropies, thresholds, visible_keys, tolerance, maximum, penalty)
    share = exceeds.to(entropies.dtype)
    if penalty != "head_mean":
        share = _mean_over_rows(share, valid)
    return share.squeeze(-1).mean(dim=(0, 2))


def _deviation(entropies, thresholds, visible_keys, tolerance, maximum, penalty):
    """
    Delta, whether it exceeds the margin, and which rows are valid, as numbers. The first two are of shape
    `(layers, batch, heads, 1)` for `"head_mean"`, else `(layers, batch, heads, rows)`.
    """
    valid = (visible_keys > 0).to(entropies.dtype)[:, None]  # (batch or 1, 1, rows)
    keys = visible_keys.clamp(min=1).to(entropies.dtype)[:, None]
    row_maximum = keys.log() if maximum == "causal" else keys.amax(dim=-1, keepdim=True).log().expand_as(keys)
    thresholds = thresholds.to(entropies.dtype)[:, None, :, None]  # (layers, 1, heads, 1)

    if penalty == "head_mean":
        entropies = _mean_over_rows(entropies, valid)
        row_maximum = _mean_over_rows(row_maximum, valid)
    deviation = entropies - thresholds * row_maximum
    return deviation, deviation.abs() > tolerance * row_maximum, valid


def _mean_over_rows(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the valid rows, the last dimension, which stays with size 1; 0 where no row is valid."""
    return (values * valid).sum(dim=-1, keepdim=True) / valid.sum(dim=-1, keepdim=True).clamp(min=1)


def reduce_over_batch(
    penalties: torch.Tensor,
    predicted_tokens: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    penalty: str,
) -> torch.Tensor:
    """
    One number for the batch, such that the parts of a split batch add up to that of the whole.

    Args:
        penalties (`torch.Tensor` of shape `(batch,)`): Result of [`entropy_penalty`].
        predicted_tokens (`torch.Tensor` of shape `(batch,)`): Number of tokens of each sequence in the cross-entropy.
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
    The mean of values of sequences, of shape `(batch,)`, weighted by their predicted tokens; parts of a batch add
    up. The other arguments as for [`reduce_over_batch`].
    """
    if num_items_in_batch is None:
        num_items_in_batch = predicted_tokens.sum().clamp(min=1)
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(values.device)
    return (values * predicted_tokens).sum() / num_items_in_batch


__all__ = ["count_visible_keys", "entropy_penalty", "mean_over_tokens", "penalized_share", "reduce_over_batch"]
