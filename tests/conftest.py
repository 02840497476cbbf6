"""What every test shares."""

import atexit
import gc
import importlib.metadata
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings

from .dots import save_dots
from .hub_server import HubServer


TESTS = Path(__file__).parent
SLOW_FILE = re.compile(r"^pytestmark = .*mark\.slow\b", re.MULTILINE)
# Files that take longest. They are begun first, or one of them would keep a worker busy when the others have ended.
LONG = (
    "entropy_gpt/test_quickstart.py",
    "test_documentation.py",
    "entropy_gpt/test_study.py",
    "evaluation/private_inference/test_server_and_client.py",
    "test_extras.py",
    "conversion/test_onnx_export.py",
    "entropy_gpt/test_push.py",
    "entropy_gpt/test_private.py",
    "modeling_entropy_gpt/test_modeling.py",
    "modeling_entropy_gpt/test_training.py",
    "evaluation/private_inference/test_fixed_point.py",
    "modeling_entropy_gpt/test_triton_attention.py",
    "evaluation/private_inference/test_round_trips.py",
    "evaluation/private_inference/test_detection.py",
    "compatibility/test_trl.py",
    "entropy_gpt/test_report.py",
    "conversion/test_simplification.py",
    "training/test_preparation.py",
    "entropy_gpt/test_train.py",
    "entropy_gpt/test_convert.py",
    "evaluation/private_inference/test_local.py",
    "training/test_healing.py",
    "training/test_trainer.py",
    "test_wheel.py",
    "entropy_gpt/test_evaluate.py",
    "conversion/test_gpt2_checkpoint.py",
    "compatibility/test_peft.py",
)


# A change is judged by the same examples on every machine; `--hypothesis-profile=explore` looks for others.
settings.register_profile("same", derandomize=True, deadline=None, max_examples=30)
settings.register_profile("whole", derandomize=True, deadline=None, max_examples=150)
settings.register_profile("explore", deadline=None, max_examples=1_000)
settings.load_profile("same")


def pytest_addoption(parser):
    parser.addoption(
        "--record-comparisons",
        type=Path,
        metavar="FILE",
        help="append what is compared with tools, as JSON lines",
    )


def pytest_configure():
    """One thread, here and in the processes that tests start: two workers share the machine."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_ignore_collect(collection_path, config):
    """Files of slow tests alone are not imported where those are left out."""
    if config.option.markexpr.startswith("not slow") and collection_path.suffix == ".py":
        return bool(SLOW_FILE.search(collection_path.read_text(encoding="utf-8"))) or None
    return None


def pytest_collectstart(collector):
    """What a file makes when it is imported is the same whatever other files are collected."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    places = {TESTS / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path, len(LONG)))


def pytest_collection_finish():
    """Every training collects garbage; what was imported is none, and going through it takes longer than the steps."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # extensions complain of what is left at the end


@pytest.fixture(autouse=True)
def fresh_start():
    """Every test starts from the same random numbers, on one thread too, and what ends a process ends this one."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():  # `entropy-gpt private` sets its own
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def fresh_accelerator():
    """accelerate knows nothing of earlier tests, and later ones nothing of this test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are dots."""
    save_dots(monkeypatch)


@pytest.fixture
def hub():
    """A Hub of our own, empty."""
    with HubServer() as server:
        yield server


@pytest.fixture
def compared(request):
    """
    A function that a test of another tool calls at its end, with what it compared and what came of it; the row is
    recorded where `--record-comparisons` asks for it.
    """
    path = request.config.getoption("--record-comparisons")

    def record(tool: str, what: str, result: str, version: str | None = None):
        row = {
            "tool": tool,
            "version": version or importlib.metadata.version(tool),
            "compared": what,
            "result": result,
            "test": request.node.nodeid,
        }
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    return record
