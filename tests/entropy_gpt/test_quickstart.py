"""The quickstart from end to end on a tiny corpus: whole, interrupted, and misused."""

import importlib.util
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost, StepCost
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.records.conversion_report import ConversionReport
from entropy_gpt.evaluation.records.results import load_results
from entropy_gpt.programs.quickstart import private_stage
from entropy_gpt.programs.quickstart.quickstart import ARCHITECTURES, CONVERTED, PRIVATE, TARGET, slug
from entropy_gpt.workflows.private_answer import PrivateAnswer

from .forks import run_command


COMMAND = Path(sys.executable).with_name("entropy-gpt")
MODELS = [*map(slug, ARCHITECTURES), CONVERTED]


def arguments(corpus, output, **options):
    options = {"steps": 20, "corpus": corpus, "output": output, **options}
    return [COMMAND, "quickstart", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def run(corpus, output, **options):
    _, *words = arguments(corpus, output, **options)
    return run_command(*words)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "output"
    return output, subprocess.run(arguments(text, output), capture_output=True, text=True)


@pytest.mark.slow
def test_everything_is_there(finished):
    output, process = finished
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    results = load_results(output / "results.json")
    *trained, converted = results
    assert [result.architecture.notation for result in trained] == list(ARCHITECTURES)
    assert {result.training.converted_from for result in trained} == {None}
    assert len({result.training.tokens for result in trained}) == 1
    assert (converted.architecture.notation, converted.training.converted_from) == (TARGET, "SM+LN+G")
    assert converted.training.steps == 5
    report = ConversionReport.load(output / "conversion" / "conversion_report.json")
    assert report.healing.steps == 5
    assert math.exp(report.original_nats) == pytest.approx(trained[0].likelihood.likelihood.perplexity, rel=0.1)
    for name, result in zip(MODELS, results, strict=True):
        assert result.name == name
        assert f"{result.likelihood.likelihood.perplexity:.2f}" in process.stdout
        assert result.architecture.notation in process.stdout
        assert len(result.heads.heads.entropy.nats) == 4
        assert (output / "pictures" / f"entropy_{name}.png").stat().st_size > 5000
        folder = output / "models" / name
        for name in ("config.json", "model.safetensors", "modeling_entropy_gpt.py", "tokenizer.json", "README.md"):
            assert (folder / name).exists()
    assert "fresh process" in process.stdout
    if importlib.util.find_spec("spu") is None:
        assert "no private answers" in process.stdout
        assert not any(result.costs for result in results)
    else:
        assert process.stdout.count("tokens are the same") == 2
        costs = {result.name: result.costs for result in results if result.costs}
        assert all(cost.check.same == cost.check.answers for each in costs.values() for cost in each)
        assert list(costs) == list(map(slug, PRIVATE))
        for (cost,) in costs.values():
            assert (cost.protocol, cost.answers, cost.network) == ("cheetah", 2, "loopback, two processes")
            assert f"{cost.total_bytes / 1e6:.2f}" in process.stdout
        assert (output / "pictures" / "private_costs.png").stat().st_size > 5000
    assert "stage 7 of 7" in process.stdout and "\x1b" not in process.stdout
    assert process.stdout.splitlines()[-1].endswith(f": {output / 'report.html'}")
    assert "EReg(SM(t)+ScFuFFN)" in (output / "report.html").read_text(encoding="utf-8")
    assert str(output / "models") in process.stdout.replace("\n", "")
    assert not list(output.rglob("checkpoint-*"))
    assert not list(output.rglob("_unfinished-*"))


@pytest.mark.slow
def test_a_second_run_shows_the_same_without_training_anew(finished, text):
    output, process = finished
    before = {path: path.stat().st_mtime_ns for path in (output / "models").rglob("*")}
    results = load_results(output / "results.json")
    again = run(text, output)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in (output / "models").rglob("*")} == before
    assert load_results(output / "results.json") == results
    assert "training SM+LN+G" not in again.stdout
    texts = (each.stdout for each in (process, again))
    shown, shown_again = (without_progress(text[text.index("architecture") :]) for text in texts)
    assert shown == shown_again


def without_progress(text: str) -> list[str]:
    """Lines that do not depend on how long anything takes."""
    lines = [re.sub(", [^,]* left in all:", ":", line) for line in text.splitlines()]
    return [line for line in lines if line and not re.search(r"^quickstart: \d+%|\b\d+ s\b", line)]


