"""`entropy-gpt plot` from end to end, and misused."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.records.run_log import LOG_NAME
from entropy_gpt.evaluation.showing import run_plots
from entropy_gpt.terminal import plot as plot_job
from tests.evaluation.test_run_log import (
    ALL_FIGURES,
    entropy_line,
    evaluation_line,
    loss_line,
    penalty_line,
    run_line,
    write_log,
)

from .forks import run_command


OF_ENTROPIES = ["entropy_ranges.png", "head_entropies.png", "layer_entropies.png"]
ALL = sorted([*OF_ENTROPIES, "losses.png", "penalty.png", "scales.png", "thresholds.png"])


def run(*arguments, folder):
    return run_command("plot", *arguments, cwd=folder)


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def proposal(tmp_path, monkeypatch):
    """A run that is still writing its log; its folder's folder is where the command runs."""
    monkeypatch.chdir(tmp_path)
    lines = [*(entropy_line(step, **ALL_FIGURES) for step in (0, 20)), penalty_line(20, 3.25), evaluation_line(20)]
    return write_log(tmp_path / "proposal", run_line(), *lines, '{"ki', end="")


@pytest.fixture
def plain(tmp_path):
    return write_log(tmp_path / "plain", run_line("SM+LN+G"), loss_line(1234, 4.5))


def test_one_run_is_drawn_in_its_folder(proposal, tmp_path):
    process = run("proposal", "--steps", "0,17", folder=tmp_path)
    assert process.returncode == 0, process.stderr
    assert contents(proposal / "pictures") == ALL
    assert all((proposal / "pictures" / name).stat().st_size > 5000 for name in ALL)
    assert "proposal: no entropies were recorded at step 17; step 20 is shown" in process.stdout
    for words in ("EReg(SM(t)+ScFuFFN)", "3.250", "12.18", "0.84", "25%", f"{proposal / 'pictures' / 'losses.png'}"):
        assert words in process.stdout
    assert max(map(len, process.stdout.partition("overloaded")[0].splitlines())) <= 80


def test_several_runs_are_drawn_side_by_side(proposal, plain, tmp_path, capsys):
    plot_job.run([proposal, plain / LOG_NAME], None, None)
    assert contents(tmp_path / "pictures") == ALL
    assert contents(proposal) == contents(plain) == [LOG_NAME]
    output = capsys.readouterr().out
    assert "1,234" in output
    assert "thresholds.png (without plain: no thresholds)" in output


def test_what_there_is_nothing_of_is_not_drawn(plain, tmp_path, capsys):
    folder = tmp_path / "here" / "there"
    plot_job.run([plain], folder, None)
    assert contents(folder) == ["losses.png"]
    assert "not drawn: penalty.png (no penalty logged)" in capsys.readouterr().out
    (folder / "penalty.png").write_bytes(b"")
    plot_job.run([plain], folder, None)
    assert "not drawn: penalty.png (no penalty logged; the existing file is older)" in capsys.readouterr().out


def test_a_picture_that_fails_leaves_the_one_before(plain, tmp_path, monkeypatch):
    class Full(Figure):
        def savefig(self, path, **options):
            path.write_bytes(b"half")
            raise OSError("no space left")

    (tmp_path / "losses.png").write_bytes(b"whole")
    monkeypatch.setattr(run_plots, "plot_losses", lambda runs: Full())
    with pytest.raises(OSError, match="no space left"):
        plot_job.run([plain], tmp_path, None)
    assert (tmp_path / "losses.png").read_bytes() == b"whole"
    assert contents(tmp_path) == ["losses.png", "plain", f"plain/{LOG_NAME}"]


def test_how_a_run_stands(tmp_path):
    lines = [
        loss_line(10, 2.0),
        {"kind": "divergence", "step": 10, "text": "a loss of 9", "action": "rollback"},
        {"kind": "alarm", "step": 10, "layer": 0, "text": "layer 0: 2 of 2 heads below 5 % of the maximum entropy"},
        entropy_line(1500, [[0.0, 0.0], [0.0, 4.0]], maximum=4.0),
        loss_line(1500, float("nan")),
    ]
    log = plot_job.RunLog.load(write_log(tmp_path / "run", run_line("SM"), *lines))
    assert plot_job.list_rows(plot_job.COLUMNS, [log])[0] == (
        *("run\n SM", "1,500", "nan", "", "1.00", "75%", "25%", "1", "1,500\n1 x back"),
    )
    log = plot_job.RunLog.load(write_log(tmp_path / "run", run_line("SM")))
    assert plot_job.list_rows(plot_job.COLUMNS, [log])[0] == ("run\n SM", "0", "", "", "", "", "", "0", "")


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        (["nowhere"], {}, "There is no .*nowhere"),
        (["proposal", "plain", "proposal/"], {}, "proposal is given twice"),
        (["proposal"], {"steps": "0,soon"}, "--steps 0,soon: 'soon' is not a step"),
        (["proposal"], {"steps": ""}, "'' is not a step"),
        (["proposal"], {"steps": "-1"}, "'-1' is not a step"),
        (["proposal"], {"output": f"plain/{LOG_NAME}"}, "is not a writable folder"),
        (["proposal"], {"output": f"plain/{LOG_NAME}/new"}, "is not a writable folder"),
        (["proposal", "damaged"], {}, "line 2 is damaged"),
        (["begun"], {}, "nothing is logged yet"),
    ],
)
def test_what_can_not_be_done_is_told_and_nothing_is_written(runs, options, message, proposal, plain, tmp_path):
    write_log(tmp_path / "damaged", run_line(), '{"kind": "log', loss_line(1))
    write_log(tmp_path / "begun", run_line())
    before = contents(tmp_path)
    output = Path(options["output"]) if "output" in options else None
    with pytest.raises(UserError, match=message):
        plot_job.run([Path(run) for run in runs], output, options.get("steps"))
    assert contents(tmp_path) == before


def test_misuse_is_one_line(tmp_path):
    process = run("nowhere", folder=tmp_path)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("entropy-gpt: There is no nowhere. Give the folder of a training run")
    assert process.stdout == ""
    assert contents(tmp_path) == []
