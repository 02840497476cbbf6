"""What draws a simplified model to the original, and keeps it from running away: parts of the loss of healing.

All are sums over the predicted tokens divided by `num_items`, the number of these in the whole batch, so that the
parts of a split batch add up to that of the whole.
"""

from collections.abc import Sequence

import torch
from torch import nn


def logits_divergence(
    logits: torch.Tensor,
    original_logits: torch.Tensor,
    predicted: torch.Tensor,
    num_items: torch.Tensor | int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """
    KL(original || model) of the distributions softened by a temperature, times its square so that gradients keep their
    scale (Hinton et al., 2015).

    Args:
        logits, original_logits (`torch.Tensor` of shape `(batch, length, vocab_size)`): Scores of both models.
        predicted (`torch.Tensor` of shape `(batch, length)`): Whether the token after this position is predicted.
        num_items (`torch.Tensor` or `int`): Predicted tokens of the whole batch.
        temperature (`float`): Above 1, unlikely tokens weigh more.
    """
    found = nn.functional.log_softmax(logits[predicted].float() / temperature, dim=-1)
    expected = nn.functional.log_softmax(original_logits[predicted].float() / temperature, dim=-1)
    divergence = nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
    return divergence * temperature**2 / num_items


def hidden_state_distance(
    hidden_states: Sequence[torch.Tensor],
    original_hidden_states: Sequence[torch.Tensor],
    predicted: torch.Tensor,
    num_items: torch.Tensor | int,
) -> torch.Tensor:
    """
    Squared distance of the residual streams after each block, as a part of the original's squared length, averaged
    over blocks.

    Args:
        hidden_states, original_hidden_states (`Sequence[torch.Tensor]`): `(batch, length, n_embd)` after each block.
        predicted, num_items: As for [`logits_divergence`].
    """
    total = 0.0
    for found, expected in zip(hidden_states, original_hidden_states, strict=True):
        found, expected = found[predicted].float(), expected[predicted].float()
        total = total + ((found - expected).square().sum(dim=-1) / expected.square().sum(dim=-1)).sum()
    return total / len(hidden_states) / num_items


def residual_scale_distance(
    hidden_states: torch.Tensor, scale: float, predicted: torch.Tensor, num_items: torch.Tensor | int
) -> torch.Tensor:
    """
    Squared distance of each row's standard deviation from a constant, as a part of it: what keeps the stream before a
    static norm at the scale that its constant stands for (arXiv 2507.02559, there in absolute terms). First positions,
    whose scale is another, are left out.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, length, n_embd)`): The residual stream before the final norm.
        scale (`float`): The constant.
        predicted, num_items: As for [`logits_divergence`].
    """
    deviations = hidden_states.float().std(dim=-1, unbiased=False) / scale
    counted = predicted.clone()
    counted[:, 0] = False
    return ((deviations - 1).square() * counted).sum() / num_items
