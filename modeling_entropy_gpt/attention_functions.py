# SPDX-License-Identifier: Apache-2.0
"""Functions in place of softmax's exponential that need no largest score of a row.

With s_ij the scores of row i and c_i the learned shift of its head and position,

    P_ij = f(s_ij - c_i) / sum_k f(s_ik - c_i)        softmax     f(x) = exp(x), for which c_i cancels
                                                      power4      f(x) = relu(1 + x / 4) ** 4
                                                      power2      f(x) = relu(1 + x / 2) ** 2
                                                      clamped     f(x) = exp(clamp(x, -7.4, 3))

A private program needs the largest score for the exponential alone, which leaves fixed point's range without it. The
powers grow slowly; they touch the exponential at 0, where their first two derivatives are the exponential's too for
power4's first and power2's first. No f is below `SMALLEST`: so a row whose f would all be 0 attends to all of its
visible keys alike, with a gradient of 0, and every row has a logarithm of f by which P is a softmax,

    P_ij = softmax_j(log f(s_ij - c_i))               ds_ij = (log f)'(s_ij - c_i) dlog f_ij

so that what holds for softmax holds for each of them: entropies, masks, and how blockwise_attention.py computes in
blocks.
"""

from contextlib import AbstractContextManager, nullcontext

import torch


# The power of each function that is one; x is divided by it, so that all of them are 1 + x + ... near 0.
POWERS = {"power4": 4, "power2": 2}
FUNCTIONS = ("softmax", *POWERS, "clamped")
# Stands for an f of 0. A row of 1,000 visible keys has a sum of at least 1e-9.
SMALLEST = 1e-12
# The range of `clamped`: from what the engine's exponential holds, to where sums still fit fixed point.
LOWEST, HIGHEST = -7.4, 3.0
# The score of a masked pair: far below any, and no product with it overflows.
MASKED = -1e20


def log_function(differences: torch.Tensor, function: str) -> torch.Tensor:
    """
    log f of scores less their shift, element by element.

    Args:
        differences (`torch.Tensor`): Scores less the shift of their row, of any shape.
        function (`str`): `"softmax"`, `"power4"`, `"power2"` or `"clamped"`.
    """
    if function == "softmax":
        return differences
    if function == "clamped":
        return differences.clamp(LOWEST, HIGHEST)
    power = POWERS[function]
    return (1 + differences / power).clamp(min=SMALLEST ** (1 / power)).log() * power


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
    logs = log_function(scores - shift.to(dtype).unsqueeze(-1), function)
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


__all__ = ["entropies_of", "log_function", "whole_attention"]
