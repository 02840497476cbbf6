# SPDX-License-Identifier: Apache-2.0
"""A block of the model: attention with an optional temperature and entropies, and a full, fused or missing FFN."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_functions import entropies_of, whole_attention
from .attention_masks import to_additive, visible_pairs
from .configuration_entropy_gpt import EntropyGPTConfig
from .entropy_attention import entropy_attention, row_entropies, row_log_sums
from .layers import (
    EntropyGPTAttentionShift,
    EntropyGPTEntropyThreshold,
    EntropyGPTResidualScaling,
    EntropyGPTTemperature,
    build_activation,
    build_linear,
    build_norm,
    keep_in_graph,
)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    attn_weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + to_additive(attention_mask, attn_weights.dtype)
    # As GPT-2 does, the softmax stays in the dtype of the model.
    attn_weights = nn.functional.softmax(attn_weights, dim=-1).type(value.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.attn_dropout.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()
    return attn_output, attn_weights


def serves_every_function(config: EntropyGPTConfig) -> bool:
    """Whether a registered attention implementation computes `attention_function`, given a `shift`: it says so."""
    interface = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    return getattr(interface, "serves_every_function", False)


class EntropyGPTAttention(nn.Module):
    """
    Multi-head causal self-attention with GPT-2's weights, an optional learnable temperature (SM(t) in arXiv
    2501.03489) and a choice of functions in softmax's place. Its result is the output and the attention matrices
    (`None` where the implementation keeps none), as of GPT-2's; if entropies are asked for, also those of all rows,
    the heads' thresholds, and the rows' log-sum-exp less their shift, `None` where the architecture has none.
    """

    def __init__(self, config: EntropyGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.is_causal = True

        self.c_attn = build_linear(config, 3 * config.n_embd, config.n_embd, ("q", "k", "v"))
        self.c_proj = build_linear(config, config.n_embd, config.n_embd, ("o",), adds_to_residual=True)
        self.attn_dropout = nn.Dropout(config.attn_pdrop)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

        self.temperature, self.threshold, self.shift = None, None, None
        if config.attention_temperature != "none":
            positions = config.n_positions if config.attention_temperature == "position" else None
            self.temperature = EntropyGPTTemperature(config.n_head, positions, config.temperature_init)
        if config.entropy_regularization:
            self.threshold = EntropyGPTEntropyThreshold(config.n_head, config.entropy_threshold_init)
        if config.has_attention_shift:
            self.shift = EntropyGPTAttentionShift(config.n_head, config.n_positions, config.attention_shift_init)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        output_entropies: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, ...]:
        head_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query_states, key_states, value_states = (
            states.view(head_shape).transpose(1, 2)
            for states in self.c_attn(hidden_states).split(self.config.n_embd, dim=-1)
        )
        if self.temperature is not None:
            query_states = query_states * self.temperature(position_ids).to(query_states.dtype)
        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx, kwargs=kwargs)

        states = (query_states, key_states, value_states, attention_mask)
        shift = None if self.shift is None else self.shift(position_ids)
        entropies = None
        if output_entropies or (
            self.config.attention_function != "softmax" and not serves_every_function(self.config)
        ):
            attn_output, attn_weights, entropies = self._attend_with_entropies(
                *states, shift, output_entropies, position_ids=position_ids, **kwargs
            )
        else:
            attn_output, attn_weights = self._attend(*states, shift=shift, position_ids=position_ids, **kwargs)
        attn_output = self.c_proj(attn_output.reshape(hidden_states.shape))
        thresholds, deviations = None, None
        if self.threshold is not None and (output_entropies or self.training):
            thresholds = self.threshold()
            attn_output = self._kept_in_graph(attn_output, thresholds)
        if self.config.log_sum_coefficient and output_entropies:
            deviations = self._log_sum_deviations(*states, shift)
        if shift is not None and self.config.attention_function == "softmax":
            attn_output = self._kept_in_graph(attn_output, shift)
        attn_output = self.resid_dropout(attn_output)
        if not output_entropies:
            return attn_output, attn_weights
        return attn_output, attn_weights, entropies, thresholds, deviations

    def _kept_in_graph(self, attn_output: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """A loss computed elsewhere may leave a parameter out."""
        return keep_in_graph(attn_output, parameter) if self.training and parameter.requires_grad else attn_output

    def _attend(self, query_states, key_states, value_states, attention_mask, shift=None, **kwargs):
        if self.config.attention_function != "softmax":
            kwargs["shift"] = shift
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attn_dropout.p if self.attn_dropout.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return attn_output, attn_weights

    def _attend_with_entropies(
        self, query_states, key_states, value_states, attention_mask, shift, output_entropies, **kwargs
    ):
        function, dropout = self.config.attention_function, self.attn_dropout.p if self.attn_dropout.training else 0.0
        is_causal = _hides_later_keys(attention_mask)
        if self.config._attn_implementation == "eager" and function == "softmax":
            attn_output, attn_weights = self._attend(query_states, key_states, value_states, attention_mask, **kwargs)
            entropies = row_entropies(query_states, key_states, attention_mask, is_causal, self.scaling)
            return attn_output, attn_weights, entropies
        key_states, value_states = self._seen_by_sdpa(query_states, attention_mask, key_states, value_states)
        if self.config._attn_implementation == "eager":
            visible = visible_pairs(attention_mask, query_states.shape[2], key_states.shape[2], query_states.device)
            attn_output, attn_weights, logs = whole_attention(
                query_states, key_states, value_states, visible, is_causal, self.scaling, dropout, function, shift
            )
            entropies = entropies_of(logs)[0] if output_entropies else None
            return attn_output.transpose(1, 2), attn_weights, entropies
        attn_output, entropies = entropy_attention(
            query_states,
            key_states,
            value_states,
            attention_mask,
            is_causal=is_causal,
            scaling=self.scaling,
            dropout=dropout,
            function=function,
            shift=None if function == "softmax" else shift,
        )
        return attn_output.transpose(1, 2), None, entropies

    def _log_sum_deviations(self, query_states, key_states, value_states, attention_mask, shift):
        key_states, _ = self._seen_by_sdpa(query_states, attention_mask, key_states, value_states)
        is_causal = _hides_later_keys(attention_mask)
        return row_log_sums(query_states, key_states, attention_mask, is_causal, self.scaling) - shift

    def _seen_by_sdpa(self, query_states, attention_mask, *states) -> tuple[torch.Tensor, ...]:
        """SDPA's meaning of no mask: the first query stands at the first key (a static cache that is still empty)."""
        query_length = query_states.shape[2]
        if self.config._attn_implementation == "sdpa" and attention_mask is None and query_length > 1:
            return tuple(state[:, :, :query_length] for state in states)
        return states


