# SPDX-License-Identifier: Apache-2.0
"""
Attention weights of a block of blockwise_attention.py, from its queries and keys: forward, and again for gradients.

Softmax subtracts the largest score of each row. The other functions (attention_functions.py) need no maximum, but
add a floor e_i. Their backward pass gets queries and shifts multiplied by r_i = Z_i^(-1/n), with Z_i the sum of a row
and n the power. Then, for b' = r b,

    P_ij = b'_ij^n + e_i / Z_i                ds_ij = r_i b'_ij^(n-1) dlog(P_ij)

without a division of matrices; what is computed from ds is multiplied by r_i. For `clamped`, r is 1.
"""

from types import SimpleNamespace

import torch

from .attention_functions import HIGHEST, LARGEST_BASE, LOWEST, MASKED, POWERS


LN_2, LOG2_E = 0.6931471805599453, 1.4426950408889634
# Rows with a maximum below this have nothing that they may attend to.
NOTHING_VISIBLE = MASKED / 10


def weigh(part: SimpleNamespace, visible: torch.Tensor | None, scaling: float, function: str):
    """
    Fills a block's weights, their logarithms to base 2 less the rows' `maximum`, and the rows' sums of weights and of
    weights times logarithms. `visible` is the block's part of the mask.
    """
    scores, weights = part.scores, part.weights
    if function == "softmax":
        _score(part, visible, scaling)
        torch.amax(scores, -1, True, out=part.maximum)
        if visible is not None:
            part.maximum.clamp_(min=NOTHING_VISIBLE)
        torch.exp2(scores.sub_(part.maximum), out=weights)
    else:
        _apply(part, visible, scaling, function)
    torch.sum(weights, -1, True, out=part.total)
    torch.sum(scores.mul_(weights), -1, True, out=part.product)
    if visible is not None:
        nothing = part.total == 0
        part.total.masked_fill_(nothing, 1.0)
        if function != "softmax":
            part.maximum.masked_fill_(nothing, NOTHING_VISIBLE)


def weigh_again(part: SimpleNamespace, visible: torch.Tensor | None, scaling: float, function: str) -> torch.Tensor:
    """
    Fills a block's probabilities and their logarithms to base 2, given the log-sums as `maximum`.

    Returns:
        `torch.Tensor`: What gradients of these logarithms, in nats, are multiplied by to be those of scores.
    """
    if function == "softmax":
        _score(part, visible, scaling)
        torch.exp2(part.scores.sub_(part.maximum), out=part.weights)
        return part.weights
    _apply(part, visible, scaling, function, are_summed=True)
    return part.derivative


def prepare_rows(plan, function: str, are_summed: bool = False):
    """
    Turns shifts into what scores start from; if rows are summed, with log-sums as `maximum`, fills `root` with r and
    `inverse` with 1 / Z, and multiplies queries, shifts and floors as this file says.
    """
    power = POWERS.get(function)
    if power:
        plan.shift.div_(-power).add_(1)
    else:
        plan.shift.neg_()
    if not are_summed:
        plan.maximum.zero_()
        return
    log_sums = plan.maximum.masked_fill(plan.maximum <= NOTHING_VISIBLE, 0.0)
    torch.exp2(-log_sums, out=plan.inverse)
    plan.floor.mul_(plan.inverse)
    if power:
        torch.exp2(log_sums.div_(-power), out=plan.root)
        plan.shift.mul_(plan.root)
        plan.queries.mul_(plan.root)
    else:
        plan.root.fill_(1.0)


def _score(part: SimpleNamespace, visible: torch.Tensor | None, scaling: float):
    """Fills a block's scores, to base 2, with `MASKED` where a key is hidden."""
    torch.baddbmm(part.scores, part.queries, part.keys.mT, beta=0, alpha=scaling * LOG2_E, out=part.scores)
    if part.later_keys is not None:
        part.later_scores.add_(part.later_keys)
    if visible is not None:
        part.whole_scores.masked_fill_(~visible, MASKED)


def _apply(part: SimpleNamespace, visible, scaling: float, function: str, are_summed: bool = False):
    """
    Fills `weights` with f + floor, 0 where a key is hidden, and `scores` with their logarithm; if rows are summed,
    `derivative` too.
    """
    base, other, weights = part.derivative, part.scores, part.weights
    power = POWERS.get(function, 1)
    torch.baddbmm(part.shift.expand_as(base), part.queries, part.keys.mT, alpha=scaling / power, out=base)
    if function == "clamped":
        torch.clamp(base, LOWEST, HIGHEST, out=other)
        if are_summed:
            torch.eq(base, other, out=base)
        other.exp_()
        if are_summed:
            base.mul_(other.mul_(part.inverse))
        torch.add(other, part.floor, out=weights)
    elif function == "power4":
        torch.square(base.clamp_(0, LARGEST_BASE), out=other)
        torch.addcmul(part.floor, other, other, out=weights)
        if are_summed:
            base.mul_(other)
    else:
        base.clamp_(0, LARGEST_BASE)
        torch.addcmul(part.floor, base, base, out=weights)
    torch.log2(weights, out=other)
    hidden = None if visible is None else ~visible
    for name in ("weights", "derivative") if are_summed else ("weights",):
        if part.later_keys is not None:
            getattr(part, f"later_{name}").mul_(part.earlier_keys)
        if hidden is not None:
            getattr(part, f"whole_{name}").masked_fill_(hidden, 0.0)


__all__ = ["prepare_rows", "weigh", "weigh_again"]
