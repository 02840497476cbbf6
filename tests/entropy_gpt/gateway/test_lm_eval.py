"""lm-eval measures a private model through the gateway, with the scores of the same model in the clear."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.measuring.task_scores import TASK_FOLDER, score_tasks
from entropy_gpt.training.tokenizer import load_tokenizer, train_tokenizer
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM
from tests.entropy_gpt.test_private import SIZES

from .test_openai_client import gateway, serve


pytest.importorskip("spu")
pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.slow, pytest.mark.private]

TASK = "local_lambada_openai"
SENTENCES = (
    "the model answers the prompt",
    "a server keeps the weights secret",
    "no client sees the other one",
    "each block adds to the stream",
)
# What the model goes on with by itself, to the end of the text, and what it does not.
OPENINGS, WRONG = ("the model", "a server", "each"), ("no client sees the weights", "each block adds to the prompt")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model that knows some sentences by heart, with their ends."""
    folder = tmp_path_factory.mktemp("model")
    words = train_tokenizer(["\n".join(SENTENCES)], 300)
    texts = [[*words(sentence)["input_ids"], words.eos_token_id] for sentence in SENTENCES]
    torch.manual_seed(0)
    model = EntropyGPTForCausalLM(EntropyGPTConfig.from_notation("SM+ScFuFFN", vocab_size=len(words), **SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        for tokens in texts:
            given = torch.tensor([tokens])
            model(given, labels=given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def test_its_scores_are_those_in_the_clear(model, clear, tmp_path):
    end = clear.words.eos_token
    own = [clear.words.decode(clear(opening, 24)[0]).partition(end) for opening in OPENINGS]
    assert all(found == end for _, found, _ in own)  # lm-eval leaves out the token after a passage: this one
    passages = [*(text for text, _, _ in own), *WRONG, "the model answers the"]
    data = tmp_path / "data"
    data.mkdir()
    lines = "".join(json.dumps({"text": passage}) + "\n" for passage in passages)
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
    scores = {score.metric: score.value for score in expected.scores}
    assert {name: found[f"{name},none"] for name in scores} == pytest.approx(scores, rel=0.02)
    assert found["acc,none"] == pytest.approx(4 / 6)  # all but the wrong ones
    assert scores["perplexity"] > 2
