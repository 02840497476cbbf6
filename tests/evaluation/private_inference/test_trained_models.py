"""The committed trained models: what their records say of them, and that private answers are theirs."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.origin import hash_weights
from entropy_gpt.evaluation.private_inference.agreement import measure_agreement
from entropy_gpt.evaluation.private_inference.inference import EMULATED, PLAINTEXT, PrivateModel
from entropy_gpt.evaluation.records.results import RESULTS, load_results
from entropy_gpt.programs.quickstart.page import CARDS


MODELS = sorted(path for path in (CARDS / "models").iterdir())
MOST_BYTES = 6_000_000


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_the_records_are_of_these_weights(folder):
    (result,) = load_results(folder / RESULTS)
    model = load_language_model(folder)
    assert hash_weights(model) == result.weights
    assert (CARDS / f"{folder.name}.md").exists()
    committed = load_results(CARDS / "results" / "quickstart.json")
    assert result.weights in {other.weights for other in committed}


def test_they_are_small():
    assert {folder.name for folder in MODELS} == {"sm-ln-g", "converted"}
    assert (
        sum(path.stat().st_size for path in (CARDS / "models").rglob("*") if path.suffix == ".safetensors")
        < MOST_BYTES
    )


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_they_predict_code(folder):
    model, tokenizer = load_language_model(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer((CARDS.parent / "training" / "corpus.py").read_text(), return_tensors="pt")["input_ids"]
    blocks = tokens[:, : tokens.shape[1] // 128 * 128].reshape(-1, 128)
    with torch.no_grad():
        nats = model(blocks, labels=blocks).loss.item()
    assert nats < 0.75 * np.log(model.config.vocab_size), "much better than a guess, on code that it has not seen"


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_the_ring_hardly_changes_their_perplexity(folder):
    """So that models need not be trained with the engine's functions."""
    tokens = AutoTokenizer.from_pretrained(folder)((CARDS.parent / "training" / "corpus.py").read_text())["input_ids"]
    prompts = np.array(tokens[: 4 * 128]).reshape(4, 128)
    agreement = measure_agreement(load_language_model(folder).eval(), prompts, EMULATED)
    assert agreement.private_perplexity == pytest.approx(agreement.perplexity, rel=1e-3)
    assert agreement.private_perplexity != agreement.perplexity


@pytest.mark.slow
@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_private_answers_are_theirs(folder):
    model, tokenizer = load_language_model(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer((CARDS.parent / "training" / "corpus.py").read_text())["input_ids"]
    prompts = [tokens[begin : begin + 64] for begin in (0, 400, 800, 1200)]
    private = PrivateModel(model)
    clear, ring = (np.stack(private.infer(prompts, mode, 64).answers) for mode in (PLAINTEXT, EMULATED))
    assert (clear.argmax(-1) == ring.argmax(-1)).mean() >= 0.99
    assert np.abs(clear - ring).max() < 0.01 * np.abs(clear).max()
