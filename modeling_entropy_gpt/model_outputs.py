# SPDX-License-Identifier: Apache-2.0
"""
What the models return: transformers' outputs, with the entropies of attention and their penalty.

A model called with `output_entropies=True` returns `attention_entropies`, one tensor for each layer, and
`visible_keys`, under any attention implementation.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)


@dataclass
class EntropyGPTModelOutput(BaseModelOutputWithPast):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Hidden states after the last block and the final norm.
        past_key_values (`Cache`, *optional*, returned when `use_cache=True`):
            Keys and values for decoding; `cache` from transformers 5.24 on.
        hidden_states (`tuple(torch.Tensor)`, *optional*, returned when `output_hidden_states=True`):
            Hidden states after the embeddings and after each block.
        attentions (`tuple(torch.Tensor)`, *optional*, returned when `output_attentions=True`):
            Attention probabilities of each layer, `(batch_size, heads, query_length, key_length)`, after dropout.
        attention_entropies (`tuple(torch.Tensor)`, *optional*, returned when `output_entropies=True`):
            Entropies of the attention rows of each layer in nats, `(batch_size, heads, query_length)`, before dropout.
        visible_keys (`torch.Tensor` of shape `(batch_size or 1, query_length)`, *optional*):
            Number of keys each row may attend to, 0 for padding; returned when `output_entropies=True`.
        entropy_thresholds (`tuple(torch.Tensor)`, *optional*):
            Thresholds of the heads of each layer, `(heads,)`; returned when `output_entropies=True` by a model with
            `entropy_regularization`.
        log_sum_deviations (`tuple(torch.Tensor)`, *optional*):
            Log-sum-exp of the scores of each attention row less its shift, `(batch_size, heads, query_length)`;
            returned when `output_entropies=True` by a model with a `log_sum_coefficient`.
        packed_sequences (`torch.Tensor` of shape `(batch_size or 1, query_length)`, *optional*):
            The sequence that each position belongs to, from 0; returned with `entropy_thresholds` or
            `log_sum_deviations` if positions or a 4D mask allow several sequences in one row.
    """

    attention_entropies: tuple[torch.Tensor, ...] | None = None
    visible_keys: torch.Tensor | None = None
    entropy_thresholds: tuple[torch.Tensor, ...] | None = None
    log_sum_deviations: tuple[torch.Tensor, ...] | None = None
    packed_sequences: torch.Tensor | None = None


@dataclass
class EntropyGPTCausalLMOutput(CausalLMOutputWithPast):
    """
    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            In training `cross_entropy_loss + entropy_coefficient * entropy_loss + log_sum_coefficient *
            log_sum_loss`, of which those that the config asks for, else the cross-entropy; with `smoothing`, of
            smoothed labels.
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): Scores before the softmax.
        past_key_values, hidden_states, attentions:
            As in [`EntropyGPTModelOutput`].
        attention_entropies, visible_keys (*optional*, returned when `output_entropies=True`):
            Entropies of all attention rows, and how many keys each row sees, as in [`EntropyGPTModelOutput`].
        cross_entropy_loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Cross-entropy of the next token.
        entropy_loss (`torch.Tensor` of shape `(1,)`, *optional*):
            Penalty on the attention entropies, not multiplied by its coefficient; returned when `labels` is given to a
            model with `entropy_regularization` that is in training or asked for entropies.
        log_sum_loss (`torch.Tensor` of shape `(1,)`, *optional*):
            Mean over attention rows of the square of their log-sum-exp less their shift, not multiplied by its
            coefficient; returned when `labels` is given to a model with a `log_sum_coefficient` that is in training
            or asked for entropies.
        penalized_share (`torch.Tensor` of shape `(1,)`, *optional*, returned with `entropy_loss`):
            Share of the heads (of their rows, where rows are penalised) whose deviation exceeds the margin, averaged
            over the predicted tokens; without gradient. Parts of a split batch add up to that of the whole.
    """

    cross_entropy_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    log_sum_loss: torch.Tensor | None = None
    penalized_share: torch.Tensor | None = None
    attention_entropies: tuple[torch.Tensor, ...] | None = None
    visible_keys: torch.Tensor | None = None


@dataclass
class EntropyGPTSequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """
    transformers' output. With `output_entropies=True` it has `attention_entropies` and `visible_keys` too, as in
    [`EntropyGPTModelOutput`].
    """

    attention_entropies: tuple[torch.Tensor, ...] | None = None
    visible_keys: torch.Tensor | None = None


@dataclass
class EntropyGPTTokenClassifierOutput(TokenClassifierOutput):
    """
    transformers' output. With `output_entropies=True` it has `attention_entropies` and `visible_keys` too, as in
    [`EntropyGPTModelOutput`].
    """

    attention_entropies: tuple[torch.Tensor, ...] | None = None
    visible_keys: torch.Tensor | None = None


@dataclass
class EntropyGPTQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    """
    transformers' output. With `output_entropies=True` it has `attention_entropies` and `visible_keys` too, as in
    [`EntropyGPTModelOutput`].
    """

    attention_entropies: tuple[torch.Tensor, ...] | None = None
    visible_keys: torch.Tensor | None = None
