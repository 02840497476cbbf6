"""Training with the Trainer and PEFT: what learns, and what the result does not depend on."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, default_data_collator

from entropy_gpt.training.packing import collate_blocks
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM, EntropyGPTForTokenClassification
from tests.architectures import ARCHITECTURES, NO_DROPOUT, make_model, make_tokens
from tests.ranks import CONFIGURATIONS, launcher_words, run_on_ranks

from . import train_on_ranks as train_on_ranks_script


ROOT = Path(__file__).resolve().parents[2]
PAYLOAD = {path.name for path in (ROOT / "modeling_entropy_gpt").glob("*.py")} - {"__init__.py"}


def make_dataset(rows=16, length=16):
    return Dataset.from_dict({"input_ids": make_tokens(rows, length).tolist()})


def make_trainer(model, folder, dataset=None, data_collator=collate_blocks, **arguments):
    defaults = {"max_steps": 2, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=folder, use_cpu=True, seed=0, **{**defaults, **arguments}),
        train_dataset=make_dataset() if dataset is None else dataset,
        data_collator=data_collator,
    )


def parameters_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_every_parameter_changes(notation, tmp_path):
    model = make_model(notation, entropy_coefficient=1e-2, entropy_tolerance=0.0)
    before = parameters_of(model)
    make_trainer(model, tmp_path, max_steps=3).train()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("penalty", ["head_mean", "row_mean", "row_sum"])
def test_the_trajectory_does_not_depend_on_accumulation(penalty, tmp_path):
    dataset = make_dataset(8)
    trajectories = {}
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        torch.manual_seed(0)
        model = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT, entropy_penalty=penalty, entropy_coefficient=0.1)
        trainer = make_trainer(
            model,
            tmp_path,
            dataset,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            logging_steps=1,
            optim="sgd",
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trajectories[size] = (losses, parameters_of(model))
    expected_losses, expected = trajectories[8]
    assert expected_losses[-1] < expected_losses[0]
    for size in (4, 1):
        losses, parameters = trajectories[size]
        assert losses == pytest.approx(expected_losses, rel=1e-4)
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def train_on_ranks(folder, ranks, notation, configuration="ddp", arguments=None, launched=False, **fields):
    """Trains on ranks, by accelerate's launcher or as it would; gives the saved weights and a record of the run."""
    folder = folder / f"{configuration}{ranks}"
    words = [folder, notation, json.dumps(fields), json.dumps(arguments or {})]
    if launched:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *launcher_words(configuration, ranks)]
        process = subprocess.run(
            [*launcher, train_on_ranks_script.__file__, *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=folder.parent,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert process.returncode == 0, process.stderr[-3000:]
    else:
        module = train_on_ranks_script.__name__
        run_on_ranks(module, *words, ranks=ranks, configuration=configuration if ranks > 1 else None)
    return load_file(folder / "model.safetensors"), json.loads((folder / "record.json").read_text())


def assert_same_run(got, expected):
    (weights, record), (expected_weights, expected_record) = got, expected
    assert record["losses"] == pytest.approx(expected_record["losses"], rel=1e-4)
    assert len(record["losses"]) == 3
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", ["head_mean", "row_sum"])
def test_the_trajectory_does_not_depend_on_the_number_of_ranks(penalty, tmp_path):
    """Two processes with four sequences each, by both configurations, and one with eight, end at the same weights."""
    run = partial(train_on_ranks, tmp_path, notation="EReg(SM(t)+ScFuFFN)", entropy_penalty=penalty)
    expected = run(1)
    for configuration in ("ddp", "fsdp"):
        got = run(2, configuration=configuration, launched=penalty == "row_sum")
        assert ("transformer.h.0" in got[1]["sharded"]) == (configuration == "fsdp")  # or it would be DDP twice
        assert_same_run(got, expected)
        folder = tmp_path / f"{configuration}2"
        loaded, report = EntropyGPTForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        # What FSDP makes of the class stays out of what is saved.
        assert {path.name for path in folder.glob("*.py")} == PAYLOAD
        assert loaded.config.auto_map == EntropyGPTConfig().auto_map


@pytest.mark.slow
@pytest.mark.parametrize(
    "notation", ["EReg(SM(t_h)+StaticLN+LearnableLeakyR+ScFFN)", "SM+ScFuFFN+SN(QKVO+FFN)", "EReg(SM(t)+ScFuFFNi1)"]
)
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_fsdp_trains_every_kind_of_parameter(untied, notation, tmp_path):
    run = partial(train_on_ranks, tmp_path, notation=notation, tie_word_embeddings=not untied)
    assert_same_run(run(2, configuration="fsdp"), run(1))


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True, None], ids=["plain", "reentrant", "FSDP's own"])
def test_checkpointing_under_fsdp_changes_nothing(use_reentrant, tmp_path):
    arguments = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    if use_reentrant is None:
        arguments = {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}
    run = partial(train_on_ranks, tmp_path, notation="EReg(SM(t)+ScFuFFN)", entropy_penalty="head_mean")
    assert_same_run(run(2, configuration="fsdp", arguments=arguments), run(1))


