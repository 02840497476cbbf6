# SPDX-License-Identifier: Apache-2.0
"""Attention that also returns the Shannon entropy of each of its rows.

Row i of a head attends with probabilities P_ij = softmax_j(scaling * q_i . k_j); its entropy is

    H_i = - sum_j P_ij log P_ij        (arXiv 2501.03489, section 3; in nats)

Entropies are those of the probabilities before dropout, and never negative. Softmax and entropy are computed in
float32, or in float64 for double inputs, whatever the dtype of the inputs. Three routes lead there, none of which
keeps a matrix of size query length x key length between forward and backward:

- "blockwise", the default: [`~blockwise_attention.blockwise_attention`], any device, dtype, mask and dropout;
- "flash": torch's own flash kernel, called a second time with the keys for values, no mask, no dropout;
- "flex": FlexAttention in the same way, a `BlockMask`, no dropout, CUDA.

The two latter rest on H_i = lse_i - scaling * q_i . m_i with m_i = sum_j P_ij k_j. The direct gradients of the two
terms cancel, so that only that through m's probabilities is left: ordinary autograd, with the keys detached where they
are values and the queries detached where they multiply m. The kernels return m in the dtype of the inputs, and H is a
small difference of two large terms: in half precision it is as far off as the rounding of m, times the queries.
"""

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.integrations.flex_attention import compile_friendly_flex_attention, get_flex_attention_lse_kwargs
from transformers.utils import is_triton_available

from .attention_masks import check_additive, check_dtype, visible_pairs
from .blockwise_attention import blockwise_attention


ROUTES = ("blockwise", "flash", "flex")
HALF_PRECISION = (torch.float16, torch.bfloat16)
LARGEST_FLASH_HEAD_DIM = 256
# The least compute capabilities for torch's flash kernel, and for Triton, which FlexAttention is compiled with.
FLASH_CAPABILITY, TRITON_CAPABILITY = (8, 0), (7, 0)
LARGEST_SEED = 2**62


