"""Adapters: what they train, that merging them changes nothing, and that PEFT's own ways lead there too."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from entropy_gpt.training.adapters import attach_lora, merge_adapter
from entropy_gpt.training.arguments import LoraArguments
from entropy_gpt.training.packing import collate_blocks
from modeling_entropy_gpt import (
    EntropyGPTForCausalLM,
    EntropyGPTForQuestionAnswering,
    EntropyGPTForSequenceClassification,
    EntropyGPTForTokenClassification,
)
from tests.architectures import ARCHITECTURES, NO_DROPOUT, make_model, make_tokens
from tests.slow import in_turn


PROPOSAL = "EReg(SM(t)+ScFuFFN)"
ROWS = [{"input_ids": row} for row in make_tokens(8, 16).tolist()]

# PEFT asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def make_adapted(notation=PROPOSAL, model_class=EntropyGPTForCausalLM, fields=None, **arguments):
    """In double precision, so that equal means equal."""
    fields = {**NO_DROPOUT, "entropy_coefficient": 0.1, "entropy_penalty": "head_mean", **(fields or {})}
    model = make_model(notation, model_class, **fields).double()
    arguments = {"lora_r": 4, "lora_target_modules": ["all-linear"], **arguments}
    return attach_lora(model, LoraArguments(**arguments))


def disturb(adapted):
    """Another value for everything that training would change."""
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapted.eval()


def train(model, folder, **arguments):
    defaults = {"max_steps": 3, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=folder, use_cpu=True, seed=0, **{**defaults, **arguments})
    Trainer(model=model, args=arguments, train_dataset=ROWS, data_collator=collate_blocks).train()
    return model


def values_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def kinds_of(names):
    return sorted({name.rpartition(".")[2] for name in names})


def answer(model, tokens):
    """Logits, and the penalty, in which the thresholds are."""
    outputs = model(tokens, labels=tokens, output_entropies=True)
    return outputs.logits, outputs.entropy_loss


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_merging_changes_nothing(notation, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        adapted = make_adapted(notation)
    config, tokens = adapted.get_base_model().config.to_dict(), make_tokens()
    with adapted.disable_adapter():
        original = answer(adapted, tokens)
    torch.testing.assert_close(answer(adapted, tokens), original)
    expected = answer(disturb(adapted), tokens)
    assert not torch.allclose(expected[0], original[0], atol=1e-2)
    with adapted.disable_adapter():
        torch.testing.assert_close(answer(adapted, tokens), original)

    merged = merge_adapter(adapted)
    assert type(merged) is EntropyGPTForCausalLM
    assert merged.config.to_dict() == config
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert merged.state_dict().keys() == make_model(notation).state_dict().keys()
    torch.testing.assert_close(answer(merged, tokens), expected)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(answer(AutoModelForCausalLM.from_pretrained(tmp_path), tokens), expected)


@pytest.mark.slow
def test_a_saved_adapter_gives_the_same_in_a_fresh_process(tmp_path):
    """One process, which can't import this project, for all architectures."""
    for index, notation in enumerate(ARCHITECTURES):
        folder, tokens, adapted = tmp_path / str(index), make_tokens(), make_adapted(notation)
        merge_adapter(copy.deepcopy(adapted)).save_pretrained(folder / "base")  # adapters add nothing at first
        disturb(adapted).save_pretrained(folder / "adapter")
        with torch.no_grad():
            save_file({"tokens": tokens, "logits": adapted(tokens).logits}, folder / "reference.safetensors")
    code = """
import importlib.abc, pathlib, sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_entropy_gpt":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
torch.set_num_threads(1)
for folder in pathlib.Path(sys.argv[1]).iterdir():
    base = AutoModelForCausalLM.from_pretrained(folder / "base", trust_remote_code=True)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        tokens = load_file(folder / "reference.safetensors")["tokens"]
        save_file({"logits": model(tokens).logits}, folder / "answer.safetensors")
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", code, tmp_path]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    for index, notation in enumerate(ARCHITECTURES):
        found, expected = (
            load_file(tmp_path / str(index) / f"{name}.safetensors")["logits"] for name in ("answer", "reference")
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, msg=notation)


@pytest.mark.parametrize(("train_thresholds", "train_temperatures"), in_turn([False, True], [True, False]))
def test_flags_freeze_and_train(train_thresholds, train_temperatures, tmp_path):
    adapted = make_adapted(train_thresholds=train_thresholds, train_temperatures=train_temperatures)
    before = values_of(adapted)
    train(adapted, tmp_path)
    changed = {name for name, value in values_of(adapted).items() if not torch.equal(value, before[name])}
    copies = {name for name in before if ".modules_to_save." in name}
    assert changed == {name for name in before if "lora_" in name} | copies
    assert kinds_of(copies) == ["entropy_threshold"] * train_thresholds + ["log_temperature"] * train_temperatures


@pytest.mark.parametrize("notation", ["SM+LN+G", "SM(t)+ScFuFFN", "EReg(SM+ScFuFFN)"])
def test_flags_for_what_the_architecture_has_not_are_passed_over(notation, tmp_path):
    adapted = train(make_adapted(notation), tmp_path)
    copies = {name for name in values_of(adapted) if ".modules_to_save." in name}
    expected = ["entropy_threshold"] * ("EReg" in notation) + ["log_temperature"] * ("SM(t)" in notation)
    assert kinds_of(copies) == expected


@pytest.mark.parametrize("targets", [["all-linear"], ["c_attn"], ["mlp.c_proj"], ["attn.c_proj"]])
def test_every_target_has_an_adapter_whether_normalised_or_not(targets):
    adapted = make_adapted("SM+ScFFN+WN(QKV+FFN)", lora_target_modules=targets)
    maps = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    wanted = maps if targets == ["all-linear"] else {name for name in maps if name.endswith(targets[0])}
    names = [name for name in values_of(adapted) if "lora_A" in name]
    assert {name for name in maps if any(f".{name}." in found for found in names)} == wanted
    assert len(names) == 3 * len(wanted)


def test_dropout_goes_with_the_plain_maps_beside_normalised_ones():
    adapted = make_adapted("SM+ScFFN+WN(QKV+FFN)", lora_target_modules=["attn.c_proj"], lora_dropout=0.1)
    tokens = make_tokens()
    disturb(adapted).train()
    assert not torch.equal(adapted(tokens).logits, adapted(tokens).logits)


@pytest.mark.parametrize(("use_reentrant", "notation"), in_turn([False, True], [PROPOSAL, "SM+ScFuFFN+SN(QKVO+FFN)"]))
def test_checkpointing_changes_nothing(use_reentrant, notation, tmp_path):
    results = []
    for arguments in ({}, {"activation_checkpointing": True}):
        if arguments:
            arguments["activation_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
        torch.manual_seed(0)
        results.append(values_of(train(make_adapted(notation), tmp_path, **arguments)))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=1e-12, msg=name)


def test_what_peft_does_by_itself(tmp_path):
    """Its own configuration, training, saving and loading, without a line of this project."""
    make_model(PROPOSAL, **NO_DROPOUT, entropy_coefficient=0.1).save_pretrained(tmp_path / "base")

    def load():
        return EntropyGPTForCausalLM.from_pretrained(tmp_path / "base")

    configuration = LoraConfig(
        target_modules=["c_attn"],
        modules_to_save=["temperature", "threshold"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    tokens = make_tokens()
    adapted = train(get_peft_model(load(), configuration), tmp_path).eval()
    expected, original = answer(adapted, tokens), answer(load(), tokens)
    for layer, block in enumerate(adapted.get_base_model().transformer.h):
        theirs = load().transformer.h[layer].attn
        for found, before in (
            (block.attn.threshold.entropy_threshold, theirs.threshold.entropy_threshold),
            (block.attn.temperature.log_temperature, theirs.temperature.log_temperature),
        ):
            assert not torch.equal(found, before)
        torch.testing.assert_close(block.attn.threshold(), block.attn.threshold.modules_to_save["default"]())
    with adapted.disable_adapter():
        torch.testing.assert_close(answer(adapted, tokens), original)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    torch.testing.assert_close(answer(loaded, tokens), expected)
    torch.testing.assert_close(answer(loaded.merge_and_unload(), tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_class", "head", "labels"),
    [
        (EntropyGPTForSequenceClassification, "score", {"labels": torch.tensor([0, 2])}),
        (EntropyGPTForTokenClassification, "classifier", {"labels": torch.randint(3, (2, 17))}),
        (
            EntropyGPTForQuestionAnswering,
            "qa_outputs",
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        ),
    ],
)
def test_other_heads_are_trained_beside_adapters(model_class, head, labels, tmp_path):
    adapted = make_adapted(model_class=model_class, fields={"num_labels": 3})
    tokens = make_tokens()
    adapted.train()(tokens, **labels).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(f".{part}." in " ".join(trained) for part in (head, "temperature", "threshold", "lora_A"))
    gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    expected = disturb(adapted)(tokens, **labels)
    merged = merge_adapter(adapted)
    torch.testing.assert_close(merged(tokens, **labels).loss, expected.loss)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(model_class.from_pretrained(tmp_path)(tokens, **labels).loss, expected.loss)


@pytest.mark.parametrize(
    ("notation", "arguments", "message"),
    [
        (PROPOSAL, {"lora_r": 0}, "lora_r=0 .*1 or more"),
        (PROPOSAL, {"lora_r": None}, "lora_r=None"),
        (PROPOSAL, {"lora_target_modules": ["c_atn"]}, "'c_atn' is no linear.*'c_attn'.*mlp.c_fused.*all-linear"),
        (
            PROPOSAL,
            {"lora_target_modules": ["c_fc"]},
            "'c_fc' is no linear.*attn.c_attn, attn.c_proj, mlp.c_fused",
        ),
        (PROPOSAL, {"lora_target_modules": ["lm_head"]}, "'lm_head' is no linear map"),
        (PROPOSAL, {"lora_target_modules": []}, "lora_target_modules is empty.*attn.c_attn"),
        (
            "SM+ScFFN+WN(QKV+FFN)",
            {"lora_target_modules": ["c_proj"], "lora_dropout": 0.1},
            "lora_dropout=0.1 .*weight_normalization='weight' among c_proj.*lora_dropout=0",
        ),
    ],
)
def test_what_can_not_be_adapted_is_named(notation, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_adapted(notation, **arguments)
