"""Each extra by itself: its commands work, and what it lacks is named with the extra that brings it."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from entropy_gpt.conversion.errors import find_extras, missing_package

from .extras import PROJECT, link_extra
from .wheel import ROOT, build_wheel


MODELS = ROOT / "model_cards" / "models"
SMALL = "n_layer=1 n_head=2 n_embd=32 n_positions=64 context=64 tokenizer_vocab_size=300"
SHORT = "max_steps=2 save_steps=2 eval_steps=2 logging_steps=1 validation_tokens=512 use_cpu=true"
TRAIN = (*SMALL.split(), *SHORT.split(), "dataset=texts", "data_cache=cache", "output_dir=run")
EVALUATE = ("evaluate", MODELS / "sm-ln-g", "--text", "texts", "--max-tokens", "300", "--head-tokens", "128")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with some text, in which commands run."""
    folder = tmp_path_factory.mktemp("extras")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def enter(wheel, folder):
    """Runs the command, or another, in an environment with one extra."""
    commands = {}

    def enter(extra, *words, name="entropy-gpt") -> subprocess.CompletedProcess:
        if extra not in commands:
            commands[extra] = link_extra(folder / f"environment_{extra}", wheel, *([extra] if extra else []))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        environment.pop("PYTHONPATH", None)
        command = [commands[extra] / name, *map(str, words)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return enter


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "words", "said"),
    [
        ("", ("private", "cost", "SM+ScFuFFN", "--n-layer", "1"), "exponential"),
        ("train", ("train", "python-stdlib-small", *TRAIN), "no pictures, since matplotlib is not installed"),
        ("eval", (*EVALUATE, "--output", "out"), "all numbers: "),
        ("eval", ("diagnose", MODELS / "sm-ln-g", "def", "-o", "attention"), "attention/entropies.png"),
        ("tasks", ("evaluate", "--tasks", "list", MODELS / "sm-ln-g"), "local_blimp"),
        ("onnx", ("export", MODELS / "sm-ln-g", "--onnx", "--output", "exported"), "Not linear in the graph"),
        pytest.param(
            *("private", ("private", "demo", MODELS / "converted", "--prompt", "def", "--max-new-tokens", "1")),
            "in the clear",
            marks=pytest.mark.private,
        ),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, tuple) else None,
)
def test_an_extra_is_enough_for_its_commands(extra, words, said, enter):
    if extra == "private":
        pytest.importorskip("spu")
    process = enter(extra, *words)
    assert process.returncode == 0, process.stderr
    assert said in process.stdout


# Words, packages of which one is missing, and extras of which one is named.
WITHOUT = [
    (("train", "python-stdlib-small", *TRAIN), "datasets|accelerate|peft", "train"),
    (("convert", MODELS / "sm-ln-g", "--to", "SM+G", "--output", "simpler"), "datasets|pyarrow", "train"),
    (EVALUATE, "datasets|matplotlib|pyarrow", "eval"),
    (("diagnose", MODELS / "sm-ln-g", "def"), "matplotlib", "eval"),
    (("evaluate", MODELS / "sm-ln-g", "--tasks", "list"), "lm_eval|datasets|pyarrow", "tasks|eval"),
    (("export", MODELS / "sm-ln-g", "--onnx", "--output", "graph"), "onnx", "onnx"),
    (("private", "demo", MODELS / "converted", "--prompt", "def"), "jax|spu", "private"),
]
# Runs commands in forks, each of which has what is imported for most of them, and leaves its errors in a file.
SEVERAL = """
import json, os, sys
import torch, transformers
from entropy_gpt.commands.main import main

for number, words in enumerate(json.loads(sys.argv[1])):
    if os.fork() == 0:
        status = 99
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(f"error{number}", os.O_WRONLY | os.O_CREAT), 2)
            sys.argv = ["entropy-gpt", *words]
            status = main()
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def refusals(enter, folder) -> dict[tuple, tuple[int, str]]:
    """Status and errors of all that needs an extra, where there is none."""
    told = json.dumps([list(map(str, words)) for words, *_ in WITHOUT])
    process = enter("", "-c", SEVERAL, told, name="python")
    errors = [(folder / f"error{number}").read_text(encoding="utf-8") for number in range(len(WITHOUT))]
    statuses = map(int, process.stdout.split())
    return {words: each for (words, *_), *each in zip(WITHOUT, statuses, errors, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "package", "extra"),
    WITHOUT,
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, tuple) else "",
)
def test_without_extras_each_command_names_the_one_that_it_needs(words, package, extra, refusals):
    status, error = refusals[words]
    assert status == 1
    (line,) = error.splitlines()
    assert any(name in line for name in package.split("|")), line
    assert any(f"pip install 'entropy-gpt[{name}]'" in line for name in extra.split("|")), line


def test_every_package_of_an_extra_is_traced_to_it():
    for extra in ("train", "tensorboard", "eval", "onnx"):
        for requirement in PROJECT["optional-dependencies"][extra]:
            module = requirement.partition(">")[0].partition("<")[0].replace("-", "_")
            assert extra in find_extras(module), requirement
    assert find_extras("lm_eval") == ["tasks"]
    assert find_extras("torch") == []


def test_the_likely_extra_is_named_where_several_bring_a_package():
    missing = ModuleNotFoundError("", name="datasets.arrow")
    assert missing_package("this", missing, "eval").endswith("pip install 'entropy-gpt[eval]'.")
    assert missing_package("this", missing).endswith("pip install 'entropy-gpt[train]'.")
    assert missing_package("this", missing, "onnx").endswith("pip install 'entropy-gpt[train]'.")
    unknown = ModuleNotFoundError("", name="nothing")
    assert missing_package("this", unknown).endswith("pip install 'entropy-gpt[all]'.")


def test_the_engine_is_left_out_where_it_has_no_release():
    private = PROJECT["optional-dependencies"]["private"]
    everywhere = [line for line in private if not line.endswith("; python_version < '3.12'")]
    assert [re.split("[<>=]", line)[0] for line in everywhere] == ["cryptography"]  # certificates need no engine
    assert not any(line.startswith(("datasets", "pyarrow", "matplotlib")) for line in private)
