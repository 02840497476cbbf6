"""Saved and loaded: the same weights, the same answers, here and in a process that has only the folder."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

from entropy_gpt.evaluation.measuring.remote_loading import RemoteLoadingError, load_in_fresh_process, save_reference
from entropy_gpt.training.tokenizer import train_tokenizer
from modeling_entropy_gpt import (
    EntropyGPTConfig,
    EntropyGPTForCausalLM,
    EntropyGPTForQuestionAnswering,
    EntropyGPTForSequenceClassification,
    EntropyGPTForTokenClassification,
    EntropyGPTModel,
)
from tests.architectures import ARCHITECTURES, make_model, make_tokens
from tests.strangers import do


AUTO_CLASSES = {
    "AutoModel": EntropyGPTModel,
    "AutoModelForCausalLM": EntropyGPTForCausalLM,
    "AutoModelForSequenceClassification": EntropyGPTForSequenceClassification,
    "AutoModelForTokenClassification": EntropyGPTForTokenClassification,
    "AutoModelForQuestionAnswering": EntropyGPTForQuestionAnswering,
}
PACKAGE = Path(__file__).parents[2] / "modeling_entropy_gpt"
PAYLOAD = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}


def randomize(model):
    """Fills every parameter and buffer with numbers that no initialisation would give."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.rand_like(tensor) * 0.1 + 0.02)
    return model


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["whole", "sharded"])
@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_loading_brings_back_every_tensor_and_initialises_none(notation, options, tmp_path):
    model = randomize(make_model(notation))
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(options)
    loaded, report = EntropyGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.notation == notation
    assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    tokens = make_tokens()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("notation", ["SM+LN+G", "EReg(SM(t)+ScFuFFN)", "SM+ScFuFFN+SN(QKVO+FFN)"])
@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": torch.bfloat16}])
def test_loading_to_a_device_or_another_dtype(notation, options, tmp_path):
    model = make_model(notation)
    model.save_pretrained(tmp_path)
    loaded = EntropyGPTForCausalLM.from_pretrained(tmp_path, **options)
    assert loaded.dtype == options.get("dtype", torch.float32)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor.float(), model.state_dict()[name], rtol=1e-2, atol=1e-2, msg=name)


def test_blocks_offloaded_to_disk_answer_the_same(tmp_path):
    model = make_model("EReg(SM(t)+ScFuFFN)")
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "transformer.wte": "cpu",
        "transformer.wpe": "cpu",
        "transformer.drop": "cpu",
        "transformer.h.0": "cpu",
        "transformer.h.1": "disk",
        "transformer.h.2": "disk",
        "transformer.ln_f": "cpu",
        "lm_head": "cpu",
    }
    loaded = EntropyGPTForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    tokens = make_tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
        got = loaded(tokens, labels=tokens, output_entropies=True)
    expected = model(tokens, labels=tokens, output_entropies=True)
    torch.testing.assert_close(got.attention_entropies, expected.attention_entropies)
    torch.testing.assert_close(got.entropy_loss, expected.entropy_loss)  # with thresholds that are on the disk


def test_a_missing_tensor_is_initialised_from_the_config_and_reported(tmp_path):
    """From weights without temperatures, scales and thresholds, as GPT-2's are."""
    make_model("SM+ScFFN").save_pretrained(tmp_path)
    config = EntropyGPTConfig.from_pretrained(tmp_path)
    fields = {**config.to_dict(), "attention_temperature": "head", "temperature_init": 0.25, "ffn_alpha_init": 2.0}
    loaded, report = EntropyGPTForCausalLM.from_pretrained(
        tmp_path, config=EntropyGPTConfig(**fields), output_loading_info=True
    )
    assert {name.rpartition(".")[2] for name in report["missing_keys"]} == {"log_temperature"}
    temperature = loaded.transformer.h[0].attn.temperature(None)
    torch.testing.assert_close(temperature, torch.full_like(temperature, 4.0))


