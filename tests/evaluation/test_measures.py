"""Numbers side by side: what can be compared, what is best, and how it is written."""

import math

import pytest

from entropy_gpt.evaluation.records.conditions import common_facts, describe_difference
from entropy_gpt.evaluation.showing.measures import (
    cost_measures,
    format_number,
    format_plain,
    head_measures,
    main_costs,
    nonlinear_measure,
    perplexity_measure,
    prediction_measures,
    task_measure,
    traffic_measure,
)

from .example_results import (
    example_cost,
    example_heads,
    example_likelihood,
    example_result,
    example_results,
    example_tasks,
)


def predicted(**conditions):
    return example_result(likelihood=example_likelihood(**conditions))


@pytest.mark.parametrize(
    "conditions",
    [
        {"context": 64},
        {"corpus": "another text"},
        {"corpus_revision": "sha256:1"},
        {"dtype": "bfloat16"},
    ],
)
def test_perplexities_under_other_conditions_are_not_compared(conditions):
    results = [predicted(perplexity=3), predicted(perplexity=2, **conditions), predicted(perplexity=2.5)]
    for measure in prediction_measures(results):
        assert list(measure.comparable) == [0, 2]
        assert measure.best_value == measure.values[2]
        assert describe_difference(measure.facts[1], measure.reference)


@pytest.mark.parametrize("change", [{"vocab_size": 1024}, {"tokens": 65000}])
def test_the_tokenizer_matters_for_tokens_and_not_for_words_and_bytes(change):
    results = [predicted(perplexity=3), predicted(perplexity=2, **change), predicted(perplexity=2.5)]
    per_token, *per_text = prediction_measures(results)
    assert list(per_token.comparable) == [0, 2]
    for measure in per_text:
        assert list(measure.comparable) == [0, 1, 2]


def test_windows_matter():
    other = predicted(perplexity=2)
    other.likelihood.likelihood.windows.bos = True
    measure = perplexity_measure([predicted(), predicted(), other])
    assert describe_difference(measure.facts[2], measure.reference) == "beginning-of-text token: yes, not no"


def test_versions_and_machine_do_not_matter_for_what_does_not_depend_on_them():
    other = predicted(perplexity=2, machine="another machine", versions={"torch": "1"}, git_revision=None)
    assert list(perplexity_measure([predicted(), other]).comparable) == [0, 1]


def test_the_first_of_two_kinds_is_the_reference():
    assert common_facts([{"a": "1"}, {"a": "2"}]) == {"a": "1"}
    assert common_facts([{"a": "1"}, {"a": "2"}, {"a": "2"}]) == {"a": "2"}


def test_there_is_no_best_of_equal_or_lonely_or_infinite_numbers():
    assert perplexity_measure([predicted(), predicted()]).best_value is None
    assert perplexity_measure([predicted(), example_result()]).best_value is None
    infinite = predicted()
    infinite.likelihood.likelihood.nats = math.inf
    assert perplexity_measure([predicted(), infinite]).best_value is None
    assert perplexity_measure([predicted(perplexity=3), infinite, predicted(perplexity=2)]).best_value == (
        pytest.approx(2)
    )


def test_entropies_at_another_context_are_not_compared():
    results = [example_result(heads=example_heads(context=context)) for context in (128, 64, 128)]
    for measure in head_measures(results):
        assert list(measure.comparable) == [0, 2]


def test_neither_much_nor_little_entropy_is_best():
    measures = {measure.name: measure.best for measure in head_measures(example_results())}
    assert [name for name, best in measures.items() if best is not None] == ["overloaded", "collapsed"]


def test_numbers_through_nonlinear_operations_are_those_of_the_paper():
    measure = nonlinear_measure(example_results())
    # 144 of 128 x 128, 24 of 128 x 768 and 12 of 128 x 3072; and the softmax alone.
    expected = [(144 * 128 * 128 + 24 * 128 * 768 + 12 * 128 * 3072) / 1e6, 144 * 128 * 128 / 1e6]
    assert (measure.values[0], measure.values[-1]) == tuple(map(pytest.approx, expected))
    assert measure.unit == "M"


def test_costs_of_the_setting_that_most_models_have():
    others = [example_cost(1, protocol="other"), example_cost(2)]
    results = [example_result(costs=[example_cost(3)]), example_result(costs=others), example_result()]
    assert [cost and cost.total_bytes for cost in main_costs(results)] == [3_000_000_000, 2_000_000_000, None]
    lonely = example_result(costs=[example_cost(1, protocol="other")])
    sent, rounds, seconds = cost_measures([*results, lonely])
    assert list(sent.comparable) == list(rounds.comparable) == list(seconds.comparable) == [0, 1]
    assert sent.values == [3, 2, None, 1]


def test_seconds_depend_on_the_network_and_bytes_do_not():
    results = [example_result(costs=[example_cost(1, network=network)]) for network in ("loopback", "100 Mbit/s")]
    sent, rounds, seconds = cost_measures(results)
    assert list(sent.comparable) == list(rounds.comparable) == [0, 1]
    assert list(seconds.comparable) == [0]


def test_bytes_have_a_fitting_unit():
    small = example_result(costs=[example_cost(25e6 / 1e9)])
    assert (traffic_measure([small]).title, traffic_measure([small]).values) == ("sent (MB)", [25])
    assert traffic_measure([example_result(costs=[example_cost(0)])]).title == "sent (B)"


def test_scores_know_which_way_is_better():
    results = [example_result(tasks=example_tasks(seed)) for seed in range(3)]
    for metric, best in (("acc", max), ("perplexity", min)):
        measure = task_measure(results, "local_lambada_openai", metric, 0)
        assert measure.best_value == best(measure.values)
    limited = example_result(tasks=example_tasks(limit=10))
    measure = task_measure([*results, limited], "local_blimp", "acc", 0)
    assert list(measure.comparable) == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0034, "0.003400"),
        (12.3456, "12.35"),
        (-1.5, "-1.500"),
        (99999, "99,999"),
        (123456, "1.23e+05"),
        (1e-9, "1.00e-09"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
        (math.nan, "NaN"),
    ],
)
def test_numbers_have_four_digits(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(2.69, "2.690"), (1234.567, "1,234.57"), (1e9, "1.00e+09"), (math.inf, "∞"), (math.nan, "NaN")]
)
def test_perplexities_have_decimals(value, text):
    assert format_plain(value) == text
