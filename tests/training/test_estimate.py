"""What a run is said to take before it begins."""

import pytest
import torch

from entropy_gpt.training import estimate as module
from entropy_gpt.training.recipe import read_recipe
from entropy_gpt.training.start import find_start
from entropy_gpt.training.tokenizer import load_tokenizer, train_tokenizer
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM
from tests.architectures import NO_DROPOUT


@pytest.fixture(autouse=True)
def known_speed(monkeypatch):
    monkeypatch.setattr(module, "measure_speed", lambda device, dtype: 1e12)


def estimated(**settings):
    recipe = read_recipe("python-stdlib-small", {"use_cpu": True, **settings})
    return module.estimate(recipe, find_start(recipe))


def test_weights_and_optimizer_are_counted():
    """The model of the recipe: 4 layers of width 128, 1,024 tokens, 128 positions."""
    found = estimated(notation="SM+LN+G", max_steps=100)
    weights = 1024 * 128 + 128 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128
    assert found.model == 4 * weights
    assert found.checkpoint == 12 * weights
    assert found.memory > 16 * weights
    tokens = 100 * 8 * 128
    assert found.seconds == pytest.approx(tokens * (6 * weights + 6 * 4 * 128 * 128) / 1e12)


def test_frozen_embeddings_have_no_gradients_and_no_moments(tmp_path):
    config = EntropyGPTConfig.from_notation(
        "SM+LN+G", n_layer=1, n_embd=64, n_head=1, vocab_size=300, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    EntropyGPTForCausalLM(config).save_pretrained(tmp_path)
    train_tokenizer(["some text"], 300).save_pretrained(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: {tmp_path}\nmax_steps: 100\nuse_cpu: true\n")
    recipes = [read_recipe(str(tmp_path / "recipe.yaml"), {"freeze_embeddings": freeze}) for freeze in (False, True)]
    whole, frozen = (module.estimate(recipe, find_start(recipe)) for recipe in recipes)
    embeddings = (300 + 128) * 64
    assert frozen.model == whole.model
    assert whole.memory - frozen.memory == 12 * embeddings
    assert whole.checkpoint - frozen.checkpoint == 8 * embeddings
    assert frozen.seconds < whole.seconds


def test_what_an_architecture_lacks_takes_nothing():
    whole, fused = estimated(notation="SM+LN+G"), estimated(notation="SM+ScFuFFN")
    assert fused.memory < whole.memory
    assert fused.seconds < whole.seconds
    assert estimated(max_steps=-1).seconds is None
    assert estimated(per_device_train_batch_size=80).memory > 5 * estimated().memory


@pytest.mark.parametrize("dropout", [{}, NO_DROPOUT])
@pytest.mark.parametrize("notation", ["SM+LN+G", "SM+ScFuFFN", "EReg(SM(t)+ScFuFFN)"])
def test_what_blocks_keep_is_what_torch_keeps(notation, dropout):
    """On the processor, with a small vocabulary, of which hardly anything is kept."""
    config = EntropyGPTConfig.from_notation(
        notation,
        n_layer=4,
        n_head=4,
        n_embd=128,
        n_positions=64,
        vocab_size=32,
        bos_token_id=0,
        eos_token_id=0,
        **dropout,
    )
    model, tokens, kept = EntropyGPTForCausalLM(config).train(), torch.zeros(8, 64, dtype=torch.long), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() * (storage.data_ptr() not in weights)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(tokens, labels=tokens).loss
    assert loss.requires_grad
    found = tokens.numel() * module.kept_by_blocks(config, 64, 4, "cpu", False)
    assert found == pytest.approx(sum(kept.values()), rel=0.15)
    assert module.kept_by_blocks(config, 64, 4, "cpu", True) * tokens.numel() < found / 2


def test_the_tokenizer_given_sets_the_vocabulary(tmp_path):
    train_tokenizer(["some text"], 300).save_pretrained(tmp_path)
    vocab_size = len(load_tokenizer(str(tmp_path)))
    assert vocab_size < 1024
    given, fixed = estimated(tokenizer=str(tmp_path)), estimated(vocab_size=vocab_size, tokenizer=str(tmp_path))
    assert (given.model, given.memory) == (fixed.model, fixed.memory)
    assert given.model < estimated().model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
def test_frozen_weights_have_no_products_of_their_own():
    settings = {"notation": "SM+LN+G", "max_steps": 100}
    assert 0.5 < estimated(lora_r=1, **settings).seconds / estimated(**settings).seconds < 0.75


def test_a_probe_is_short_and_plausible(monkeypatch):
    monkeypatch.undo()
    assert 1e8 < module.measure_speed(torch.device("cpu"), torch.float32) < 1e14
