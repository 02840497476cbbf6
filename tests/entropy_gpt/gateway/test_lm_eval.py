"""lm-eval measures a private model through the gateway, with the scores of the same model in the clear."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.measuring.task_scores import TASK_FOLDER, score_tasks
from entropy_gpt.training.tokenizer import load_tokenizer

from .test_openai_client import gateway, serve


pytest.importorskip("spu")
pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.slow, pytest.mark.private]

PASSAGES = ("def main return self", "import the value of self", "class name is not None")
TASK = "local_lambada_openai"


def test_its_scores_are_those_in_the_clear(model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    lines = "".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES)
    (data / "lambada_openai.jsonl").write_text(lines, encoding="utf-8")
    with serve(model) as (_, server), gateway(model, server) as (_, client):
        arguments = {
            "model": "local-completions",
            "model_args": f"model=private,base_url={client.base_url}completions,tokenizer={model},max_length=32",
            "tasks": TASK,
            "include_path": TASK_FOLDER,
            "metadata": json.dumps({"task_data": str(data)}),
            "output_path": tmp_path / "output",
        }
        command = [sys.executable, "-m", "lm_eval", "run", *(f"--{name}={value}" for name, value in arguments.items())]
        cache = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        process = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    (path,) = Path(tmp_path, "output").rglob("results_*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["results"][TASK]
    expected = score_tasks(load_language_model(model), load_tokenizer(str(model)), [TASK], data)
    assert {score.metric for score in expected.scores} == {"acc", "perplexity"}
    for score in expected.scores:
        assert found[f"{score.metric},none"] == pytest.approx(score.value, rel=0.02)
