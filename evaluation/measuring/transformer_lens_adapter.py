"""
EntropyGPT in TransformerLens, which finds this adapter by the entry point group `transformer_lens.architectures`:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    bridge = build_bridge_from_module(model, "EntropyGPTForCausalLM", hf_config=model.config, tokenizer=tokenizer)

The model may be of this package or remote code: nothing here asks for its classes. TransformerLens, an optional
dependency, is imported here alone.
"""

import torch
from torch import nn
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    JointQKVAttentionBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.gpt2 import GPT2ArchitectureAdapter
from transformers.pytorch_utils import Conv1D


class EntropyGPTArchitectureAdapter(GPT2ArchitectureAdapter):
    """
    GPT-2's adapter, with what EntropyGPT has in place of GPT-2's parts. TransformerLens' names mean:

    - `blocks.{i}.attn.hook_q`: queries before the temperature; `hook_attn_scores` and `hook_pattern` come after it;
    - `blocks.{i}.ln1`, `ln2` and `ln_final`: a static norm's `hook_scale` is its constant; without a norm, there are
      neither `hook_scale` nor `hook_normalized`, and a stack that a norm is to be applied to raises `KeyError`;
    - `blocks.{i}.mlp.hook_out`: the FFN's output, zeros in a layer without an FFN. A fused FFN has `hook_post`, which
      is its input, and no `hook_pre`;
    - `blocks.{i}.hook_mlp_out`: what the FFN adds to the residual stream, `resid_post - resid_mid`. With
      `ffn_residual_scaling` this is `(beta - 1) * resid_mid + FFN / alpha`, so that the parts which
      `cache.decompose_resid` gives sum to the residual stream in every architecture.

    The model is changed in place, as by every bridge; normalised weights become plain ones, of the same function.
    Weight processing (`enable_compatibility_mode`) is there for models with LayerNorms alone: centred weights would
    change the others.
    """

    # The bridge computes attention itself, from which it takes the patterns.
    supports_hf_output_attentions = False

    def __init__(self, cfg):
        super().__init__(cfg)
        self.cfg.attn_implementation = "eager"

    def prepare_model(self, hf_model: nn.Module):
        super().prepare_model(hf_model)
        config = hf_model.config
        if getattr(config, "attention_function", "softmax") != "softmax":
            raise ValueError(
                f"attention_function={config.attention_function!r}: TransformerLens computes attention itself, by "
                "softmax alone. Use the model without a bridge."
            )
        if getattr(config, "log_sum_coefficient", 0):
            raise ValueError(
                f"log_sum_coefficient={config.log_sum_coefficient}: the bridge has no log-sums for this penalty. Set "
                "it to 0, or use the model without a bridge."
            )
        norms = {config.normalization, config.final_normalization}
        self.cfg.normalization_type = None if norms == {"none"} else "LN"
        self.supports_compatibility_mode = norms == {"layernorm"} and config.ffn_type == "mlp"
        if config.ffn_type == "fused":
            self.cfg.d_mlp = config.n_embd
        _use_plain_weights(hf_model)
        for layer in config.pruned_ffn_layers:
            block = hf_model.transformer.h[layer]
            block.ln_2, block.mlp = nn.Identity(), NoFFN()
        self.component_mapping |= {
            "blocks": self._block(config.ffn_type),
            "ln_final": NormBridge(name="transformer.ln_f", config=self.cfg),
        }

    def _block(self, ffn_type: str) -> BlockBridge:
        qkv_and_o = {"qkv": LinearBridge(name="c_attn"), "o": LinearBridge(name="c_proj")}
        in_and_out = {
            "in": LinearBridge(name="c_fc", optional=True),
            "out": LinearBridge(name="c_fused" if ffn_type == "fused" else "c_proj", optional=True),
        }
        return BlockBridge(
            name="transformer.h",
            config=self.cfg,
            submodules={
                "ln1": NormBridge(name="ln_1", config=self.cfg),
                "attn": EntropyGPTAttentionBridge(name="attn", config=self.cfg, submodules=qkv_and_o),
                "ln2": NormBridge(name="ln_2", config=self.cfg),
                "mlp": MLPBridge(name="mlp", submodules=in_and_out),
                "residual_scaling": ResidualScalingBridge(name="residual_scaling", optional=True),
            },
            # Where there is none, TransformerLens goes back to its own, mlp.hook_out.
            hook_alias_overrides={"hook_mlp_out": "residual_scaling.hook_out"},
        )


class EntropyGPTAttentionBridge(JointQKVAttentionBridge):
    """Attention whose queries are divided by the temperature, and which knows its entropies."""

    def forward(self, *args, output_entropies: bool = False, **kwargs):
        output, pattern = super().forward(*args, **kwargs)
        if not output_entropies:
            return output, pattern, None, None
        threshold = self.original_component.threshold
        entropies = torch.special.entr(pattern).sum(dim=-1)
        return output, pattern, entropies, None if threshold is None else threshold(), None

    def _reconstruct_attention(self, q, k, v, position_ids=None, **kwargs):
        attention = self.original_component
        if attention.temperature is not None:
            inverse = attention.temperature(position_ids).to(q.dtype).transpose(1, 2)
            q = q.reshape(*q.shape[:2], self.config.n_heads, -1) * inverse
            k, v = (states.reshape(q.shape) for states in (k, v))
        output, pattern = super()._reconstruct_attention(q, k, v, **kwargs)
        return attention.resid_dropout(output), pattern


class NormBridge(NormalizationBridge):
    """A LayerNorm, a static norm, or none."""

    def set_original_component(self, original_component: nn.Module):
        super().set_original_component(original_component)
        if isinstance(original_component, nn.Identity):
            for name in ("hook_scale", "hook_normalized"):
                delattr(self, name)
                del self._hook_registry[name]

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        if isinstance(self.original_component, nn.Identity):
            return self.hook_out(self.hook_in(hidden_states))
        return super().forward(hidden_states, **kwargs)

    def _python_norm_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norm = self.original_component
        if isinstance(norm, nn.LayerNorm):
            return super()._python_norm_forward(hidden_states)
        scale = self.hook_scale(norm.standard_deviation.expand(*hidden_states.shape[:-1], 1))
        centered = hidden_states - hidden_states.mean(dim=-1, keepdim=True)
        return self.hook_normalized(centered / scale) * norm.weight + norm.bias


class ResidualScalingBridge(GeneralizedComponent):
    """`beta * residual + ffn_output / alpha` as a sum; `hook_out` has what is added to the residual stream."""

    def forward(self, residual: torch.Tensor, ffn_output: torch.Tensor) -> torch.Tensor:
        residual = self.hook_in(residual)
        return residual + self.hook_out(self.original_component(residual, ffn_output) - residual)


class NoFFN(nn.Module):
    """What adds nothing, in a layer without an FFN: TransformerLens' tools ask every layer for what its FFN adds."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


@torch.no_grad()
def _use_plain_weights(model: nn.Module):
    """Replaces linear maps with normalised weights, known by their name: remote code has classes of its own."""
    for parent in list(model.modules()):
        for name, linear in parent.named_children():
            if type(linear).__name__ == "EntropyGPTNormalizedConv1D":
                plain = Conv1D(linear.nf, linear.nx)
                plain.weight, plain.bias = nn.Parameter(linear.normalized_weight()), linear.bias
                setattr(parent, name, plain)
    model.config.weight_normalization, model.config.weight_normalization_targets = None, []
