"""`import entropy_gpt`: what the import costs, and workflows from Python compared with the commands."""

import ast
import dataclasses
import inspect
import json
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

import entropy_gpt
from entropy_gpt.commands.card import card as card_command
from entropy_gpt.commands.convert import convert as convert_command
from entropy_gpt.commands.evaluate import evaluate as evaluate_command
from entropy_gpt.commands.export import export as export_command
from entropy_gpt.commands.main import main
from entropy_gpt.commands.push import push as push_command
from entropy_gpt.conversion.onnx_export import REPORT as EXPORT_REPORT
from entropy_gpt.evaluation.records.conversion_report import ConversionReport
from entropy_gpt.training.library_bars import library_bars_hidden
from entropy_gpt.training.tokenizer import train_tokenizer
from entropy_gpt.workflows.convert_inputs import ConversionOptions
from entropy_gpt.workflows.evaluate_inputs import EvaluationOptions
from entropy_gpt.workflows.publish import PublicationOptions, write_card


WORKFLOWS = Path(__file__).parents[2] / "entropy_gpt" / "workflows"
CONVERSION = {"to": "EReg(SM(t)+ScFuFFN)", "context": 32, "calibration_tokens": 8192, "evaluation_tokens": 2048}
TINY = """notation: SM+R
n_layer: 1
n_head: 1
n_embd: 16
context: 16
tokenizer_vocab_size: 300
validation_tokens: 512
per_device_train_batch_size: 4
max_steps: 3
save_steps: 3
logging_steps: 1
entropy_logging_steps: 1
use_cpu: true
"""


class Recorder:
    """Remembers the stages of a workflow, and how far each came."""

    def __init__(self):
        self.stages: dict[str, list] = {}

    @contextmanager
    def stage(self, description, total=None):
        seen = self.stages.setdefault(description, [])
        yield RecordedStage(seen)
        seen.append("ended")


@dataclasses.dataclass
class RecordedStage:
    seen: list

    def say(self, status):
        self.seen.append(status)

    def advance(self, count=1):
        self.seen.append(count)

    def reach(self, completed, total=None):
        self.seen.append((completed, total))


