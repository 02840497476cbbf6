"""Opacus, which differential privacy takes gradients of single samples from."""

import json
from pathlib import Path

import pytest
import torch

from tests.architectures import ARCHITECTURES, NO_DROPOUT, make_model

from .environments import Environment
from .twins import make_twins


pytestmark = pytest.mark.releases
TOOL = "opacus"
SCRIPT = Path(__file__).with_name("through_opacus.py")
# Opacus takes no layers with buffers; a folded model has plain weights.
TAKEN = [notation for notation in ARCHITECTURES if "SN" not in notation]


def test_gradients_of_single_samples(tmp_path, compared):
    environment = Environment("opacus", f"{TOOL}==1.6.0", "transformers")
    folders = {}
    for name in TAKEN:
        torch.manual_seed(0)
        folders[name] = tmp_path / str(len(folders))
        make_model(name, **NO_DROPOUT).save_pretrained(folders[name])
    for model in make_twins():
        folders[type(model).__name__] = tmp_path / type(model).__name__
        model.save_pretrained(folders[type(model).__name__])
    output = environment.run(SCRIPT, *folders.values(), HF_HOME=str(tmp_path / "home"))
    found = {line["folder"]: line for line in map(json.loads, output.splitlines()) if "folder" in line}
    figures = {name: found[folder.name] for name, folder in folders.items()}
    assert all(figure["difference"] < 1e-9 for figure in figures.values()), figures
    assert figures["EntropyGPTForCausalLM"]["parameters"] == figures["GPT2LMHeadModel"]["parameters"]
    difference = max(figure["difference"] for figure in figures.values())
    version = f"{environment.version_of(TOOL)}, transformers {environment.version_of('transformers')}"
    what = f"gradients of single samples of {len(TAKEN)} architectures, beside those of each sample alone"
    compared(TOOL, what, f"equal within {difference:.0e}, in float64", version)
