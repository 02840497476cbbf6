# SPDX-License-Identifier: Apache-2.0
"""Attention that also returns the Shannon entropy of each of its rows.

Row i of a head attends with probabilities P_ij = softmax_j(scaling * q_i . k_j); its entropy is

    H_i = - sum_j P_ij log P_ij        (arXiv 2501.03489, section 3; in nats)

Entropies are those of the probabilities before dropout. Softmax and entropy are computed in float32, or in float64 for
double inputs, whatever the dtype of the inputs. Three routes lead there, none of which keeps a matrix of size
query length x key length between forward and backward:

- "blockwise": [`~blockwise_attention.blockwise_attention`], any device, dtype, mask and dropout;
- "flash": torch's own flash kernel, called a second time with the keys for values, no mask, no dropout;
- "flex": FlexAttention in the same way, a `BlockMask`, no dropout, CUDA.

The two latter rest on H_i = lse_i - scaling * q_i . m_i with m_i = sum_j P_ij k_j. The direct gradients of the two
terms cancel, so that only that through m's probabilities is left: ordinary autograd, with the keys detached where they
are values and the queries detached where they multiply m.
"""

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.integrations.flex_attention import compile_friendly_flex_attention
from transformers.utils import logging

from .blockwise_attention import blockwise_attention


logger = logging.get_logger(__name__)

ROUTES = ("blockwise", "flash", "flex")
HALF_PRECISION = (torch.float16, torch.bfloat16)
LARGEST_FLASH_HEAD_DIM = 256
LARGEST_SEED = 2**62


