"""Models that were trained alike in one table, in a model card and on the quickstart's page."""

import copy
import dataclasses
import json
import shutil

import pytest

from entropy_gpt.evaluation.records.results import save_results
from entropy_gpt.evaluation.showing.comparison import COLUMNS, comparison_markdown, comparison_rows, conditions_text
from entropy_gpt.evaluation.showing.model_card import model_card
from entropy_gpt.programs.quickstart.page import (
    BLOCK,
    HEALED_BLOCK,
    HEALED_PAGE,
    HEALED_RESULTS,
    PAGE,
    QUICKSTART_RESULTS,
    load_all,
    update_page,
)

from .example_results import example_cost, example_heads, example_likelihood, example_result, example_training


@pytest.fixture
def result():
    return example_result(
        "ereg-smt-scfuffn",
        "EReg(SM(t)+ScFuFFN)",
        training=example_training(10),
        likelihood=example_likelihood(71.264),
        heads=example_heads(),
    )


def converted_from(result):
    converted = copy.deepcopy(result)
    converted.training = example_training(3, converted_from="SM+LN+G")
    return converted


def test_the_table_has_every_number(result):
    (row,) = comparison_rows([result])
    entropy = result.heads.heads.entropy
    figures = ("71.26", f"{result.likelihood.likelihood.bits_per_byte:.3f}", f"{entropy.mean:.2f}")
    assert row == (
        *("EReg(SM(t)+ScFuFFN)", "layernorm", "124,439,808", *figures, f"{entropy.overloaded_share:.0%}", "1"),
    )
    assert len(row) == len(COLUMNS)
    assert comparison_markdown([result]).splitlines()[2] == f"| {' | '.join(row)} |"


def test_private_answers_have_a_column_where_there_are_any(result):
    answered = dataclasses.replace(result, costs=[example_cost(0.0125, context=8, answers=2)])
    head, _, *rows = comparison_markdown([result, answered]).splitlines()[:4]
    assert head == f"| {' | '.join(column.title for column in COLUMNS)} | private answer (MB) |"
    assert [row.split(" | ")[-1] for row in rows] == ["– |", "12.5 |"]
    told = "protocol: cheetah; prompt: 8 tokens; answer: 2 tokens; versions: spu 0.9.5"
    assert f"without the set-up of their connection ({told}). Versions: " in conditions_text([result, answered])
    assert "rivate" not in comparison_markdown([result])


def test_private_answers_of_unlike_conditions_are_refused(result):
    results = [dataclasses.replace(result, costs=[example_cost(answers=answers)]) for answers in (1, 2)]
    with pytest.raises(ValueError, match=r"private answers differ \(answer: 2 tokens, not 1 token\)"):
        comparison_markdown([result, *results])


def test_a_converted_model_is_shown_as_one_beside_those_from_scratch(result):
    converted = converted_from(result)
    text = comparison_markdown([result, converted])
    assert "| EReg(SM(t)+ScFuFFN) from SM+LN+G | layernorm | 124,439,808 |" in text
    assert "for 10 steps, 10,240 tokens" in text
    assert "from SM+LN+G: fitted step by step, then healed for 3 steps, 3,072 tokens" in text
    assert "Converted and healed on " in conditions_text([converted])
    assert "# EntropyGPT EReg(SM(t)+ScFuFFN) from SM+LN+G" in model_card(converted).text
    # From scratch, unlike amounts of training are not comparable.
    converted.training.converted_from = None
    with pytest.raises(ValueError, match="training steps differ, 3 and 10"):
        comparison_markdown([result, converted])


def test_a_converted_model_may_come_first(result):
    assert "Converted and healed" in conditions_text([converted_from(result), result, result])


def test_conditions_tell_what_each_model_was_told_alone(result):
    other = dataclasses.replace(
        result,
        architecture=dataclasses.replace(result.architecture, notation="SM+LN+G"),
        training=example_training(10, temperature_init=0.01),
    )
    text = conditions_text([result, other])
    assert "(learning_rate 0.001, batch_size 8, dropout 0.0; seed " in text
    assert "SM+LN+G alone: temperature_init 0.01. " in text
    assert "EReg(SM(t)+ScFuFFN) alone" not in text


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"likelihood": example_likelihood(seed=8)}, "conditions of the likelihood"),
        ({"likelihood": example_likelihood(context=64)}, "windows"),
        ({"heads": example_heads(dtype="bfloat16")}, "conditions of the heads"),
        ({"training": example_training(11)}, "training steps"),
    ],
)
def test_numbers_that_can_not_be_compared_are_refused(result, change, name):
    with pytest.raises(ValueError, match=f"can't be compared: their {name} differ"):
        comparison_markdown([result, dataclasses.replace(result, **change)])


def test_parts_that_are_missing_are_named(result):
    with pytest.raises(ValueError, match="training and heads are missing"):
        conditions_text([result, dataclasses.replace(result, training=None, heads=None)])
    with pytest.raises(ValueError, match="no models"):
        comparison_rows([])


def test_conditions_are_folded_away_below_the_table(result):
    _, conditions = comparison_markdown([result]).split("\n\n", 1)
    assert conditions.startswith('<details markdown="1">\n<summary>Conditions</summary>\n\n- Trained from scratch')
    assert conditions.endswith("</details>\n")


@pytest.mark.parametrize(
    "page, files, block", [(PAGE, QUICKSTART_RESULTS, BLOCK), (HEALED_PAGE, HEALED_RESULTS, HEALED_BLOCK)]
)
def test_the_page_shows_the_committed_results(page, files, block, tmp_path):
    copied = tmp_path / page.name
    shutil.copy(page, copied)
    update_page(copied, files, block)
    assert copied.read_text() == page.read_text(), "run: python -m entropy_gpt.programs.quickstart.page"


def test_the_page_shows_private_answers(result, tmp_path):
    save_results([dataclasses.replace(result, costs=[example_cost()]), result], tmp_path / "results.json")
    copied = tmp_path / PAGE.name
    shutil.copy(PAGE, copied)
    update_page(copied, [tmp_path / "results.json"])
    text = copied.read_text()
    assert "| training (s) | private answer (MB) |" in text
    assert "| 25,320.0 |" in text


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("# Nothing\n")
    with pytest.raises(ValueError, match="no place for the part"):
        update_page(tmp_path / "page.md")


@pytest.mark.parametrize("files", [QUICKSTART_RESULTS, HEALED_RESULTS])
def test_committed_results_are_of_one_commit_without_changes(files):
    results = load_all(files)
    assert {result.likelihood.conditions.git_revision.endswith("+changes") for result in results} == {False}
    assert len({json.dumps(dataclasses.asdict(result.likelihood.conditions)) for result in results}) == 1