def test_initial_values_come_from_the_config():
    model = EntropyGPTForCausalLM(
        EntropyGPTConfig.from_notation(
            "EReg(SM(t)+ScFuFFN)",
            n_layer=2,
            n_embd=32,
            n_head=4,
            vocab_size=11,
            n_positions=8,
            temperature_init=0.01,
            entropy_threshold_init=0.4,
            ffn_alpha_init=2.0,
            ffn_beta_init=3.0,
        )
    )
    for block in model.transformer.h:
        torch.testing.assert_close(block.attn.temperature.log_temperature.exp(), torch.full((4, 8), 0.01))
        torch.testing.assert_close(block.attn.threshold.entropy_threshold, torch.full((4,), 0.4))
        assert (block.residual_scaling.ffn_alpha, block.residual_scaling.ffn_beta) == (2.0, 3.0)


def test_the_saved_folder_holds_the_code_and_safetensors_alone(tmp_path):
    make_model("SM+LN+G").save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == PAYLOAD | {"config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", *AUTO_CLASSES}
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118


@pytest.mark.parametrize("name", sorted(PAYLOAD))
def test_the_payload_tells_its_licence(name):
    assert (PACKAGE / name).read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")


@pytest.mark.parametrize("name", sorted(PAYLOAD))
def test_the_payload_imports_torch_and_transformers_alone(name):
    """
    And of its own files only by `from .sibling import`, which is what travels with a saved model. What it imports in a
    `try`, transformers does not demand.
    """
    assert "triton" not in get_imports(PACKAGE / name)
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Import):
            packages = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert (node.level, f"{node.module}.py" in PAYLOAD) == (1, True), ast.unparse(node)
            continue
        elif isinstance(node, ast.ImportFrom):
            packages = {node.module.partition(".")[0]}
        else:
            continue
        allowed = {"torch", "transformers", "huggingface_hub", "triton", *sys.stdlib_module_names}
        assert packages <= allowed, ast.unparse(node)
        assert "__future__" not in packages


@pytest.fixture
def saved(tmp_path):
    """A saved model with its tokenizer, and what it answers."""
    tokenizer = train_tokenizer(["def main():\n    return 1\n"] * 3, vocab_size=300)
    model = make_model("EReg(SM(t)+ScFuFFN)", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tokens = make_tokens()
    with torch.no_grad():
        save_reference(tokens, model(tokens).logits, tmp_path / "reference.safetensors")
    return tmp_path / "model", tmp_path / "reference.safetensors"


def test_a_fresh_process_with_the_folder_alone_gives_the_same_logits(saved):
    loaded = load_in_fresh_process(*saved, prompt="def ")
    assert loaded.max_difference <= 1e-6
    assert loaded.completion.startswith("def ")


@pytest.mark.slow
def test_a_fresh_process_notices_code_that_needs_this_project(saved):
    folder, reference = saved
    with (folder / "layers.py").open("a") as file:
        file.write("\nfrom modeling_entropy_gpt import layers\n")
    with pytest.raises(RemoteLoadingError, match=r"modeling_entropy_gpt"):
        load_in_fresh_process(folder, reference, prompt="def ")


@pytest.mark.slow
def test_a_fresh_process_notices_a_cache_that_is_lost(saved):
    folder, reference = saved
    path = folder / "modeling_entropy_gpt.py"
    code = path.read_text()
    path.write_text(code.replace("        check_keywords(", "        past_key_values = None\n        check_keywords("))
    assert path.read_text() != code
    with pytest.raises(RemoteLoadingError, match="something else with a cache than without"):
        load_in_fresh_process(folder, reference, prompt="def ")


@pytest.mark.slow
def test_a_fresh_process_notices_other_weights(saved):
    folder, reference = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.h[0].attn.temperature.log_temperature.add_(0.5)
    model.save_pretrained(folder)
    assert load_in_fresh_process(folder, reference, prompt="def ").max_difference > 1e-3


@pytest.mark.slow
def test_every_head_loads_in_a_fresh_process_from_any_folder(tmp_path):
    """A causal model's folder serves every auto class: one process, all of them."""
    make_model("EReg(SM(t)+ScFuFFN)").save_pretrained(tmp_path / "model")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    answer = do("load_heads", tmp_path, environment, model=tmp_path / "model", names=[*AUTO_CLASSES])
    loaded = {name: [model_class.__name__, True] for name, model_class in AUTO_CLASSES.items()}
    assert answer == {"notation": "EReg(SM(t)+ScFuFFN)", **loaded}
