"""The benchmarks' records, and the pages made of them."""

import dataclasses

from evaluation.benchmarks import entropy_attention as benchmark


def test_the_page_shows_the_committed_record():
    record = benchmark.Record.load(benchmark.RECORD)
    assert benchmark.PAGE.read_text() == benchmark.page(record), "run the benchmark with --redraw"
    assert not record.git_revision.endswith("+changes")


def test_records_are_read_back_as_they_were_written(tmp_path):
    record = benchmark.Record.load(benchmark.RECORD)
    record.save(tmp_path / "record.json")
    assert benchmark.Record.load(tmp_path / "record.json") == record


def test_pages_show_every_ratio_with_its_spread():
    timing = benchmark.Timing("attention", 64, 3, {benchmark.OURS: 2.0}, {benchmark.STOCK: [1.0, 1.25, 1.5]})
    record = dataclasses.replace(benchmark.Record.load(benchmark.RECORD), times=[timing])
    assert "| attention | 64 | 2.0 | 1.25 (1.00-1.50) |  |" in benchmark.page(record)
