"""`entropy-gpt evaluate` from end to end: models side by side, parts, misuse, going on."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from entropy_gpt.commands.main import main
from entropy_gpt.evaluation.measuring.text_diagnostics import diagnose_text
from entropy_gpt.evaluation.records.results import load_results
from entropy_gpt.terminal import evaluate as evaluate_job
from entropy_gpt.training.tokenizer import train_tokenizer
from entropy_gpt.workflows.evaluate_inputs import short_names
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .forks import run_command


PROMPT = "def main(x):"
SIZES = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64}


@pytest.fixture(scope="module")
def models(text, tmp_path_factory):
    """An EntropyGPT, and a GPT-2 as transformers saves it, with one tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer((path.read_text() for path in sorted(text.iterdir())), 300)
    common = {**SIZES, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    made = {
        "gpt2": GPT2LMHeadModel(GPT2Config(**common)),
        "ereg": EntropyGPTForCausalLM(EntropyGPTConfig.from_notation("EReg(SM(t)+ScFuFFN)", **common)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def run(*words):
    return run_command("evaluate", *words, env={**os.environ, "COLUMNS": "120"})


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The same in this process, for what is refused."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["entropy-gpt", "evaluate", *map(str, words)])
        capsys.readouterr()  # the progress bars of models that the test saved
        status = main()
        output = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, output.out, output.err)

    return run


@pytest.fixture(scope="module")
def finished(models, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "out"
    words = ("--text", text, "--stride", 40, "--per-position", "--frequency-text", text, "--max-tokens", 3000)
    words = (*words, "--prompt", PROMPT, "--head", "1,0")
    process = run(models / "gpt2", models / "ereg", *words, "--output", output)
    assert process.returncode == 0, process.stderr
    return output, process, words


def test_two_models_side_by_side(finished, models, text):
    output, process, _ = finished
    gpt2, ereg = load_results(output / "results.json")
    assert (gpt2.name, gpt2.title, ereg.title) == ("gpt2", "SM+LN+G", "EReg(SM(t)+ScFuFFN)")
    tokenizer = AutoTokenizer.from_pretrained(models / "gpt2")
    ids = [i for path in sorted(text.iterdir()) for i in [*tokenizer(path.read_text())["input_ids"], 0]][:3000]
    for name, result in (("gpt2", gpt2), ("ereg", ereg)):
        likelihood = result.likelihood.likelihood
        assert f"{likelihood.perplexity:.2f}" in process.stdout
        assert likelihood.tokens == result.likelihood.conditions.evaluated_tokens
        assert abs(likelihood.tokens - 2999) <= 10  # ends of documents do not count as text
        assert sum(part.tokens for part in likelihood.by_position) == likelihood.tokens
        assert sum(part.nats for part in likelihood.by_frequency) == pytest.approx(likelihood.nats)
        assert (likelihood.windows.context, likelihood.windows.stride) == (63, 40)
        # The first window, predicted by transformers alone.
        model = AutoModelForCausalLM.from_pretrained(models / name, trust_remote_code=True)
        first = torch.tensor([ids[:64]])
        with torch.no_grad():
            nats = model(first[:, :63]).logits.log_softmax(-1).gather(2, first[:, 1:, None]).neg().sum().item()
        few = run(models / name, "--text", text, "--max-tokens", 64, "--head-tokens", 0, "--output", output / name)
        (short,) = load_results(output / name / "results.json")
        assert short.likelihood.likelihood.nats == pytest.approx(nats, rel=1e-5), few.stderr
        assert short.heads is None
        assert (output / "pictures" / f"{name}.png").stat().st_size > 10_000
    assert gpt2.heads.heads.entropy.maximum == pytest.approx(math.lgamma(65) / 64)
    assert "report" in process.stdout
    # The text is tokenised, and tokens are counted, once for models of one vocabulary.
    assert "gpt2: counting tokens" in process.stdout
    assert "ereg: counting tokens" not in process.stdout


def test_one_text_is_kept_with_the_rows_of_a_head(finished, models):
    for result in load_results(finished[0] / "results.json"):
        diagnostics = diagnose_text(models / result.name, None, PROMPT, weights=True)
        attention = result.attention
        assert (attention.tokens, attention.head) == (diagnostics.tokens, [1, 0])
        torch.testing.assert_close(torch.tensor(attention.entropies), diagnostics.entropies)
        torch.testing.assert_close(torch.tensor(attention.weights), diagnostics.weights[1, 0])


def test_what_is_measured_is_kept_and_not_measured_again(finished, models):
    output, _, words = finished
    before = load_results(output / "results.json")
    path = output / "results.json"
    content = json.loads(path.read_text())
    del content["content"][1]  # as if interrupted after the first model
    path.write_text(json.dumps(content))
    process = run(models / "gpt2", models / "ereg", *words, "--output", output)
    assert process.returncode == 0, process.stderr
    assert "gpt2: perplexity" not in process.stdout
    assert "ereg: perplexity" in process.stdout
    after = load_results(path)
    assert after[0] == before[0]
    assert after[1].likelihood.likelihood == before[1].likelihood.likelihood
    other = run(models / "gpt2", *words[:2], "--output", output)
    assert other.returncode == 1
    assert "stride 40 then, 63 now" in other.stderr
    assert "--overwrite" in other.stderr
    assert load_results(path) == after


def test_an_overwritten_evaluation_goes_on_under_its_own_settings(models, text, tmp_path, run_here):
    words = (models / "gpt2", "--text", text, "--max-tokens", 200, "--head-tokens", 0, "--output", tmp_path / "out")
    assert run_here(*words).returncode == 0
    replaced = run_here(*words, "--stride", 9, "--overwrite")
    assert replaced.returncode == 0, replaced.stderr
    again = run_here(*words, "--stride", 9)
    assert again.returncode == 0, again.stderr
    (result,) = load_results(tmp_path / "out" / "results.json")
    assert result.likelihood.likelihood.windows.stride == 9
    assert "stride 9 then, 63 now" in run_here(*words).stderr


def test_documents_alone_with_their_beginning(models, tmp_path):
    texts = ["one two three\n", "x", "naïve"]
    Dataset.from_dict({"body": texts}).to_json(tmp_path / "texts.jsonl")
    words = ("--text", tmp_path / "texts.jsonl", "--text-column", "body", "--separate", "--bos")
    process = run(models / "gpt2", *words, "--output", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    (result,) = load_results(tmp_path / "out" / "results.json")
    likelihood = result.likelihood.likelihood
    assert likelihood.bytes == sum(len(text.encode()) for text in texts)
    assert likelihood.words == 5
    tokenizer = AutoTokenizer.from_pretrained(models / "gpt2")
    assert likelihood.tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)


@pytest.mark.slow
def test_the_default_is_what_training_keeps_apart(models, tmp_path):
    words = ("--frequency-text", "training", "--max-tokens", "500", "--head-tokens", "128")
    process = run(models / "gpt2", *words, "--output", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    (result,) = load_results(tmp_path / "out" / "results.json")
    assert "Python standard library" in result.likelihood.conditions.corpus
    assert result.likelihood.likelihood.by_frequency[-1].end is None
    assert result.heads.heads.rows == 128


@pytest.mark.slow
def test_tasks_of_ones_own_data(models, text, tmp_path, run_here):
    data = tmp_path / "data"
    data.mkdir()
    missing = run_here(models / "gpt2", "--tasks", "local_arc_easy", "--task-data", data, "--output", tmp_path / "out")
    assert missing.returncode == 1
    assert "arc_easy.jsonl" in missing.stderr
    unknown = run_here(models / "gpt2", "--tasks", "local_arc_esay", "--task-data", data)
    assert "local_arc_easy" in unknown.stderr
    assert not (tmp_path / "out").exists()
    questions = [{"query": f"Question: {word}?", "choices": ["yes", "no"], "gold": 1} for word in ("a", "b", "c")]
    (data / "arc_easy.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    words = ("--text", text, "--max-tokens", 200, "--tasks", "local_arc_easy", "--task-data", data, "--limit", 2)
    process = run_here(models / "ereg", *words, "--output", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    (result,) = load_results(tmp_path / "out" / "results.json")
    assert {(score.task, score.metric, score.samples) for score in result.tasks.scores} == {
        ("local_arc_easy", "acc", 2),
        ("local_arc_easy", "acc_norm", 2),
    }
    assert "lm_eval" in result.tasks.versions
    assert "local_arc_easy" in process.stdout
    assert "local_blimp" in run_here("--tasks", "list").stdout


def test_a_dry_run_writes_nothing(models, text, tmp_path):
    process = run(models / "gpt2", "--text", text, "--dry-run", "--output", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert "gpt2: SM+LN+G, 2 layers, width 16, 64 positions, 300 tokens" in process.stdout
    assert not (tmp_path / "out").exists()


def break_folder(models, folder, name):
    """A copy of the GPT-2 that lacks or has something."""
    shutil.copytree(models / "gpt2", folder)
    if name == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif name == "no weights":
        (folder / "model.safetensors").unlink()
    elif name == "another tokenizer":
        train_tokenizer(["a text with a few words and more merges " * 3], 400).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        model = GPT2LMHeadModel(GPT2Config(**{**config, "vocab_size": 260}))
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context", "65"), "gpt2: A context of 65 tokens is not possible: the model has 64 positions"),
        (("--context", "0"), "A context of 0 tokens"),
        (("--stride", "65"), "A stride of 65 tokens is not possible: allowed are 1 to the context, 63"),
        (("--context", "8", "--stride", "9"), "A stride of 9 tokens"),
        (("--held-out",), "--held-out has no effect without --text"),
        (("--text", "/nowhere"), "There is no /nowhere"),
        (("--text", "EMPTY"), "is empty"),
        (("--text", "SHORT", "--separate"), "there is no token to predict"),
        (("--text", "SHORT"), "there is no token to predict"),
        (("--limit", "3"), "--limit has no effect without --tasks"),
        (("--tasks", " , "), "--tasks names no task"),
        (("--head", "1,0"), "--head has no effect without --prompt"),
        (("--prompt", "x", "--head", "2,0"), "There is no head 0 in a layer 2"),
        (("--prompt", "x" * 99), "The text has 99 tokens, and the model sees 64"),
        (("--device", "cuda:7"), "--device cuda:7 can't be used"),
        (("--text", "TEXT", "--frequency-text", "training"), "add --held-out"),
        (("--text", "TEXT", "--split", "test"), "dataset_split=test does nothing here"),
    ],
)
def test_misuse_is_told_in_a_line_and_writes_nothing(words, message, models, text, tmp_path, run_here):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("x")
    places = {"EMPTY": tmp_path / "empty.txt", "SHORT": tmp_path / "short.txt", "TEXT": text}
    words = [places.get(word, word) for word in words]
    process = run_here(models / "gpt2", *words, "--output", tmp_path / "out")
    assert process.returncode == 1
    assert message in process.stderr
    assert len(process.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no tokenizer", "Say where the tokenizer of"),
        ("no weights", "model.safetensors"),
        ("another tokenizer", "they do not belong together"),
    ],
)
def test_models_that_can_not_be_measured(name, message, models, text, tmp_path, run_here):
    folder = break_folder(models, tmp_path / "model", name)
    process = run_here(models / "ereg", folder, "--text", text, "--output", tmp_path / "out")
    assert process.returncode == 1
    assert message in process.stderr
    assert len(process.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_tokenizers_are_used_as_far_as_they_go(models, text, tmp_path, run_here):
    """One with an appended token, a bare file, and one that names no end of text."""
    tokenizer = AutoTokenizer.from_pretrained(models / "gpt2")
    folder = break_folder(models, tmp_path / "model", "no tokenizer")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "padded")
    tokenizer.eos_token = tokenizer.bos_token = tokenizer.pad_token = None
    PreTrainedTokenizerFast(tokenizer_object=renamed(tokenizer)).save_pretrained(tmp_path / "endless")
    place = tmp_path / "endless"
    words = ("--text", text, "--max-tokens", 4000, "--head-tokens", 0, "--overwrite", "--output", tmp_path / "out")
    perplexities = set()
    for more in ((), ("--tokenizer", tmp_path / "padded"), ("--tokenizer", place, "--eos-token", "<end>")):
        assert run_here(folder, *words, *more).returncode == 0
        (result,) = load_results(tmp_path / "out" / "results.json")
        perplexities.add(result.likelihood.likelihood.perplexity)
    assert len(perplexities) == 1
    refused = run_here(folder, *words, "--tokenizer", place)
    assert "name one of its tokens with --eos-token, or evaluate each document separately" in refused.stderr
    assert run_here(folder, *words, "--tokenizer", place, "--separate").returncode == 0


def renamed(tokenizer) -> Tokenizer:
    """The same, whose end of text has a name that says nothing."""
    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str().replace("<|endoftext|>", "<end>"))


def test_folders_that_hold_no_model_of_the_family(models, text, tmp_path, run_here):
    BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "nothing").mkdir()
    for folder in (tmp_path / "bert", tmp_path / "nothing", tmp_path / "missing"):
        process = run_here(folder, "--text", text, "--output", tmp_path / "out")
        assert process.returncode == 1
        assert str(folder) in process.stderr
        assert len(process.stderr.splitlines()) == 1
    twice = run_here(models / "gpt2", models / "gpt2", "--text", text, "--output", tmp_path / "out")
    assert "is given twice" in twice.stderr


def test_another_folder_is_not_touched(models, text, tmp_path):
    (tmp_path / "diary.txt").write_text("dear")
    process = run(models / "gpt2", "--text", text, "--output", tmp_path, "--overwrite")
    assert process.returncode == 1
    assert "holds no evaluation" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


def test_names_tell_models_apart():
    assert short_names(["runs/a/model", "runs/b/model"]) == ["a/model", "b/model"]
    assert short_names(["x/gpt2", "y/gpt2", "small"]) == ["x/gpt2", "y/gpt2", "small"]
    assert short_names(["/"]) == ["/"]
    names = short_names(["model", "a/model/"])
    assert len({*names}) == 2


def test_frequencies_are_those_of_the_text(finished):
    output, _, _ = finished
    for result in load_results(output / "results.json"):
        parts = result.likelihood.likelihood.by_frequency
        # What is evaluated is a part of the text that is counted.
        assert all(part.begin >= 1 for part in parts) or np.isclose(parts[0].tokens / 3000, 0, atol=0.02)


def test_the_command_that_is_advised_can_be_pasted(capsys, monkeypatch):
    monkeypatch.setattr(evaluate_job, "console", Console(width=80))
    evaluate_job._print_files([], Path("my [texts] (1)"))
    *_, line = capsys.readouterr().out.splitlines()
    words = shlex.split(line.removeprefix("make a page of them: "))
    assert words[2:] == ["my [texts] (1)/results.json", "-o", "my [texts] (1)/report.html"]
