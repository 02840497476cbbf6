"""nnsight, by the same lines on our model as remote code and on a GPT-2 of the same weights."""

import json
from pathlib import Path

import pytest

from tests.twins import make_twins

from .environments import Environment
from .figures import describe
from .folders import run_page, save_with_tokenizer


pytestmark = pytest.mark.releases
TOOL = "nnsight"
SCRIPT = Path(__file__).with_name("through_nnsight.py")


@pytest.fixture(scope="module")
def environment():
    return Environment.with_tool(TOOL, "0.8.1")


def test_traces_interventions_and_generation(environment, tmp_path, compared):
    folders = [save_with_tokenizer(model, tmp_path / type(model).__name__) for model in make_twins()]
    output = environment.run(SCRIPT, *folders, HF_HOME=str(tmp_path / "home"))
    figures = json.loads(output.splitlines()[-1])
    version = f"{environment.version_of(TOOL)}, transformers {environment.version_of('transformers')}"
    assert figures.pop("generated as stock")
    assert figures.pop("steering changes tokens")
    assert figures.pop("what interventions do") > 0.1
    assert len(figures) == 15
    assert max(figures.values()) < 1e-5, figures
    difference = max(value for name, value in figures.items() if not name.startswith("logits,"))
    what = "attention outputs and patterns, FFN outputs, hidden states and logits, alone and in a padded batch"
    compared(TOOL, what, describe(difference), version)
    difference = max(value for name, value in figures.items() if name.startswith("logits,"))
    what = "hidden states doubled, a position set to zero, a head ablated"
    compared(TOOL, what, f"logits {describe(difference)}", version)
    compared(TOOL, "tokens generated, plain and steered at each step", "the same", version)


def test_the_page(environment, tmp_path):
    assert "torch.Size([1, 4, 48]) torch.Size([1, 4, 101])" in run_page(TOOL, environment, tmp_path)
