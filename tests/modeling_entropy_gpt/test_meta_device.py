"""
A step of training without numbers: on the meta device, tensors made on a wrong device meet, and whatever makes a GPU's
host wait (a look at a number) raises.
"""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_entropy_gpt import EntropyGPTForCausalLM
from tests.architectures import ARCHITECTURES, SIZES, make_config
from tests.slow import slow_but


STOCK = "GPT-2"


@pytest.mark.parametrize("notation", slow_but([STOCK, *ARCHITECTURES[::3]], [STOCK, *ARCHITECTURES]))
def test_a_training_step_never_waits(notation):
    with torch.device("meta"):
        if notation == STOCK:
            model = GPT2LMHeadModel(GPT2Config(**SIZES))
        else:
            model = EntropyGPTForCausalLM(make_config(notation))
        tokens = torch.empty(2, 17, dtype=torch.long)
        # Transformers looks into masks of padding, for GPT-2 too.
        mask = torch.empty(2, 1, 17, 17, dtype=torch.bool)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    options = {} if notation == STOCK else {"output_entropies": True}
    outputs = model(tokens, attention_mask=mask, labels=tokens, **options)
    outputs.loss.backward()
    assert all(parameter.grad.is_meta for parameter in model.parameters() if parameter.requires_grad)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if notation != STOCK:
        assert {entropies.shape for entropies in outputs.attention_entropies} == {(2, SIZES["n_head"], 17)}
