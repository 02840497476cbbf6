"""What every test shares."""

import os

import pytest
import torch

from .hub_server import HubServer


def pytest_configure():
    """One thread for the processes that tests start: two workers share the machine."""
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, on one thread too."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def hub():
    """A Hub of our own, empty."""
    with HubServer() as server:
        yield server