def entropy_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    route: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention and the entropy of its rows, differentiable (once) in query, key and value through both results.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, query_length, head_dim)`): Queries.
        key (`torch.Tensor` of shape `(batch, heads, key_length, head_dim)`): Keys.
        value (`torch.Tensor` of shape `(batch, heads, key_length, value_dim)`): Values.
        attention_mask (`torch.Tensor` or `BlockMask`, *optional*): What a query may attend to; see [`visible_pairs`].
        is_causal (`bool`, *optional*, defaults to `False`): Whether a query attends to no later key; the last query
            stands at the last key. Holds in addition to the mask.
        scaling (`float`, *optional*, defaults to `head_dim ** -0.5`): What the products are multiplied by.
        dropout (`float`, *optional*, defaults to 0.0): Dropout on the probabilities; entropies are taken before it.
        route (`str`, *optional*): `"blockwise"`, `"flash"` or `"flex"`; without, the fastest that serves.

    Returns:
        `tuple`: The output, of shape `(batch, heads, query_length, value_dim)` and the values' dtype, and the row
        entropies in nats, of shape `(batch, heads, query_length)`. A query that may attend to nothing has output 0,
        entropy 0 and no gradient.

    Raises:
        `ValueError`: If shapes do not agree, the mask has a wrong shape or dtype, there are more queries than keys
            under a causal mask, or the route asked for does not serve.
    """
    query, key, value = _cast_as_autocast_does(query, key, value)
    _check_shapes(query, key, value, attention_mask, is_causal)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout={dropout} has to be between 0 and 1.")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    route = _choose_route(route, query, value, attention_mask, is_causal, dropout)
    if route == "blockwise":
        visible = visible_pairs(attention_mask, query.shape[2], key.shape[2], query.device)
        seed = torch.randint(LARGEST_SEED, (1,)) if dropout else None
        return blockwise_attention(query, key, value, visible, is_causal, scaling, dropout, seed)[:2]
    attend = _stock_attention(route, attention_mask, is_causal, scaling)
    key = _center_if_half(key)
    return attend(query, key, value)[0], _entropies(attend, query, key, scaling)


def row_entropies(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
    route: str | None = None,
) -> torch.Tensor:
    """The entropies of [`entropy_attention`] alone, of shape `(batch, heads, query_length)`, for less."""
    query, key = _cast_as_autocast_does(query, key)
    _check_shapes(query, key, None, attention_mask, is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    route = _choose_route(route, query, key, attention_mask, is_causal, dropout=0.0)
    if route == "blockwise":
        visible = visible_pairs(attention_mask, query.shape[2], key.shape[2], query.device)
        return blockwise_attention(query, key, None, visible, is_causal, scaling, 0.0, None)[1]
    attend = _stock_attention(route, attention_mask, is_causal, scaling)
    return _entropies(attend, query, _center_if_half(key), scaling)


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
        may attend to every key.
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


def _cast_as_autocast_does(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What torch's own attention does under autocast: one dtype for all."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device_type)) for tensor in tensors)


def _check_shapes(query, key, value, attention_mask, is_causal):
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
    if value is not None:
        shapes += f", value {tuple(value.shape)}"
    states = [state for state in (query, key, value) if state is not None]
    if any(state.ndim != 4 or state.shape[:2] != query.shape[:2] for state in states):
        raise ValueError(f"Expected (batch, heads, length, head_dim), with one batch and heads for all: {shapes}.")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"Query and key need the same head_dim: {shapes}.")
    if value is not None and value.shape[2] != key.shape[2]:
        raise ValueError(f"Key and value need the same length: {shapes}.")
    if len({state.dtype for state in states}) > 1 or not query.dtype.is_floating_point:
        dtypes = ", ".join(str(state.dtype) for state in states)
        raise ValueError(f"Query, key and value need one floating point dtype, and have {dtypes}.")
    if is_causal and query.shape[2] > key.shape[2]:
        raise ValueError(
            f"Under a causal mask the last query stands at the last key, so there can't be more queries than keys: "
            f"{shapes}."
        )
    if torch.is_tensor(attention_mask):
        _check_mask(attention_mask, query, key)


def _check_mask(attention_mask, query, key):
    batch_size, heads, query_length, key_length = *query.shape[:3], key.shape[2]
    found = f"attention_mask has shape {tuple(attention_mask.shape)} and dtype {attention_mask.dtype}"
    if attention_mask.ndim == 2:
        allowed = ((1, batch_size),)
        expected = f"({batch_size}, {key_length} or more)"
    elif attention_mask.ndim == 4:
        allowed = ((1, batch_size), (1, heads), (1, query_length))
        expected = f"({batch_size} or 1, {heads} or 1, {query_length} or 1, {key_length} or more)"
        if attention_mask.dtype != torch.bool and not attention_mask.dtype.is_floating_point:
            raise ValueError(f"{found}: with four dimensions it has to be boolean (true: visible) or additive.")
    else:
        raise ValueError(f"{found}: expected (batch, keys), or (batch, heads, queries, keys).")
    sizes = attention_mask.shape
    if any(size not in choices for size, choices in zip(sizes, allowed, strict=False)) or sizes[-1] < key_length:
        raise ValueError(f"{found}: expected {expected} for query {tuple(query.shape)} and key {tuple(key.shape)}.")
    if attention_mask.ndim == 4 and attention_mask.dtype.is_floating_point and not torch.compiler.is_compiling():
        bias = attention_mask[(attention_mask != 0) & to_boolean(attention_mask)]
        if len(bias):
            raise ValueError(
                f"attention_mask holds {bias[0].item():g}: an additive mask has 0 where a key is visible, and the "
                "dtype's lowest value or -inf where it is not. Other biases are not supported together with entropies."
            )


def _choose_route(route, query, value, attention_mask, is_causal, dropout) -> str:
    """The route asked for, if it serves, else the fastest that does."""
    if route is not None and route not in ROUTES:
        raise ValueError(f"route={route!r} is unknown. Known are {', '.join(ROUTES)}, and None for the fastest.")
    obstacles = {
        "blockwise": None,
        "flash": _obstacle_to_flash(query, value, attention_mask, is_causal, dropout),
        "flex": _obstacle_to_flex(query, attention_mask, is_causal, dropout),
    }
    if route is not None and obstacles[route]:
        raise ValueError(f"route={route!r} does not serve: {obstacles[route]}. Leave it to None, or take 'blockwise'.")
    if route is None:
        # On a CPU the blocks are faster than two calls of the flash kernel at every length.
        candidates = ("flash", "flex") if query.device.type == "cuda" else ()
        route = next((name for name in candidates if not obstacles[name]), "blockwise")
    if not torch.compiler.is_compiling():
        logger.debug("entropy attention: %s route for %s on %s", route, tuple(query.shape), query.device)
    return route


def _obstacle_to_flash(query, value, attention_mask, is_causal, dropout) -> str | None:
    if query.device.type not in ("cpu", "cuda"):
        return f"there is no such kernel on {query.device.type}"
    if attention_mask is not None or dropout:
        return "the flash kernel takes neither a mask nor dropout here"
    if query.shape[-1] != value.shape[-1]:
        return f"values need the head_dim of the keys, and have {value.shape[-1]} where keys have {query.shape[-1]}"
    if is_causal and query.shape[2] != value.shape[2]:
        return f"under a causal mask it needs as many queries as keys, not {query.shape[2]} and {value.shape[2]}"
    if query.device.type == "cuda":
        if query.dtype not in HALF_PRECISION:
            return f"on CUDA it needs float16 or bfloat16, not {query.dtype}"
        if query.shape[-1] % 8 or query.shape[-1] > LARGEST_FLASH_HEAD_DIM:
            return f"on CUDA head_dim={query.shape[-1]} has to be a multiple of 8 up to {LARGEST_FLASH_HEAD_DIM}"
    return None


def _obstacle_to_flex(query, attention_mask, is_causal, dropout) -> str | None:
    if query.device.type != "cuda":
        return f"FlexAttention has no gradient on {query.device.type}"
    if not isinstance(attention_mask, BlockMask) or is_causal or dropout:
        return "FlexAttention needs its mask as a BlockMask, and no dropout"
    return None


def _stock_attention(route, attention_mask, is_causal, scaling) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A function from query, key and value to torch's own output and log-sum-exp."""

    def flash(query, key, value):
        if query.device.type == "cuda":
            results = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, is_causal, scale=scaling
            )
            return results[:2]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, scale=scaling
        )

    def flex(query, key, value):
        return compile_friendly_flex_attention(
            query, key, value, block_mask=attention_mask, scale=scaling, return_lse=True
        )

    return flash if route == "flash" else flex


def _center_if_half(key: torch.Tensor) -> torch.Tensor:
    """
    Half precision loses what keys have beside an offset that they share; neither output nor entropy depends on it, so
    it is taken off, without a gradient.
    """
    if key.dtype not in HALF_PRECISION:
        return key
    return key - key.detach().float().mean(dim=2, keepdim=True).to(key.dtype)


def _entropies(attend, query, key, scaling) -> torch.Tensor:
    mean_key, log_sum_exp = attend(query, key, key.detach())
    dtype = torch.promote_types(query.dtype, torch.float32)
    products = (query.detach().to(dtype) * mean_key.to(dtype)).sum(dim=-1)
    log_sum_exp = log_sum_exp.detach().to(dtype)
    return torch.where(log_sum_exp.isneginf(), 0.0, log_sum_exp - scaling * products)  # of no visible key


__all__ = ["entropy_attention", "row_entropies", "to_boolean", "visible_pairs"]
