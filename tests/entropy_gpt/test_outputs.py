"""Outputs of all commands: refused before the work, filled where they are, and continued after an interruption."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from entropy_gpt.commands import main as main_module
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.tokenizer_files import save_tokenizer
from entropy_gpt.training.claims import GOES_ON, claimed
from entropy_gpt.training.files import put_in_place
from entropy_gpt.training.recipe_file import read_settings
from entropy_gpt.training.tokenizer import train_tokenizer
from entropy_gpt.workflows.convert_inputs import ConversionOptions
from entropy_gpt.workflows.evaluate_inputs import EvaluationOptions
from entropy_gpt.workflows.options import read_options
from entropy_gpt.workflows.output_folder import CONVERSION, EXPORT, QUICKSTART
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from ..disks import mount, small_disk
from .forks import run_command


COMMAND = Path(sys.executable).with_name("entropy-gpt")
# Commands with an output that can't be written, since a part of its path is a file.
UNWRITABLE = (
    "convert gpt2 --to SM+LN+G --output file/x",
    "train python-stdlib-small output_dir=file/x",
    "evaluate gpt2 --output file",
    "report gpt2 -o file/report.html",
    "export gpt2 --onnx --output file/x",
    "plot folder --output file/x",
    "quickstart --output file",
    "study --output file/x",
    "private demo gpt2 -o file/costs.json",
    "private demo gpt2 --results folder",
    "private ask text --connect localhost:1 --tokenizer gpt2 -o file/costs.json",
    "private benchmark -o file/x",
)
ALL_IN_ONE_PROCESS = """
import sys
from entropy_gpt.commands.main import main

for line in sys.stdin:
    sys.argv = ["entropy-gpt", *line.split()]
    print(main(), "torch" in sys.modules)
