"""Pictures of runs: the numbers in them, and that none fails on what a run may have left."""

import math

import pytest

from entropy_gpt.evaluation.measuring.entropy_diagnostics import HeadwiseEntropy
from entropy_gpt.evaluation.showing import run_plots
from entropy_gpt.evaluation.showing.run_plots import choose_records
from tests.slow import slow_but

from .test_run_log import ALL_FIGURES, entropy_line, evaluation_line, load, loss_line, penalty_line, run_line


def naive_shares(values, maximum):
    counts = [0, 0, 0, 0]
    for value in values:
        if value < maximum / 4:
            counts[0] += 1
        elif value < maximum / 2:
            counts[1] += 1
        elif value < 3 * maximum / 4:
            counts[2] += 1
        elif value >= 3 * maximum / 4:
            counts[3] += 1
    return [count / len(values) for count in counts]


@pytest.mark.parametrize("maximum", [4.0, 3.878])
def test_shares_are_those_of_a_naive_count_boundaries_included(maximum):
    values = [part * maximum for part in (0, 0.1, 0.25, 0.2499, 0.5, 0.4999, 0.75, 0.7499, 1.0, 1.0001, 0.3, 0.6)]
    entropy = HeadwiseEntropy([values[:6], values[6:]], maximum)
    assert entropy.range_shares() == naive_shares(values, maximum)
    assert sum(entropy.range_shares()) == pytest.approx(1)
    assert entropy.overloaded_share == 3 / 12
    assert entropy.range_shares(entropy.largest) == naive_shares(values, 1.0001 * maximum)


def test_heads_without_a_value_are_in_no_range():
    entropy = HeadwiseEntropy([[math.nan, 1.0], [3.0, math.nan]], 4.0)
    assert entropy.range_shares() == [0, 0.25, 0, 0.25]
    assert entropy.largest == 3.0
    nothing = HeadwiseEntropy([[math.nan] * 2] * 2, 4.0)
    assert nothing.range_shares(nothing.largest) == [0, 0, 0, 0]


def test_collapsed_heads_are_below_a_twentieth_of_the_maximum():
    assert HeadwiseEntropy([[0.0, 0.1999], [0.2, 4.0]], 4.0).collapsed_share == 0.5


PLOTS = {
    "losses": run_plots.plot_losses,
    "layers": run_plots.plot_layer_entropies,
    "heads": run_plots.plot_head_entropies,
    "ranges": run_plots.plot_entropy_ranges,
    "thresholds": run_plots.plot_thresholds,
    "penalty": run_plots.plot_penalty,
    "scales": run_plots.plot_scales,
}


@pytest.fixture
def runs(tmp_path):
    """One that went well, one that went back, one that diverged, with entropies that are not finite."""
    nan = [[math.nan] * 3] * 3
    whole = [line for step in (10, 20) for line in (penalty_line(step), evaluation_line(step))]
    return [
        load(tmp_path / "whole", run_line(), *(entropy_line(step, **ALL_FIGURES) for step in (0, 20)), *whole),
        load(
            tmp_path / "back",
            run_line("EReg(SM(t_h)+ScFuFFN+SN(QK+FFN))"),
            entropy_line(10, **ALL_FIGURES),
            penalty_line(10),
            {"kind": "divergence", "step": 10, "text": "a loss of 9", "action": "rollback"},
        ),
        load(
            tmp_path / "cost $a and $b",
            run_line(layers=3, heads=3),
            entropy_line(0, [[1.0] * 3] * 3, **ALL_FIGURES),
            penalty_line(10),
            evaluation_line(10, math.inf),
            penalty_line(20, 1e9),
            entropy_line(30, nan, **{**ALL_FIGURES, "thresholds": nan, "residual_scale": [1.0, math.inf, math.nan]}),
            penalty_line(30, math.nan),
            {"kind": "divergence", "step": 30, "text": "loss is nan", "action": "stop"},
        ),
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("chosen", slow_but([slice(3)], [slice(3), slice(1), slice(1, 2), slice(2, 3)]), ids=str)
@pytest.mark.parametrize("name", PLOTS)
def test_pictures_are_drawn_of_whatever_runs_left(name, chosen, runs, tmp_path):
    """Of all together, and of each alone."""
    path = tmp_path / "picture.png"
    PLOTS[name](runs[chosen]).savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_losses_tell_which_runs_diverged_and_where(runs):
    figure = run_plots.plot_losses(runs)
    (axes,) = figure.axes
    texts = [text.get_text().replace("\n", "") for legend in figure.legends for text in legend.get_texts()]
    assert "EReg(SM(t)+ScFuFFN) (whole)" in texts
    assert "EReg(SM(t_h)+ScFuFFN+SN(QK+FFN)), went back at step 10" in texts
    assert r"EReg(SM(t)+ScFuFFN) (cost \$a and \$b), diverged at step 30" in texts
    assert {"diverged", "went back"} <= {*texts}
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "X"] == [30]
    # A loss of a thousand million would hide all others.
    assert axes.get_ylim()[1] < 5
    assert "the largest loss is 1e+09" in axes.get_title()


def test_the_first_middle_and_last_record_are_chosen_unless_others_are_wanted(tmp_path):
    for count, expected in ((1, [0]), (2, [0, 10]), (3, [0, 10, 20]), (6, [0, 20, 50])):
        log = load(tmp_path, run_line(), *(entropy_line(10 * number) for number in range(count)))
        assert [record.step for record in choose_records(log)] == expected
    assert [record.step for record in choose_records(log, [0, 12, 900])] == [0, 10, 50]


def test_losses_without_a_penalty_are_the_cross_entropy(tmp_path):
    log = load(tmp_path, run_line("SM+LN+G"), loss_line(10, 4.0), entropy_line(10))
    assert log.has_losses
    assert not log.has_penalty
    assert not log.has_thresholds
    assert not run_plots.has_scales(log)