def entropy_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    route: str = "blockwise",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention and the entropy of its rows, differentiable in query, key and value through both results: once, and in
    reverse mode; torch raises an error for others.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, query_length, head_dim)`): Queries.
        key (`torch.Tensor` of shape `(batch, heads, key_length, head_dim)`): Keys.
        value (`torch.Tensor` of shape `(batch, heads, key_length, value_dim)`): Values.
        attention_mask (`torch.Tensor` or `BlockMask`, *optional*): What a query may attend to; see [`visible_pairs`].
        is_causal (`bool`, *optional*, defaults to `False`): Whether a query attends to no later key; the last query
            stands at the last key. Holds in addition to the mask.
        scaling (`float`, *optional*, defaults to `head_dim ** -0.5`): What the products are multiplied by.
        dropout (`float`, *optional*, defaults to 0.0): Dropout on the probabilities; entropies are taken before it.
        route (`str`, *optional*, defaults to `"blockwise"`):
            `"blockwise"` takes everything, and computes in float32 or better whatever the dtype. `"flash"` and
            `"flex"` call torch's kernels, and are exact in float32 and float64 alone: with logits of deviation 20,
            entropies are off by up to 0.13 nats in bfloat16 and 0.02 in float16, and their gradients by 17 % and 3 %
            (with the kernel for CPUs; `"blockwise"`: 1e-5 nats, and 0.2 % and 0.02 %).

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
    _check_route(route, query, value, attention_mask, is_causal, dropout)
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
    route: str = "blockwise",
) -> torch.Tensor:
    """The entropies of [`entropy_attention`] alone, of shape `(batch, heads, query_length)`, for less."""
    query, key = _cast_as_autocast_does(query, key)
    _check_shapes(query, key, None, attention_mask, is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    _check_route(route, query, key, attention_mask, is_causal, dropout=0.0)
    if route == "blockwise":
        visible = visible_pairs(attention_mask, query.shape[2], key.shape[2], query.device)
        return blockwise_attention(query, key, None, visible, is_causal, scaling, 0.0, None)[1]
    attend = _stock_attention(route, attention_mask, is_causal, scaling)
    return _entropies(attend, query, _center_if_half(key), scaling)


def _cast_as_autocast_does(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What torch's own attention does under autocast: one dtype for all but double, which stays."""
    device_type = tensors[0].device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


# Lengths may be symbols while a graph is captured: they are compared one by one, and written only into an error.
def _check_shapes(query, key, value, attention_mask, is_causal):
    states = {"query": query, "key": key} if value is None else {"query": query, "key": key, "value": value}
    if any(
        state.ndim != 4 or state.shape[0] != query.shape[0] or state.shape[1] != query.shape[1]
        for state in states.values()
    ):
        raise ValueError(
            f"Expected (batch, heads, length, head_dim), with one batch and heads for all: {_shapes(states)}."
        )
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"Query and key need the same head_dim: {_shapes(states)}.")
    if value is not None and value.shape[2] != key.shape[2]:
        raise ValueError(f"Key and value need the same length: {_shapes(states)}.")
    if any(state.dtype != query.dtype for state in states.values()) or not query.dtype.is_floating_point:
        dtypes = ", ".join(str(state.dtype) for state in states.values())
        raise ValueError(f"Query, key and value need one floating point dtype, and have {dtypes}.")
    if is_causal and query.shape[2] > key.shape[2]:
        raise ValueError(
            f"Under a causal mask the last query stands at the last key, so there can't be more queries than keys: "
            f"{_shapes(states)}."
        )
    if torch.is_tensor(attention_mask):
        _check_mask(attention_mask, query, key)


def _shapes(states: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(state.shape)}" for name, state in states.items())


def _check_mask(attention_mask, query, key):
    batch_size, heads, query_length = query.shape[:3]
    key_length = key.shape[2]
    if attention_mask.ndim == 2:
        fits = _broadcasts(attention_mask.shape[0], batch_size)
    elif attention_mask.ndim == 4:
        check_dtype(attention_mask)
        sizes = zip(attention_mask.shape[:3], (batch_size, heads, query_length), strict=True)
        fits = all(_broadcasts(size, expected) for size, expected in sizes)
    else:
        raise ValueError(f"{_found(attention_mask)}: expected (batch, keys), or (batch, heads, queries, keys).")
    if not fits or attention_mask.shape[-1] < key_length:
        expected = f"{batch_size} or 1, {key_length} or more"
        if attention_mask.ndim == 4:
            expected = f"{batch_size} or 1, {heads} or 1, {query_length} or 1, {key_length} or more"
        raise ValueError(
            f"{_found(attention_mask)}: expected ({expected}) for query {tuple(query.shape)} and key "
            f"{tuple(key.shape)}."
        )
    if attention_mask.ndim == 4:
        check_additive(attention_mask)


def _broadcasts(size: int, expected: int) -> bool:
    return size == expected or size == 1


def _found(attention_mask: torch.Tensor) -> str:
    return f"attention_mask has shape {tuple(attention_mask.shape)} and dtype {attention_mask.dtype}"


def _check_route(route, query, value, attention_mask, is_causal, dropout):
    if route not in ROUTES:
        raise ValueError(f"route={route!r} is unknown. Known are {', '.join(ROUTES)}.")
    obstacle = None
    if route == "flash":
        obstacle = _obstacle_to_flash(query, value, attention_mask, is_causal, dropout)
    elif route == "flex":
        obstacle = _obstacle_to_flex(query, attention_mask, is_causal, dropout)
    if obstacle:
        raise ValueError(f"route={route!r} does not serve: {obstacle}. Take 'blockwise', which always does.")


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
        if not torch.backends.cuda.is_flash_attention_available():
            return "this build of torch has no flash kernel for CUDA"
        capability = torch.cuda.get_device_capability(query.device)
        if capability < FLASH_CAPABILITY:
            return _too_old(capability, FLASH_CAPABILITY)
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
    if not is_triton_available():
        return "FlexAttention needs triton, which is not installed"
    capability = torch.cuda.get_device_capability(query.device)
    return _too_old(capability, TRITON_CAPABILITY) if capability < TRITON_CAPABILITY else None


def _too_old(capability: tuple[int, int], needed: tuple[int, int]) -> str:
    return "it needs compute capability {}.{}, and the device has {}.{}".format(*needed, *capability)


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
        options = get_flex_attention_lse_kwargs(return_lse=True)
        output, log_sum_exp = compile_friendly_flex_attention(
            query, key, value, block_mask=attention_mask, scale=scaling, **options
        )
        # From torch 2.9 on, it is one of several things that can be asked for.
        return output, log_sum_exp if torch.is_tensor(log_sum_exp) else log_sum_exp.lse

    return flash if route == "flash" else flex


def _center_if_half(key: torch.Tensor) -> torch.Tensor:
    """
    Subtracts the offset that all keys share, without a gradient. Neither output nor entropy depends on it, and in half
    precision it would swallow the differences between keys.
    """
    if key.dtype not in HALF_PRECISION:
        return key
    return key - key.detach().float().mean(dim=2, keepdim=True).to(key.dtype)


def _entropies(attend, query, key, scaling) -> torch.Tensor:
    mean_key, log_sum_exp = attend(query, key, key.detach())
    dtype = torch.promote_types(query.dtype, torch.float32)
    products = (query.detach().to(dtype) * mean_key.to(dtype)).sum(dim=-1)
    log_sum_exp = log_sum_exp.detach().to(dtype)
    entropies = torch.where(log_sum_exp.isneginf(), 0.0, log_sum_exp - scaling * products)  # of no visible key
    # What rounding has made negative is 0, and keeps its gradient.
    return entropies - entropies.detach().clamp(max=0)


__all__ = ["entropy_attention", "row_entropies"]
