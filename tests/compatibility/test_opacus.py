"""Gradients of single sequences: by torch's own transforms, and by Opacus for differentially private training."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.func import functional_call, grad, vmap

from tests.architectures import ARCHITECTURES, NO_DROPOUT, make_model, make_tokens
from tests.twins import make_twins

from .environments import Environment


ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("through_opacus.py")


def gradients_at_once(model, tokens, **arguments):
    """Of each sequence's loss, by one pass."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    mask = torch.ones_like(tokens[:1])  # without one, a look for padding would be taken at each sequence's tokens

    def loss_of(parameters, row):
        inputs = {"input_ids": row[None], "labels": row[None], "attention_mask": mask, "use_cache": False}
        return functional_call(model, parameters, (), inputs | arguments).loss

    return vmap(grad(loss_of), in_dims=(None, 0))(parameters, tokens)


def gradients_one_by_one(model, tokens):
    gradients = []
    for row in tokens:
        model.zero_grad()
        model(input_ids=row[None], labels=row[None], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return {name: torch.stack([each[name] for each in gradients]) for name in gradients[0]}


def assert_equal_gradients(model):
    tokens = make_tokens(4, 9)
    got, expected = gradients_at_once(model, tokens), gradients_one_by_one(model, tokens)
    unused = set() if model.training else {name for name in got if name.endswith("entropy_threshold")}
    assert got.keys() - expected.keys() == unused
    for name, gradients in expected.items():
        largest = gradients.abs().max().item()
        torch.testing.assert_close(got[name], gradients, rtol=0, atol=1e-4 * largest, msg=name)
    return got


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transforms_of_torch(attention, compared):
    theirs, ours = (assert_equal_gradients(model) for model in make_twins(attn_implementation=attention))
    assert ours.keys() == theirs.keys()
    compared("torch", f"gradients of single sequences by vmap(grad), {attention}", "equal within 1e-4 of the largest")


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_transforms_of_torch_on_every_architecture(notation):
    assert_equal_gradients(make_model(notation, **NO_DROPOUT))


def test_transforms_of_torch_with_the_penalty():
    model = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT, entropy_coefficient=0.5, entropy_tolerance=0.0).train()
    gradients = assert_equal_gradients(model)
    assert any(value.any() for name, value in gradients.items() if name.endswith("entropy_threshold"))


@pytest.mark.releases
def test_opacus(tmp_path, compared):
    """Layers that are GPT-2's too need nothing; those with several inputs or buffers are registered."""
    environment = Environment.with_tool("opacus", "1.6.0")
    models = dict(zip(("stock", "ours"), make_twins(), strict=True))
    models |= {f"architecture{number}": make_model(each, **NO_DROPOUT) for number, each in enumerate(ARCHITECTURES)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    folders = [tmp_path / name for name in models]
    # Of this project, the environment has what is imported there, by its installed names.
    (tmp_path / "installed" / "entropy_gpt").mkdir(parents=True)
    (tmp_path / "installed" / "entropy_gpt" / "training").symlink_to(ROOT / "training")
    (tmp_path / "installed" / "modeling_entropy_gpt").symlink_to(ROOT / "modeling_entropy_gpt")
    paths = {"PYTHONPATH": str(tmp_path / "installed"), "HF_MODULES_CACHE": str(tmp_path / "cache")}
    printed = environment.run(SCRIPT, *folders, HF_HUB_OFFLINE="1", **paths)
    answer = json.loads(printed.splitlines()[-1])
    assert max(answer["without samplers"].values()) <= 1e-4
    assert len(answer["with samplers"]) == len(ARCHITECTURES)
    assert max(answer["with samplers"].values()) <= 1e-4
    with_buffers = [each for each in ARCHITECTURES if re.search(r"StaticLN|SN", each)]
    assert len(answer["with buffers"]) == len(with_buffers) > 0
    assert max(answer["with buffers"].values()) <= 1e-5
    assert answer["moved"] > 1e-2
    assert answer["apart"] <= 1e-5
    version = f"{environment.version_of('opacus')}, transformers {environment.version_of('transformers')}"
    compared("opacus", "gradients of single sequences, one by one and at once", "equal within 1e-4", version)
    result = f"weights equal within {answer['apart']:.0e}"
    compared("opacus", "differentially private steps from the same noise", result, version)
    what = f"clipped steps of {len(with_buffers)} models with StaticLN or SN beside those computed by hand"
    compared("opacus", what, "equal within 1e-5 of the largest change, in float64", version)
