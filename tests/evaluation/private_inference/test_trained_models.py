"""The committed trained models: what their records say of them, and that private answers are theirs."""

import functools

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.origin import hash_weights
from entropy_gpt.evaluation.private_inference.agreement import measure_agreement
from entropy_gpt.evaluation.private_inference.inference import EMULATED, PLAINTEXT, PrivateModel
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from entropy_gpt.evaluation.records.results import RESULTS, load_results
from entropy_gpt.programs.quickstart.page import CARDS
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .phases import answers_in_one_phase, answers_in_two


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


@functools.cache
def read_code() -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(MODELS[0])
    return tokenizer((CARDS.parent / "training" / "corpus.py").read_text(), return_tensors="pt")["input_ids"][0]


def train_without_maximum() -> EntropyGPTForCausalLM:
    """A power of scores in place of softmax, trained a little."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 128, "vocab_size": 1024}
    model = EntropyGPTForCausalLM(EntropyGPTConfig.from_notation("Pow4+LN+G", **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = read_code()
    blocks = tokens[: len(tokens) // 64 * 64].reshape(-1, 64)
    for _ in range(60):
        model(blocks, labels=blocks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("folder", [*MODELS, None], ids=lambda folder: folder.name if folder else "power4")
def test_two_phases_answer_as_one_does(folder):
    """At 400 positions, but for those where two tokens are as likely; with errors that are not larger."""
    model = load_language_model(folder).eval() if folder else train_without_maximum()
    (config, weights), private, tokens = prepare_weights(model), PrivateSettings(), read_code()
    span = Span(0, 100, 100)
    for begin in range(0, 400, 100):
        prompt = tokens[begin : begin + 100]
        with torch.no_grad():
            clear = model(prompt[None]).logits[0].numpy()
        (one,) = answers_in_one_phase(config, weights, private, [span], prompt.numpy(), is_prepared=False)
        (two,) = answers_in_two(config, weights, private, [span], [span], prompt.numpy())
        *_, second, first = np.sort(clear, axis=-1).T
        differ = one.argmax(-1) != two.argmax(-1)
        assert ((first - second)[differ] < 2 * np.abs(one - clear).max()).all()
        assert differ.sum() <= 1
        errors = [np.sqrt(np.square(found - clear).mean()) for found in (one, two)]
        assert errors[1] < 1.1 * errors[0]
