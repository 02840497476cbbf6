"""`entropy-gpt train` from end to end: whole, killed, on two ranks, adapted, and misused."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from entropy_gpt.evaluation.records.results import load_results
from entropy_gpt.evaluation.records.run_log import RunLog
from entropy_gpt.training.checkpoints import STAGING, list_checkpoints
from entropy_gpt.training.recipe import ARGUMENT_FIELDS, CONFIG_FIELDS
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .forks import run_command


COMMAND = str(Path(sys.executable).with_name("entropy-gpt"))
TINY = """# A tiny model for tests.
notation: EReg(SM(t)+ScFuFFN)
n_layer: 2
n_head: 2
n_embd: 32
context: 32
temperature_init: 1e-2
entropy_penalty: head_mean
entropy_coefficient: 0.16
tokenizer_vocab_size: 300
validation_tokens: 1024
per_device_train_batch_size: 8
dataloader_drop_last: true
max_steps: 12
learning_rate: 1e-3
lr_scheduler_type: constant_with_warmup
warmup_steps: 0.1
logging_steps: 2
eval_strategy: steps
eval_steps: 4
save_steps: 2
save_total_limit: 3
entropy_logging_steps: 3
seed: 0
use_cpu: true
"""
# What a model has already that a run starts from.
OF_A_MODEL = ("n_layer", "n_head", "n_embd", "temperature_init", "tokenizer_vocab_size")


class Runner:
    """Runs the command in a folder of its own, with a cache of its own."""

    def __init__(self, folder, text):
        self.folder, self.text = folder, text
        (folder / "tiny.yaml").write_text(TINY)
        lines = [line for line in TINY.splitlines() if not line.startswith(OF_A_MODEL)]
        (folder / "tiny_from_model.yaml").write_text("\n".join(lines))

    def command(self, *settings, output="run", launcher=(), recipe="tiny.yaml"):
        settings = [f"dataset={self.text}", f"data_cache={self.folder / 'cache'}", f"output_dir={output}", *settings]
        return [*launcher, COMMAND, "train", recipe, *settings]

    def __call__(self, *settings, draws=False, **options):
        _, *words = self.command(*settings, **options)
        return run_command(*words, cwd=self.folder, draws=draws)

    def alone(self, *settings, **options):
        """The same in a process of its own."""
        return subprocess.run(self.command(*settings, **options), cwd=self.folder, capture_output=True, text=True)

    def start(self, *settings, **options):
        command = self.command(*settings, **options)
        return subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def weights(self, output="run"):
        return load_file(self.folder / output / "model" / "model.safetensors")

    def records(self, output="run"):
        lines = (self.folder / output / "training_log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert {"log", "speed"} <= {record["kind"] for record in records}
        return [record for record in records if record["kind"] != "speed"]  # no two runs have the same


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("train"), text)


@pytest.fixture(scope="module")
def finished(run):
    return run(draws=True)


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0, msg=name)


def test_everything_is_there(run, finished):
    assert finished.returncode == 0, finished.stderr
    output = run.folder / "run"
    model = EntropyGPTForCausalLM.from_pretrained(output / "model")
    assert model.config.notation == "EReg(SM(t)+ScFuFFN)"
    assert len(AutoTokenizer.from_pretrained(output / "model")) == model.config.vocab_size
    (result,) = load_results(output / "model" / "results.json")
    assert (result.training.steps, result.training.tokens) == (12, 12 * 8 * 32)
    assert f"perplexity {result.likelihood.likelihood.perplexity:.2f}" in finished.stdout
    log = RunLog.load(output)
    assert [record.step for record in log.entropies] == [0, 3, 6, 9, 12]
    assert log.entropies[-1].learned["thresholds"] is not None
    assert [record["step"] for record in run.records() if "eval_loss" in record] == [4, 8, 12]
    losses = [record for record in run.records() if "cross_entropy_loss" in record]
    assert [record["step"] for record in losses] == [2, 4, 6, 8, 10, 12]
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert {"losses.png", "layer_entropies.png", "thresholds.png"} <= {
        path.name for path in (output / "pictures").iterdir()
    }
    assert len(list_checkpoints(output)) == 3
    assert not list((output / "model").glob("*.bin"))
    assert not [path for path in output.rglob("*") if "unfinished" in path.name]


def test_a_second_time_it_shows_the_same_without_training_anew(run, finished):
    before = {path: path.stat().st_mtime_ns for path in (run.folder / "run" / "model").rglob("*")}
    again = run()
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (run.folder / "run" / "model").rglob("*")} == before
    assert "perplexity" in again.stdout


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def wait_until(condition, process, seconds=600):
    """Whether it came true before the process ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)
    return True


