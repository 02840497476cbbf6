"""Tables in a terminal of 80 columns."""

import io

import pytest
from rich.console import Console

from entropy_gpt.terminal.tables import print_side_by_side


@pytest.mark.parametrize("models", [1, 4, 9, 20])
def test_columns_that_do_not_fit_go_into_another_table(models):
    headings = ["tokens seen before", *(f"runs/\nproposal-{number}/\nmodel" for number in range(models))]
    rows = [["1 to 10", *(f"{1000 + number}.25" for number in range(models))]]
    console = Console(file=io.StringIO(), width=80)
    print_side_by_side(console, headings, rows)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    shown = [word for line in text.splitlines() for word in line.split()]
    assert [word for word in shown if word.endswith(".25")] == rows[0][1:]
    assert text.count("tokens seen before") == text.count("1 to 10") >= models / 9


def test_a_column_wider_than_the_terminal_is_shown_alone():
    console = Console(file=io.StringIO(), width=30)
    print_side_by_side(console, ["metric", "a", "b" * 60], [["perplexity", "1.00", "2.00"]])
    assert "1.00" in console.file.getvalue() and "2.00" in console.file.getvalue()
