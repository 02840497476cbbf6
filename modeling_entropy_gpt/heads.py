# SPDX-License-Identifier: Apache-2.0
"""What all heads share: the call of the base model, and a loss that contains the entropy penalty."""

import torch
from torch import nn

from .entropy_regularization import (
    count_tokens,
    entropy_penalty,
    log_sum_penalty,
    mean_over_sequences,
    mean_over_tokens,
    penalized_share,
    reduce_over_batch,
)
from .forward_keywords import CACHE, check_keywords
from .model_outputs import EntropyGPTModelOutput


def smoothed_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    smoothing: float,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """
    Cross-entropy of the next token in which all tokens of the vocabulary share a part of the label's weight.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Scores before the softmax.
        targets (`torch.Tensor` of shape `(batch_size, sequence_length)`): The token after each position.
        smoothing (`float`): That part.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): Predicted tokens of the whole batch.
        ignore_index (`int`, *optional*, defaults to -100): The target that is not predicted.

    Raises:
        `ValueError`: If the part is not between 0 and 1.
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing={smoothing} has to be between 0 and 1, such as 0.1.")
    targets = targets.to(logits.device)
    total = nn.functional.cross_entropy(
        logits.float().flatten(0, -2),
        targets.flatten(),
        ignore_index=ignore_index,
        reduction="sum",
        label_smoothing=smoothing,
    )
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum()
    elif torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return total / num_items_in_batch


class EntropyGPTHead:
    """A mixin for models that consist of the base model (`transformer`) and a head with a loss."""

    def run_base_model(
        self, labels: torch.Tensor | None, output_entropies: bool | None, kwargs: dict, past_key_values=None, **inputs
    ) -> EntropyGPTModelOutput:
        """
        Runs the base model, with entropies where they are asked for or the loss needs them.

        Args:
            labels (`torch.Tensor`, *optional*): What the head predicts.
            output_entropies (`bool`, *optional*): As for the base model.
            kwargs (`dict`): Keywords that the head's forward does not name.
            past_key_values (`Cache`, *optional*): Keys and values of the tokens before.
            inputs: Other arguments of the base model.

        Raises:
            `TypeError`: If a keyword is none of this model's.
        """
        check_keywords(self, kwargs, past_key_values)
        cache = {} if past_key_values is None else {CACHE: past_key_values}
        output_entropies = output_entropies or self.needs_entropies(labels)
        return self.transformer(**inputs, **cache, output_entropies=output_entropies, **kwargs)

    @staticmethod
    def handed_on(outputs: EntropyGPTModelOutput, output_entropies: bool | None) -> dict:
        """The fields of the base model's output that every head's output has too."""
        return {
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
            "attention_entropies": outputs.attention_entropies if output_entropies else None,
            "visible_keys": outputs.visible_keys if output_entropies else None,
        }

    def needs_entropies(self, labels: torch.Tensor | None) -> bool:
        """Whether this forward pass yields a loss with the penalty; says so once if the penalty is lost."""
        if self.penalizes_rows and labels is None:
            self._warn_of_a_lost_penalty("No labels are given")
        return self.penalizes_rows and labels is not None

    def entropy_loss(
        self,
        outputs: EntropyGPTModelOutput,
        predicted: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """
        The penalty on the attention entropies (Algorithm 1), not multiplied by its coefficient.

        Args:
            outputs ([`EntropyGPTModelOutput`]): The base model's, with entropies.
            predicted (`torch.Tensor` of shape `(batch_size, sequence_length)`):
                Whether the cross-entropy is of the token after each position.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Number of such tokens of the whole batch.
        """
        penalties = entropy_penalty(**self._penalty_arguments(outputs))
        tokens = count_tokens(predicted, outputs.packed_sequences)
        return reduce_over_batch(penalties, tokens, num_items_in_batch, self.config.entropy_penalty)

    def log_sum_loss(
        self,
        outputs: EntropyGPTModelOutput,
        predicted: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The penalty on the rows' log-sum-exp, not multiplied by its coefficient; as [`entropy_loss`]."""
        tokens = count_tokens(predicted, outputs.packed_sequences)
        return mean_over_tokens(self._log_sum_penalties(outputs), tokens, num_items_in_batch)

    def _log_sum_penalties(self, outputs: EntropyGPTModelOutput) -> torch.Tensor:
        device = outputs.last_hidden_state.device
        deviations = torch.stack([deviations.to(device) for deviations in outputs.log_sum_deviations])
        return log_sum_penalty(deviations, outputs.visible_keys.to(device), outputs.packed_sequences)

    @torch.no_grad()
    def penalized_share(
        self,
        outputs: EntropyGPTModelOutput,
        predicted: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The share of heads or rows that are penalised, without gradient; arguments as for [`entropy_loss`]."""
        shares = penalized_share(**self._penalty_arguments(outputs))
        return mean_over_tokens(shares, count_tokens(predicted, outputs.packed_sequences), num_items_in_batch)

    def _penalty_arguments(self, outputs: EntropyGPTModelOutput) -> dict:
        """What [`entropy_penalty`] and [`penalized_share`] take."""
        device = outputs.last_hidden_state.device
        return {
            "entropies": torch.stack([entropies.to(device) for entropies in outputs.attention_entropies]),
            "thresholds": torch.stack([thresholds.to(device) for thresholds in outputs.entropy_thresholds]),
            "visible_keys": outputs.visible_keys.to(device),
            "tolerance": self.config.entropy_tolerance,
            "maximum": self.config.entropy_maximum,
            "penalty": self.config.entropy_penalty,
            "sequences": outputs.packed_sequences,
        }

    def add_entropy_loss(self, loss: torch.Tensor, outputs: EntropyGPTModelOutput) -> torch.Tensor:
        """The loss of a head that predicts one thing for each sequence, with the penalties added in training."""
        if self.training and outputs.log_sum_deviations is not None:
            penalty = mean_over_sequences(self._log_sum_penalties(outputs), outputs.packed_sequences).to(loss.device)
            loss = loss + self.config.log_sum_coefficient * penalty
        if self.penalizes_entropy and outputs.attention_entropies is not None:
            # A mean over sequences, whatever the penalty: so is the loss of these heads, over parts of a batch too.
            penalties = entropy_penalty(**self._penalty_arguments(outputs))
            penalty = mean_over_sequences(penalties, outputs.packed_sequences).to(loss.device)
            loss = loss + self.config.entropy_coefficient * penalty
        return self.check_loss(loss)

    def check_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Returns the loss; raises `FloatingPointError` if divergence is to be detected and it is not finite."""
        if self.config.detect_divergence and self.training and not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} while the hidden states of every layer are finite: the head or the "
                "entropy penalty diverged. Lower the learning rate or clip gradients."
            )
        return loss
