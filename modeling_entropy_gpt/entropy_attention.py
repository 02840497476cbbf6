# SPDX-License-Identifier: Apache-2.0
"""Attention that also returns the Shannon entropy of each of its rows.

Row i of a head attends with probabilities P_ij = softmax_j(scaling * q_i . k_j), or with another function of these
scores (attention_functions.py); its entropy is

    H_i = - sum_j P_ij log P_ij        (arXiv 2501.03489, section 3; in nats)

Entropies are those of the probabilities before dropout, and never negative. Softmax and entropy are computed in
float32, or in float64 for double inputs, whatever the dtype of the inputs. No matrix of size query length x key length
is kept between forward and backward. A GPU computes both in one kernel of triton_attention.py; where that does not
serve, they come in blocks out of torch's matrix products: any device, dtype, mask and dropout.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask

from .attention_functions import FUNCTIONS
from .attention_masks import check_additive, check_dtype, visible_pairs
from .attention_weights import LN_2, NOTHING_VISIBLE
from .blockwise_attention import blockwise_attention


LARGEST_SEED = 2**62


def entropy_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    function: str = "softmax",
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention and the entropy of its rows, differentiable in query, key, value and shift through both results: once,
    and in reverse mode; torch raises an error for others.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, query_length, head_dim)`): Queries.
        key (`torch.Tensor` of shape `(batch, heads, key_length, head_dim)`): Keys.
        value (`torch.Tensor` of shape `(batch, heads, key_length, value_dim)`): Values.
        attention_mask (`torch.Tensor` or `BlockMask`, *optional*): What a query may attend to; see [`visible_pairs`].
        is_causal (`bool`, *optional*, defaults to `False`): Whether a query attends to no later key; the last query
            stands at the last key. Holds in addition to the mask.
        scaling (`float`, *optional*, defaults to `head_dim ** -0.5`): What the products are multiplied by.
        dropout (`float`, *optional*, defaults to 0.0): Dropout on the probabilities; entropies are taken before it.
        function (`str`, *optional*, defaults to `"softmax"`): The attention function, as the configuration names it.
        shift (`torch.Tensor`, broadcastable to `(batch, heads, query_length)`, *optional*):
            The shift of each row's scores. Functions other than softmax need it; softmax does not depend on it.

    Returns:
        `tuple`: The output, of shape `(batch, heads, query_length, value_dim)` and the values' dtype, and the row
        entropies in nats, of shape `(batch, heads, query_length)`. A query that may attend to nothing has output 0,
        entropy 0 and no gradient.

    Raises:
        `ValueError`: If shapes do not agree, the function is unknown or lacks its shift, softmax is given one that
            requires a gradient (there is none), the mask has a wrong shape or dtype, or there are more queries than
            keys under a causal mask.
    """
    return attention_and_log_sums(query, key, value, attention_mask, is_causal, scaling, dropout, function, shift)[:2]


def attention_and_log_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    is_causal: bool,
    scaling: float | None,
    dropout: float,
    function: str,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The results of [`entropy_attention`], with its arguments and errors, and the logarithm of the sum of f over each
    row, `(batch, heads, query_length)`, which for softmax is that of [`row_log_sums`].
    """
    query, key, value = _cast_as_autocast_does(query, key, value)
    _check_shapes(query, key, value, attention_mask, is_causal)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout={dropout} has to be between 0 and 1.")
    _check_function(function, shift)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = visible_pairs(attention_mask, query.shape[2], key.shape[2], query.device)
    output, entropies, log_sums = attend_rows(query, key, value, visible, is_causal, scaling, dropout, function, shift)
    return output, entropies, _natural(log_sums)


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
    function: str,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The output and the entropies of [`entropy_attention`], and the logarithm to base 2 of the sum of f over each row,
    `(batch, heads, query_length)`. Nothing is checked; `visible` is what [`visible_pairs`] gives.
    """
    shift = None if function == "softmax" else shift.expand(query.shape[:3])
    seed = torch.randint(LARGEST_SEED, (1,)) if dropout else None
    return blockwise_attention(query, key, value, visible, is_causal, scaling, dropout, seed, function, shift)


def row_entropies(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
) -> torch.Tensor:
    """The entropies of [`entropy_attention`] alone, of shape `(batch, heads, query_length)`, for less."""
    query, key = _cast_as_autocast_does(query, key)
    _check_shapes(query, key, None, attention_mask, is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = visible_pairs(attention_mask, query.shape[2], key.shape[2], query.device)
    return blockwise_attention(query, key, None, visible, is_causal, scaling, 0.0, None)[1]


def row_log_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None = None,
    is_causal: bool = False,
    scaling: float | None = None,
) -> torch.Tensor:
    """
    The logarithm of the sum of the exponentials of the scores that each row sees, `(batch, heads, query_length)`; 0
    where it sees nothing. Arguments as for [`entropy_attention`].
    """
    query, key = _cast_as_autocast_does(query, key)
    _check_shapes(query, key, None, attention_mask, is_causal)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = visible_pairs(attention_mask, query.shape[2], key.shape[2], query.device)
    log_sums = blockwise_attention(query, key, None, visible, is_causal, scaling, 0.0, None)[2]
    return _natural(log_sums)


def _natural(log_sums: torch.Tensor) -> torch.Tensor:
    """Log-sums of base 2 to base e; 0 for a row that sees nothing."""
    return log_sums.where(log_sums > NOTHING_VISIBLE, 0.0) * LN_2


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


def _check_function(function: str, shift: torch.Tensor | None):
    if function not in FUNCTIONS:
        raise ValueError(f"function={function!r} is unknown: it has to be one of {', '.join(FUNCTIONS)}.")
    if function != "softmax" and shift is None:
        raise ValueError(f"function={function!r} needs a shift, (batch, heads, query_length).")
    if function == "softmax" and shift is not None and shift.requires_grad:
        raise ValueError("softmax does not depend on the shift, which requires a gradient: leave it out.")


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


__all__ = ["entropy_attention", "row_entropies", "row_log_sums"]
