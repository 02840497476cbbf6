"""The page about evaluated models: its words and numbers, whatever was measured and under whichever conditions."""

import dataclasses
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from entropy_gpt.evaluation.records.run_log import RunLog
from entropy_gpt.evaluation.showing import report_pictures
from entropy_gpt.evaluation.showing.page import page_html, page_markdown
from entropy_gpt.evaluation.showing.report import build_report
from entropy_gpt.evaluation.showing.report_pictures import (
    head_pictures,
    prediction_pictures,
    run_pictures,
    tradeoff_blocks,
)
from entropy_gpt.evaluation.showing.report_summary import summarize
from entropy_gpt.evaluation.showing.report_tables import (
    Notes,
    comparison_table,
    condition_table,
    cost_table,
    operations_table,
    task_table,
)

from .example_results import (
    example_attention,
    example_cost,
    example_heads,
    example_likelihood,
    example_operations,
    example_result,
    example_results,
    example_tasks,
    example_training,
)
from .test_run_log import ALL_FIGURES, entropy_line, penalty_line, run_line, write_log


@pytest.fixture(scope="module")
def empty_png(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "empty.png"
    Image.new("RGB", (1, 1)).save(path)
    return path.read_bytes()


@pytest.fixture
def without_drawing(monkeypatch, empty_png):
    def draw(name, alt, caption, plot):
        return report_pictures.Picture(name, alt, caption, empty_png)

    monkeypatch.setattr(report_pictures, "_draw", draw)


def test_one_text_has_two_pictures_of_each_model():
    results = [example_result(name, attention=example_attention()) for name in ("a", "b")]
    results.append(example_result("without"))
    pictures = head_pictures(results)
    assert [picture.name for picture in pictures] == [
        *("text-entropies-1", "text-attention-1", "text-entropies-2", "text-attention-2"),
    ]
    assert "every head of a at every token of one text of 3 tokens" in pictures[0].caption
    assert "head 2 in layer 1 of b" in pictures[3].caption
    assert all(picture.png.startswith(b"\x89PNG") for picture in pictures)


@pytest.fixture
def run(tmp_path):
    lines = [entropy_line(0, **ALL_FIGURES), penalty_line(10), entropy_line(10, **ALL_FIGURES)]
    return RunLog.load(write_log(tmp_path / "run", run_line(), *lines))


def cells(table, row, title):
    """The cell of a row under a heading."""
    (index,) = [index for index, column in enumerate(table.columns) if column.title == title]
    return next(each for each in table.rows if each[0].text == row)[index]


def test_the_page_has_a_section_for_all_that_was_measured(without_drawing, run):
    page = build_report(example_results(), [run])
    assert page.title == "Evaluation of 4 models"
    assert [section.title for section in page.sections] == [
        *("Comparison", "Perplexity and cost", "Operations", "Tasks", "Private inference", "Prediction"),
        *("Attention heads", "Training", "Models and conditions"),
    ]
    assert len(page.pictures) == len({picture.name for picture in page.pictures})


def test_what_was_not_measured_has_no_section(without_drawing):
    page = build_report([example_result("alone")], [])
    assert page.title == "Evaluation of alone"
    assert [section.title for section in page.sections] == [
        *("Comparison", "Perplexity and cost", "Operations", "Models and conditions"),
    ]
    assert page.pictures == []


def test_no_models_and_models_of_one_name_are_refused():
    with pytest.raises(ValueError, match="no models"):
        build_report([], [])
    with pytest.raises(ValueError, match="Two models are called 'same'"):
        build_report([example_result("same"), example_result("same")], [])


def test_the_best_of_each_column_is_marked():
    table = comparison_table(example_results())
    best = {
        column.title: [row[0].text for row in table.rows if row[index].is_best]
        for index, column in enumerate(table.columns)
    }
    assert best["perplexity per token"] == best["bits per byte"] == ["gpt2-small"]
    assert best["overloaded"] == ["proposal"]
    assert best["non-linear (M)"] == best["sent (GB)"] == best["seconds"] == ["softmax-only", "proposal"]
    assert best["mean entropy (nats)"] == best["sink share"] == best["diversity (nats)"] == []
    assert table.notes == {}
    assert cells(table, "gpt2-small", "perplexity per token").text == "2.690"
    assert cells(table, "gpt2-small", "sent (GB)").text == "25.32"


def test_what_was_measured_under_other_conditions_is_marked_beside_the_number():
    other = example_result("other", likelihood=example_likelihood(1.5, context=64, vocab_size=1024))
    table = comparison_table([*example_results(), other])
    assert cells(table, "other", "perplexity per token").note == "A"
    assert cells(table, "other", "bits per byte").note == "B"
    assert table.notes == {
        "A": "context: 64 tokens, not 128 tokens; stride: 32 tokens, not 64 tokens; "
        "vocabulary: 1,024 tokens, not 50,257 tokens",
        "B": "context: 64 tokens, not 128 tokens; stride: 32 tokens, not 64 tokens",
    }
    # The least perplexity of all is not the best of the others.
    assert not cells(table, "other", "perplexity per token").is_best
    assert cells(table, "gpt2-small", "perplexity per token").is_best
    assert "Measured under other conditions, and so not compared with that: other." in summarize(
        [*example_results(), other]
    )


def test_numbers_of_one_model_are_told_with_their_conditions():
    result = example_results()[0]
    table = comparison_table([result])
    assert not any(cell.is_best or cell.note for row in table.rows for cell in row)
    for words in ("Python standard library, the part kept apart", "context: 128 tokens", "float32", "65,024"):
        assert words in table.remarks["Prediction"]
    assert "100 Mbit/s, 80 ms" in table.remarks["Private inference"]


def test_other_versions_and_machines_are_told_and_compared():
    elsewhere = example_result("elsewhere", likelihood=example_likelihood(2.0, machine="another machine"))
    table = comparison_table([*example_results(), elsewhere])
    assert cells(table, "elsewhere", "perplexity per token").is_best
    assert table.remarks["Origin"].startswith("Versions, commit or machine are not the same for all numbers")
    assert "Origin" not in comparison_table(example_results()).remarks
    assert "another machine" in condition_table([*example_results(), elsewhere]).rows[-1][-1].text


def test_operations_are_in_the_papers_notation():
    short = example_result("short", operations=example_operations(context=64))
    table = operations_table([*example_results(), short])
    assert cells(table, "gpt2-small", "softmax").text == "144 × R^(128×128)"
    assert cells(table, "gpt2-small", "LayerNorm").text == "24 × R^(128×768)"
    assert cells(table, "gpt2-small", "GELU").text == "12 × R^(128×3072)"
    assert cells(table, "proposal", "GELU").text == ""
    assert cells(table, "short", "softmax").note == cells(table, "short", "FFNs (G)").note == "A"
    assert table.notes == {"A": "sequence: 64 tokens, not 128 tokens"}


def test_scores_have_their_standard_errors():
    results = example_results()
    results[1].tasks = None
    results[2].tasks = example_tasks(limit=10)
    table = task_table(results)
    assert [column.title for column in table.columns] == ["task and metric", "gpt2-small", "softmax-only", "proposal"]
    first, *numbers = table.rows[0]
    assert (first.text, first.detail) == ("local_blimp", "acc")
    assert [cell.detail for cell in numbers] == ["± 0.0046"] * 3
    assert [cell.note for cell in numbers] == ["", "A", ""]
    assert table.notes == {"A": "samples of a task: at most 10, not all"}
    assert table.rows[-1][1].detail == ""  # lm-eval gave none


def test_every_private_inference_is_listed():
    costs = [example_cost(1), example_cost(2, protocol="other", context=8, answers=2)]
    table = cost_table([example_result("a", costs=costs), example_result("b")])
    assert [[cell.text for cell in row[:5]] for row in table.rows] == [
        ["a", "cheetah", "128", "1", "1.000"],
        ["a", "other", "8", "2", "2.000"],
    ]


def test_answers_of_unlike_lengths_are_not_compared():
    costs = {"first": example_cost(3), "second": example_cost(2), "longer": example_cost(1, answers=2)}
    table = comparison_table([example_result(name, costs=[cost]) for name, cost in costs.items()])
    assert cells(table, "second", "sent (GB)").is_best
    assert not cells(table, "longer", "sent (GB)").is_best
    assert table.notes[cells(table, "longer", "sent (GB)").note] == "answer: 2 tokens, not 1 token"


def test_the_summary_tells_the_numbers():
    text = summarize(example_results())
    for words in (
        "perplexity per token lies between 2.690 (gpt2-small) and 3.480 (softmax-only), 29.4% more",
        "2.359 million numbers through non-linear operations in softmax-only and proposal",
        "sends 6.430 GB in softmax-only and proposal and 25.32 GB in gpt2-small, 3.94 times as much",
    ):
        assert words in text
    assert "Communication of private inference was not measured." in summarize(example_results(costs=False))


def test_the_summary_of_one_model_compares_nothing():
    text = summarize([example_result("alone", likelihood=example_likelihood(20), heads=example_heads())])
    assert text.startswith(
        "alone is SM+LN+G with 124,439,808 parameters. The perplexity per token of alone is 20.00 on"
    )
    assert "between" not in text
    assert "times" not in text


def test_a_perplexity_that_is_not_finite_is_said():
    broken = example_result("broken", likelihood=example_likelihood())
    broken.likelihood.likelihood.nats = math.inf
    text = summarize([*example_results(), broken])
    assert "Not finite is that of broken." in text
    assert "and 3.480 (softmax-only)" in text
    assert summarize([broken]).count("Not finite is that of broken.") == 1
    assert cells(comparison_table([broken]), "broken", "perplexity per token").text == "∞"


def test_many_models_are_counted_and_not_listed():
    results = [example_result(str(number)) for number in range(9)]
    assert summarize(results).startswith("9 models are set side by side. ")


def test_the_tradeoff_is_against_communication_where_that_was_measured(without_drawing):
    (picture,) = tradeoff_blocks([*example_results(), example_result("nothing")])
    assert "bytes that all parties send" in picture.caption
    assert "prompt: 128 tokens" in picture.caption
    assert "proposal, relu and gpt2-small." in picture.caption
    assert "Not drawn, for want of numbers that can be compared: nothing." in picture.caption
    assert "softmax-only 6.430 and 3.480" in picture.alt


def test_the_tradeoff_without_communication_is_against_operations_and_says_so(without_drawing):
    (picture,) = tradeoff_blocks(example_results(costs=False))
    assert "numbers that go through non-linear operations in a forward pass over 128 tokens" in picture.caption
    assert "Communication was not measured;" in picture.caption
    results = example_results(costs=False)
    results[0].costs = [example_cost()]
    (picture,) = tradeoff_blocks(results)
    assert "Communication was not measured of two models that can be compared;" in picture.caption


def test_no_picture_sets_what_can_not_be_compared_side_by_side(without_drawing):
    results = example_results(costs=False)
    results[0] = dataclasses.replace(
        results[0], likelihood=example_likelihood(context=64), heads=example_heads(context=64)
    )
    (picture,) = tradeoff_blocks(results)
    assert "Not drawn, for want of numbers that can be compared: gpt2-small." in picture.caption
    common, apart = [picture for picture in prediction_pictures(results) if picture.name.startswith("positions")]
    assert "relu, softmax-only, proposal." in common.caption
    unlike = "gpt2-small. Not to be compared with the first picture of this kind, for other conditions: context: 64"
    assert unlike in apart.caption
    common, apart = [picture for picture in head_pictures(results) if picture.name.startswith("entropies")]
    assert common.caption.endswith("relu, softmax-only, proposal.")
    assert "gpt2-small. Not to be compared" in apart.caption


def test_one_model_has_no_tradeoff():
    (paragraph,) = tradeoff_blocks(example_results()[:1])
    assert "takes two models" in paragraph.text


@pytest.mark.slow
def test_every_picture_can_be_drawn(run):
    results = [
        dataclasses.replace(result, name=name, heads=example_heads(layers=2, heads=3))
        for result, name in zip(example_results(), (r"$\frac", "_a$b", "模型", "x" * 90), strict=True)
    ]
    pictures = [
        *tradeoff_blocks(results),
        *prediction_pictures(results),
        *head_pictures(results),
        *run_pictures([run]),
    ]
    assert [picture.name for picture in pictures] == [
        *("tradeoff", "positions-1", "frequencies-1", "entropies-1", "quantiles-1"),
        *("heads-1", "heads-2", "heads-3", "heads-4"),
        *("training-losses", "training-entropies", "training-thresholds", "training-penalty", "training-scales"),
    ]
    assert all(picture.png.startswith(b"\x89PNG") and picture.width > 300 for picture in pictures)


def test_runs_have_the_pictures_that_they_logged_something_for(tmp_path):
    assert run_pictures([]) == []
    run = RunLog.load(write_log(tmp_path, run_line("SM+LN+G"), penalty_line(10)))
    assert [picture.name for picture in run_pictures([run])] == ["training-losses", "training-penalty"]


def test_notes_have_letters_each_once():
    notes = Notes()
    assert [notes.letter(text) for text in ("x", "", "y", "x")] == ["A", "", "B", "A"]
    assert [notes.letter(str(number)) for number in range(25)][-1] == "AA"


numbers = st.one_of(st.floats(0.01, 1e4), st.sampled_from([math.nan, math.inf, 0.0]))
conditions = st.fixed_dictionaries(
    {}, optional={"corpus": st.sampled_from(["a", "b|*"]), "dtype": st.just("bfloat16"), "seed": st.just(1)}
)


@st.composite
def likelihoods(draw):
    context = draw(st.sampled_from([2, 64, 128]))
    likelihood = example_likelihood(
        2.0, context, by_position=draw(st.booleans()), by_frequency=draw(st.booleans()), **draw(conditions)
    )
    likelihood.likelihood.nats = draw(numbers) * 1000
    likelihood.likelihood.words = draw(st.sampled_from([0, 7, 23000]))
    return likelihood


@st.composite
def head_results(draw):
    heads = example_heads(layers=2, heads=2, context=draw(st.sampled_from([2, 128])), **draw(conditions))
    heads.heads.entropy.nats = [[draw(numbers), 1.0], [0.0, 0.5]]
    heads.heads.diversity = [draw(numbers), 0.1]
    return heads


@st.composite
def task_results(draw):
    tasks = example_tasks(limit=draw(st.sampled_from([None, 5])))
    tasks.scores = draw(st.lists(st.sampled_from(tasks.scores), unique_by=id))
    if tasks.scores:
        tasks.scores[0].value = draw(numbers)
    return tasks


costs = st.builds(
    example_cost,
    st.sampled_from([0.0, 1e-6, 25.0]),
    st.sampled_from([0.0, 8.0]),
    protocol=st.sampled_from(["cheetah", "other"]),
    network=st.sampled_from(["loopback", "slow"]),
)


@st.composite
def model_results(draw):
    return example_result(
        draw(st.text(max_size=20).filter(lambda name: name.isprintable() and "None" not in name)),
        draw(st.sampled_from(["SM+LN+G", "SM", "EReg(SM(t)+ScFuFFN)"])),
        training=draw(st.none() | st.builds(example_training, converted_from=st.sampled_from([None, "SM+LN+G"]))),
        likelihood=draw(st.none() | likelihoods()),
        heads=draw(st.none() | head_results()),
        tasks=draw(st.none() | task_results()),
        costs=draw(st.lists(costs, max_size=2)),
    )


def check_page(results):
    page = build_report(results, [])
    html, markdown = page_html(page), page_markdown(page, "pictures")
    assert "None" not in page.summary
    for section in page.sections:
        for block in section.blocks:
            if block.kind == "table":
                assert {len(row) for row in block.rows} == {len(block.columns)}
                assert {cell.note for row in block.rows for cell in row} - {""} == set(block.notes)
    assert html.count("<section") == markdown.count("\n## ") == len(page.sections)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(model_results(), min_size=1, max_size=4, unique_by=lambda result: result.name))
def test_whatever_is_missing_there_is_a_page(without_drawing, results):
    check_page(results)


@pytest.mark.slow
@settings(deadline=None, max_examples=4, derandomize=True)
@given(st.lists(model_results(), min_size=2, max_size=3, unique_by=lambda result: result.name))
def test_whatever_is_missing_there_are_pictures(results):
    check_page(results)