@pytest.mark.slow
def test_killed_again_and_again_it_ends_at_the_same_weights_and_log(run, finished):
    """Three times: in the middle of a save, between saves, and while a checkpoint is given its name."""
    output = run.folder / "killed"
    chance = random.Random(0)
    conditions = [
        lambda: list(output.glob(f"{STAGING}/checkpoint-*/*.safetensors")),
        lambda: len(list_checkpoints(output)) >= 2,
        lambda: any((path / "trainer_state.json").exists() for path in output.glob(f"{STAGING}/checkpoint-*")),
    ]
    killed = 0
    for condition in conditions:
        process = run.start(output="killed")
        if wait_until(condition, process):
            time.sleep(chance.uniform(0, 0.02))
            killed += 1
        kill(process)
    assert killed >= 2
    resumed = run(output="killed")
    assert resumed.returncode == 0, resumed.stderr
    assert_same(run.weights("killed"), run.weights())
    assert run.records("killed") == run.records()


def test_killed_after_its_last_step_it_takes_no_more(run, finished):
    shutil.copytree(run.folder / "run", run.folder / "last")
    (run.folder / "last" / "model").rename(run.folder / "last" / "_unfinished-model")
    (run.folder / "last" / "_unfinished-model" / "stale.txt").write_text("from before")
    resumed = run(output="last")
    assert resumed.returncode == 0, resumed.stderr
    assert_same(run.weights("last"), run.weights())
    assert run.records("last") == run.records()
    assert not (run.folder / "last" / "model" / "stale.txt").exists()


def test_a_damaged_checkpoint_is_passed_over(run, finished):
    shutil.copytree(run.folder / "run", run.folder / "damaged")
    output = run.folder / "damaged"
    shutil.rmtree(output / "model")
    latest, before, _ = list_checkpoints(output)
    with (latest / "optimizer.pt").open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"x" * 100)
    (before / "model.safetensors").write_bytes(b"cut")
    resumed = run(output="damaged")
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint-12 is passed over: optimizer.pt was altered" in resumed.stderr.replace("\n", "")
    assert "checkpoint-10 is passed over: model.safetensors has 3 bytes" in resumed.stderr.replace("\n", "")
    assert_same(run.weights("damaged"), run.weights())
    assert run.records("damaged") == run.records()


