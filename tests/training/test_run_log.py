"""The log of a run: what a run that goes on keeps of it."""

import json

import pytest

from entropy_gpt.training.run_log import RUN_LOG, RunLogWriter


def records(folder):
    return [json.loads(line) for line in (folder / RUN_LOG).read_text().splitlines()]


@pytest.fixture
def written(tmp_path):
    log = RunLogWriter(tmp_path, {"notation": "SM"})
    for step in range(1, 5):
        log.write("log", step, loss=1 / step)
        log.write("entropy", step, maximum=1.0)
    log.close()
    return tmp_path


def test_a_record_is_in_the_file_at_once(tmp_path):
    log = RunLogWriter(tmp_path, {"notation": "SM"})
    log.write("log", 1, loss=float("nan"))
    assert [record["kind"] for record in records(tmp_path)] == ["run", "log"]
    assert records(tmp_path)[0]["notation"] == "SM"


@pytest.mark.parametrize("cut", ["", '{"kind": "log", "step": 5, "lo'])
def test_a_run_that_goes_on_drops_what_came_after_its_checkpoint(written, cut):
    """Whatever the killed process was writing."""
    with (written / RUN_LOG).open("a") as file:
        file.write(cut)
    log = RunLogWriter(written, {"notation": "SM(t)"}, step=2)
    assert log.last["log"] == {"kind": "log", "step": 2, "loss": 0.5}
    log.write("log", 3, loss=0.3)
    log.close()
    assert [(record["kind"], record.get("step")) for record in records(written)] == [
        ("run", None),
        ("log", 1),
        ("entropy", 1),
        ("log", 2),
        ("entropy", 2),
        ("log", 3),
    ]
    assert records(written)[0]["notation"] == "SM(t)"


def test_a_run_that_begins_anew_has_a_new_log(written):
    RunLogWriter(written, {"notation": "SM"}).close()
    assert len(records(written)) == 1


def test_a_run_that_goes_on_without_a_log_begins_one(tmp_path):
    RunLogWriter(tmp_path, {"notation": "SM"}, step=7).close()
    assert len(records(tmp_path)) == 1
