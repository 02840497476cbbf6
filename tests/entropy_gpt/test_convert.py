"""`entropy-gpt convert` from end to end: whole, interrupted, planned and misused."""

import copy
import gzip
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, GPT2Config, GPT2LMHeadModel

from entropy_gpt.conversion.embeddings import read_embeddings
from entropy_gpt.conversion.planning import Step
from entropy_gpt.evaluation.measuring.remote_loading import load_in_fresh_process, save_reference
from entropy_gpt.evaluation.records.conversion_report import ConversionReport
from entropy_gpt.evaluation.records.results import load_results, save_results
from entropy_gpt.terminal.convert import show_evaluation
from entropy_gpt.training.progress import SILENT
from entropy_gpt.training.tokenizer import train_tokenizer
from entropy_gpt.workflows.convert_steps import Measurement, take_step
from tests.architectures import make_model, make_tokens
from tests.slow import slow_but

from .forks import run_command


COMMAND = Path(sys.executable).with_name("entropy-gpt")


@pytest.fixture(scope="module")
def source(text, tmp_path_factory):
    """A GPT-2 with its tokenizer, as transformers saves it; its weights are large enough to tell steps apart."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    tokenizer = train_tokenizer((path.read_text() for path in sorted(text.iterdir())), 300)
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    tokens = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(source, text, output, *words, to="EReg(SM(t)+ScFuFFN)"):
    small = ("--context", "32", "--calibration-tokens", "8192", "--evaluation-tokens", "2048")
    return [COMMAND, "convert", source, "--to", to, "--text", text, "--output", output, *small, *words]


def run(*args, **options):
    _, *words = arguments(*args, **options)
    return run_command(*words)


HEALING = ("--heal-steps", "12", "--schedule", "staircase", "--distill", "--final-norm", "none")


@pytest.fixture(scope="module")
def finished(source, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "a[" / "b]" / "model"  # as markup, it would end in an error
    return output, run(source, text, output, *HEALING)


def has_embeddings_of(source, output) -> bool:
    own, original = read_embeddings(output).tables, read_embeddings(source).tables
    return all(np.array_equal(own[name], original[name]) for name in ("wte", "wpe"))


def test_everything_is_there_and_true(finished, source):
    output, process = finished
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert f"the model, ready for the Hub: {output}\n" in process.stdout
    report = ConversionReport.load(output / "conversion_report.json")
    assert (report.source_notation, report.target_notation) == ("SM+LN+G", "EReg(SM(t)+ScFuFFN)")
    assert report.target_final_normalization == "none"
    titles = [step.title for step in report.steps]
    assert titles == [
        *("LayerNorms static", "final norm static", "gelu_new to identity", "FFNs fused", "alpha and beta, at 1"),
        *("temperatures, at 1", "thresholds, at entropies", "healed, 12 steps"),
        *("norms folded away", "final norm folded away"),
    ]
    by_title = dict(zip(titles, report.steps, strict=True))
    assert all(step.kl < step.naive_kl for step in report.steps[:3])
    # Exact steps change nothing, and are not measured again.
    assert by_title["thresholds, at entropies"].kl == by_title["gelu_new to identity"].kl
    assert by_title["final norm folded away"].kl == by_title["healed, 12 steps"].kl
    kept = ["FFNs fused", "alpha and beta, at 1", "temperatures, at 1", "thresholds, at entropies"]
    assert [step.title for step in report.steps if step.kept] == [*kept, "norms folded away", "final norm folded away"]
    assert [operation.name for operation in report.target_operations.nonlinear] == ["softmax"]
    assert report.healing.validation_nats[0][0] == 0
    # Through open gates, it is the original.
    assert report.healing.validation_nats[0][1] == pytest.approx(report.original_nats, abs=1e-2)
    assert report.healing.tokens == 12 * 8 * 32
    assert "freeze_embeddings" not in report.healing.settings
    assert not has_embeddings_of(source, output)
    # The table on the screen and the page are those of the record.
    page = (output / "conversion_report.md").read_text()
    for step in report.steps:
        assert f"{step.kl:.4f}" in process.stdout
        kept = "= " if step.kept else ""
        assert f"| {step.title} | {kept}{step.kl:.4f} | {kept}{math.exp(step.nats):.2f} |" in page
    (result,) = load_results(output / "results.json")
    likelihood = result.likelihood.likelihood
    assert math.log(likelihood.perplexity) == pytest.approx(report.final_nats, rel=0.1)
    assert result.heads is not None and result.training.converted_from == "SM+LN+G"
    first, last = (f"{math.exp(nats):.2f}" for nats in (report.original_nats, report.final_nats))
    assert f"perplexity per token: {last}; the original has {first} on the same tokens" in process.stdout
    assert f"perplexity {likelihood.perplexity:.2f} per token" in process.stdout
    assert (output / "healing.png").stat().st_size > 5000
    assert [path.name for path in output.parent.iterdir()] == ["model"]

    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).eval()
    assert model.config.notation == "EReg(SM(t)+ScFuFFN)"
    assert model.num_parameters() == report.steps[-1].parameters


@pytest.mark.slow
def test_a_fresh_process_computes_the_same(finished, tmp_path):
    output, _ = finished
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    input_ids = tokenizer("import torch", return_tensors="pt").input_ids
    with torch.no_grad():
        save_reference(input_ids, model(input_ids).logits, tmp_path / "reference.safetensors")
    assert load_in_fresh_process(output, tmp_path / "reference.safetensors", "def ").max_difference < 1e-5


def test_the_card_needs_nothing_more(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "model")
    process = run_command("card", folder, "--license", "apache-2.0")
    assert process.returncode == 0, process.stderr
    (result,) = load_results(folder / "results.json")
    assert f"{result.likelihood.likelihood.perplexity:.2f}" in (folder / "README.md").read_text(encoding="utf-8")


def test_what_was_not_evaluated_is_said(finished, tmp_path, capsys):
    report = ConversionReport.load(finished[0] / "conversion_report.json")
    (result,) = load_results(finished[0] / "results.json")
    save_results([replace(result, likelihood=None, heads=None)], tmp_path / "results.json")
    show_evaluation(report, tmp_path)
    assert capsys.readouterr().out == (
        f"not evaluated, because there was no text; do it with: entropy-gpt evaluate {tmp_path}\n"
    )


def test_embeddings_that_are_frozen_stay_those_of_the_source(source, text, tmp_path):
    words = ("--heal-steps", "2", "--freeze-embeddings")
    process = run(source, text, tmp_path / "model", *words, to="SM+LN+R")
    assert process.returncode == 0, process.stderr
    report = ConversionReport.load(tmp_path / "model" / "conversion_report.json")
    assert report.healing.settings["freeze_embeddings"] is True
    assert has_embeddings_of(source, tmp_path / "model")


def test_an_earlier_conversion_is_replaced_only_when_told(finished, source, text):
    output, _ = finished
    before = (output / "conversion_report.json").read_bytes()
    refused = run(source, text, output, to="SM+LN+R")
    assert refused.returncode == 1
    assert "holds an earlier conversion: give another --output, or --overwrite" in refused.stderr
    assert (output / "conversion_report.json").read_bytes() == before
    # What is converted can be converted on, and be its own output's source.
    replaced = run(source, text, output.with_name("other"), to="SM+LN+G")
    assert replaced.returncode == 0, replaced.stderr
    onwards = run(output.with_name("other"), text, output.with_name("other"), "--overwrite", to="SM+R+FFNi1")
    assert onwards.returncode == 0, onwards.stderr
    report = ConversionReport.load(output.with_name("other") / "conversion_report.json")
    assert (report.source_notation, report.target_notation) == ("SM+LN+G", "SM+R+FFNi1")
    assert report.healing is None


def test_a_checkpoint_without_tokenizer_is_imported(source, tmp_path):
    """Nothing is fitted, so no text is read."""
    shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    words = ("convert", tmp_path / "bare", "--to", "SM+LN+G", "--output", tmp_path / "model")
    process = run_command(*words)
    assert process.returncode == 0, process.stderr
    assert "nothing was measured, because there is no tokenizer" in process.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    original = GPT2LMHeadModel.from_pretrained(source)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(model(tokens).logits, original(tokens).logits, rtol=0, atol=1e-5)
    assert ConversionReport.load(tmp_path / "model" / "conversion_report.json").original_nats is None


@pytest.mark.parametrize("kind", slow_but(["parquet"], ["jsonl", "csv", "parquet", "txt.gz"]))
def test_text_is_read_as_every_command_reads_it(kind, source, text, tmp_path):
    rows = Dataset.from_dict({"body": [path.read_text() for path in sorted(text.iterdir())]})
    path = tmp_path / f"br[1].{kind}"
    if kind == "txt.gz":
        path.write_bytes(gzip.compress("".join(rows["body"]).encode()))
    else:
        getattr(rows, {"jsonl": "to_json", "csv": "to_csv", "parquet": "to_parquet"}[kind])(path)
    column = () if kind == "txt.gz" else ("--text-column", "body")
    process = run(source, path, tmp_path / "model", *column, to="SM+LN+R")
    assert process.returncode == 0, process.stderr
    report = ConversionReport.load(tmp_path / "model" / "conversion_report.json")
    assert report.conditions.corpus == path.name
    assert report.conditions.corpus_revision.startswith("sha256:")


@pytest.mark.slow
def test_a_killed_conversion_goes_on_to_the_same_end(finished, source, text, tmp_path):
    whole, _ = finished
    output = tmp_path / "parts" / "model"
    process = subprocess.Popen(arguments(source, text, output, *HEALING), stdout=subprocess.PIPE)
    checkpoints = output.with_name(".converting-model") / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    again = run(source, text, output, *HEALING)
    assert again.returncode == 0, again.stderr
    assert "resuming earlier work" in again.stdout
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, output))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_a_dry_run_shows_the_plan_and_writes_nothing(finished, source, text, tmp_path):
    process = run(source, text, tmp_path / "new" / "model", "--dry-run", *HEALING)
    assert process.returncode == 0, process.stderr
    assert "LayerNorms static (fitted to text)" in process.stdout
    assert "healing, 12 steps" in process.stdout
    assert "× R^(32×32)" in process.stdout
    assert not (tmp_path / "new").exists()
    # The figures after it are those that a conversion ends with: the head is not tied any more.
    whole = ConversionReport.load(finished[0] / "conversion_report.json")
    assert re.search(rf"parameters +{whole.original_parameters:,} +{whole.steps[-1].parameters:,}", process.stdout)


def test_statistics_are_used_again_for_another_target(source, text, tmp_path):
    kept = tmp_path / "statistics"
    for name, notation, files in (("a", "SM+StaticLN+G", 1), ("b", "SM+StaticLN+G+ScFFN", 1), ("c", "SM+LN", 1)):
        process = run(source, text, tmp_path / name, "--calibration", kept, to=notation)
        assert process.returncode == 0, process.stderr
        assert len(list(kept.iterdir())) == files


def test_ffns_are_pruned_by_what_is_missed_least(source, text, tmp_path):
    process = run(source, text, tmp_path / "model", "--prune-by-damage", to="SM+LN+G+FFNi1")
    assert process.returncode == 0, process.stderr
    report = ConversionReport.load(tmp_path / "model" / "conversion_report.json")
    assert len(report.pruning_damage) == 2
    least = min(report.pruning_damage, key=report.pruning_damage.get)
    assert report.steps[0].title == f"FFN of layer {least} pruned"
    # The one that is left is the next, whatever the notation calls it.
    process = run(tmp_path / "model", text, tmp_path / "none", "--prune-by-damage", to="SM+LN+G+FFNi2")
    assert process.returncode == 0, process.stderr
    assert f"FFN of layer {1 - int(least)} pruned" in process.stdout


def damaged(source, tmp_path, change):
    """A copy of the source with its weights or its configuration changed."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    return folder


