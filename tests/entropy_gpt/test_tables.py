"""Tables in a terminal of 80 columns."""

import io

import pytest
from rich.console import Console

from entropy_gpt.evaluation.private_inference.program.cost import TABLE_COLUMNS, CostSum, table_rows
from entropy_gpt.terminal.tables import make_table, print_side_by_side


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


@pytest.mark.parametrize("name", ["before the prompt", "once a connection", "operation"])
def test_costs_of_a_private_answer_are_whole_at_80_columns(name):
    step = CostSum(
        "query, key, value",
        sent_bytes=4_912_340_000,
        received_bytes=3_112_340_000,
        total_bytes=8_024_680_000,
        messages=123_456,
        round_trips=1487.5,
        seconds=1234.5,
    )
    console = Console(file=io.StringIO(), width=80)
    console.print(make_table((name, *TABLE_COLUMNS), table_rows([step])))
    _, above, headings, _, cells, *_ = console.file.getvalue().splitlines()
    assert above.split() == ["MB,", "all", "MB", "MB", "round"]
    assert headings.split() == [*name.split(), "parties", "share", "sent", "received", "messages", "trips", "seconds"]
    assert cells.split() == " ".join(table_rows([step])[0]).split()
