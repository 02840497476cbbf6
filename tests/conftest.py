"""What every test shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, on one thread: two workers share the machine."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
