"""`entropy-gpt export`: what it leaves, what it says, and how it fails."""

import json
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils import logging

from command_line.main import main
from conversion.onnx_export import REPORT, run_graph
from tests.architectures import make_model, make_tokens
from training.tokenizer import train_tokenizer

from .outcome import Outcome


COMMAND = Path(sys.executable).with_name("entropy-gpt")
VOCABULARY = 300


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_model("SM+ScFuFFN", final_normalization="none", n_layer=2, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def source(model, text, tmp_path_factory):
    """A folder as training leaves it."""
    folder = tmp_path_factory.mktemp("source")
    model.save_pretrained(folder)
    train_tokenizer((path.read_text() for path in sorted(text.iterdir())), VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """The command in this process, which has imported all that it needs."""

    def run(*arguments) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["entropy-gpt", "export", *map(str, arguments)])
        capfd.readouterr()
        status = main()
        return Outcome(status, *capfd.readouterr())

    yield run
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """By a process of its own."""
    output = tmp_path_factory.mktemp("exported") / "graph"
    command = [COMMAND, "export", source, "--onnx", "--cache", "--output", output]
    return output, subprocess.run(command, capture_output=True, text=True)


def test_a_graph_its_tokenizer_and_its_report(exported, model):
    output, process = exported
    assert (process.returncode, process.stderr) == (0, "")
    assert "not linear in the graph: 2 Softmax; nothing else" in process.stdout
    assert "SM+ScFuFFN, folded: SM+FuFFN" in process.stdout
    assert [path.name for path in output.parent.iterdir()] == ["graph"]
    told = json.loads((output / REPORT).read_text())
    assert told["files"].keys() >= {"model.onnx", "config.json", "generation_config.json", "tokenizer.json"}
    for name in (*told["files"], *told["operators"]):
        assert name in process.stdout
    assert AutoTokenizer.from_pretrained(output)("def main").input_ids

    sequences = [make_tokens(1, 11), make_tokens(1, 5)]
    found = run_graph(onnxruntime.InferenceSession(output / "model.onnx"), sequences, steps=3)
    with torch.no_grad():
        expected = torch.cat([model(tokens).logits[0] for tokens in sequences])
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_earlier_export_is_replaced_only_when_told(exported, source, run):
    output, _ = exported
    before = (output / REPORT).read_bytes()
    refused = run(source, "--onnx", "--output", output).complaint
    assert refused == f"{output} holds an earlier export: give another --output, or --overwrite."
    (output / "notes.txt").write_text("mine")
    refused = run(source, "--onnx", "--output", output, "--overwrite").complaint
    assert refused == f"--overwrite would delete {output / 'notes.txt'}, which no export wrote: move it elsewhere."
    (output / "notes.txt").unlink()
    assert (output / REPORT).read_bytes() == before
    assert "holds no export" in run(source, "--onnx", "--output", source).complaint


@pytest.mark.slow
def test_overwriting_and_trying(source, tmp_path, run):
    # Without its tokenizer, and in half precision.
    bare, output = tmp_path / "bare", tmp_path / "graph"
    bare.mkdir()
    (bare / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, bare / "model.safetensors", {"format": "pt"})
    tried = run(bare, "--onnx", "--output", output, "--dry-run").succeeded()
    assert "2 Softmax; nothing else" in tried.output
    assert tried.output.endswith("Nothing was kept.\n")
    assert not output.exists()

    first = run(bare, "--onnx", "--output", output).succeeded()
    assert "has no tokenizer, so the export has none" in " ".join(first.output.split())
    assert not (output / "tokenizer.json").exists()
    run(bare, "--onnx", "--output", output, "--tokenizer", source, "--overwrite", "--cache").succeeded()
    assert (output / "tokenizer.json").exists()
    assert "present.1.value" in json.loads((output / REPORT).read_text())["outputs"]


def test_a_failure_leaves_nothing_behind(source, tmp_path, run):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.wte.weight"] = torch.full_like(tensors["transformer.wte.weight"], 1e30)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert "logits are not finite" in run(broken, "--onnx", "--output", tmp_path / "graph").complaint
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_wrong_usage(source, tmp_path, run):
    missing = run(source)
    assert (missing.status, missing.output) == (2, "")
    assert "--onnx" in missing.error
    assert "has no config.json" in run(tmp_path, "--onnx", "--output", tmp_path / "graph").complaint
    (tmp_path / "file").touch()
    refused = run(source, "--onnx", "--output", tmp_path / "file" / "graph").complaint
    assert f"{tmp_path / 'file'} is no folder that can be written to" in refused
    assert "Example: entropy-gpt export" in run("--help").output
