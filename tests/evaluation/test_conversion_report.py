"""Reports of conversions: records, tables and pages."""

import dataclasses
import json
import math

import pytest

from entropy_gpt.evaluation.measuring.operation_counts import count_operations
from entropy_gpt.evaluation.records.conversion_report import ConversionReport, HealingRecord, StepRecord
from entropy_gpt.evaluation.showing.conversion_page import (
    format_perplexity,
    operation_rows,
    report_markdown,
    step_rows,
)
from entropy_gpt.evaluation.showing.plots import plot_healing
from tests.architectures import make_config


@pytest.fixture
def report(conditions):
    steps = [
        StepRecord("LayerNorms static", 0.0441, 3.77, 1234567.0, 51.26, False, 940800, 1.8),
        StepRecord("gelu_new to identity", 0.1, 3.9, None, None, True, 940800, 1.7),
        StepRecord("FFNs fused", 0.1, 3.9, None, None, False, 480000, 0.0, kept=True),
    ]
    return ConversionReport(
        source="somewhere",
        source_notation="SM+LN+G",
        target_notation="SM+FuFFN",
        source_final_normalization="layernorm",
        target_final_normalization="layernorm",
        original_nats=3.7251,
        original_parameters=940800,
        source_operations=count_operations(make_config("SM+LN+G"), 32),
        target_operations=count_operations(make_config("SM+FuFFN"), 32),
        pruning_damage={},
        calibration_tokens=65536,
        steps=steps,
        healing=HealingRecord(4, 4096, 2.0, {"schedule": "gate"}, [[0.0, 3.8], [4.0, 3.7]], [[2, "ln_f removed"]]),
        seconds=12.0,
        peak_memory_bytes=2**30,
        conditions=conditions,
    )


def test_reports_are_read_back_as_they_were_written(report, tmp_path):
    for written in (report, dataclasses.replace(report, healing=None)):
        written.save(tmp_path / "report.json")
        assert ConversionReport.load(tmp_path / "report.json") == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "is of schema version 1, where 2 is read: make it anew"),
        ({"kind": "a cake"}, "holds a cake, not a conversion: give another file"),
        ({"content": {"source": 1}}, "is broken: source: Input should be a valid string"),
        ({"content": []}, "is broken: content"),
    ],
)
def test_other_files_are_refused(change, message, report, tmp_path):
    report.save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message):
        ConversionReport.load(tmp_path / "report.json")


def test_rows_tell_what_is_missing_and_what_is_beyond_measure(report):
    original, static, identity, fused = step_rows(report)
    assert original == ("original", "0.0000", f"{math.exp(3.7251):.2f}", "", "", "940,800", "")
    assert static[3:5] == ("1.23e+06", "e^51.3")
    assert identity[3:5] == ("not finite", "")
    assert fused[1:5] == ("= 0.1000", "= 49.40", "", "")
    assert format_perplexity(1e6) == "e^1e+06"


def test_pages_and_pictures_show_the_healing(report, tmp_path):
    page = report_markdown(report)
    assert "- step 2: ln_f removed" in page
    assert "| LayerNorms static | 0.0441 | 43.38 | 1.23e+06 | e^51.3 | 940,800 | 1.8 |" in page
    assert "## Healing" not in report_markdown(dataclasses.replace(report, healing=None))
    plot_healing(report).savefig(tmp_path / "healing.png")
    assert (tmp_path / "healing.png").read_bytes().startswith(b"\x89PNG")


def test_operations_before_and_after_stand_side_by_side(report):
    rows = operation_rows(report.source_operations, report.target_operations)
    assert ("softmax", "12 × R^(32×32)", "12 × R^(32×32)") in rows
    assert ("GELU", "3 × R^(32×192)", "none") in rows
    assert ("FLOPs of FFNs", "3,538,944", "442,368") in rows
    assert "| GELU | 3 × R^(32×192) | none |" in report_markdown(report)
