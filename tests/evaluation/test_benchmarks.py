"""The benchmarks' records, and the pages made of them."""

import dataclasses

import pytest

from entropy_gpt.evaluation.benchmarks import (
    conversion,
    entropy_attention,
    evaluation,
    private_inference,
    range_check,
    training_step,
)


BENCHMARKS = [conversion, entropy_attention, evaluation, private_inference, range_check, training_step]


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