def _hides_later_keys(attention_mask: torch.Tensor | BlockMask | None) -> bool:
    """Masks of padding alone (flash attention) and no mask leave it to the kernel to hide later keys."""
    return attention_mask is None or (torch.is_tensor(attention_mask) and attention_mask.ndim == 2)


class EntropyGPTMLP(nn.Module):
    """Two linear maps with the activation between them."""

    def __init__(self, config: EntropyGPTConfig):
        super().__init__()
        self.c_fc = build_linear(config, config.inner_size, config.n_embd, ("ffn",))
        self.act = build_activation(config.activation_function)
        self.c_proj = build_linear(config, config.n_embd, config.inner_size, ("ffn",), adds_to_residual=True)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class EntropyGPTFusedFFN(nn.Module):
    """One square linear map: what two without an activation between them amount to."""

    def __init__(self, config: EntropyGPTConfig):
        super().__init__()
        self.c_fused = build_linear(config, config.n_embd, config.n_embd, ("ffn",), adds_to_residual=True)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_fused(hidden_states))


class EntropyGPTBlock(GradientCheckpointingLayer):
    """
    A Pre-LN block. Its result is the hidden states, as of GPT-2's, so that tools may hook it; if entropies are asked
    for, a tuple of them, the entropies of the attention rows, the heads' thresholds and the rows' log-sum-exp less
    their shift (`None` without any). These go up the stack as results: entropies caught by hooks lose their gradient
    under checkpointing, and outside of its block a parameter is only there in part under FSDP.
    """

    def __init__(self, config: EntropyGPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = build_norm(config.normalization, config.n_embd, config.layer_norm_epsilon)
        self.attn = EntropyGPTAttention(config, layer_idx)
        self.ln_2, self.mlp = None, None
        self.residual_scaling = None
        if layer_idx not in config.pruned_ffn_layers:
            self.ln_2 = build_norm(config.normalization, config.n_embd, config.layer_norm_epsilon)
            self.mlp = EntropyGPTFusedFFN(config) if config.ffn_type == "fused" else EntropyGPTMLP(config)
            if config.ffn_residual_scaling:
                self.residual_scaling = EntropyGPTResidualScaling(config.ffn_alpha_init, config.ffn_beta_init)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        output_entropies: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        residual = hidden_states
        attn_output, _, *row_measures = self.attn(
            self.ln_1(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            output_entropies=output_entropies,
            **kwargs,
        )
        hidden_states = residual + attn_output
        if self.mlp is not None:
            residual = hidden_states
            ffn_output = self.mlp(self.ln_2(hidden_states))
            scaling = self.residual_scaling
            hidden_states = residual + ffn_output if scaling is None else scaling(residual, ffn_output)
        return (hidden_states, *row_measures) if output_entropies else hidden_states


__all__ = ["EntropyGPTAttention", "EntropyGPTBlock", "EntropyGPTFusedFFN", "EntropyGPTMLP"]
