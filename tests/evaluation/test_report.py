"""Result records, the tables made of them, and the README that shows one."""

import dataclasses
import json
import shutil

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError

from evaluation.plots import plot_comparison, plot_headwise_entropy
from evaluation.report import (
    QUICKSTART_RESULTS,
    README,
    comparison_markdown,
    conditions_text,
    model_card,
    update_readme,
)
from evaluation.results import (
    ModelResult,
    git_revision,
    load_results,
    save_results,
)


@pytest.fixture
def result(conditions):
    return ModelResult(
        notation="EReg(SM(t)+ScFuFFN)",
        final_normalization="none",
        parameters=1234567,
        training_steps=10,
        training_tokens=10240,
        training_seconds=12.3,
        hyperparameters={"learning_rate": 1e-3},
        perplexity_per_token=71.264,
        bits_per_byte=2.1649,
        headwise_entropy_nats=[[3.0, 1.0], [0.5, 3.5]],
        maximum_entropy_nats=4.0,
        conditions=conditions,
    )


def test_a_converted_model_is_shown_as_one_beside_those_from_scratch(result):
    converted = dataclasses.replace(result, training_steps=3, training_tokens=3072, converted_from="SM+LN+G")
    text = comparison_markdown([result, converted])
    assert "| EReg(SM(t)+ScFuFFN) from SM+LN+G | none | 1,234,567 |" in text
    assert "Trained from scratch on text (sha256:0) for 10 steps, 10,240 tokens" in text
    assert "from SM+LN+G: fitted step by step, then healed for 3 steps, 3,072 tokens" in text
    # From scratch, unlike amounts of training are not comparable.
    with pytest.raises(ValueError, match="training_steps differ, 3 and 10"):
        comparison_markdown([result, dataclasses.replace(converted, converted_from=None)])
    assert "Converted and healed on text (sha256:0) for 3 steps" in conditions_text([converted])
    assert "# EntropyGPT EReg(SM(t)+ScFuFFN) from SM+LN+G" in model_card(converted)


def test_results_are_read_back_as_they_were_written(result, tmp_path):
    save_results([result, result], tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == [result, result]


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        '{"schema_version": 0, "results": []}',
        '{"schema_version": 1}',
        '{"schema_version": 1, "results": [{"conditions": {}}]}',
    ],
)
def test_other_files_are_refused_by_name(damage, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(damage)
    with pytest.raises(ValueError, match=r"results\.json is no file of results"):
        load_results(path)


def test_values_of_another_type_are_refused_by_name(result, tmp_path):
    path = tmp_path / "results.json"
    save_results([result], path)
    path.write_text(path.read_text().replace('"seed": 7', '"seed": "seven"'))
    with pytest.raises(ValueError, match=r"results\.json is no file of results.*seed"):
        load_results(path)


def test_records_are_typed_and_have_no_infinite_numbers(result, tmp_path):
    with pytest.raises(StrictDataclassError):
        dataclasses.replace(result, parameters="many")
    with pytest.raises(ValueError, match="JSON"):
        save_results([dataclasses.replace(result, bits_per_byte=float("nan"))], tmp_path / "results.json")


def test_the_table_has_every_number(result):
    row = comparison_markdown([result]).splitlines()[2]
    assert row == "| EReg(SM(t)+ScFuFFN) | none | 1,234,567 | 71.26 | 2.165 | 2.00 | 50% | 12 |"


def test_conditions_tell_what_each_model_was_told_alone(result):
    other = dataclasses.replace(
        result, notation="SM+LN+G", hyperparameters={**result.hyperparameters, "temperature_init": 0.01}
    )
    text = conditions_text([result, other])
    assert "(learning_rate 0.001; seed 7" in text
    assert "SM+LN+G alone: temperature_init 0.01. " in text
    assert "EReg(SM(t)+ScFuFFN) alone" not in text


@pytest.mark.parametrize("field", ["training_steps", "conditions"])
def test_numbers_that_can_not_be_compared_are_refused(result, field):
    different = {
        "training_steps": 11,
        "conditions": dataclasses.replace(result.conditions, seed=8),
    }
    with pytest.raises(ValueError, match=f"can't be compared: their {field} differ"):
        comparison_markdown([result, dataclasses.replace(result, **{field: different[field]})])


def test_the_card_is_valid_and_tells_the_conditions(result):
    card = ModelCard(model_card(result))
    assert card.data.library_name == "transformers"
    for words in ("trust_remote_code=True", "sha256:0", "seed 7", "999 tokens", "a machine", "nothing secret"):
        assert words in card.text


def test_pictures_are_written(result, tmp_path):
    plot_headwise_entropy(result, tmp_path / "one.png")
    plot_comparison([result, result], tmp_path / "two.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_readme_shows_the_committed_results(tmp_path):
    copy = tmp_path / "README.md"
    shutil.copy(README, copy)
    update_readme(copy)
    assert copy.read_text() == README.read_text(), "run: python -m evaluation.report"


def test_a_readme_without_a_place_for_the_table_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# Nothing\n")
    with pytest.raises(ValueError, match="no place for the table"):
        update_readme(tmp_path / "README.md")


def test_the_revision_of_a_tree_of_another_owner_is_told(monkeypatch):
    """As in a container: git's test of ownership can be made to fail for any tree."""
    expected = git_revision()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert git_revision() == expected
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None


def test_committed_results_are_of_one_commit_without_changes():
    results = load_results(QUICKSTART_RESULTS)
    assert {result.conditions.git_revision.endswith("+changes") for result in results} == {False}
    assert len({json.dumps(dataclasses.asdict(result.conditions)) for result in results}) == 1
