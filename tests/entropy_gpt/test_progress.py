"""Progress: bars on a terminal of 80 columns, and lines without one."""

import io
import re
import time

import pytest
from rich.console import Console

from entropy_gpt.terminal import progress
from entropy_gpt.terminal.progress import Line, format_bytes, format_count, format_seconds, progress_display


NOTATION = "training EReg(SM(t)+ScFuFFN) from a model with a very long name"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_terminal_of_80_columns_shows_bar_and_time_left_and_finished_stages_leave_the_table():
    console = Console(file=Terminal(), width=80, force_terminal=True)
    with progress_display(console) as display:
        with display.stage("reading the text") as line:
            line.say("161,428 characters")
        with display.stage(NOTATION, 100) as line:
            line.reach(0)
            time.sleep(0.01)
            line.reach(50)
            line.say("loss 2.313 in the mean of the last hundred steps")
            shown = Console(file=io.StringIO(), width=80)
            shown.print(display.bars())
            rows = shown.file.getvalue().splitlines()
    assert len(rows) == 1 and len(rows[0]) <= 80
    assert "━" in rows[0]
    assert "s left loss" in rows[0]
    printed = without_codes(console.file.getvalue())
    assert "reading the text: 161,428 characters (0 s)" in printed
    assert f"{NOTATION}: loss 2.313 in the mean of the last hundred steps (0 s)" in printed


@pytest.mark.parametrize("transient", [False, True])
def test_without_a_terminal_there_is_a_line_for_each_finished_stage_and_one_a_minute(transient, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI sets it
    console = Console(file=io.StringIO())
    with progress_display(console, transient) as display, display.stage("loading the model"):
        while console.file.getvalue().count("\n") < 2:
            time.sleep(0.01)
    *states, last = (re.sub(r"\d+ s", "n s", line) for line in console.file.getvalue().splitlines())
    assert {*states} == {"loading the model: n s"}
    assert last == ("loading the model: n s" if transient else "loading the model (n s)")
    assert "\x1b" not in console.file.getvalue() and "\r" not in console.file.getvalue()


def test_a_stage_that_fails_leaves_no_line():
    console = Console(file=io.StringIO())
    with pytest.raises(KeyError), progress_display(console) as display, display.stage("tokenising"):
        raise KeyError
    assert console.file.getvalue() == ""


def test_the_time_left_is_that_of_work_done_now(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    line = Line("training", None)
    line.reach(600, 1300)  # from a checkpoint
    assert line.time_left == ""
    now = 100.0
    line.reach(700)
    assert line.time_left == "10 min left"
    now = 160.0  # a slow step counts down
    assert line.time_left == "9 min 0 s left"
    assert line.state == "training: 54%, 9 min 0 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (1500, "25 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 kB"), (1499, "1.5 kB"), (45.26e6, "45.3 MB"), (999e6, "999.0 MB"), (1.5e12, "1,500.0 GB")],
)
def test_sizes_in_units_that_fit(size, text):
    assert format_bytes(size) == text


def test_one_and_many():
    counts = [(0, "step"), (1, "step"), (12000, "step"), (1.0, "epoch"), (0.5, "epoch")]
    expected = ["0 steps", "1 step", "12,000 steps", "1 epoch", "0.5 epochs"]
    assert [format_count(*count) for count in counts] == expected
    assert format_count(2, "process", "processes") == "2 processes"
