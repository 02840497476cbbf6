"""What a run is said to take before it begins."""

import pytest
import torch

from entropy_gpt.training import estimate as module
from entropy_gpt.training.recipe import read_recipe
from entropy_gpt.training.start import find_start


@pytest.fixture(autouse=True)
def known_speed(monkeypatch):
    monkeypatch.setattr(module, "measure_speed", lambda device, dtype: 1e12)


def estimated(**settings):
    recipe = read_recipe("python-stdlib-small", {"use_cpu": True, **settings})
    return module.estimate(recipe, find_start(recipe))


def test_weights_and_optimizer_are_counted():
    """The model of the recipe: 4 layers of width 128, 1,024 tokens, 128 positions."""
    found = estimated(notation="SM+LN+G", max_steps=100)
    weights = 1024 * 128 + 128 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128
    assert found.model == 4 * weights
    assert found.checkpoint == 12 * weights
    assert found.memory > 16 * weights
    tokens = 100 * 8 * 128
    assert found.seconds == pytest.approx(tokens * (6 * weights + 6 * 4 * 128 * 128) / 1e12)


def test_what_an_architecture_lacks_takes_nothing():
    whole, fused = estimated(notation="SM+LN+G"), estimated(notation="SM+ScFuFFN")
    assert fused.memory < whole.memory
    assert fused.seconds < whole.seconds
    assert estimated(max_steps=-1).seconds is None
    assert estimated(per_device_train_batch_size=80).memory > 5 * estimated().memory


def test_a_probe_is_short_and_plausible(monkeypatch):
    monkeypatch.undo()
    assert 1e8 < module.measure_speed(torch.device("cpu"), torch.float32) < 1e14
