"""A GPT-2 of transformers and ours with the same weights: a tool has to do the same with both."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM
from tests.architectures import NO_DROPOUT, SIZES


def make_twins(**fields) -> tuple[GPT2LMHeadModel, EntropyGPTForCausalLM]:
    """
    Both in evaluation mode, without dropout, and with weights so large that every token looks elsewhere.

    Args:
        fields: Fields that both configurations have, or `attn_implementation`.
    """
    fields = {**SIZES, **NO_DROPOUT, **fields}
    del fields["classifier_dropout"]
    stock = GPT2LMHeadModel(GPT2Config(**fields))
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ours = EntropyGPTForCausalLM(EntropyGPTConfig(**fields))
    ours.load_state_dict(stock.state_dict())
    return stock.eval(), ours.eval()