"""
# What a conversion of a tiny model takes.
FEW = ("--calibration-tokens", "2048", "--evaluation-tokens", "512")


def test_an_unwritable_output_is_refused_before_any_import(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    process = subprocess.run(
        [sys.executable, "-c", ALL_IN_ONE_PROCESS],
        input="\n".join(UNWRITABLE),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout.splitlines() == ["1 False"] * len(UNWRITABLE), process.stderr
    for command, line in zip(UNWRITABLE, process.stderr.splitlines(), strict=True):
        assert line.startswith("entropy-gpt: ") and command.split()[-1].rpartition("=")[2] in line
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_an_output_of_something_else_and_one_in_use_are_refused_before_any_import(tmp_path):
    (tmp_path / "notes.txt").touch()
    words = ["convert gpt2 --to SM --output .", "export gpt2 --onnx --output .", "quickstart --output ."]
    words += ["evaluate gpt2 --output .", "private benchmark -o .", "train python-stdlib-small output_dir=run"]
    with claimed(tmp_path / "run"):
        process = subprocess.run(
            [sys.executable, "-c", ALL_IN_ONE_PROCESS], input="\n".join(words), capture_output=True, text=True,
            cwd=tmp_path,
        )  # fmt: skip
    assert process.stdout.splitlines() == ["1 False"] * len(words)
    *others, in_use = process.stderr.splitlines()
    assert all("exists and holds no" in line and "give another --output" in line for line in others)
    assert f"Another command is at work in run: process {os.getpid()}, since" in in_use


@pytest.mark.parametrize("kind", [CONVERSION, EXPORT])
def test_what_a_begun_move_has_left_is_no_foreign_folder(kind, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "config.json").touch()
    with pytest.raises(UserError, match=f"holds no {kind.name}"):
        kind.is_replaced_in(output, overwrite=True)
    content = kind.content(output)
    content.with_name("whole-moving").mkdir(parents=True)
    assert kind.is_replaced_in(output, overwrite=False)
    (output / kind.record).touch()
    with pytest.raises(UserError, match="or --overwrite"):
        kind.is_replaced_in(output, overwrite=False)


def test_a_disk_s_own_folder_does_not_count(tmp_path):
    (tmp_path / "lost+found").mkdir()
    assert not QUICKSTART.is_in(tmp_path)


def test_a_home_folder_is_found_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("texts", "tokenizer", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "recipe.yaml").write_text("dataset: ~/texts\ntokenizer: ~/tokenizer\nnotation: SM\n")
    settings = read_settings(
        "~/recipe.yaml", {"output_dir": "~/run", "model_name_or_path": Path("~/model").as_posix(), "run_name": "~"}
    )
    assert settings == {
        **{"dataset": f"{tmp_path}/texts", "tokenizer": f"{tmp_path}/tokenizer", "notation": "SM"},
        **{"output_dir": f"{tmp_path}/run", "model_name_or_path": f"{tmp_path}/model", "run_name": "~"},
    }
    paths = {"text": "~/texts", "calibration": "~/kept", "output": Path("~/out"), "tokenizer": "~/tokenizer"}
    options = read_options(ConversionOptions, source="~/gpt2", to="SM", **paths)
    assert {str(getattr(options, name)) for name in (*paths, "source")} == {
        str(tmp_path / name) for name in ("texts", "kept", "out", "tokenizer", "gpt2")
    }
    options = read_options(EvaluationOptions, models=("~/a", Path("~/b"), "gpt2"), text="~/texts", task_data="~/tasks")
    assert options.models == (f"{tmp_path}/a", f"{tmp_path}/b", "gpt2")
    assert (options.text, str(options.task_data)) == (f"{tmp_path}/texts", f"{tmp_path}/tasks")


def test_arguments_that_are_no_text_are_refused_in_one_line():
    for words in (["convert", b"br\xff", "--to", "SM"], ["private", "ask", b"\xff", "--connect", "a:1"]):
        process = subprocess.run([COMMAND, *words], capture_output=True, text=True)
        (line,) = process.stderr.splitlines()
        assert process.returncode == 1 and "is not in UTF-8: give texts and names of files in UTF-8" in line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "interrupted."),
        (
            OSError(errno.ENOSPC, "No space", "/disk/cache"),
            "/disk/cache can't be written: the disk is full. Make room",
        ),
        (SafetensorError("I/O error: No space left on device (os error 28)"), " can't be written: the disk is full."),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "ulimit -f"),
    ],
)
@pytest.mark.parametrize("goes_on", [True, False])
def test_the_end_of_a_command_is_one_line(error, line, goes_on, monkeypatch, capfd):
    if hasattr(error, "__notes__"):
        del error.__notes__
    if goes_on:
        error.add_note(GOES_ON)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("entropy_gpt.terminal.report.run", fail)
    monkeypatch.setattr(sys, "argv", ["entropy-gpt", "report", ".", "-o", "report.html"])
    assert main_module.main() == (130 if isinstance(error, KeyboardInterrupt) else 1)
    (printed,) = capfd.readouterr().err.splitlines()
    assert line in printed
    assert printed.endswith(GOES_ON) == goes_on


def test_an_error_of_the_program_is_not_hidden(monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("entropy_gpt.terminal.report.run", fail)
    monkeypatch.setattr(sys, "argv", ["entropy-gpt", "report", ".", "-o", "report.html"])
    with pytest.raises(RuntimeError, match="a bug"):
        main_module.main()


@pytest.fixture(scope="module")
def source(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tokenizer = train_tokenizer([path.read_text() for path in text.glob("*.py")], 300)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    EntropyGPTForCausalLM(EntropyGPTConfig.from_notation("SM+LN+G", **sizes, **ids)).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def convert(source, text, output, *words, cwd=None):
    arguments = ("convert", source, "--to", "SM+LN+R", "--text", text, "--output", output, *FEW, *words)
    return run_command(*arguments, cwd=cwd)


@pytest.mark.slow
def test_a_conversion_fills_the_current_folder_and_goes_on_where_its_end_was_interrupted(source, text, tmp_path):
    output = tmp_path / "model"
    output.mkdir()
    first = convert(source, text, ".", cwd=output)
    assert first.returncode == 0, first.stderr
    assert {"config.json", "model.safetensors", CONVERSION.record} <= {path.name for path in output.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert "holds an earlier conversion" in convert(source, text, ".", cwd=output).stderr
    assert convert(source, text, ".", "--overwrite", cwd=output).returncode == 0


@pytest.mark.slow
def test_an_interrupted_finish_is_continued(source, text, tmp_path, monkeypatch):
    from entropy_gpt.workflows import convert as workflow

    options = {"to": "SM+LN+R", "text": text, "output": tmp_path / "model"}
    options |= {"calibration_tokens": 2048, "evaluation_tokens": 512}
    (tmp_path / "model").mkdir()
    moves = iter(range(3))

    def move_some(content, folder, last):
        replace = Path.replace

        def interrupt(self, target):
            if next(moves, None) is None:
                raise KeyboardInterrupt
            return replace(self, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", interrupt)
            put_in_place(content, folder, last)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as interrupted:
        patch.setattr(workflow, "put_in_place", move_some)
        workflow.convert(source, **options)
    assert interrupted.value.__notes__ == [GOES_ON]
    assert not (tmp_path / "model" / CONVERSION.record).exists() and list((tmp_path / "model").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "_convert", None)  # nothing is computed again
        report = workflow.convert(source, **options)
    assert report.target_notation == "SM+LN+R"
    assert EntropyGPTForCausalLM.from_pretrained(tmp_path / "model").config.notation == "SM+LN+R"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_a_conversion_onto_a_disk_that_is_too_small_goes_on_when_there_is_room(source, text, tmp_path):
    with small_disk(tmp_path / "disk", "300k") as disk:
        (disk / "lost+found").mkdir()
        full = convert(source, text, disk, "--heal-steps", "4")
        (line,) = full.stderr.splitlines()
        assert full.returncode == 1
        assert f"entropy-gpt: {disk}" in line and "can't be written: the disk is full. Make room" in line
        mount("-o", "remount,size=16m", disk)
        again = convert(source, text, disk, "--heal-steps", "4")
        assert again.returncode == 0, again.stderr
        assert "resuming earlier work" in again.stdout
        assert (disk / CONVERSION.record).exists() and (disk / "lost+found").exists()
        modes = {path.stat().st_mode & 0o777 for path in disk.iterdir() if path.is_file()}
        assert len(modes) == 1


@pytest.mark.slow
def test_training_onto_a_disk_that_is_too_small_goes_on_when_there_is_room(source, text, tmp_path):
    recipe = {"notation": "SM+LN+G", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "max_steps": 6}
    recipe |= {"dataset": str(text), "tokenizer": str(source), "save_steps": 2, "data_cache": str(tmp_path / "data")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with small_disk(tmp_path / "disk", "500k") as disk:
        words = ("train", tmp_path / "recipe.yaml", f"output_dir={disk / 'run'}")
        full = run_command(*words)
        assert full.returncode == 1, full.stderr
        line = full.stderr.splitlines()[-1]
        assert f"{disk / 'run'}" in line and "can't be written: the disk is full. Make room" in line
        assert not [path.name for path in (disk / "run").iterdir() if path.name.startswith("_unfinished")]
        mount("-o", "remount,size=16m", disk)
        again = run_command(*words)
        assert again.returncode == 0, again.stderr
        assert (disk / "run" / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_an_interrupted_run_promises_to_go_on_once_it_has_a_checkpoint(source, text, tmp_path):
    recipe = {"notation": "SM+LN+G", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "max_steps": 100_000}
    recipe |= {"dataset": str(text), "tokenizer": str(source), "data_cache": str(tmp_path / "data")}
    for save_steps, awaited, end in (
        (90_000, "training_log.jsonl", ""),
        (20, "checkpoint-*/sealed_files.json", GOES_ON),
    ):
        folder = tmp_path / f"every-{save_steps}"
        (tmp_path / "recipe.yaml").write_text(json.dumps({**recipe, "save_steps": save_steps}))
        process = subprocess.Popen(
            [COMMAND, "train", tmp_path / "recipe.yaml", f"output_dir={folder}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while process.poll() is None and not list(folder.glob(awaited)):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
        assert process.returncode == 130
        assert error.splitlines()[-1] == f"entropy-gpt: interrupted. {end}".rstrip()
