"""Conditions under which nothing was measured, for records of tests."""

import pytest

from entropy_gpt.evaluation.origin import recorded_versions
from entropy_gpt.evaluation.records.results import Conditions


@pytest.fixture
def conditions():
    return Conditions(
        corpus="text",
        corpus_revision="sha256:0",
        vocab_size=300,
        context=128,
        evaluated_tokens=999,
        dtype="float32",
        seed=7,
        versions=recorded_versions(),
        git_revision=None,
        machine="a machine",
    )
