"""Tiny models of every architecture, for tests that run over all of them."""

import torch

from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM
from modeling_entropy_gpt.layers import EntropyGPTNormalizedConv1D


SIZES = {
    "n_layer": 3,
    "n_embd": 48,
    "n_head": 4,
    "vocab_size": 101,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0}

TABLE_1 = (
    "SM+LN+G",
    "SM+LN+R",
    "SM+LN",
    "SM+G",
    "SM+R",
    "SM",
    "SM+ScFFN",
    "SM+ScFuFFN",
    "SM(t)+ScFuFFN",
    "EReg(SM(t)+ScFuFFN)",
)
ARCHITECTURES = (
    *TABLE_1,
    "EReg(SM(t_h)+StaticLN+LearnableLeakyR+ScFFN)",
    "EReg(SM(t)+ScFuFFNi1)",
    "SM+LN+LeakyR+FFNi[0]",
    "SM+ScFFN+WN(QKV+FFN)",
    "SM+ScFuFFN+SN(QKVO+FFN)",
    "EReg(SM(t_h)+LN+G+WN(QK+FFN))",
    "EReg(Pow4(t_h)+ScFuFFN)",
    "ClSM(t)+LN+G",
)


def make_config(notation: str, **fields) -> EntropyGPTConfig:
    """A tiny configuration, whose temperatures are not 1."""
    return EntropyGPTConfig.from_notation(notation, **{**SIZES, "temperature_init": 0.7, **fields})


def make_model(notation: str, model_class=EntropyGPTForCausalLM, **fields):
    """
    A tiny model with weights so large that its attention is far from uniform even without norms: at initialisation
    every key looks alike, and a wrong mask, position or temperature would hardly show.
    """
    model = model_class(make_config(notation, **fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("log_temperature", "attention_shift")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            elif "wte" in name or "wpe" in name:
                parameter.mul_(50)
            else:
                parameter.mul_(8)
        for module in model.modules():
            if isinstance(module, EntropyGPTNormalizedConv1D):
                module.initialize()
                module.gain.mul_(2 if module.kind == "spectral" else 1)
    return model


def make_tokens(batch_size: int = 2, length: int = 17) -> torch.Tensor:
    """Random tokens without special ones."""
    return torch.randint(2, SIZES["vocab_size"], (batch_size, length))
