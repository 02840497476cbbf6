# SPDX-License-Identifier: Apache-2.0
"""A block of the model: attention with an optional temperature and entropies, and a full, fused or missing FFN."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_masks import to_additive
from .configuration_entropy_gpt import EntropyGPTConfig
from .entropy_attention import entropy_attention, row_entropies
from .layers import (
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


class EntropyGPTAttention(nn.Module):
    """
    Multi-head causal self-attention with GPT-2's weights, an optional learnable temperature (SM(t) in arXiv
    2501.03489). Its result is the output and the attention matrices (`None` where the implementation keeps none), as
    of GPT-2's; if entropies are asked for, also those of all rows and the heads' thresholds, `None` without any.
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

        self.temperature, self.threshold = None, None
        if config.attention_temperature != "none":
            positions = config.n_positions if config.attention_temperature == "position" else None
            self.temperature = EntropyGPTTemperature(config.n_head, positions, config.temperature_init)
        if config.entropy_regularization:
            self.threshold = EntropyGPTEntropyThreshold(config.n_head, config.entropy_threshold_init)

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

        attend = self._attend_with_entropies if output_entropies else self._attend
        attn_output, attn_weights, entropies = attend(
            query_states, key_states, value_states, attention_mask, position_ids=position_ids, **kwargs
        )
        attn_output = self.c_proj(attn_output.reshape(hidden_states.shape))
        thresholds = None
        if self.threshold is not None and (output_entropies or self.training):
            thresholds = self.threshold()
            if self.training and thresholds.requires_grad:  # a loss computed elsewhere may leave them out
                attn_output = keep_in_graph(attn_output, thresholds)
        attn_output = self.resid_dropout(attn_output)
        if not output_entropies:
            return attn_output, attn_weights
        return attn_output, attn_weights, entropies, thresholds

    def _attend(self, query_states, key_states, value_states, attention_mask, **kwargs):
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
        return attn_output, attn_weights, None

    def _attend_with_entropies(self, query_states, key_states, value_states, attention_mask, **kwargs):
        query_length = query_states.shape[2]
        # Masks of padding alone (flash attention) and no mask leave it to the kernel to hide later keys.
        is_causal = attention_mask is None or (torch.is_tensor(attention_mask) and attention_mask.ndim == 2)
        if self.config._attn_implementation == "eager":
            attn_output, attn_weights, _ = self._attend(
                query_states, key_states, value_states, attention_mask, **kwargs
            )
            entropies = row_entropies(query_states, key_states, attention_mask, is_causal, self.scaling)
            return attn_output, attn_weights, entropies
        if self.config._attn_implementation == "sdpa" and attention_mask is None and query_length > 1:
            # SDPA's meaning of no mask: the first query stands at the first key (a static cache that is still empty).
            key_states, value_states = key_states[:, :, :query_length], value_states[:, :, :query_length]
        attn_output, entropies = entropy_attention(
            query_states,
            key_states,
            value_states,
            attention_mask,
            is_causal=is_causal,
            scaling=self.scaling,
            dropout=self.attn_dropout.p if self.attn_dropout.training else 0.0,
        )
        return attn_output.transpose(1, 2), None, entropies


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
    for, a tuple of them, the entropies of the attention rows and the heads' thresholds (`None` without any). These go
    up the stack as results: entropies caught by hooks lose their gradient under checkpointing, and outside of its
    block a parameter is only there in part under FSDP.
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
        attn_output, _, *entropies_and_thresholds = self.attn(
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
        return (hidden_states, *entropies_and_thresholds) if output_entropies else hidden_states


__all__ = ["EntropyGPTAttention", "EntropyGPTBlock", "EntropyGPTFusedFFN", "EntropyGPTMLP"]
