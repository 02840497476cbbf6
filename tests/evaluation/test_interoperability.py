"""The page of the tools, from the record of what was compared with them."""

import json
import re
import shutil

import pytest

from entropy_gpt.evaluation.origin import ROOT
from entropy_gpt.evaluation.showing.interoperability import PAGE, RECORD, comparisons_markdown, load_comparisons, write


def line(**fields) -> str:
    row = {"tool": "peft", "version": "1.0", "compared": "logits", "result": "equal", "test": "test_peft.py::test"}
    return json.dumps(row | fields) + "\n"


@pytest.fixture
def record(tmp_path):
    return tmp_path / "record.jsonl"


def test_the_order_is_not_that_of_the_lines(record):
    lines = [line(tool=tool, compared=what) for tool in ("trl", "Opacus", "peft") for what in ("weights", "losses")]
    tables = set()
    for ordered in (lines, lines[::-1], sorted(lines)):
        record.write_text("".join(ordered))
        tables.add(comparisons_markdown(load_comparisons(record)))
    (table,) = tables
    rows = [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()]
    assert rows == ["tool", "---", "Opacus", "Opacus", "peft", "peft", "trl", "trl"]


def test_the_newest_of_a_test_counts(record):
    record.write_text(line(version="0.9", result="off by 1") + line(compared="tokens") + line())
    rows = load_comparisons(record)
    assert [(row.version, row.compared, row.result) for row in rows] == [
        ("1.0", "logits", "equal"),
        ("1.0", "tokens", "equal"),
    ]


def test_what_reads_the_same_stands_there_once(record):
    record.write_text(line(test="a") + line(test="b") + line(test="c", version="2.0"))
    assert comparisons_markdown(load_comparisons(record)).count("| peft |") == 2


def test_the_page_and_the_record_are_put_in_order(tmp_path, record):
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- comparisons: begin -->\nold\n<!-- comparisons: end -->\nAfter.\n")
    record.write_text(line(tool="trl", compared="a|b") + line())
    write(record, page)
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.\n")
    assert "old" not in text
    assert "| trl | 1.0 | a\\|b | equal |" in text
    assert record.read_text() == line() + line(tool="trl", compared="a|b")
    write(record, page)
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line() + "{", r"record.jsonl:2 is broken: .*JSON.* Record the comparisons anew."),
        (line().replace("result", "results"), "record.jsonl:1 is broken: result"),
        (line(version=1), "record.jsonl:1 is broken: version: Input should be a valid string"),
    ],
)
def test_a_broken_record_is_refused(record, text, message):
    record.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_comparisons(record)


def test_the_tests_of_the_committed_record_exist():
    for row in load_comparisons(RECORD):
        file, *_, function = row.test.partition("[")[0].split("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *def {function}\(", text, re.MULTILINE), f"{row.test} is gone: make interoperability"


def test_the_page_shows_the_committed_record(tmp_path):
    for path in (PAGE, RECORD):
        shutil.copy(path, tmp_path)
    write(tmp_path / RECORD.name, tmp_path / PAGE.name)
    for path in (PAGE, RECORD):
        assert (tmp_path / path.name).read_text() == path.read_text(), (
            "run: python -m entropy_gpt.evaluation.showing.interoperability"
        )
