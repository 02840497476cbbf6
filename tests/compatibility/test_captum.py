"""captum, by the same lines on our model as remote code and on a GPT-2 of the same weights."""

import json
from pathlib import Path

import pytest

from tests.architectures import make_model
from tests.twins import make_twins

from .environments import Environment
from .figures import describe
from .folders import run_page, save_with_tokenizer


pytestmark = pytest.mark.releases
TOOL = "captum"
SCRIPT = Path(__file__).with_name("through_captum.py")


@pytest.fixture(scope="module")
def environment():
    return Environment.with_tool(TOOL, "0.9.0")


def test_attributions(environment, tmp_path, compared):
    models = [*make_twins(), make_model("SM", final_normalization="none")]
    folders = [save_with_tokenizer(model, tmp_path / str(number)) for number, model in enumerate(models)]
    output = environment.run(SCRIPT, *folders, HF_HOME=str(tmp_path / "home"))
    figures = json.loads(output.splitlines()[-1])
    version = f"{environment.version_of(TOOL)}, transformers {environment.version_of('transformers')}"
    assert figures.pop("smallest attribution") > 0.1
    assert figures.pop("difference of logits") > 0.1
    missing = figures.pop("completeness")
    assert missing < 1e-6
    assert len(figures) == 4
    for what, difference in figures.items():
        assert difference < 1e-9, what
        compared(TOOL, what, describe(difference), version)
    what = "integrated gradients of a softmax-only model: their sum beside the difference of logits"
    compared(TOOL, what, describe(missing), version)


def test_the_page(environment, tmp_path):
    assert "tensor([[" in run_page(TOOL, environment, tmp_path)
