"""The benchmarks' records, and the pages made of them."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from entropy_gpt.evaluation.benchmarks import (
    conversion,
    drafts,
    entropy_attention,
    evaluation,
    gpu,
    private_inference,
    range_check,
    ring,
    training_step,
    two_phases,
)
from entropy_gpt.evaluation.private_inference.parties.drafts import expected_passes
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost, StepCost
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span


BENCHMARKS = [conversion, entropy_attention, evaluation, private_inference, range_check, ring, training_step]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_the_page_shows_the_committed_record(benchmark):
    record = benchmark.Record.load(benchmark.RECORD)
    assert benchmark.PAGE.read_text() == benchmark.page(record), "run the benchmark with --redraw"
    revision = record.conditions.git_revision if benchmark is conversion else record.git_revision
    assert not revision.endswith("+changes")


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_records_are_read_back_as_they_were_written(benchmark, tmp_path):
    record = benchmark.Record.load(benchmark.RECORD)
    record.save(tmp_path / "record.json")
    assert benchmark.Record.load(tmp_path / "record.json") == record


def test_pages_show_every_ratio_with_its_spread():
    benchmark = entropy_attention
    timing = benchmark.Timing("attention", 64, 3, {benchmark.OURS: 2.0}, {benchmark.STOCK: [1.0, 1.25, 1.5]})
    record = dataclasses.replace(benchmark.Record.load(benchmark.RECORD), times=[timing])
    assert "| attention | 64 | 2.0 | 1.25 (1.00-1.50) |  |" in benchmark.page(record)


def test_conversions_are_compared_seed_by_seed():
    record = conversion.Record.load(conversion.RECORD)
    runs = [
        *(conversion.Run(conversion.SCRATCH, seed, 100, 800, nats) for seed, nats in enumerate((3.0, 4.0))),
        *(conversion.Run(conversion.HEALED, seed, 25, 200, nats) for seed, nats in enumerate((2.5, 4.1))),
    ]
    table = conversion.healing_table(dataclasses.replace(record, runs=runs))
    assert "| converted | 25 | 0.25 | 36.26 (12.18 to 60.34) | -0.200 (-0.500 to +0.100) | 1 of 2 |" in table
    steps = [conversion.StepCost("a step", 0, 0.1, 2.0), conversion.StepCost("a step", 1, 0.1, None)]
    table = conversion.step_table(dataclasses.replace(record, steps=steps))
    assert "| a step | 0.1000 (0.1000 to 0.1000) | 2.000 (2.000 to 2.000) | 20.0 (20.0 to 20.0) |" in table


def test_the_page_of_two_phases_shows_its_record_or_that_there_is_none():
    record = two_phases.Record.load(two_phases.RECORD) if two_phases.RECORD.exists() else None
    assert two_phases.PAGE.read_text() == two_phases.page(record), "run the benchmark with --redraw"
    assert ("has not yet been measured" in two_phases.page(record)) == (record is None)
    link = "To be measured" if record is None else "Measured"
    assert f"[{link}](two_phases.md)" in two_phases.PAGE.with_name("private_inference.md").read_text()


def test_the_page_of_drafts_shows_its_record_or_that_there_is_none():
    record = drafts.Record.load(drafts.RECORD) if drafts.RECORD.exists() else None
    assert drafts.PAGE.read_text() == drafts.page(record), "run the benchmark with --redraw"
    assert ("has not yet been measured" in drafts.page(record)) == (record is None)


def cost(million: int, seconds: float) -> InferenceCost:
    step = StepCost("scores", 0, million * 500_000, million * 500_000, 1, 1, 2.0 * million, seconds)
    model = {"notation": "SM", "n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 9, "context": 4, "answers": 1}
    about = {"network": "", "set_up": [], "versions": {}, "git_revision": None, "machine": "a machine"}
    return InferenceCost(**model, settings=PrivateSettings(), steps=[step], seconds=seconds, **about)


def test_an_answer_with_drafts_is_compared_with_the_one_without(tmp_path):
    without, accepted, prompt = drafts.WAYS
    answers = {
        without: drafts.Answer([1, 2, 3, 4], 40.0, cost(8, 32.0), []),
        accepted: drafts.Answer([1, 2, 3, 4], 10.0, cost(3, 8.0), [(2, 1), (1, 1)]),
    }
    record = drafts.Record("text", "a network", answers, {accepted: [1, 2, 4], prompt: [1]}, "abc")
    page = drafts.page(record)
    assert f"| {without} | 4 |  | 40 | 1.00 | 8 | 16 | 1 |" in page
    assert f"| {accepted} | 2 | 2 of 3 | 10 | 0.25 | 3 | 6 | 2.3 (1 to 4) |" in page
    assert "Where those before were right, 2 of\n3 were." in page
    record.save(tmp_path / "record.json")
    assert drafts.Record.load(tmp_path / "record.json") == record


@pytest.mark.parametrize("keep", ["accepted", "prompt"])
def test_the_share_of_right_drafts_is_found_by_how_many_passes_there_were(keep):
    passes = sum(expected_passes(Span(0, 24, 9), 9, 8, keep, 0.7).values())
    assert drafts.find_acceptance(passes, 16, 9, 8, keep) == pytest.approx(0.7, abs=1e-5)


def test_two_phases_are_compared_with_one(tmp_path, monkeypatch):
    costs = {two_phases.ONE: cost(10, 8.0), two_phases.BEFORE: cost(6, 7.0), two_phases.AFTER: cost(5, 1.0)}
    parts = {name: two_phases.Part(each, [2 * 10**9, 10**9], [], []) for name, each in costs.items()}
    parts[two_phases.BEFORE].half_bytes = [3 * 10**6, 4 * 10**6]
    record = two_phases.Record(parts, 0.01, 5.0, True, dict(parts), "abc")
    monkeypatch.setattr(two_phases, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(two_phases, "PICTURE", tmp_path / "picture.png")
    two_phases.write(record)
    page = (tmp_path / "page.md").read_text()
    assert "**0.50 of the bytes** and\n  **0.12 of the seconds**" in page
    assert "Both phases together: 1.100 of the bytes and 1.00 of the seconds." in page
    assert "| scores | 10.0 | 6.0 | 5.0 | 8.0 | 7.0 | 1.0 |" in page
    assert "| 3 / 4 |" in page
    assert "a block takes 8.0 s and\n10.0 MB for one more token in one phase." in page
    assert "After the prompt it takes\n1.0 s and 5.0 MB." in page
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    record.save(tmp_path / "record.json")
    assert two_phases.Record.load(tmp_path / "record.json") == record


@pytest.mark.parametrize(("left", "again"), [((), True), ((0,), True), ((1,), True), ((0, 1), False)])
def test_a_preparation_of_which_a_half_was_used_is_made_anew(left, again, tmp_path, monkeypatch):
    def take(parts, name, type_, measure):
        if not (parts / f"{name}.json").exists():
            measured.append(name)
        return SimpleNamespace(cost=SimpleNamespace(total_bytes=0, seconds=0.0))

    measured: list[str] = []
    monkeypatch.setattr(two_phases, "measure_once", take)
    (tmp_path / "prepared").mkdir()
    for rank in left:
        (tmp_path / "prepared" / f"{'0' * 32}-{rank}.half").touch()
    for name in (two_phases.ONE, two_phases.BEFORE):
        (tmp_path / f"{name}.json").touch()
    two_phases.measure_parts(two_phases.QUICK_SIZES | {"n_layer": 1, "n_embd": 48}, tmp_path)
    assert measured == [two_phases.BEFORE] * again + [two_phases.AFTER]
    assert len([*tmp_path.rglob("*.half")]) == (0 if again else 2)


def test_a_block_is_measured_for_its_last_token():
    steps = [
        StepCost(operation, layer, number, number, 1, 1, 1.0, 1.0)
        for number, (operation, layer) in enumerate(2 * [("embedding", None), ("embedding", None), ("scores", 0)])
    ]
    cost = InferenceCost("SM", 1, 8, 1, 9, 4, 2, PrivateSettings(), "", [], steps, 0.0, {}, None, "a machine")
    found = two_phases.take_last_token(cost)
    assert (found.steps, found.seconds) == (steps[5:], 1.0)


def test_the_page_of_the_gpu_shows_its_record_or_that_there_is_none():
    record = gpu.Record.load(gpu.RECORD) if gpu.RECORD.exists() else None
    assert gpu.PAGE.read_text() == gpu.page(record), "run the benchmark with --redraw"
    assert ("not yet been run on a GPU" in gpu.page(record)) == (record is None)


def test_what_is_measured_on_a_gpu_at_tiny_sizes_on_a_cpu(tmp_path):
    """FlexAttention has no gradient there, and compilers take long."""
    sizes = gpu.Sizes(
        lengths=(8, 16),
        tokens=32,
        heads=2,
        head_dim=8,
        model={"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 16},
        new_tokens=2,
        sequences=2,
        attentions=(gpu.FLASH, gpu.PUBLIC),
        compiles=False,
        milliseconds=1.0,
    )
    record = gpu.measure(sizes, torch.device("cpu"), runs=3)
    record.save(tmp_path / "record.json")
    assert gpu.Record.load(tmp_path / "record.json") == record
    lines = gpu.page(record).splitlines()
    assert [line.count(" | ") for line in lines if line.startswith(("| 8 |", "| 16 |"))] == [5, 5]
    rows = [line.split(" | ")[:2] for line in lines if line.startswith(("| training", "| generation"))]
    assert [kind for kind, _ in rows] == ["| training step"] * 3 + ["| generation"] * 3
    assert rows[0][1] == gpu.STOCK


def test_without_a_gpu_the_benchmark_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(gpu.typer.Exit):
        gpu.main()


def test_training_steps_are_compared_with_the_stock_model(capsys):
    """At a tiny size; the models have as many weights as stock GPT-2, but for the penalty's thresholds."""
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 8}
    steps = training_step.measure_steps(training_step.EVERYTHING, sizes, 8, 2, 2)
    assert steps.ratios.keys() == steps.milliseconds.keys() - {training_step.STOCK}
    counts = {
        name: sum(parameter.numel() for parameter in training_step.build_model(name, sizes).parameters())
        for name in training_step.EVERYTHING[:5]
    }
    thresholds = sizes["n_layer"] * sizes["n_head"]
    assert {count - counts[training_step.STOCK] for count in [*counts.values()][:4]} == {0}
    assert counts[training_step.REGULARIZED] - counts[training_step.STOCK] == thresholds
    record = dataclasses.replace(training_step.Record.load(training_step.RECORD), steps=[steps])
    row = next(line for line in training_step.page(record).splitlines() if line.startswith("| 16 | 2 x 8 |"))
    assert row.count("(") == 5


def test_the_first_records_of_training_steps_are_read():
    step = {
        "kind": "training step",
        "length": 512,
        "runs": 6,
        "milliseconds": {training_step.STOCK: 4.0, training_step.REGULARIZED: 3.0, training_step.PROPOSAL: 2.0},
        "ratios": {training_step.STOCK: [0.4, 0.5, 0.6], training_step.REGULARIZED: [0.6, 0.7, 0.8]},
    }
    ((migrated,), watching) = training_step.Record.migrate({"steps": [step], "watching": 1}, 1).values()
    steps = training_step.Steps(**migrated)
    assert (steps.sizes["n_embd"], steps.batch, watching) == (768, 2, 1)
    assert training_step.format_step(steps, training_step.PROPOSAL) == "0.50 (0.40-0.60)"
    assert training_step.format_step(steps, training_step.REGULARIZED) == "0.75"
    assert training_step.format_step(steps, training_step.BASELINE) == ""
