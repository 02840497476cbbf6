"""
Opacus' gradients of single samples beside those of each sample alone, for saved models: for each folder one line of
JSON. Run by path, in an environment with Opacus and without this project.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from opacus import GradSampleModule
from transformers import AutoModelForCausalLM


SAMPLES, LENGTH = 3, 9
FROZEN = (
    "EntropyGPTResidualScaling",
    "EntropyGPTStaticLayerNorm",
    "EntropyGPTTemperature",
    "EntropyGPTEntropyThreshold",
)


def losses(model, tokens: torch.Tensor) -> torch.Tensor:
    """One loss for each sample. Positions are given for each, as Opacus needs them of a GPT-2 too."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = model(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits[:, :-1]
    of_tokens = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return of_tokens.view(len(tokens), -1).mean(dim=1)


def freeze_what_opacus_refuses(model):
    """What has no input or two, buffers, or a result that is no batch."""
    for module in model.modules():
        if type(module).__name__ in FROZEN:
            module.requires_grad_(False)


def compare(folder: str) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).train()
    freeze_what_opacus_refuses(model)
    tokens = torch.randint(2, 101, (SAMPLES, LENGTH))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    alone = [
        torch.autograd.grad(losses(model, row[None]).sum(), list(trained.values()), allow_unused=True)
        for row in tokens
    ]
    wrapped = GradSampleModule(model, loss_reduction="sum")
    losses(wrapped, tokens).sum().backward()
    differences = [
        (parameter.grad_sample - torch.stack(gradients)).abs().max().item()
        for parameter, *gradients in zip(trained.values(), *alone, strict=True)
        if gradients[0] is not None  # thresholds are in the penalty alone
    ]
    return {"folder": Path(folder).name, "parameters": len(differences), "difference": max(differences)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for each in sys.argv[1:]:
        print(json.dumps(compare(each)))
