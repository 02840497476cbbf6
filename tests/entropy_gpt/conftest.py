"""Text for the commands to work on."""

from pathlib import Path

import pytest

from tests.evaluation.private_inference.warm_engines import warm_engines  # noqa: F401


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some of this project's own source."""
    folder = tmp_path_factory.mktemp("text")
    for path in Path(__file__).parents[2].glob("modeling_entropy_gpt/*.py"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
