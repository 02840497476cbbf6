"""
Run by `test_opacus.py` in an environment with Opacus: how far the gradients of single sequences are from those of
passes with one sequence each, for models in folders; and where two models end by differentially private steps.
"""

import copy
import json
import sys

import torch
from opacus import GradSampleModule, PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

from training.per_sample_gradients import register_grad_samplers


def load(folder: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).train()
    for name, parameter in model.named_parameters():
        if name.endswith("entropy_threshold"):
            parameter.requires_grad_(False)
    return model


def losses_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of each sequence, `(batch,)`."""
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(dim=1)


def compare(folder: str, with_samplers: bool) -> float:
    """The largest difference of a gradient, relative to the largest of its parameter."""
    torch.manual_seed(0)
    tokens = torch.randint(2, 100, (4, 9))
    model = load(folder)
    state = copy.deepcopy(model.state_dict())
    expected = []
    for row in tokens:
        model.load_state_dict(state)  # singular vectors move in every pass
        model.zero_grad()
        losses_of(model, row[None]).sum().backward()
        expected.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    if with_samplers:
        register_grad_samplers(model)
    losses_of(GradSampleModule(model, loss_reduction="sum", strict=False), tokens).sum().backward()
    difference = 0.0
    for name in expected[0]:
        wanted = torch.stack([gradients[name] for gradients in expected])
        got = model.get_parameter(name).grad_sample
        difference = max(difference, ((got - wanted).abs().max() / wanted.abs().max()).item())
    return difference


def train(folder: str) -> dict[str, torch.Tensor]:
    """The weights after steps with clipped gradients and noise, from the same numbers each time."""
    torch.manual_seed(0)
    tokens = torch.randint(2, 100, (8, 9))
    model = load(folder)
    register_grad_samplers(model)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(tokens), batch_size=4),
        noise_multiplier=0.5,
        max_grad_norm=0.5,
        poisson_sampling=False,
        noise_generator=torch.Generator().manual_seed(0),
    )
    for (batch,) in loader:
        optimizer.zero_grad()
        losses_of(private, batch).mean().backward()
        optimizer.step()
    return model.state_dict()


def main(stock: str, ours: str, *others: str):
    answer = {
        "without samplers": {folder: compare(folder, with_samplers=False) for folder in (stock, ours)},
        "with samplers": {folder: compare(folder, with_samplers=True) for folder in others},
    }
    theirs, own = train(stock), train(ours)
    before = load(ours).state_dict()
    answer["moved"] = max((own[name] - before[name]).abs().max().item() for name in own)
    answer["apart"] = max((own[name] - theirs[name]).abs().max().item() for name in theirs)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
