"""Workflows called from Python: they return what the commands write, report progress, and print nothing."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from entropy_gpt.commands.main import main
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.measuring.remote_loading import RemoteLoading
from entropy_gpt.evaluation.records.measurement import measure_model, read_text
from entropy_gpt.evaluation.records.results import ModelResult, load_results, save_results
from entropy_gpt.evaluation.showing import publication
from entropy_gpt.training.progress import SILENT
from entropy_gpt.training.tokenizer import train_tokenizer
from entropy_gpt.workflows.evaluate import evaluate
from entropy_gpt.workflows.private import demonstrate, open_server
from entropy_gpt.workflows.private_cost import private_cost
from entropy_gpt.workflows.private_table import private_table
from entropy_gpt.workflows.publish import publish, write_card
from entropy_gpt.workflows.report import report
from tests.architectures import make_model
from tests.evaluation.example_results import example_training
from tests.slow import slow_cases


# Publishes from Python, in a process whose Hub is that of its variables; writes down what came of it.
PUBLISH = """
import dataclasses, json, sys
from entropy_gpt.workflows.publish import publish

folder, output = sys.argv[1:]
tried = publish(folder, "model", dry_run=True)
sent = publish(folder, "model", licence="mit")
with open(output, "w") as file:
    json.dump([dataclasses.asdict(publication) for publication in (tried, sent)], file)
"""


class Recorder:
    """A [`~entropy_gpt.training.progress.Progress`] that remembers its stages, with the units that were done."""

    def __init__(self):
        self.stages: dict[str, int] = {}
        self.said: list[str] = []

    @contextlib.contextmanager
    def stage(self, description, total=None):
        self.stages[description] = 0
        self._current = description
        yield self

    def say(self, status):
        self.said.append(status)

    def advance(self, count=1):
        self.stages[self._current] += count

    def reach(self, completed, total=None):
        self.stages[self._current] = completed


@pytest.fixture(scope="module")
def model(text, tmp_path_factory) -> Path:
    """A folder with a tiny model and its results."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    texts = [path.read_text(encoding="utf-8") for path in sorted(text.iterdir())][:2]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    tiny = make_model("EReg(SM(t)+ScFuFFN)", vocab_size=len(tokenizer), **ids)
    tiny.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    measured = read_text("some code", "sha256:0", texts, tokenizer, 32, 1000)
    save_results([measure_model(tiny, "tiny", measured, example_training(), 0, SILENT)], folder / "results.json")
    return folder


def without_seconds(result: ModelResult) -> ModelResult:
    parts = {name: dataclasses.replace(getattr(result, name), seconds=0.0) for name in ("likelihood", "heads")}
    return dataclasses.replace(result, **parts)


def test_evaluate_returns_what_the_command_writes(model, text, tmp_path, monkeypatch, capfd, undrawn):
    progress, output = Recorder(), tmp_path / "out"
    options = {"text": text, "max_tokens": 400, "stride": 20, "per_position": True}
    (result,) = evaluate(model, **options, progress=progress)
    assert capfd.readouterr() == ("", "")
    assert progress.stages["tiny: perplexity"] == result.likelihood.likelihood.tokens
    assert progress.stages["looking at the models"] == 1
    assert any("per token" in line for line in progress.said)
    arguments = [model, "--text", text, "--max-tokens", 400, "--stride", 20, "--per-position", "--output", output]
    monkeypatch.setattr(sys, "argv", ["entropy-gpt", "evaluate", *map(str, arguments)])
    assert main() == 0
    (written,) = load_results(output / "results.json")
    assert without_seconds(result) == without_seconds(written)
    # The folder of the command serves Python too: nothing is measured again.
    progress = Recorder()
    assert evaluate([model], **options, output=output, progress=progress) == [written]
    assert "tiny: perplexity" not in progress.stages


def test_a_report_is_the_page_of_the_command(model, tmp_path, monkeypatch, capfd, undrawn):
    progress = Recorder()
    monkeypatch.chdir(tmp_path)
    assert report([model], "python.html", progress=progress) == Path("python.html")
    assert progress.stages == {"drawing": 0}
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys, "argv", ["entropy-gpt", "report", str(model), "--output", "command.html"])
    assert main() == 0
    assert Path("python.html").read_text() == Path("command.html").read_text()