def with_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def as_bert(folder):
    BertConfig().save_pretrained(folder)


def without_head(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2Model"]}))


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, "not finite: transformer.h.1.mlp.c_fc.weight"),
        (as_bert, "a model of type 'bert'"),
        (without_head, "is no language model"),
        (without_tokenizer, "--tokenizer"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_wrong_sources_are_named_and_nothing_is_written(change, message, source, text, tmp_path):
    process = run(damaged(source, tmp_path, change), text, tmp_path / "new" / "model")
    assert process.returncode == 1
    assert message in process.stderr
    assert process.stderr.count("\n") < 4
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--to", "SM+ScFuFN"), 1, "nearest known one is 'ScFuFFN'"),
        (("--text", "/nowhere"), 1, "There is no /nowhere"),
        (("--calibration-tokens", "64"), 1, "Too little calibration text: 64 tokens"),
        (("--context", "65"), 1, "--context 65: the model has 64 positions"),
        (
            ("--set", "entropy_coeficient=1"),
            1,
            "--set entropy_coeficient=1: only resid_pdrop",
        ),
        (("--set", "n_layer"), 1, "--set n_layer is not FIELD=VALUE"),
        (("--set", "n_layer=3"), 1, "sizes are those of the source"),
        (("--set", "activation_function=silu"), 1, "Choose the architecture with --to"),
        (("--set", "entropy_tolerance=-1"), 1, "entropy_tolerance=-1 has to be at least 0"),
        (("--to", "SM", "--set", "entropy_coefficient=1"), 1, "needs the entropy penalty: --to 'EReg(SM)'"),
        (("--schedule", "spiral"), 2, "spiral"),
        (("--learning-rate", "0", "--heal-steps", "2"), 2, "than or equal to 0.000000001; it is 0"),
        (("--schedule", "gate"), 1, "--schedule has no effect without --heal-steps"),
        (("--distill",), 1, "--distill has no effect without --heal-steps"),
        (("--heal-steps", "2", "--distill-temperature", "2"), 1, "has no effect without --distill:"),
        (("--heal-steps", "2", "--residual-scale-weight", "1"), 1, "with a LayerNorm before the head"),
        (("--prune-by-damage",), 1, "prunes no more FFNs than the source. Add FFNi<k> to --to"),
        (("--calibration", __file__), 1, "test_convert.py is not a folder"),
    ],
    ids=lambda value: "".join(value).strip("-").replace("/", "_")[:40] if isinstance(value, tuple) else None,
)
def test_wrong_options_are_named_and_nothing_is_left(words, status, message, source, text, tmp_path):
    process = run(source, text, tmp_path / "new" / "model", *words)
    assert process.returncode == status
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "new").exists()


