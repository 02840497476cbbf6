"""Conditions under which nothing was measured, for records of tests."""

import pytest

from evaluation.results import Conditions, recorded_versions


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
