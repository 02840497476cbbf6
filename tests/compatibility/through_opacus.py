"""
Run by `test_opacus.py` in an environment with Opacus: how far the gradients of single sequences are from those of
passes with one sequence each, for models in folders; and where models end by differentially private steps.
"""

import copy
import json
import sys

import torch
from opacus import GradSampleModule, PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

from entropy_gpt.training.per_sample_gradients import register_grad_samplers


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


def gradients_one_by_one(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each sequence's loss, `(batch, ...)`; leaves the model as it was."""
    state = copy.deepcopy(model.state_dict())
    rows = []
    for row in tokens:
        model.load_state_dict(state)  # singular vectors move in every pass
        model.zero_grad()
        losses_of(model, row[None]).sum().backward()
        rows.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    return {name: torch.stack([gradients[name] for gradients in rows]) for name in rows[0]}


def compare(folder: str, with_samplers: bool) -> float:
    """The largest difference of a gradient, relative to the largest of its parameter."""
    torch.manual_seed(0)
    tokens = torch.randint(2, 100, (4, 9))
    model = load(folder)
    expected = gradients_one_by_one(model, tokens)
    if with_samplers:
        register_grad_samplers(model)
    losses_of(GradSampleModule(model, loss_reduction="sum", strict=False), tokens).sum().backward()
    difference = 0.0
    for name, wanted in expected.items():
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


def step_beside_buffers(folder: str) -> float:
    """
    How far the weights after a step with clipped gradients are from those computed by hand, relative to the largest
    change. The model is wrapped before it is handed over: what `PrivacyEngine` wraps itself, it wraps strictly.
    """
    torch.manual_seed(0)
    tokens, rate, largest_norm = torch.randint(2, 100, (4, 9)), 0.1, 0.5
    model = load(folder).double()
    gradients = gradients_one_by_one(model, tokens)
    norms = torch.stack([each.flatten(1).norm(dim=1) for each in gradients.values()]).norm(dim=0)
    assert norms.max() > largest_norm
    shares = (largest_norm / norms).clamp(max=1) / len(tokens)
    changes = {name: -rate * torch.tensordot(shares, each, 1) for name, each in gradients.items()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    register_grad_samplers(model)
    arguments = {
        "data_loader": DataLoader(TensorDataset(tokens), batch_size=len(tokens)),
        "noise_multiplier": 0.0,
        "max_grad_norm": largest_norm,
        "poisson_sampling": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    try:
        PrivacyEngine().make_private(module=model, optimizer=optimizer, strict=False, **arguments)
    except NotImplementedError as error:
        assert "buffers" in str(error), error
    else:
        raise AssertionError("Opacus wraps models with buffers by itself now")
    wrapped = GradSampleModule(model, strict=False)
    private, optimizer, loader = PrivacyEngine().make_private(module=wrapped, optimizer=optimizer, **arguments)
    for (batch,) in loader:
        optimizer.zero_grad()
        losses_of(private, batch).mean().backward()
        optimizer.step()
    differences = [(model.get_parameter(name) - before[name] - changes[name]).abs().max() for name in changes]
    return (max(differences) / max(change.abs().max() for change in changes.values())).item()


def main(stock: str, ours: str, *others: str):
    answer = {
        "without samplers": {folder: compare(folder, with_samplers=False) for folder in (stock, ours)},
        "with samplers": {folder: compare(folder, with_samplers=True) for folder in others},
        "with buffers": {folder: step_beside_buffers(folder) for folder in others if [*load(folder).buffers()]},
    }
    theirs, own = train(stock), train(ours)
    before = load(ours).state_dict()
    answer["moved"] = max((own[name] - before[name]).abs().max().item() for name in own)
    answer["apart"] = max((own[name] - theirs[name]).abs().max().item() for name in theirs)
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