@pytest.fixture(scope="module")
def source(text, tmp_path_factory):
    """A tiny GPT-2 with its tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source")
    tokenizer = train_tokenizer((path.read_text() for path in sorted(text.iterdir())), 300)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 1, "n_positions": 32, "vocab_size": len(tokenizer)}
    tokens = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**sizes, **tokens)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(text, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{TINY}dataset: {text}\ndata_cache: {tmp_path / 'cache'}\n")
    return path


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs a command in this process, and forgets what it printed."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["entropy-gpt", *map(str, words)])
        status = main()
        printed = capfd.readouterr()
        assert status == 0, printed.err
        assert printed.out

    return run


@pytest.fixture
def silence(capfd):
    """Nothing was printed, and the progress bars of libraries are as they were."""
    logging.enable_progress_bar()
    datasets.enable_progress_bars()
    yield
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "it/s" not in printed.err
    assert logging.is_progress_bar_enabled()
    assert not datasets.are_progress_bars_disabled()


def assert_same_weights(folder, expected):
    weights, expected = (load_file(place / "model.safetensors") for place in (folder, expected))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_importing_costs_nothing():
    """Nor do the names, and the error that one catches."""
    code = (
        "import json, sys, entropy_gpt; names = dir(entropy_gpt); entropy_gpt.UserError;"
        "heavy = {'torch', 'transformers', 'datasets', 'rich', 'typer', 'pydantic'} & {*sys.modules};"
        "print(json.dumps([names, sorted(heavy)]))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, heavy = json.loads(process.stdout)
    assert heavy == []
    assert {*names} >= {"PrivateModel", "UserError", "convert", "evaluate", "export", "publish", "report", "train"}


def test_the_command_starts_without_heavy_libraries():
    code = "import sys, entropy_gpt.commands.main; print({'torch', 'transformers', 'datasets'} & {*sys.modules})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "set()\n"


@pytest.mark.parametrize("name", entropy_gpt.__all__)
def test_every_name_is_there_and_documented(name):
    found = getattr(entropy_gpt, name)
    assert found.__name__ == name
    assert found.__doc__
    if inspect.isfunction(found):
        assert all(section in found.__doc__ for section in ("Args:", "Returns:", "Raises:", "Example:"))
        assert "progress" in inspect.signature(found).parameters or name == "diagnose_text"  # one forward pass


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        entropy_gpt.evalute  # noqa: B018


@pytest.mark.parametrize(
    ("workflow", "command", "of_the_command", "other_defaults"),
    [
        (entropy_gpt.convert, convert_command, {"dry_run"}, set()),
        (entropy_gpt.export, export_command, {"onnx"}, set()),
        (
            entropy_gpt.evaluate,
            evaluate_command,
            {"dry_run"},
            {"output"},
        ),  # from Python, nothing is written by default
        (entropy_gpt.publish, push_command, set(), {"results"}),
        (write_card, card_command, set(), {"results"}),
    ],
)
def test_arguments_are_the_options_of_the_command(workflow, command, of_the_command, other_defaults):
    arguments, options = (dict(inspect.signature(function).parameters) for function in (workflow, command))
    assert arguments.keys() - {"progress"} == options.keys() - of_the_command
    for name in arguments.keys() & options.keys() - other_defaults:
        assert str(arguments[name].default) == str(options[name].default), name


@pytest.mark.parametrize(
    ("workflow", "options"),
    [
        (entropy_gpt.convert, ConversionOptions),
        (entropy_gpt.evaluate, EvaluationOptions),
        (entropy_gpt.publish, PublicationOptions),
    ],
)
def test_options_have_one_default(workflow, options):
    arguments = inspect.signature(workflow).parameters
    fields = {field.name: field for field in dataclasses.fields(options)}
    assert fields.keys() <= arguments.keys()
    for name, field in fields.items():
        if field.default is not dataclasses.MISSING:
            assert arguments[name].default == field.default, name


def test_a_conversion_is_that_of_the_command(source, text, tmp_path, command, undrawn):
    words = [word for name, value in CONVERSION.items() for word in (f"--{name.replace('_', '-')}", value)]
    healing = ("--heal-steps", 2, "--distill", "--set", "resid_pdrop=0")
    command("convert", source, "--text", text, "--output", tmp_path / "command", *words, *healing)
    expected = ConversionReport.load(tmp_path / "command" / "conversion_report.json")
    recorder = Recorder()
    report = entropy_gpt.convert(
        source,
        **CONVERSION,
        text=text,
        output=tmp_path / "python",
        heal_steps=2,
        distill=True,
        settings={"resid_pdrop": 0},
        progress=recorder,
    )
    assert [(step.title, step.kl, step.nats) for step in report.steps] == [
        (step.title, step.kl, step.nats) for step in expected.steps
    ]
    assert ConversionReport.load(tmp_path / "python" / "conversion_report.json").steps == report.steps
    assert_same_weights(tmp_path / "python", tmp_path / "command")
    names = {path.name for path in (tmp_path / "command").iterdir()}
    assert {path.name for path in (tmp_path / "python").iterdir()} == names
    assert (2, 2) in recorder.stages["healing"] and recorder.stages["healing"][-1] == "ended"
    assert [*recorder.stages][:3] == ["loading the model", "reading the text", "tokenising"]


def test_a_conversion_prints_nothing(source, text, tmp_path, silence):
    settings = {**CONVERSION, "to": "SM+LN+R"}
    assert entropy_gpt.convert(str(source), **settings, text=text, output=tmp_path / "model").healing is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 1}, "--context 1: "),
        ({"context": 33}, "--context 33: the model has 32 positions"),
        ({"heal_steps": "many"}, "--heal-steps many: "),
        ({"learning_rate": math.nan}, "--learning-rate nan: "),
        ({"schedule": "spiral"}, "--schedule spiral: .*'staircase'"),
        ({"final_norm": "batch"}, "--final-norm batch: "),
        ({"seed": -1}, "--seed -1: "),
        ({"settings": {"n_layer": 3}}, "--set n_layer=3: only resid_pdrop"),
        ({"distill": True}, "--distill has no effect without --heal-steps"),
        ({"distill": True}, "In Python, --distill is distill, --heal-steps is heal_steps."),
        ({"settings": {"n_layer": 3}}, "--set is settings"),
        ({"to": "SM+ScFuFN"}, "'ScFuFFN'"),
        ({"text": "/nowhere"}, "There is no /nowhere"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_of_a_conversion_are_named(arguments, message, source, text, tmp_path):
    output = tmp_path / "new" / "model"
    with pytest.raises(entropy_gpt.UserError, match=message):
        entropy_gpt.convert(source, **{**CONVERSION, "text": text, "output": output, **arguments})
    assert not output.parent.exists()


def test_a_training_run_is_that_of_the_command(recipe, tmp_path, command, fresh_accelerator, undrawn):
    command("train", recipe, f"output_dir={tmp_path / 'command'}", "learning_rate=1e-2", "lr_scheduler_type=linear")
    recorder = Recorder()
    run = entropy_gpt.train(
        recipe, output_dir=tmp_path / "python", learning_rate=1e-2, lr_scheduler_type="linear", progress=recorder
    )
    assert run.folder == tmp_path / "python"
    assert run.divergence is None
    assert_same_weights(run.model, tmp_path / "command" / "model")
    assert run.log.last_step == 3
    assert run.result.training.steps == 3
    assert recorder.stages["training SM+R"][-1] == "ended"
    assert (3, 3) in recorder.stages["training SM+R"]
    pictures = {path.name for path in (tmp_path / "command" / "pictures").iterdir()}
    assert {path.name for path in (run.folder / "pictures").iterdir()} == pictures
    assert {drawing.path.name for drawing in run.drawings if drawing.runs} == pictures

    again = entropy_gpt.train(recipe, output_dir=run.folder, learning_rate=1e-2, lr_scheduler_type="linear")
    assert again.result == run.result


def test_a_run_that_diverges_is_a_result_and_prints_nothing(recipe, tmp_path, silence, fresh_accelerator, undrawn):
    settings = {"notation": "SM", "final_normalization": "none", "learning_rate": 1e6, "max_grad_norm": 0}
    run = entropy_gpt.train(str(recipe), output_dir=tmp_path / "run", max_steps=12, **settings)
    assert (run.result, run.model) == (None, None)
    assert run.divergence.action == "stop"
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lerning_rate": 1}, "did you mean 'learning_rate'?"),
        ({"n_head": 3}, "n_head=3 does not divide n_embd=16"),
        ({"learning_rate": [1, 2]}, r"learning_rate=\[1, 2\] is a list"),
        ({"n_layer": {1, 2}}, r"n_layer=\{1, 2\}: a setting is text"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_settings_of_a_run_are_named(settings, message, recipe, tmp_path):
    with pytest.raises(entropy_gpt.UserError, match=message):
        entropy_gpt.train(recipe, output_dir=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_export_is_that_of_the_command(source, tmp_path, command, capfd):
    command("export", source, "--onnx", "--cache", "--output", tmp_path / "command")
    recorder = Recorder()
    report = entropy_gpt.export(source, output=tmp_path / "python", cached=True, progress=recorder)
    assert capfd.readouterr().out == ""
    assert [*recorder.stages] == ["loading the model", "exporting and checking the graph"]
    reports = [json.loads((tmp_path / place / EXPORT_REPORT).read_text()) for place in ("command", "python")]
    assert reports[0] == reports[1]
    assert (report.nonlinear, report.notation) == (reports[0]["nonlinear"], "SM+LN+G")
    with pytest.raises(entropy_gpt.UserError, match="holds an earlier export"):
        entropy_gpt.export(source, output=tmp_path / "python")


def test_a_model_that_is_not_there_can_not_be_exported(tmp_path):
    with pytest.raises(entropy_gpt.UserError, match="nowhere"):
        entropy_gpt.export(tmp_path / "nowhere", output=tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.py")), ids=lambda path: path.name)
def test_workflows_have_no_console(path):
    """Nor do they import rooms that have: tests/test_layout.py."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"
        assert not {"rich", "typer"} & {name.partition(".")[0] for name in names}


def test_a_missing_package_is_named_with_the_remedy(tmp_path):
    code = (
        "import sys, entropy_gpt; sys.modules['onnxruntime'] = None\n"
        "try: entropy_gpt.export\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    process = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == (
        "entropy_gpt.export needs onnxruntime, which is not installed: pip install 'entropy-gpt[onnx]'.\n"
    )


@pytest.mark.parametrize("transformers_shown", [True, False])
@pytest.mark.parametrize("hub_shown", [True, False])
def test_the_bars_of_libraries_are_as_before(transformers_shown, hub_shown):
    """Those of transformers and of the Hub each, although transformers changes both."""

    def shown():
        return logging.is_progress_bar_enabled(), not are_progress_bars_disabled()

    before = shown()
    try:
        (logging.enable_progress_bar if transformers_shown else logging.disable_progress_bar)()
        (enable_progress_bars if hub_shown else disable_progress_bars)()
        with library_bars_hidden():
            assert shown() == (False, False)
        assert shown() == (transformers_shown, hub_shown)
    finally:
        (logging.enable_progress_bar if before[0] else logging.disable_progress_bar)()
        (enable_progress_bars if before[1] else disable_progress_bars)()
