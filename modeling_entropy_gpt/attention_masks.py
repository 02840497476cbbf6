# SPDX-License-Identifier: Apache-2.0
"""What a query may attend to: the masks that transformers' attention backends take, and what they come to."""

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers.utils.import_utils import is_tracing


def visible_pairs(
    attention_mask: torch.Tensor | BlockMask | None, query_length: int, key_length: int, device: torch.device
) -> torch.Tensor | None:
    """
    Which query may attend to which key, from any mask that transformers' attention backends are given.

    Args:
        attention_mask: `None` for no mask; a padding mask of shape `(batch, keys)`, non-zero where a key may be
            attended to; a mask of shape `(batch, 1 or heads, queries, keys)`, boolean (true: may be attended to) or
            additive (0, or the dtype's lowest value or -inf for a pair that is masked); or a `BlockMask`. Keys beyond
            `key_length` are left out.
        query_length (`int`): Number of queries.
        key_length (`int`): Number of keys.
        device (`torch.device`): Where the result lies.

    Returns:
        `torch.Tensor` of `bool`, broadcastable to `(batch, heads, query_length, key_length)`, or `None` if every query
        may attend to every key. A boolean mask is not copied.
    """
    if attention_mask is None:
        return None
    if isinstance(attention_mask, BlockMask):
        batch_size, heads = attention_mask.shape[:2]
        return create_mask(attention_mask.mask_mod, batch_size, heads, query_length, key_length, device)
    attention_mask = attention_mask[..., :key_length]
    if attention_mask.ndim == 2:
        return attention_mask[:, None, None].bool()
    return to_boolean(attention_mask)


def to_boolean(attention_mask: torch.Tensor) -> torch.Tensor:
    """A mask, boolean or additive (0, or the dtype's lowest value or -inf for what is masked), as a boolean one."""
    if attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask > torch.finfo(attention_mask.dtype).min / 2


def to_additive(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask, boolean or additive, as an additive one: 0 where true, as transformers has it, else the lowest value."""
    if attention_mask.dtype != torch.bool:
        return attention_mask
    visible = torch.zeros((), dtype=dtype, device=attention_mask.device)
    return torch.where(attention_mask, visible, torch.finfo(dtype).min)


def check_dtype(attention_mask: torch.Tensor):
    """Refuses integers with a `ValueError`: they could be addends, or mark what is visible."""
    if attention_mask.dtype != torch.bool and not attention_mask.dtype.is_floating_point:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and dtype {attention_mask.dtype}: with four "
            "dimensions it has to be boolean (true: visible) or additive."
        )


def check_additive(attention_mask: torch.Tensor):
    """
    Refuses an additive mask that does more than mask, where its numbers can be looked at: not in a graph that is being
    captured, nor on the meta device; there a bias is taken for a visible pair.

    Raises:
        `ValueError`: If it holds anything but 0, the dtype's lowest value and -inf.
    """
    if attention_mask.dtype == torch.bool or attention_mask.is_meta or is_tracing(attention_mask):
        return
    bias = attention_mask[(attention_mask != 0) & to_boolean(attention_mask)]
    if len(bias):
        raise ValueError(
            f"attention_mask holds {bias[0].item():g}: an additive mask has 0 where a key is visible, and the "
            "dtype's lowest value or -inf where it is not. Other biases are supported by 'eager' and 'sdpa' alone, "
            "without entropies."
        )


def prepare_mask(
    attention_mask: torch.Tensor | BlockMask | None,
    implementation: str,
    inputs_embeds: torch.Tensor,
    with_entropies: bool,
    is_given: bool,
) -> torch.Tensor | BlockMask | None:
    """
    What the layers are given, made once for all of them out of what [`~masking_utils.create_causal_mask`] returns: a
    mask of its own for the attention implementation, or one of the user's as it is.

    Args:
        attention_mask: As for [`visible_pairs`].
        implementation (`str`): The attention implementation.
        inputs_embeds (`torch.Tensor` of shape `(batch, queries, hidden_size)`): What the layers begin with.
        with_entropies (`bool`):
            Whether attention is computed with entropies: then masks in four dimensions become boolean.
        is_given (`bool`): Whether the mask is a user's, which may hold anything.

    Returns:
        `torch.Tensor`, `BlockMask` or `None`: The same, if the implementation takes it as it is.

    Raises:
        `ValueError`: If the implementation can't do what the mask says.
    """
    if attention_mask is None or (torch.is_tensor(attention_mask) and attention_mask.ndim == 2):
        return attention_mask
    if torch.is_tensor(attention_mask):
        check_dtype(attention_mask)
    if with_entropies:
        if is_given and torch.is_tensor(attention_mask):
            check_additive(attention_mask)
        return visible_pairs(attention_mask, *attention_mask.shape[-2:], inputs_embeds.device)
    if torch.is_tensor(attention_mask) and implementation == "flex_attention":
        return _to_block_mask(attention_mask, len(inputs_embeds))
    if "flash" in implementation:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but {implementation!r} takes masks of padding, "
            "(batch, keys): call model.set_attn_implementation('sdpa') for masks in four dimensions."
        )
    return attention_mask


def _to_block_mask(attention_mask: torch.Tensor, batch_size: int) -> BlockMask:
    """
    What else is a tensor, transformers adds to the scores: a boolean mask as numbers, and of several heads' masks the
    first alone.
    """
    check_additive(attention_mask)
    visible = to_boolean(attention_mask).expand(batch_size, -1, -1, -1)
    heads = visible.shape[1]

    def may_attend(batch, head, query, key):
        return visible[batch, head if heads > 1 else 0, query, key]

    return create_block_mask(may_attend, batch_size, heads, *visible.shape[-2:], visible.device)


__all__ = ["check_additive", "check_dtype", "prepare_mask", "to_additive", "to_boolean", "visible_pairs"]
