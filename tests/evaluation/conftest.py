"""Conditions under which nothing was measured, for records of tests, and data for tasks of lm-eval."""

import pytest

from entropy_gpt.evaluation.origin import recorded_versions
from entropy_gpt.evaluation.records.results import Conditions

from .task_files import make_tokenizer, write_task_data


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


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def task_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "data"
    write_task_data(folder)
    return folder
