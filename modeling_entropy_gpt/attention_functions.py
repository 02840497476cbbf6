# SPDX-License-Identifier: Apache-2.0
"""Functions in place of softmax's exponential that need no largest score of a row.

With s_ij the scores of row i, c_i the learned shift of its head and position, and n_i the keys that the row sees,

    P_ij = (f(s_ij - c_i) + e_i) / sum_k (f(s_ik - c_i) + e_i)        power4      f(x) = relu(1 + x / 4) ** 4
    e_i = max(LEAST_SUM / n_i, LEAST_WEIGHT)                          power2      f(x) = relu(1 + x / 2) ** 2
                                                                      clamped     f(x) = exp(clamp(x, -7.4, 3))

and softmax has f(x) = exp(x), for which c_i cancels, and e_i = 0. A private program needs the largest score for the
exponential alone, which leaves fixed point's range without it. The powers grow slowly; they touch the exponential at
0, where their first two derivatives are the exponential's too for power4's first and power2's first. The floor e_i is
what a fixed-point reciprocal of the sum needs: a row whose f are all 0 attends to all of its visible keys alike, with
a gradient of 0. Every row has logarithms by which P is a softmax,

    P_ij = softmax_j(log(f(s_ij - c_i) + e_i))        ds_ij = f'(s_ij - c_i) / (f(s_ij - c_i) + e_i) dlog(f_ij + e_i)

so that what holds for softmax holds for each of them: entropies, masks, and how blockwise_attention.py computes in
blocks.
"""

from contextlib import AbstractContextManager, nullcontext

import torch


# The power of each function that is one; x is divided by it, so that all of them are 1 + x + ... near 0.
POWERS = {"power4": 4, "power2": 2}
FUNCTIONS = ("softmax", *POWERS, "clamped")
# The floors of a row's sum and of each weight: a sum's reciprocal in fixed point loses few bits, and truncation takes
# no weight whole.
LEAST_SUM, LEAST_WEIGHT = 2.0**-8, 2.0**-17
# The largest 1 + x / n that is raised to its power: sums of products with it stay in the range of float32.
LARGEST_BASE = 1e6
# The range of `clamped`: from what the engine's exponential holds, to where sums still fit fixed point.
LOWEST, HIGHEST = -7.4, 3.0
# The score of a masked pair: far below any, and no product with it overflows.
MASKED = -1e20


def log_function(differences: torch.Tensor, function: str, floors: torch.Tensor | float = 0.0) -> torch.Tensor:
    """
    The logarithms by which attention is a softmax, element by element.

    Args:
        differences (`torch.Tensor`): Scores less the shift of their row, of any shape.
        function (`str`): `"softmax"`, `"power4"`, `"power2"` or `"clamped"`.
        floors (`torch.Tensor`, broadcastable to the differences, *optional*, defaults to 0):
            What [`row_floors`] gives; softmax has none.
    """
    if function == "softmax":
        return differences
    if function == "clamped":
        weights = differences.clamp(LOWEST, HIGHEST).exp()
    else:
        power = POWERS[function]
        weights = (1 + differences / power).clamp(0.0, LARGEST_BASE) ** power
    return (weights + floors).log()


def row_floors(
    visible: torch.Tensor | None, is_causal: bool, query_length: int, key_length: int, device: torch.device
) -> torch.Tensor:
    """
    What is added to each f of a row, e_i of this file, in float32, broadcastable to `(batch, heads, query_length)`.
    Arguments as for [`~blockwise_attention.blockwise_attention`].
    """
    past = key_length - query_length
    if visible is None:
        seen = torch.arange(past + 1, key_length + 1, device=device) if is_causal else key_length
        seen = torch.as_tensor(seen, device=device).view(1, 1, -1)
    elif is_causal and visible.shape[2] == 1:
        seen = visible[:, :, 0].cumsum(dim=-1)[..., past:]
    else:
        seen = visible_to_rows(visible, is_causal, query_length, key_length, device).sum(dim=-1)
    return (LEAST_SUM / seen.clamp(min=1).to(torch.float32)).clamp(min=LEAST_WEIGHT)


def whole_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
    function: str,
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Attention by whole matrices and torch's own operations, for any function: it can be differentiated any number of
    times, captured and exported.

    Args:
        query, key, value, visible, is_causal, scaling, dropout:
            As for [`~blockwise_attention.blockwise_attention`].
        function (`str`): As for [`log_function`].
        shift (`torch.Tensor`, broadcastable to `(batch, heads, query_length)`): The shift of each row.

    Returns:
        `tuple`: The output, `(batch, heads, query_length, value_dim)`, and the probabilities after dropout,
        `(batch, heads, query_length, key_length)`, both in the dtype of the values; and the logarithms of f, of at
        least float32, from which [`entropies_of`] has entropies. A row that sees nothing has output 0.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with _without_autocast(query.device.type):
        scores = torch.matmul(query.to(dtype), key.to(dtype).transpose(-1, -2)) * scaling
    floors = row_floors(visible, is_causal, *scores.shape[-2:], scores.device).to(dtype)
    logs = log_function(scores - shift.to(dtype).unsqueeze(-1), function, floors.unsqueeze(-1))
    seen = visible_to_rows(visible, is_causal, *scores.shape[-2:], scores.device)
    if seen is not None:
        logs = logs + torch.where(seen, 0.0, MASKED)
    probabilities = logs.softmax(dim=-1)
    if visible is not None:  # a row that sees nothing has none
        probabilities = probabilities * seen.any(dim=-1, keepdim=True)
    probabilities = torch.nn.functional.dropout(probabilities, dropout, training=dropout > 0).to(value.dtype)
    return torch.matmul(probabilities, value), probabilities, logs


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Products in the dtype of their factors; the meta device knows no autocast."""
    is_available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if is_available else nullcontext()


def entropies_of(logs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Entropies in nats, and log-sum-exp, of rows whose logarithms of f are given, `(..., key_length)`, to `(...)`; the
    entropy of a row that sees nothing is 0.
    """
    log_sums = logs.logsumexp(dim=-1)
    log_probabilities = logs - log_sums.unsqueeze(-1)
    entropies = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return entropies.where(log_sums > MASKED / 10, 0.0), log_sums


def visible_to_rows(
    visible: torch.Tensor | None, is_causal: bool, query_length: int, key_length: int, device: torch.device
) -> torch.Tensor | None:
    """The mask and causality in one, broadcastable to `(batch, heads, query_length, key_length)`; `None`: all."""
    if not is_causal:
        return visible
    queries = torch.arange(query_length, device=device)[:, None] + (key_length - query_length)
    not_later = torch.arange(key_length, device=device) <= queries
    return not_later if visible is None else visible & not_later


__all__ = ["entropies_of", "log_function", "row_floors", "whole_attention"]