def test_a_private_answer_of_an_older_version_is_computed_anew(tmp_path, monkeypatch):
    """Its cost has one phase, and the table is of two."""
    step = StepCost("linear", 0, 1, 1, 1, 1, 1.0, 1.0)
    cost = InferenceCost("SM", *[1] * 6, PrivateSettings(), "", [], [], 0.0, {}, None, "")
    new, asked = PrivateAnswer("text", None, 0.0, replace(cost, before=[step])), []
    monkeypatch.setattr(private_stage, "demonstrate", lambda *given, **options: asked.append(given) or new)
    (tmp_path / "private").mkdir()
    PrivateAnswer("text", None, 0.0, cost).save(tmp_path / "private" / "model.json")
    for _ in range(2):
        assert private_stage._answer(tmp_path / "model", "def", tmp_path, None).cost.before == [step]
    assert len(asked) == 1


def interrupt(corpus: Path, output: Path, notation: str, sent: signal.Signals) -> str:
    """Begins, and sends a signal once the model has a checkpoint; what was said by then."""
    process = subprocess.Popen(arguments(corpus, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoints = output / "checkpoints" / slug(notation)
    deadline = time.monotonic() + 600
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")) and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.01)
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (130 if sent == signal.SIGINT else -sent), error
    return error


@pytest.mark.slow
def test_a_run_that_is_interrupted_and_killed_goes_on_to_the_same_result(finished, text, tmp_path):
    output, _ = finished
    error = interrupt(text, tmp_path / "output", "SM+ScFuFFN", signal.SIGINT)
    assert error.splitlines()[-1] == "entropy-gpt: interrupted. The same command goes on from here."
    assert "Traceback" not in error
    interrupt(text, tmp_path / "output", "EReg(SM(t)+ScFuFFN)", signal.SIGKILL)

    if (output / "private").exists():  # these answers take most of the time, and are the same once the weights are
        shutil.copytree(output / "private", tmp_path / "output" / "private")
    resumed = run(text, tmp_path / "output")
    assert resumed.returncode == 0, resumed.stderr
    assert not any(f"training {notation}" in resumed.stdout for notation in ("SM+LN+G", "SM+ScFuFFN:"))
    for model in MODELS:
        expected, got = (
            load_file(folder / "models" / model / "model.safetensors") for folder in (output, tmp_path / "output")
        )
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, msg=f"{name} of {model}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no"),
        (b"", "is empty"),
        (b"\0\1\2", "is not UTF-8 text"),
        (b"x = 1\n", "too short"),
        (b"x = 1\n" * 300, "kept for validation"),
    ],
    ids=["missing", "empty", "binary", "short", "short validation"],
)
def test_a_bad_corpus_leaves_nothing(content, message, tmp_path):
    if content is not None:
        (tmp_path / "corpus.txt").write_bytes(content)
    process = run(tmp_path / "corpus.txt", tmp_path / "output")
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("entropy-gpt: ")
    assert message in line
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_another_runs_folder_is_not_touched(finished, text):
    output, _ = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    process = run(text, output, steps=21)
    assert process.returncode == 1
    assert "steps 20 then, 21 now" in process.stderr
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_folder_of_something_else_is_not_touched(text, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    process = run(text, tmp_path)
    assert process.returncode == 1
    assert "holds no quickstart" in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_holds_nothing_whole_counts_as_empty(tmp_path):
    """A process killed at the very beginning leaves such a one; here the corpus is what is refused."""
    (tmp_path / "corpus.txt").write_text("x = 1\n")
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "_unfinished-settings.json").write_text("{")
    process = run(tmp_path / "corpus.txt", tmp_path / "output")
    assert "too short" in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["settings.json", "models/sm-ln-g/results.json"])
def test_damaged_files_are_named(damaged, finished, text, tmp_path):
    shutil.copytree(finished[0], tmp_path / "output")
    (tmp_path / "output" / damaged).write_text("{")
    process = run(text, tmp_path / "output")
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert damaged in line
    assert "elete" in line


def test_slugs_need_no_quotes():
    assert slug("EReg(SM(t)+ScFuFFN)") == "ereg-smt-scfuffn"
    assert slug("SM+LN+G") == "sm-ln-g"
