"""Attention that also returns the Shannon entropy of each of its rows.

Row i of a head attends with probabilities P_ij = softmax_j(scaling * q_i . k_j); its entropy is

    H_i = - sum_j P_ij log P_ij        (arXiv 2501.03489, section 3; in nats)

Entropies are those of the probabilities before dropout. Softmax and entropy are computed in float32, or in
float64 for double inputs, whatever the dtype of the inputs.
"""

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask


def entropy_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention and the entropy of its rows, differentiable in query, key and value through both results.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, query_length, head_dim)`): Queries.
        key (`torch.Tensor` of shape `(batch, heads, key_length, head_dim)`): Keys.
        value (`torch.Tensor` of shape `(batch, heads, key_length, value_dim)`): Values.
        attention_mask (`torch.Tensor` or `BlockMask`, *optional*): What a query may attend to; see [`visible_pairs`].
        is_causal (`bool`, *optional*, defaults to `False`): Whether a query attends to no later key; the last query
            stands at the last key. Holds in addition to the mask.
        scaling (`float`, *optional*, defaults to `head_dim ** -0.5`): What the products are multiplied by.
        dropout (`float`, *optional*, defaults to 0.0): Dropout on the probabilities; entropies are taken before it.

    Returns:
        `tuple`: The output, of shape `(batch, heads, query_length, value_dim)` and the values' dtype, and the row
        entropies in nats, of shape `(batch, heads, query_length)`. A query that may attend to nothing has output 0,
        entropy 0 and no gradient.
    """
    visible = visible_pairs(attention_mask, query.shape[2], key.shape[2], is_causal, query.device)
    probabilities, entropies = _probabilities_and_entropies(query, key, visible, scaling)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=dropout > 0)
    return probabilities.to(value.dtype) @ value, entropies


def row_entropies(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
) -> torch.Tensor:
    """The entropies of [`entropy_attention`] alone, of shape `(batch, heads, query_length)`."""
    visible = visible_pairs(attention_mask, query.shape[2], key.shape[2], is_causal, query.device)
    return _probabilities_and_entropies(query, key, visible, scaling)[1]


def visible_pairs(
    attention_mask: torch.Tensor | BlockMask | None,
    query_length: int,
    key_length: int,
    is_causal: bool,
    device: torch.device,
) -> torch.Tensor | None:
    """
    Which query may attend to which key, from any mask that transformers' attention backends are given.

    Args:
        attention_mask: `None` for no mask; a padding mask of shape `(batch, keys)`, non-zero where a key may be
            attended to; a mask of shape `(batch, 1 or heads, queries, keys)`, boolean (true: may be attended to) or
            additive (0, or the dtype's lowest value or -inf for a pair that is masked); or a `BlockMask`.
        query_length (`int`): Number of queries.
        key_length (`int`): Number of keys.
        is_causal (`bool`): Whether a query attends to no later key, the last query standing at the last key.
        device (`torch.device`): Where the result lies.

    Returns:
        `torch.Tensor` of `bool`, broadcastable to `(batch, heads, query_length, key_length)`, or `None` if every query
        may attend to every key.
    """
    visible = None
    if isinstance(attention_mask, BlockMask):
        visible = create_mask(
            attention_mask.mask_mod, attention_mask.shape[0], attention_mask.shape[1], query_length, key_length, device
        )
    elif attention_mask is not None and attention_mask.ndim == 2:
        visible = attention_mask[:, None, None, :key_length].bool()
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        visible = attention_mask[..., :key_length]
    elif attention_mask is not None:
        visible = attention_mask[..., :key_length] > torch.finfo(attention_mask.dtype).min / 2
    if is_causal:
        causal = torch.ones(query_length, key_length, dtype=torch.bool, device=device).tril(key_length - query_length)
        visible = causal if visible is None else visible & causal
    return visible


def _probabilities_and_entropies(query, key, visible, scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in at least float32. Masked pairs are kept out of every product, so that no -inf meets a 0."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(-1, -2)) * scaling
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if visible is None:
        log_probabilities = scores.log_softmax(dim=-1)
        probabilities = log_probabilities.exp()
    else:
        # The lowest finite number, not -inf: the softmax of a row without a visible key then has a finite gradient.
        lowest = torch.finfo(scores.dtype).min
        log_probabilities = scores.masked_fill(~visible, lowest).log_softmax(dim=-1).masked_fill(~visible, 0.0)
        probabilities = log_probabilities.exp().masked_fill(~visible, 0.0)
    return probabilities, -(probabilities * log_probabilities).sum(dim=-1)


__all__ = ["entropy_attention", "row_entropies", "visible_pairs"]
