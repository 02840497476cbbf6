"""The study: a trial from end to end, interrupted, and misused."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from entropy_gpt.commands.study import ARCHITECTURES, LADDER, SCALING, find_protocol
from entropy_gpt.evaluation.records.results import load_results, save_results
from entropy_gpt.programs.study.ladder import log_sum_weight
from entropy_gpt.programs.study.protocol import read_protocol
from entropy_gpt.programs.study.records import TIMED, Study, StudyRun
from entropy_gpt.programs.study.run import TOKENIZER, Place, perform, write_plan
from entropy_gpt.training.claims import claimed
from entropy_gpt.training.tokenizer import train_tokenizer

from .forks import run_command


COMMAND = Path(sys.executable).with_name("entropy-gpt")
TINY = """
dataset: {text}
vocabulary: 300
test:
  {package}: {{release: "{release}", characters: 20000}}
trained:
  notation: SM
  n_layer: 1
  n_head: 1
  n_embd: 8
  context: 16
  max_steps: {steps}
  per_device_train_batch_size: 2
  validation_tokens: 1024
  learning_rate: {rate}
  seed: 0
  entropy_logging_steps: 5
  save_steps: 50
converted: {{}}
answered: {{}}
groups:
  one:
    notation: {notation}
"""
DIVERGING = """
  trained_wildly:
    notation: SM+LN+G
    learning_rate: 1e6
    max_steps: 60
  healed_wildly:
    convert: {group: one, notation: SM+LN+G}
    notation: SM
    heal_steps: 60
    learning_rate: 1e9
    validation_tokens: 1024
    seed: 0