def test_folders_of_others_are_left_alone(source, text, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    process = run(source, text, tmp_path, "--overwrite")
    assert process.returncode == 1
    assert "exists and holds no conversion" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    process = run(source, text, tmp_path / "notes.txt" / "model")
    assert process.returncode == 1
    assert "notes.txt is not a writable folder. Give another --output" in process.stderr


def test_what_lies_in_an_earlier_conversion_is_not_deleted_with_it(finished, source, text, tmp_path):
    shutil.copytree(finished[0], tmp_path / "model")
    shutil.copytree(text, tmp_path / "model" / "texts")
    process = run(source, tmp_path / "model" / "texts", tmp_path / "model", "--overwrite")
    assert process.returncode == 1
    assert "--overwrite would delete" in process.stderr
    assert (tmp_path / "model" / "texts" / "layers.py").exists()


def test_an_output_may_be_reached_by_a_link(source, text, tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "large_disk")
    process = run(source, text, tmp_path / "model", to="SM+LN+G")
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "large_disk" / "conversion_report.json").exists()


@pytest.mark.slow
def test_work_on_another_source_of_the_same_name_is_not_taken_up(source, text, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    output = tmp_path / "model"
    words = ("--heal-steps", "40")
    process = subprocess.Popen(arguments(tmp_path / "source", text, output, *words), stdout=subprocess.PIPE)
    while process.poll() is None and not list(tmp_path.glob(".converting-model/checkpoints/*/trainer_state.json")):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not output.exists()
    tensors = load_file(source / "model.safetensors")
    tensors = {name: tensor * (1.1 if name.endswith("c_fc.weight") else 1) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    again = run(tmp_path / "source", text, output, *words)
    assert again.returncode == 0, again.stderr
    assert "resuming earlier work" not in again.stdout


@pytest.mark.slow
def test_healing_to_attention_without_a_maximum_is_reported_with_its_cost(source, text, tmp_path):
    sharp, output = tmp_path / "sharp", tmp_path / "model"
    shutil.copytree(source, sharp)
    model = GPT2LMHeadModel.from_pretrained(source)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(6)  # scores that differ, so that it matters what they go through
    model.save_pretrained(sharp)
    words = ("--heal-steps", "12", "--distill", "--learning-rate", "5e-3", "--set", "log_sum_coefficient=1e-3")
    process = run(sharp, text, output, *words, to="Pow4+LN+G")
    assert process.returncode == 0, process.stderr
    report = ConversionReport.load(output / "conversion_report.json")
    replaced, healed = report.steps[0], report.steps[-1]
    assert "power4" in replaced.title and healed.title == "healed, 12 steps"
    assert replaced.kl > 1e-4 and healed.nats < replaced.nats
    assert report.healing.validation_nats[0][1] == pytest.approx(replaced.nats, abs=0.05)
    assert report.healing.validation_nats[-1][1] < report.healing.validation_nats[0][1]
    assert report.healing.settings["log_sum_coefficient"] == 1e-3
    page = (output / "conversion_report.md").read_text()
    assert f"| healed, 12 steps | {healed.kl:.4f} | {math.exp(healed.nats):.2f} |" in page
    assert all("maximum" not in operation.name for operation in report.target_operations.nonlinear)
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert model.config.attention_function == "power4" and model.config.log_sum_coefficient == 1e-3
    assert all(block.attn.shift.attention_shift.abs().min() > 0 for block in model.transformer.h)


def test_training_fields_arrive(source, text, tmp_path):
    words = ("--set", "attn_pdrop=0.2", "--set", "entropy_coefficient=7", "--set", 'entropy_maximum="causal"')
    process = run(source, text, tmp_path / "model", *words, to="EReg(SM+LN+G)")
    assert process.returncode == 0, process.stderr
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["attn_pdrop"], config["entropy_coefficient"], config["entropy_maximum"]) == (0.2, 7, "causal")


def test_a_naive_version_that_gives_no_numbers_is_said_to(text, source, tmp_path):
    """Weights so large that without norms the stream overflows."""

    def blow_up(folder):
        tensors = load_file(folder / "model.safetensors")
        for name in tensors:
            if name.endswith(("c_proj.weight", "c_attn.weight", "c_fc.weight")):
                tensors[name] *= 1e6
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    process = run(damaged(source, tmp_path, blow_up), text, tmp_path / "model", to="SM+StaticLN+R")
    assert process.returncode == 0, process.stderr
    report = ConversionReport.load(tmp_path / "model" / "conversion_report.json")
    assert report.steps[0].naive_diverged
    assert "| not finite |" in (tmp_path / "model" / "conversion_report.md").read_text()


def test_a_step_that_is_not_as_exact_as_it_should_be_is_measured():
    model, text = make_model("SM+LN+G"), SimpleNamespace(validation=[make_tokens()])
    measure = Measurement(model, text, SILENT)
    measure(model, "the original")

    def shift(model, _):
        changed = copy.deepcopy(model)
        changed.transformer.wpe.weight.data.mul_(1.01)
        return changed

    records = []
    take_step(Step("nothing", lambda model, _: model, exact=True), model, None, measure, records, naive=False)
    take_step(Step("shift", shift, exact=True), model, None, measure, records, naive=False)
    assert [record.kept for record in records] == [True, False]
    assert records[0].kl == 0 < records[1].kl
