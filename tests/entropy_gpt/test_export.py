"""`entropy-gpt export`: what it leaves, what it says, and how it fails."""

import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from transformers.utils import logging

from entropy_gpt.commands.main import main
from entropy_gpt.conversion.onnx_export import REPORT, run_graph
from entropy_gpt.training.tokenizer import train_tokenizer
from entropy_gpt.workflows import export as export_job
from tests.architectures import make_model, make_tokens
from tests.hub_server import USER

from .outcome import Outcome


COMMAND = Path(sys.executable).with_name("entropy-gpt")
VOCABULARY, WTE = 300, "transformer.wte.weight"
# The command in a process that has the extra `onnx` alone.
WITHOUT_OTHER_EXTRAS = """
import sys

extras = "accelerate datasets evaluate lm_eval matplotlib peft pyarrow tensorboard"
sys.modules.update(dict.fromkeys(extras.split()))
from entropy_gpt.commands.main import main
sys.exit(main())
"""


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


@pytest.fixture(scope="module")
def bare(source, tmp_path_factory):
    """The same without its tokenizer, and in half precision."""
    folder = tmp_path_factory.mktemp("bare")
    copy_weights(source, folder, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    return folder


@pytest.fixture
def broken(source, tmp_path):
    """The same with weights that no logits come of."""
    (tmp_path / "broken").mkdir()
    copy_weights(source, tmp_path / "broken", lambda tensors: tensors | {WTE: torch.full_like(tensors[WTE], 1e30)})
    return tmp_path / "broken"


def copy_weights(source, folder, change):
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(change(load_file(source / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def run(*arguments) -> Outcome:
    """The command in this process, which has imported all that it needs."""
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(StringIO()) as output,
        redirect_stderr(StringIO()) as error,
    ):
        patch.setattr(sys, "argv", ["entropy-gpt", "export", *map(str, arguments)])
        status = main()
    logging.enable_progress_bar()
    return Outcome(status, output.getvalue(), error.getvalue())


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """What the tests that are always run share; its path would be markup."""
    output = tmp_path_factory.mktemp("exported") / "a[" / "b]"
    return output, run(source, "--onnx", "--cache", "--output", output).succeeded()


def read_all(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_graph_its_tokenizer_and_its_report(exported, model, source):
    output, outcome = exported
    *_, notation, nonlinear, products, difference, place = outcome.output.splitlines()
    assert notation.startswith("SM+ScFuFFN, folded: SM+FuFFN, ")
    assert nonlinear == "Not linear in the graph: 2 Softmax; nothing else"
    assert products == "Products of two secret tensors: 4 MatMul"
    assert difference.endswith(" of the largest logit.")
    assert place == f"The graph: {output}"
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    told = json.loads((output / REPORT).read_text())
    assert told["files"].keys() >= {"model.onnx", "config.json", "generation_config.json", "tokenizer.json"}
    for name in (*told["files"], *told["operators"]):
        assert name in outcome.output
    words = "def main(argument):\n    return 'ä'"
    ids, expected = (AutoTokenizer.from_pretrained(folder)(words).input_ids for folder in (output, source))
    assert ids == expected

    sequences = [make_tokens(1, 11), make_tokens(1, 5)]
    found = run_graph(onnxruntime.InferenceSession(output / "model.onnx"), sequences, steps=3)
    with torch.no_grad():
        expected = torch.cat([model(tokens).logits[0] for tokens in sequences])
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_earlier_export_is_replaced_only_when_told(exported, source):
    output, _ = exported
    before = read_all(output)
    refused = run(source, "--onnx", "--output", output).complaint
    assert refused == f"{output} holds an earlier export: give another --output, or --overwrite."
    (output / "notes.txt").write_text("mine")
    refused = run(source, "--onnx", "--output", output, "--overwrite").complaint
    assert refused == f"--overwrite would delete {output / 'notes.txt'}, which no export wrote: move it elsewhere."
    (output / "notes.txt").unlink()
    assert read_all(output) == before
    assert "holds no export" in run(source, "--onnx", "--output", source).complaint


def test_a_failure_leaves_an_earlier_export_as_it_was(exported, broken):
    output, _ = exported
    before = read_all(output)
    assert "logits are not finite" in run(broken, "--onnx", "--output", output, "--overwrite").complaint
    assert read_all(output) == before
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_what_an_export_did_not_write_is_not_deleted(source, tmp_path):
    report, graph = tmp_path / REPORT, tmp_path / "model.onnx"
    graph.mkdir()
    (graph / "notes.txt").write_text("mine")
    report.write_text('{"files": {"model.onnx": 1}}')
    refused = run(source, "--onnx", "--output", tmp_path, "--overwrite").complaint
    assert refused == f"--overwrite would delete {graph}, which no export wrote: move it elsewhere."
    for damaged in ('{"files": ["model.onnx"]}', '{"files": "model.onnx"}', "[]", "{}", "{"):
        report.write_text(damaged)
        assert "is damaged" in run(source, "--onnx", "--output", tmp_path, "--overwrite").complaint
    assert (graph / "notes.txt").exists()


@pytest.mark.slow
def test_overwriting_and_trying(source, bare, tmp_path):
    output = tmp_path / "graph"
    tried = run(bare, "--onnx", "--output", output, "--dry-run").succeeded()
    assert "2 Softmax; nothing else" in tried.output
    assert tried.output.endswith("Nothing was kept.\n")
    assert not output.exists()

    first = run(bare, "--onnx", "--output", output).succeeded()
    assert f"{bare} has no tokenizer, so the export has none" in first.output
    assert not (output / "tokenizer.json").exists()
    run(bare, "--onnx", "--output", output, "--tokenizer", source, "--overwrite", "--cache").succeeded()
    assert (output / "tokenizer.json").exists()
    assert "present.1.value" in json.loads((output / REPORT).read_text())["outputs"]


@pytest.mark.slow
def test_a_process_of_its_own_with_the_extra_onnx_alone(source, tmp_path):
    command = [sys.executable, "-c", WITHOUT_OTHER_EXTRAS, "export", source, "--onnx", "--output", tmp_path / "graph"]
    process = subprocess.run(command, capture_output=True, text=True)
    Outcome(process.returncode, process.stdout, process.stderr).succeeded()
    assert "tokenizer.json" in json.loads((tmp_path / "graph" / REPORT).read_text())["files"]


@pytest.mark.slow
def test_a_repository_of_the_hub_without_a_tokenizer(bare, hub, tmp_path):
    repository = f"{USER}/bare"
    hub.put_folder(repository, bare)
    command = [COMMAND, "export", repository, "--onnx", "--dry-run"]
    process = subprocess.run(command, capture_output=True, text=True, env=hub.environment(tmp_path / "home"))
    outcome = Outcome(process.returncode, process.stdout, process.stderr).succeeded()
    assert f"{repository} has no tokenizer, so the export has none" in outcome.output


def test_a_failure_leaves_nothing_behind(broken, tmp_path):
    assert "logits are not finite" in run(broken, "--onnx", "--output", tmp_path / "new" / "deeper" / "out").complaint
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_interrupted_export_does_not_promise_to_go_on(source, tmp_path, monkeypatch):
    def interrupt(source):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_job, "load_language_model", interrupt)
    outcome = run(source, "--onnx", "--output", tmp_path / "graph")
    assert (outcome.status, outcome.error) == (130, "entropy-gpt: interrupted.\n")


def test_wrong_usage(source, tmp_path):
    missing = run(source)
    assert (missing.status, missing.output) == (2, "")
    assert "--onnx" in missing.error
    assert "holds no config.json" in run(tmp_path, "--onnx", "--output", tmp_path / "graph").complaint
    (tmp_path / "file").touch()
    refused = run(source, "--onnx", "--output", tmp_path / "file" / "graph").complaint
    assert f"{tmp_path / 'file'} is not a writable folder" in refused
    root = run(source, "--onnx", "--output", "/", "--overwrite").complaint
    assert root.startswith(("/ exists and holds no export", "--output /: / is not a writable folder"))
    assert "Example: entropy-gpt export" in run("--help").output