@pytest.mark.slow
def test_two_ranks_take_the_course_of_one(run, finished):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = ("resid_pdrop=0", "embd_pdrop=0", "attn_pdrop=0", "label_smoothing_factor=0.1")
    one = run(*settings, output="one")
    two = run.alone(*settings, "per_device_train_batch_size=4", output="ranks", launcher=launcher)
    for process in (one, two):
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stdout.count("model, ready for the Hub") == 1
    for name in ("loss", "cross_entropy_loss", "entropy_loss", "penalized_share", "eval_loss"):
        expected, found = ([record[name] for record in run.records(p) if name in record] for p in ("one", "ranks"))
        assert found == pytest.approx(expected, rel=1e-4), name
    for name, tensor in run.weights("one").items():
        torch.testing.assert_close(run.weights("ranks")[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
def test_a_trained_model_is_adapted_to_other_text(run, finished, tmp_path):
    """LoRA from the model folder, on the user's own file: adapter and merged model agree, scalars are trained."""
    (tmp_path / "mine.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    source = run.folder / "run" / "model"
    (tmp_path / "lora.yaml").write_text(
        f"model_name_or_path: {source}\nlora_r: 4\nmax_steps: 8\nlearning_rate: 1e-2\nsave_steps: 4\nuse_cpu: true\n"
        f"dataset: {tmp_path / 'mine.txt'}\ndata_cache: {tmp_path / 'cache'}\noutput_dir: {tmp_path / 'run'}\n"
        "train_temperatures: false\n"
    )
    process = run_command("train", tmp_path / "lora.yaml")
    assert process.returncode == 0, process.stderr
    base = EntropyGPTForCausalLM.from_pretrained(source)
    merged = EntropyGPTForCausalLM.from_pretrained(tmp_path / "run" / "model")
    threshold = "transformer.h.0.attn.threshold.entropy_threshold"
    temperature = "transformer.h.0.attn.temperature.log_temperature"
    before, after = base.state_dict(), merged.state_dict()
    assert not torch.equal(before[threshold], after[threshold])
    assert torch.equal(before[temperature], after[temperature])
    assert torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])
    assert not torch.equal(before["transformer.h.0.attn.c_attn.weight"], after["transformer.h.0.attn.c_attn.weight"])
    tokens = torch.arange(20)[None]
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(adapted(tokens).logits, merged.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
    for folder in ("model", "adapter"):
        card = (tmp_path / "run" / folder / "README.md").read_text()
        assert "lora\\_r 4" in card and "train\\_temperatures False" in card
    assert "library_name: peft" in card and "AutoPeftModelForCausalLM" in card
    automatic = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()
    torch.testing.assert_close(automatic(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").eos_token_id is not None
    refused = run_command("evaluate", tmp_path / "run" / "adapter", "--output", tmp_path / "evaluation")
    assert "holds an adapter of " in refused.stderr
    assert f"not a model; did you mean {tmp_path / 'run' / 'model'}?" in refused.stderr
    assert merged.config.use_cache and merged.generation_config.use_cache


@pytest.mark.slow
def test_another_architecture_is_converted_first(run, finished):
    plain = run("notation=SM+LN+G", "max_steps=4", output="plain")
    assert plain.returncode == 0, plain.stderr
    process = run("model_name_or_path=plain/model", "max_steps=4", output="converted", recipe="tiny_from_model.yaml")
    assert process.returncode == 0, process.stderr
    model = EntropyGPTForCausalLM.from_pretrained(run.folder / "converted" / "model")
    assert model.config.notation == "EReg(SM(t)+ScFuFFN)"
    assert (run.folder / "converted" / "converted" / "conversion_report.md").exists()


def test_divergence_is_a_result(run):
    settings = {"notation": "SM", "final_normalization": "none", "learning_rate": "1e6", "max_grad_norm": 0}
    process = run(*(f"{name}={value}" for name, value in settings.items()), output="diverged", draws=True)
    assert process.returncode == 0, process.stderr
    assert "SM diverged at step" in process.stdout
    assert "first appear in the output of" in " ".join(process.stdout.split())
    assert not (run.folder / "diverged" / "model").exists()
    assert [record["action"] for record in run.records("diverged") if record["kind"] == "divergence"] == ["stop"]


def test_labels_are_smoothed_beside_the_penalty(run):
    """Of one batch and one model, what smoothing adds is its factor times a constant."""
    added = {}
    for factor in (0.1, 0.3):
        settings = f"label_smoothing_factor={factor}", "initializer_range=0.5", "max_steps=1", "logging_steps=1"
        process = run(*settings, output=f"smoothed by {factor}")
        assert process.returncode == 0, process.stderr
        (first,) = (record for record in run.records(f"smoothed by {factor}") if "cross_entropy_loss" in record)
        assert first["entropy_loss"] > 0
        added[factor] = first["loss"] - first["cross_entropy_loss"] - 0.16 * first["entropy_loss"]
    assert abs(added[0.1]) > 1e-3
    assert added[0.3] == pytest.approx(3 * added[0.1], rel=1e-2)


def test_a_dry_run_writes_nothing(run):
    before = sorted(run.folder.rglob("*"))
    process = run("--dry-run", output="dry")
    assert process.returncode == 0, process.stderr
    assert "EReg(SM(t)+ScFuFFN)" in process.stdout
    assert "12 steps" in process.stdout
    assert "1 process on cpu" in process.stdout
    assert re.search(r"memory +about [1-9]\d*\.\d [kMG]B a process \(an estimate", process.stdout)
    assert re.search(r"time +at least \d+ s of matrix products, at [\d,]+ billion operations", process.stdout)
    assert re.search(
        r"writes +checkpoints of [1-9]\d*\.\d [kMG]B.*; the model, [1-9]\d*\.\d [kMG]B; log", process.stdout
    )
    assert sorted(run.folder.rglob("*")) == before


def test_a_dry_run_by_epochs_knows_no_time(run):
    process = run("max_steps=-1", "optim=sgd", "--dry-run", output="dry")
    assert process.returncode == 0, process.stderr
    assert "AdamW in place of sgd" in process.stdout
    assert re.search(r"time +not known before the text is read", process.stdout)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lerning_rate=1"], "did you mean 'learning_rate'?"),
        (["n_head=3"], "n_head=3 does not divide n_embd=32"),
        (["notation=SM+LM"], "nearest known one is 'LN'"),
        (["context=64", "n_positions=32"], "context=64: the model has n_positions=32"),
        (["vocab_size=100"], "tokenizer_vocab_size=300 is more than vocab_size=100"),
        (["save_only_model=true"], "save_only_model=true saves checkpoints that no run can continue from"),
        (["learning_rate=[1, 2]"], "learning_rate=[1, 2] is a list"),
        (["dataset=nowhere.txt"], "nowhere.txt"),
        (["streaming=true", "max_steps=-1"], "max_steps"),
        (["model_name_or_path=nowhere"], "nowhere"),
        (["freeze_embeddings=true"], "freeze_embeddings=true keeps embeddings that are trained: name a model_name"),
        (["lora_r=0"], "lora_r=0"),
        (["lora_r=2", "lora_target_modules=[c_atn]"], "nearest is 'c_attn'"),
        (
            ["on_divergence=rollback", "lr_scheduler_type=reduce_lr_on_plateau"],
            "lr_scheduler_type=reduce_lr_on_plateau",
        ),
        (["resume_from_checkpoint=nowhere"], "resume_from_checkpoint=nowhere can't be used"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_can_not_be_is_refused_in_one_line(settings, message, run):
    process = run(*settings, output="refused")
    assert process.returncode == 1
    *_, line = process.stderr.splitlines()
    assert line.startswith("entropy-gpt: ")
    assert message in line
    assert not (run.folder / "refused").exists()


def test_another_runs_folder_is_not_touched(run, finished):
    def states():
        return {path: path.stat().st_mtime_ns for path in (run.folder / "run").rglob("*")}

    before = states()
    for settings, message in (
        (["learning_rate=2e-3"], "learning_rate 0.001 then, 0.002 now"),
        (["n_layer=3", "resume_from_checkpoint=run/checkpoint-12"], "n_layer 2 then, 3 now"),
    ):
        process = run(*settings)
        assert process.returncode == 1
        (line,) = process.stderr.splitlines()
        assert message in line
        assert states() == before


def test_a_run_goes_on_elsewhere_under_other_settings(run, finished):
    """But for what the optimiser's state keeps; a text that changed is noticed."""
    checkpoint = "resume_from_checkpoint=run/checkpoint-8"
    for settings, message in (
        (["n_layer=3"], "n_layer 2, and this run trains one with 3"),
        (["notation=SM+LN+G"], "notation EReg(SM(t)+ScFuFFN)"),
        (["learning_rate=2e-3"], "optimiser that can't change (learning_rate 0.001 then, 0.002 now)"),
        (["lora_r=2"], "holds all weights, and this run trains adapters"),
    ):
        process = run(*settings, checkpoint, output="elsewhere")
        assert process.returncode == 1
        line = process.stderr.splitlines()[-1]  # PEFT may warn before
        assert message in line
        assert not (run.folder / "elsewhere").exists()
    process = run("max_steps=14", "freeze_embeddings=false", checkpoint, output="elsewhere")
    assert process.returncode == 0, process.stderr
    assert run.records("elsewhere")[-1]["step"] == 14


def test_a_run_goes_on_with_embeddings_as_frozen_as_they_were(run, finished):
    settings = ("model_name_or_path=run/model", "resume_from_checkpoint=run/checkpoint-8", "freeze_embeddings=true")
    process = run(*settings, output="frozen", recipe="tiny_from_model.yaml")
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert "can't change (freeze_embeddings False then, True now): leave them as they were, or start from" in line
    assert not (run.folder / "frozen").exists()


def test_a_run_whose_text_changed_does_not_go_on(run, tmp_path):
    (tmp_path / "mine.txt").write_text("the quick brown fox\n" * 600)
    settings = (f"dataset={tmp_path / 'mine.txt'}", "max_steps=4", "validation_tokens=128")
    assert run(*settings, output="changed").returncode == 0
    shutil.rmtree(run.folder / "changed" / "model")
    (tmp_path / "mine.txt").write_text("the lazy dog\n" * 600)
    process = run(*settings, output="changed")
    assert process.returncode == 1
    assert "holds a run that was trained on mine.txt" in process.stderr


def test_a_folder_of_something_else_is_not_touched(run, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    process = run(output=tmp_path)
    assert process.returncode == 1
    assert "holds no training run" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_recipes_and_settings_are_listed():
    recipes = run_command("train")
    row = next(line for line in recipes.stdout.splitlines() if "codeparrot-128-18layers" in line)
    assert row.split()[-3:] == ["2.56", "3.24", "3.13"]
    assert "that the paper reports" in " ".join(recipes.stdout.split())
    assert max(map(len, recipes.stdout.splitlines())) <= 80
    settings = run_command("train", "--settings")
    assert "temperature_lr_multiplier (default: 1.0): Learning rate of temperatures" in settings.stdout
    assert "per_device_train_batch_size" in settings.stdout
    groups = [line for line in settings.stdout.splitlines() if line and not line.startswith(" ")]
    assert groups[:3] == ["Model", "Architecture, sizes and penalty", "Text"]
    assert len(groups) == len({*groups}) and all(len(title) < 80 for title in groups)
    lines = [line for line in settings.stdout.splitlines() if line.startswith("  ")]
    assert {line.split()[0] for line in lines} == {*ARGUMENT_FIELDS, *CONFIG_FIELDS}
    assert not [line for line in lines if line.rstrip().endswith("):")]
    assert "entropy_coefficient (default: 0.16)" in settings.stdout
