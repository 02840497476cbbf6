"""Result records: written, read back, and refused where they are something else."""

import dataclasses

import pytest
from pydantic import ValidationError

from entropy_gpt.conversion.calibration import calibrate
from entropy_gpt.conversion.simplification import make_norms_static
from entropy_gpt.evaluation.origin import git_revision, hash_weights
from entropy_gpt.evaluation.records.results import find_results, load_results, save_results
from tests.architectures import make_model, make_tokens

from .example_results import example_attention, example_cost, example_likelihood, example_result, example_results


def test_results_are_read_back_as_they_were_written(tmp_path):
    results = [*example_results(), example_result("only what it is", attention=example_attention())]
    save_results(results, tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == results


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read: it is no JSON"),
        ("[]", "holds something else"),
        ('{"schema_version": 1, "results": []}', "holds something else"),
        ('{"kind": "a conversion", "schema_version": 2, "content": []}', "holds a conversion"),
        ('{"kind": "results of models", "schema_version": 1, "content": []}', "is of schema version 1"),
        ('{"kind": "results of models", "schema_version": 2, "content": [{}]}', r"is broken: 0\.name"),
    ],
)
def test_other_files_are_refused_by_name(content, message, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=rf"results\.json {message}"):
        load_results(tmp_path / "results.json")


def test_values_of_another_type_are_refused_by_name(tmp_path):
    path = tmp_path / "results.json"
    save_results(example_results(), path)
    path.write_text(path.read_text().replace('"n_head": 12', '"n_head": "twelve"'))
    with pytest.raises(ValueError, match=r"results\.json is broken: 0\.architecture\.n_head"):
        load_results(path)


def test_records_are_typed():
    with pytest.raises(ValidationError):
        dataclasses.replace(example_result(), name=7)


def test_numbers_that_are_not_finite_are_read_back(tmp_path):
    result = example_results()[0]
    result.likelihood.likelihood.nats = float("inf")
    save_results([result], tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == [result]


def test_the_revision_of_a_tree_of_another_owner_is_told(monkeypatch):
    """As in a container: git's test of ownership can be made to fail for any tree."""
    expected = git_revision()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert git_revision() == expected
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None


def test_what_records_tell_of_one_model_is_put_together():
    one, other, *_ = example_results(tasks=False)
    renamed = dataclasses.replace(one, name="elsewhere", likelihood=None, heads=None, training=None, costs=[])
    cheaper = dataclasses.replace(renamed, costs=[example_cost(1.0), *one.costs])
    trained = dataclasses.replace(renamed, training=one.training)
    parts = [dataclasses.replace(one, training=None), other, cheaper, trained]
    assert find_results(parts, one) == dataclasses.replace(one, costs=[*one.costs, example_cost(1.0)])
    assert find_results([renamed], one) == renamed
    assert find_results([other], one) is None


def test_a_text_of_ones_own_is_not_handed_on():
    one = dataclasses.replace(example_results()[0], attention=example_attention())
    assert find_results([one], one) == dataclasses.replace(one, attention=None)


def test_the_first_record_of_a_part_counts():
    one = example_results()[0]
    again = dataclasses.replace(one, likelihood=example_likelihood(99.0))
    assert find_results([again, one], one).likelihood == again.likelihood


def test_a_model_and_its_static_twin_are_two():
    """All their parameters are the same; the twin's norms divide by constants beside them."""
    model = make_model("SM+LN+G")
    batches = [make_tokens(8, 32) for _ in range(6)]
    twin, other = (make_norms_static(model, calibrate(model, part)) for part in (batches, batches[:4]))
    assert len({hash_weights(each) for each in (model, twin, other)}) == 3


def test_records_of_another_architecture_are_not_the_models():
    one = example_results()[0]
    other = dataclasses.replace(one, architecture=dataclasses.replace(one.architecture, notation="SM+LN+R"))
    assert find_results([other], one) is None
