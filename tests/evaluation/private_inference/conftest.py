"""What tests of private inference share."""

from collections.abc import Iterator

import pytest

from tests.waiting import eventually

from .warm_engines import warm_engines  # noqa: F401


@pytest.fixture(scope="module")
def softmax_only() -> Iterator:
    from .serving import QUICK, make_offer, serving

    with serving(*make_offer(protocol=QUICK)) as served:
        yield served


@pytest.fixture
def served(softmax_only):
    """A server of `SM`, free again after whatever another test did to it."""
    assert eventually(lambda: not softmax_only.server.turns.active, 30)
    softmax_only.lines.clear()
    return softmax_only


@pytest.fixture
def program_config():
    from entropy_gpt.evaluation.private_inference.program.program import ProgramConfig

    from .serving import make_offer

    return ProgramConfig.of(make_offer()[0].config)