@pytest.mark.slow
def test_a_model_is_published_from_python(model, hub, tmp_path):
    output = tmp_path / "published.json"
    command = [sys.executable, "-c", PUBLISH, str(model), str(output)]
    process = subprocess.run(command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    tried, sent = json.loads(output.read_text())
    assert (tried["repository"], tried["url"]) == ("model", None)
    assert {"model.safetensors", "README.md", "config.json"} <= tried["files"].keys() == sent["files"].keys()
    assert (sent["repository"], sent["url"].startswith(hub.endpoint)) == ("somebody/model", True)
    assert len(hub.files("somebody/model")["model.safetensors"]) == sent["files"]["model.safetensors"]


def test_a_dry_run_needs_no_hub_and_reports_its_stages(model, monkeypatch, capfd, undrawn):
    """Models that are published below are loaded in fresh processes, which take most of the time."""
    loaded = []

    def load(folder, reference, prompt, subfolder):
        loaded.append(subfolder)
        return RemoteLoading(0.0, prompt)

    monkeypatch.setattr(publication, "load_in_fresh_process", load)
    monkeypatch.setenv("HF_TOKEN", "")
    progress = Recorder()
    tried = publish(model, "my-name/my-model", folded="beside", dry_run=True, progress=progress)
    assert tried.url is None
    assert "folded/model.safetensors" in tried.files
    assert loaded == ["", "folded"]
    assert [*progress.stages] == ["loading the model", "putting it together", "loading it in a fresh process"]
    assert capfd.readouterr() == ("", "")


def test_the_predicted_cost_of_architectures(capfd):
    gpt2, linear = private_cost(["SM+LN+G", "SM+ScFuFFN"], n_layer=2, n_embd=128, vocab_size=256, length=8)
    assert gpt2.total_bytes == pytest.approx(sum(gpt2.by_operation.values()))
    assert gpt2.total_bytes > linear.total_bytes > 0
    assert gpt2.round_trips > linear.round_trips > 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.private
@pytest.mark.slow
def test_a_private_answer_is_that_in_the_clear(model, capfd):
    pytest.importorskip("spu")
    progress = Recorder()
    answer = demonstrate(model, "def main(", new_tokens=1, progress=progress)
    assert (answer.check.answers, answer.check.same, answer.repeats) == (1, 1, 0)
    assert progress.stages["answering privately"] == len(answer.cost.steps)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 1}, "--max-tokens 1: Input should be greater than or equal to 2"),
        ({"dtype": "float8"}, "--dtype float8: Input should be 'float32', 'bfloat16' or 'float16'"),
        ({"seed": -1}, "--seed -1: "),
        ({"batch_tokens": 0}, "In Python, --batch-tokens is batch_tokens."),
        ({"context": 999}, "A context of 999 tokens is not possible"),
        ({"held_out": True}, "--held-out has no effect without --text"),
        ({"tasks": ["local_nothing"]}, "local_nothing"),
        *slow_cases(({"tasks": ["arc_eazy"]}, "Near it are arc_easy")),  # all of lm-eval's own are read
        ({"text": "/nowhere"}, "There is no /nowhere"),
        ({"device": "cuda:77"}, "--device cuda:77 can't be used"),
    ],
)
def test_wrong_values_of_an_evaluation(options, message, model, tmp_path, capfd):
    with pytest.raises(UserError) as failure:
        evaluate(model, **options, output=tmp_path / "out")
    assert message in str(failure.value)
    assert not (tmp_path / "out").exists()
    assert capfd.readouterr() == ("", "")


def test_wrong_values_of_other_workflows(model, tmp_path, capfd):
    cases = [
        (lambda: evaluate([]), "There is no model"),
        (lambda: evaluate([model, model]), "is given twice"),
        (lambda: report([tmp_path / "nothing.json"], tmp_path / "page.html"), "nothing.json"),
        (lambda: report(model, tmp_path / "page.pdf"), "page.pdf"),
        (lambda: publish(model, "a/b/c", dry_run=True), "'a/b/c'"),
        (lambda: publish(tmp_path / "nothing", "model", dry_run=True), "nothing"),
        (lambda: publish(model, "model", folded="twice", dry_run=True), "--folded twice: "),
        (lambda: publish(model, "model", timeout=0, dry_run=True), "--timeout 0: "),
        (lambda: write_card(tmp_path / "nothing"), "nothing"),
        (lambda: private_cost(["SM+LM"]), "SM+LM"),
        (lambda: private_cost(["SM"], embedding="two_hot"), "--embedding two_hot: "),
        (lambda: private_cost(["SM"], length=0), "--seq 0: "),
        (lambda: private_cost(["SM"], kept=-1), "--kept -1: "),
        (lambda: private_table(["SM"], output=tmp_path / "table", n_layer=0), "--n-layer 0: "),
        (lambda: private_table(["SM"], output=tmp_path / "table", networks=["fast"]), "'fast'"),
    ]
    for call, message in cases:
        with pytest.raises(UserError) as failure:
            call()
        assert message in str(failure.value)
    assert [*tmp_path.iterdir()] == []
    assert capfd.readouterr() == ("", "")


def test_wrong_values_of_private_inference(model):
    pytest.importorskip("spu")
    with pytest.raises(UserError, match="--protocol cheater: "):
        demonstrate(model, "def main(", protocol="cheater")
    with pytest.raises(UserError, match="--protocol aby3 is not for two parties: give cheetah or semi2k"):
        open_server(model, protocol="aby3")
    with pytest.raises(UserError, match="--max-new-tokens 0: "):
        demonstrate(model, "def main(", new_tokens=0)
    with pytest.raises(UserError, match="the prompt is empty"):
        demonstrate(model, "")
    with pytest.raises(UserError, match="'nowhere' is no address"):
        open_server(model, "nowhere")