"""


def study(*words, **options):
    return run_command("study", *words, **options)


def tiny(text: Path, folder: Path, **changes) -> Path:
    told = {
        "text": text,
        "package": "networkx",
        "release": "3.6.1",
        "steps": 5,
        "rate": 1e-3,
        "notation": "SM",
    } | changes
    (folder / "protocol.yaml").write_text(TINY.format(**told))
    return folder / "protocol.yaml"


@pytest.mark.slow
@pytest.mark.private
def test_the_trial_of_the_committed_protocol(tmp_path):
    output = tmp_path / "study"
    process = study("--protocol", ARCHITECTURES, "--only", "smoke", "--output", output, "--workers", 2)
    assert process.returncode == 0, process.stderr + process.stdout
    assert "10 rows are measured: " in process.stdout
    found = Study.load(output / "study.json")
    assert {group: len(names) for group, names in found.groups.items() if group.startswith("smoke")} == {
        "smoke_training": 4,
        "smoke_ladder": 2,
        "smoke_conversion": 2,
        "smoke_private": 2,
    }
    assert not any(group.startswith("smoke") for group in found.missing)
    trained, converted, private = (found.group(f"smoke_{name}") for name in ("ladder", "conversion", "private"))
    for run in [*trained, *converted]:
        assert math.isfinite(run.validation_nats) and math.isfinite(run.test_nats)
        assert run.validation.conditions.corpus_revision == trained[0].validation.conditions.corpus_revision
        assert run.validation.likelihood.tokens == trained[0].validation.likelihood.tokens
        assert set(run.test) == {"networkx", "sympy"}
        assert len(run.heads.nats) == 2
    assert [run.source for run in converted] == [trained[0].name] * 2
    naive = {run.settings["naive"]: run for run in converted}
    assert naive[True].validation_nats != naive[False].validation_nats
    for run in private:
        assert run.cost.total_bytes > 1e6
        assert run.cost.check.same == 1
        assert run.agreement.agreeing >= 0.9 * run.agreement.positions
        assert run.agreement.private_perplexity == pytest.approx(run.agreement.perplexity, rel=0.01)
    assert private[0].cost.total_bytes > private[1].cost.total_bytes
    assert not list(output.rglob("checkpoint-*"))

    models = load_results(output / "models.json")
    assert [model.name for model in models] == sorted(run.source for run in private)
    save_results([*models, replace(models[0], name="of another protocol")], output / "models.json")
    begun = time.monotonic()
    again = study("--protocol", ARCHITECTURES, "--only", "smoke", "--output", output)
    assert again.returncode == 0 and "10 rows are measured" in again.stdout
    assert time.monotonic() - begun < 300, "nothing was left to do"
    assert load_results(output / "models.json") == models


def small(name: str, text: Path, folder: Path, **groups) -> Path:
    """A committed protocol on a small text; where groups are given, with what they set anew."""
    content = yaml.safe_load(find_protocol(name).read_text(encoding="utf-8"))
    content |= {"dataset": str(text), "vocabulary": 300, "transfer": {}}
    for package in content["test"].values():
        package["characters"] = 20_000
    for group, settings in groups.items():
        content["groups"][group] |= settings
    (folder / "small.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "small.yaml"


@pytest.mark.slow
def test_the_trial_of_the_protocol_of_the_ladder(text, tmp_path):
    """Its GPT-2 and what that is healed to; power4 is trained in the trial of scaling."""
    protocol, output = small(LADDER, text, tmp_path), tmp_path / "ladder"
    process = study("--protocol", protocol, "--only", "smoke_h", "--output", output, "--workers", 1)
    assert process.returncode == 0, process.stderr + process.stdout
    found = Study.load(output / "study.json")
    (healed,) = found.group("smoke_healed")
    assert healed.source == found.group("smoke_training")[0].name and healed.notation == "Pow4(t_h)+ScFuFFN"
    assert math.isfinite(healed.test_nats) and log_sum_weight(healed) == 1e-3


@pytest.mark.slow
def test_the_trial_of_the_protocol_of_scaling(text, tmp_path):
    once = {"smoke_rates": {"learning_rate": [1e-3]}, "smoke_tokens": {"max_steps": [8]}}
    protocol, output = small(SCALING, text, tmp_path, **once), tmp_path / "scaling"
    words = ("--protocol", protocol, "--only", "smoke", "--output", output, "--workers", 1)
    stopped = study(*words, "--hours", 0)
    assert stopped.returncode == 0 and "Stopped after 0 hours, with 6 of 6 rows to go" in stopped.stdout
    process = study(*words)
    assert process.returncode == 0, process.stderr + process.stdout
    found = Study.load(output / "study.json")
    assert not any(group.startswith("smoke") for group in found.missing)
    timed = found.group("smoke_pace")
    assert [run.notation for run in timed] == ["SM+LN+G", "Pow4(t_h)+ScFuFFN"]
    assert all(0 < run.cpu_seconds_per_step < 1 for run in timed)
    tokens = [run.tokens for run in found.group("smoke_tokens")]
    assert tokens == [8 * 1024] * 2
    assert all(run.cpu_seconds_per_step > 0 for run in found.group("smoke_tokens"))
    plan = study(*words, "--dry-run")
    assert "0 runs are known and missing" in plan.stdout


def test_steps_are_timed_in_seconds_of_the_processor(text, tmp_path):
    protocol = read_protocol(small(SCALING, text, tmp_path))
    row = next(row for row in protocol.rows if row.group == "smoke_pace")
    (output := tmp_path / "scaling").mkdir()
    tokenizer = train_tokenizer((path.read_text() for path in sorted(text.iterdir())), 300)
    tokenizer.save_pretrained(output / TOKENIZER)
    place = Place(output, row.timed.name)
    write_plan(place, row.timed, protocol)
    perform(place)
    found = StudyRun.load(place.result)
    assert (found.kind, found.notation, found.tokens) == (TIMED, "SM+LN+G", 0)
    assert 0 < found.cpu_seconds_per_step < 1 and 0 < found.seconds_per_step < 10
    assert found.validation is None and place.model is None


def test_a_plan_predicts_hours_by_steps_that_were_timed(text, tmp_path):
    path, output = small(SCALING, text, tmp_path), tmp_path / "scaling"
    output.mkdir()
    protocol = read_protocol(path)
    record = Study(protocol.hash)
    for row in protocol.rows:
        if row.group == "smoke_pace":
            run = row.timed
            record.runs[run.name] = StudyRun(run.name, run.kind, run.settings, None, row.settings["notation"], 1000)
            record.runs[run.name].cpu_seconds_per_step = 90.0
    record.save(output / "study.json")
    plan = study("--protocol", path, "--only", "smoke", "--output", output, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    (rates,) = (line.split() for line in plan.stdout.splitlines() if line.split()[:1] == ["smoke_rates"])
    assert rates == ["smoke_rates", "4", "0", "0", "0.40"], "4 runs of 4 steps of 90 seconds"
    assert "What is missing and was timed takes at most 1.0 hours of one core." in plan.stdout


def test_what_was_timed_counts_until_it_is_timed_anew(text, tmp_path):
    path, output = small(SCALING, text, tmp_path), tmp_path / "scaling"
    output.mkdir()
    protocol = read_protocol(path)
    record = Study(protocol.hash)
    for run in (row.timed for row in protocol.rows if row.group == "smoke_pace"):
        record.runs[run.name] = StudyRun(run.name, run.kind, run.settings, None, run.settings["notation"], 1000)
    record.save(output / "study.json")
    words = ("--protocol", path, "--only", "smoke_pace", "--output", output, "--hours", 0)
    stopped = study(*words, "--time-again")
    assert "Stopped after 0 hours, with 2 of 2 rows to go" in stopped.stdout
    assert Study.load(output / "study.json").runs.keys() == record.runs.keys()
    assert "2 rows are measured" in study(*words).stdout, "when all is done, no hours are missing"
    assert not (output / "runs").exists(), "nothing is started after the deadline"


def test_a_text_that_is_tested_on_is_looked_for_before_training(text, tmp_path):
    protocol, output = tiny(text, tmp_path, release="0.1"), tmp_path / "study"
    process = study("--protocol", protocol, "--output", output)
    assert process.returncode == 1
    assert "The study tests on networkx 0.1, and 3.6.1 is installed" in process.stderr
    assert not (output / "runs").exists()


def test_runs_on_another_list_of_packages_are_refused(text, tmp_path):
    protocol, output = tiny(text, tmp_path), tmp_path / "study"
    output.mkdir()
    run = StudyRun("a run", TIMED, {}, None, "SM", 1)
    Study("sha256:0", {run.name: run}, pins="sha256:another").save(output / "study.json")
    process = study("--protocol", protocol, "--output", output, "--dry-run")
    assert process.returncode == 1
    assert "were trained on the packages of another list (sha256:another, and none now)" in process.stderr


def test_a_tokenizer_of_another_study_is_refused(text, tmp_path):
    protocol, output = tiny(text, tmp_path), tmp_path / "study"
    output.mkdir()
    Study("sha256:0", tokenizer="another").save(output / "study.json")
    process = study("--protocol", protocol, "--output", output)
    assert process.returncode == 1
    assert "have another tokenizer than" in process.stderr


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(text, tmp_path):
    protocol, output = tiny(text, tmp_path, steps=300), tmp_path / "study"
    with subprocess.Popen(
        [COMMAND, "study", "--protocol", protocol, "--output", output, "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 600
        while not (checkpoints := list(output.glob("runs/*/training/checkpoint-*"))):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        process.kill()
    assert not list(output.glob("runs/*/result.json"))
    run = checkpoints[0].parents[1].name
    log = output / "runs" / run / "training" / "training_log.jsonl"
    assert log.exists()
    assert study("--protocol", protocol, "--output", output).returncode == 0
    result = StudyRun.load(output / "runs" / run / "result.json")
    assert result.tokens == 300 * 2 * 16
    entries = map(json.loads, log.read_text().splitlines())
    steps = [entry["step"] for entry in entries if entry["kind"] == "entropy"]
    assert steps == list(range(0, 301, 5)), "no step was done twice"


def test_two_commands_do_not_share_a_folder(text, tmp_path):
    with claimed(tmp_path):
        process = study("--protocol", tiny(text, tmp_path), "--output", tmp_path)
    assert process.returncode == 1
    assert f"Another command is at work in {tmp_path}: process {os.getpid()}, since" in process.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_what_diverges_is_a_result(text, tmp_path):
    protocol, output = tiny(text, tmp_path, notation="SM+LN+G"), tmp_path / "study"
    with protocol.open("a") as file:
        file.write(DIVERGING)
    process = study("--protocol", protocol, "--output", output)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("diverged: ") == 2
    found = Study.load(output / "study.json")
    for group, notation in (("trained_wildly", "SM+LN+G"), ("healed_wildly", "SM")):
        (run,) = found.group(group)
        assert run.notation == notation and run.diverged
        assert run.parameters > 1000
        assert run.validation is None and run.validation_nats == math.inf
    (run,) = found.group("one")
    assert run.diverged is None and math.isfinite(run.validation_nats)


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_tried_again(text, tmp_path):
    output = tmp_path / "study"
    output.mkdir()
    (output / "data").touch()  # where the runs would keep tokenised text
    process = study("--protocol", tiny(text, tmp_path), "--output", output)
    assert process.returncode == 1
    assert "1 runs failed: " in process.stderr and "Tokenised data can't be kept in" in process.stderr
    assert "Traceback" not in process.stderr
    (output / "data").unlink()
    assert study("--protocol", tiny(text, tmp_path), "--output", output).returncode == 0


def test_a_folder_of_another_study_is_refused(text, tmp_path):
    output = tmp_path / "study"
    output.mkdir()
    (output / "shared.json").write_text(json.dumps({"dataset": str(text.resolve()), "vocabulary": 400, "test": {}}))
    process = study("--protocol", tiny(text, tmp_path), "--output", output)
    assert process.returncode == 1
    assert "holds a study of another kind (vocabulary 400 then, 300 now" in process.stderr


def test_a_dry_run_writes_nothing(text, tmp_path):
    process = study("--protocol", tiny(text, tmp_path), "--output", tmp_path / "study", "--dry-run")
    assert process.returncode == 0
    assert "1 runs are known and missing, with 5 steps of training. Nothing was" in process.stdout
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        (("--only", "nothing"), "--only nothing: no group's name begins like that. There are one."),
        (("--protocol", "no.yaml"), "There is no no.yaml"),
        (("--workers", "0"), "--workers"),
    ],
)
def test_wrong_usage_is_one_line(text, tmp_path, words, message):
    process = study("--protocol", tiny(text, tmp_path), "--output", tmp_path / "study", *words, cwd=tmp_path)
    assert process.returncode in (1, 2)
    assert message in process.stderr and len(process.stderr.splitlines()) == 1
    assert not (tmp_path / "study").exists()
