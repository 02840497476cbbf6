"""GPT-2 checkpoints to EntropyGPT and back."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_gpt.conversion.errors import ConversionError
from entropy_gpt.conversion.gpt2_checkpoint import TWINS, from_gpt2, load_gpt2, load_language_model, to_gpt2
from modeling_entropy_gpt import EntropyGPTForCausalLM
from tests.architectures import ARCHITECTURES, make_model, make_tokens

from .gpt2_checkpoints import HEADS, SIZES, assert_same_function, make_gpt2, write_pickled_shards


LOAD_FROM_HUB = """
import sys
from entropy_gpt.conversion.errors import ConversionError
from entropy_gpt.conversion.gpt2_checkpoint import load_gpt2
try:
    load_gpt2(sys.argv[1]).save_pretrained(sys.argv[2])
except ConversionError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.parametrize("model_class", HEADS)
def test_a_saved_checkpoint_computes_the_same_and_comes_back_bit_for_bit(model_class, tmp_path):
    original = make_gpt2(model_class)
    original.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    converted = load_gpt2(tmp_path)
    assert type(converted) is TWINS[model_class]
    assert converted.config.notation == "SM+LN+G"
    assert_same_function(converted, original)

    back = to_gpt2(converted)
    assert type(back) is model_class
    assert back.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert_same_function(back, original)
    names = ["n_layer", "n_positions", "activation_function", "tie_word_embeddings", "id2label", "pad_token_id"]
    assert [getattr(back.config, name) for name in names] == [getattr(original.config, name) for name in names]


@pytest.mark.parametrize("model_class", HEADS)
def test_a_model_in_memory_shares_its_parameters(model_class):
    original = make_gpt2(model_class)
    converted = from_gpt2(original)
    assert_same_function(converted, original)
    pairs = zip(converted.parameters(), original.parameters(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() and ours.requires_grad for ours, theirs in pairs)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_tied_and_not(tied, tmp_path):
    original = make_gpt2(tie_word_embeddings=tied)
    original.save_pretrained(tmp_path)
    converted = load_gpt2(tmp_path)
    assert (converted.lm_head.weight is converted.get_input_embeddings().weight) == tied
    assert_same_function(converted, original)
    assert to_gpt2(converted).config.tie_word_embeddings == tied


def test_only_the_files_of_the_checkpoint_are_read(tmp_path):
    """Not others beside them, and shards by their index; safetensors before pickled files."""
    original, other = make_gpt2(), make_gpt2()
    original.save_pretrained(tmp_path)
    for name in ("model_old", "model-best", "model-00001-of-00002"):
        save_file({"transformer.ln_f.bias": other.transformer.ln_f.bias.detach()}, tmp_path / f"{name}.safetensors")
    write_pickled_shards(other, tmp_path)
    assert_same_function(load_gpt2(tmp_path), original)
    (tmp_path / "model.safetensors").unlink()
    assert_same_function(load_gpt2(tmp_path), other)
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save({"transformer.ln_f.bias": torch.ones(32)}, tmp_path / "pytorch_model_old.bin")
    assert_same_function(load_gpt2(tmp_path), original)


def test_old_files_without_prefix_with_masks_and_pickled(tmp_path):
    """As the first GPT-2 on the Hub was saved."""
    original = make_gpt2()
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in original.state_dict().items()}
    del tensors["lm_head.weight"]
    for layer in range(SIZES["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "config.json").write_text(json.dumps({**original.config.to_dict(), "n_ctx": 64}))
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_same_function(load_gpt2(tmp_path), original)


def test_half_precision_stays(tmp_path):
    make_gpt2().to(torch.bfloat16).save_pretrained(tmp_path)
    converted = load_gpt2(tmp_path)
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.bfloat16}
    converted.save_pretrained(tmp_path / "ours")
    assert EntropyGPTForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16


def test_alias_names_of_a_configuration_are_read_as_transformers_reads_them(tmp_path):
    original = make_gpt2(GPT2LMHeadModel)
    original.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for alias, name in GPT2Config.attribute_map.items():
        config[alias] = config.pop(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_function(load_gpt2(tmp_path), original)
    load_gpt2(tmp_path).save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for alias, name in GPT2Config.attribute_map.items():
        config[alias] = config.pop(name)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    assert load_language_model(tmp_path / "ours").config.n_head == original.config.n_head


def test_published_models_without_layernorm_become_static(tmp_path):
    """They are stored with an epsilon beyond every variance, and gains as much larger."""
    original = make_gpt2(layer_norm_epsilon=1e12)
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter.copy_((1 + 0.2 * torch.randn_like(parameter)) * 1e6)
    original.save_pretrained(tmp_path)
    converted = load_gpt2(tmp_path)
    assert (converted.config.normalization, converted.config.final_normalization) == ("static", "static")
    assert converted.config.layer_norm_epsilon < 1
    gains = converted.transformer.ln_f.weight / converted.transformer.ln_f.standard_deviation
    assert 0.1 < gains.abs().mean() < 10
    tokens = make_tokens()
    torch.testing.assert_close(converted(tokens).logits, original(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_architectures_that_gpt2_has_not_are_refused(notation):
    model = make_model(notation)
    if notation in ("SM+LN+G", "SM+LN+R", "SM+LN"):
        assert_same_function(to_gpt2(model), model)
        return
    with pytest.raises(ConversionError, match="can't be written as a GPT-2, which has no "):
        to_gpt2(model)


@pytest.mark.parametrize("notation", ["SM+LN+G", "SM+LN+R", "SM+LN"])
def test_an_architecture_that_gpt2_has_comes_back(notation, tmp_path):
    model = make_model(notation)
    model.generation_config.max_new_tokens = 7
    gpt2 = to_gpt2(model)
    gpt2.save_pretrained(tmp_path)
    assert load_gpt2(tmp_path).generation_config.max_new_tokens == 7
    assert from_gpt2(gpt2).config.notation == load_gpt2(tmp_path).config.notation == notation


def test_loose_settings_of_generation_are_kept_and_broken_ones_named(tmp_path):
    make_gpt2(GPT2LMHeadModel).save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.7, "top_k": 40}')  # without do_sample, as published models have it
    load_gpt2(tmp_path).save_pretrained(tmp_path / "converted")
    assert load_language_model(tmp_path / "converted").generation_config.temperature == 0.7
    for broken in ("{", '{"max_new_tokens": -1}', '{"max_new_tokens": "x"}'):
        file.write_text(broken)
        with pytest.raises(ConversionError, match=r"generation_config\.json can't be used"):
            load_gpt2(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["safetensors", "pickled", "pickled shards"])
def test_a_repository_of_the_hub(weights, hub, tmp_path):
    original, repository = make_gpt2(), tmp_path / "repository"
    original.save_pretrained(repository)
    if weights != "safetensors":
        (repository / "model.safetensors").rename(repository / "model_old.safetensors")
    if weights == "pickled":
        torch.save(original.state_dict(), repository / "pytorch_model.bin")
    elif weights == "pickled shards":
        write_pickled_shards(original, repository)
    hub.put_folder("someone/gpt2", repository)

    def load(name):
        command = [sys.executable, "-c", LOAD_FROM_HUB, name, str(tmp_path / "converted")]
        return subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)

    process = load("someone/gpt2")
    assert process.returncode == 0, process.stderr[-3000:]
    assert_same_function(EntropyGPTForCausalLM.from_pretrained(tmp_path / "converted").eval(), original)
    missing = load("someone/nothing")
    assert missing.returncode == 1
    assert "refused: someone/nothing is neither" in missing.stderr
