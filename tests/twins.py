"""A GPT-2 of transformers and ours with the same weights: a tool has to do the same with both."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .architectures import NO_DROPOUT, SIZES


def make_twins(notation: str | None = None, **fields) -> tuple[GPT2LMHeadModel, EntropyGPTForCausalLM]:
    """
    Both in evaluation mode, without dropout, and with weights so large that every token looks elsewhere.

    Args:
        notation (`str`, *optional*): Of ours: an architecture that computes GPT-2's logits, with parameters of its own
            for the entropy penalty. By default, the configuration's defaults are taken.
        fields: Fields of both configurations, or `attn_implementation`. GPT-2 does not read those that it lacks.
    """
    fields = {**SIZES, **NO_DROPOUT, **fields}
    del fields["classifier_dropout"]
    stock = GPT2LMHeadModel(GPT2Config(**fields))
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    config = EntropyGPTConfig(**fields) if notation is None else EntropyGPTConfig.from_notation(notation, **fields)
    ours = EntropyGPTForCausalLM(config)
    missing, unexpected = ours.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("entropy_threshold") for name in missing)
    return stock.eval(), ours.eval()
