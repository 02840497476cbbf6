"""The metric for HuggingFace's `evaluate`, loaded from its folder as a user loads it."""

import math
from pathlib import Path

import evaluate
import pytest

from entropy_gpt.evaluation.measuring.perplexity import Windows, measure_likelihood
from entropy_gpt.evaluation.measuring.tokenized_text import tokenize
from entropy_gpt.training.tokenizer import train_tokenizer
from tests.architectures import make_model


FOLDER = Path(__file__).parents[2] / "evaluation" / "metrics" / "perplexity"
TEXTS = ["import os\n", "def f(x):\n    return x\n\n" * 30, "naïve"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS, 280)
    tokenizer.pad_token = None
    model = make_model("EReg(SM(t)+ScFuFFN)", vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


@pytest.fixture
def metric(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path))


def test_the_mean_is_over_tokens_and_no_padding_token_is_needed(metric, saved):
    folder, model, tokenizer = saved
    got = metric.compute(
        predictions=TEXTS, model_id=str(folder), trust_remote_code=True, context=32, stride=8, device="cpu"
    )
    windows = Windows(32, 8, True, True)
    expected = measure_likelihood(model, tokenize(TEXTS, tokenizer, True, True), windows)
    assert got["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert got["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
    assert got["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert got["tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    alone = [metric.compute(predictions=[text], model_id=str(folder), trust_remote_code=True) for text in TEXTS]
    mean_of_texts = sum(one["perplexity"] for one in alone) / len(alone)
    assert not math.isclose(got["perplexity"], mean_of_texts, rel_tol=0.01)


def test_bad_input(metric, saved):
    folder, _, _ = saved
    with pytest.raises(ValueError, match="A stride of 9 tokens is not possible"):
        metric.compute(predictions=TEXTS, model_id=str(folder), trust_remote_code=True, context=8, stride=9)
    with pytest.raises(ValueError, match="There is nothing to predict"):
        metric.compute(predictions=["i"], model_id=str(folder), trust_remote_code=True, add_start_token=False)