@pytest.mark.slow
def test_ranks_need_no_penalty_in_the_loss(tmp_path):
    """Where the `Trainer` computes the loss (here of smoothed labels), thresholds still have their gradient, zero."""
    run = partial(train_on_ranks, tmp_path, notation="EReg(SM(t)+ScFuFFN)")
    expected = run(1, arguments={"label_smoothing_factor": 0.1})
    for use_reentrant in (False, True):
        checkpointing = {"activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
        arguments = {"label_smoothing_factor": 0.1, "activation_checkpointing": True, **checkpointing}
        assert_same_run(run(2, arguments=arguments), expected)


@pytest.mark.parametrize("configuration", ["ddp", "fsdp"])
def test_accelerate_understands_its_configurations(configuration):
    file = CONFIGURATIONS / f"{configuration}.yaml"
    config = load_config_from_file(str(file))
    assert config.distributed_type == {"ddp": DistributedType.MULTI_GPU, "fsdp": DistributedType.FSDP}[configuration]
    parser = launch_command_parser()
    arguments, _, _ = _validate_launch_command(parser.parse_args(["--config_file", str(file), "script.py"]))
    assert (arguments.multi_gpu, arguments.use_fsdp) == (configuration == "ddp", configuration == "fsdp")
    assert config.fsdp_config.keys() <= {action.dest for action in parser._actions}
    if configuration == "fsdp":
        assert [config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]] == EntropyGPTForCausalLM._no_split_modules


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_by_the_trainer_changes_nothing(use_reentrant, tmp_path):
    results = []
    for arguments in ({}, {"activation_checkpointing": True}):
        if arguments:
            arguments["activation_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
        torch.manual_seed(0)
        model = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT, entropy_coefficient=0.01)
        make_trainer(model, tmp_path, **arguments).train()
        results.append(parameters_of(model))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=1e-7, msg=name)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
@pytest.mark.parametrize("targets", [["c_attn"], "all-linear"], ids=str)
@pytest.mark.parametrize("notation", ["SM+LN+G", "EReg(SM(t)+ScFuFFN)"])
def test_lora(notation, targets, tmp_path):
    model = make_model(notation, **NO_DROPOUT)
    tokens = make_tokens()
    original = model(tokens).logits
    configuration = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, configuration)
    torch.testing.assert_close(adapted(tokens).logits, original)
    before = parameters_of(adapted)
    make_trainer(adapted, tmp_path, max_steps=3).train()
    changed = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    trained = adapted.eval()(tokens).logits
    assert not torch.allclose(trained, original, atol=1e-3)

    adapted.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(adapted.merge_and_unload()(tokens).logits, trained, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(make_model(notation, **NO_DROPOUT), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(tokens).logits, trained, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("notation", ["SM+ScFFN+WN(QKV+FFN)", "SM+ScFuFFN+SN(QKVO+FFN)"])
def test_lora_refuses_normalized_weights(notation):
    """An adapter merged into weights that are scaled afterwards would be another one."""
    with pytest.raises(ValueError, match=r"EntropyGPTNormalizedConv1D.* is not supported"):
        get_peft_model(make_model(notation), LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"))
    # Linear maps that are not normalised take one.
    model = make_model("SM+ScFFN+WN(QKV)").double()
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"))
    tokens = make_tokens()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    expected = adapted.eval()(tokens).logits
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(tokens).logits, expected, atol=1e-2)
    torch.testing.assert_close(adapted.merge_and_unload()(tokens).logits, expected)


def test_another_head_trains_with_the_trainer(tmp_path):
    model = make_model("EReg(SM(t)+ScFuFFN)", EntropyGPTForTokenClassification, num_labels=2, entropy_coefficient=1e-2)
    dataset = make_dataset().map(lambda row: {"labels": [token % 2 for token in row["input_ids"]]})
    before = parameters_of(model)
    make_trainer(model, tmp_path, dataset, default_data_collator, max_steps=3).train()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_spectral_norms_follow_the_weights_in_training():
    model = make_model("SM+ScFuFFN+SN(QKVO+FFN)", **NO_DROPOUT).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(50):
        optimizer.zero_grad()
        tokens = make_tokens(4)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    for _ in range(30):  # power iterations at fixed weights
        model(tokens)
    for block in model.transformer.h:
        linear = block.mlp.c_fused
        largest = torch.linalg.svdvals(linear.normalized_weight())[0]
        torch.testing.assert_close(largest, linear.gain.flatten()[0], rtol=2e-2, atol=0)


def test_learning_lowers_the_loss_and_generation_repeats_what_was_learnt():
    model = EntropyGPTForCausalLM(make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT, temperature_init=0.1).config)
    tokens = make_tokens(2, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        outputs = model.train()(tokens, labels=tokens)
        outputs.loss.backward()
        optimizer.step()
    assert outputs.cross_entropy_loss < 0.1
    prompt = tokens[:, :6]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 18, "do_sample": False}
    assert torch.equal(model.eval().generate(prompt, **options, eos_token_id=None), tokens)
