"""Logs of runs: whole, going on, cut, damaged, gone back and diverged."""

import json
import math

import pytest

from entropy_gpt.evaluation.records.run_log import LOG_NAME, RunLog, run_titles


NOTATION = "EReg(SM(t)+ScFuFFN)"


def run_line(notation=NOTATION, layers=2, heads=2, **changes):
    return {
        "kind": "run",
        "schema_version": 1,
        "notation": notation,
        "config": {"n_layer": layers, "n_head": heads, "entropy_tolerance": 0.2, "entropy_maximum": "context"},
        "parameters": 480024,
        "max_steps": 40,
        "tokens_per_step": 64,
        "context": 16,
        "seed": 0,
        "versions": {},
        "git_revision": None,
        "machine": "a machine",
        **changes,
    }


def loss_line(step, loss=3.0, **figures):
    return {"kind": "log", "step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0, **figures}


def penalty_line(step, loss=3.0):
    return loss_line(step, loss + 0.1, cross_entropy_loss=loss, entropy_loss=0.1, penalized_share=0.5)


def evaluation_line(step, loss=2.5):
    return {"kind": "log", "step": step, "eval_loss": loss}


def entropy_line(step, entropies=((1.0, 0.5), (0.05, 1.8)), maximum=1.9, **figures):
    layers, heads = len(entropies), len(entropies[0])
    plain = dict.fromkeys(("thresholds", "temperatures", "alpha", "beta", "residual_scale"))
    shaped = {
        "thresholds": [[0.3 + 0.1 * layer] * heads for layer in range(layers)],
        "temperatures": [[0.01 * (1 + step)] * heads] * layers,
        "alpha": [1.0 + 0.1 * step] * (layers - 1) + [None],
        "beta": [1.0] * (layers - 1) + [None],
        "residual_scale": [1.0 + layer for layer in range(layers)],
    }
    figures = {name: shaped[name] if value is True else value for name, value in figures.items()}
    record = {"kind": "entropy", "step": step, "entropies": entropies, "maximum": maximum, "context_maximum": 2.77}
    return {**record, **plain, **figures}


ALL_FIGURES = dict.fromkeys(("thresholds", "temperatures", "alpha", "beta", "residual_scale"), True)


def write_log(folder, *lines, end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / LOG_NAME).write_text(text + end)
    return folder


def load(folder, *lines, **options):
    return RunLog.load(write_log(folder, *lines, **options))


def test_everything_is_read(tmp_path):
    log = load(
        tmp_path,
        run_line(),
        entropy_line(0, **ALL_FIGURES),
        loss_line(10, 4.0),
        penalty_line(20, 3.0),
        {"kind": "log", "step": 20, "epoch": 0.5},
        evaluation_line(20, 2.5),
        {"kind": "alarm", "step": 20, "layer": 1, "text": "layer 1: 1 of 2 heads below 5 % of the maximum entropy"},
    )
    assert log == RunLog.load(tmp_path / LOG_NAME)
    assert log.description.notation == NOTATION
    assert [(record.step, record.cross_entropy) for record in log.training] == [(10, 4.0), (20, 3.0)]
    assert log.training[1].penalized_share == 0.5
    (evaluation,) = log.evaluations
    assert (evaluation.step, evaluation.loss) == (20, 2.5)
    assert evaluation.perplexity == pytest.approx(math.exp(2.5))
    (record,) = log.entropies
    assert record.headwise_entropy.maximum == 1.9
    assert record.learned["alpha"][0] == 1
    assert math.isnan(record.learned["alpha"][1])
    assert [alarm.layer for alarm in log.alarms] == [1]
    assert (log.last_step, log.diverged_at, log.place) == (20, None, tmp_path)


@pytest.mark.parametrize("cut", ['{"kind": "log", "step": 20, "lo', "{", '{"kind": "log", "step": 20, "loss": 3.0'])
def test_a_last_line_that_is_cut_counts_as_not_written(cut, tmp_path):
    log = load(tmp_path, run_line(), loss_line(10), cut, end="")
    assert [record.step for record in log.training] == [10]


def test_a_last_line_without_its_end_counts_if_it_is_whole(tmp_path):
    log = load(tmp_path, run_line(), loss_line(10), loss_line(20), end="")
    assert [record.step for record in log.training] == [10, 20]


def test_a_character_that_is_cut_is_a_cut_line(tmp_path):
    write_log(tmp_path, run_line())
    with (tmp_path / LOG_NAME).open("ab") as file:
        file.write('{"kind": "alarm", "text": "é'.encode()[:-1])
    assert RunLog.load(tmp_path).alarms == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "log", "st', "line 2 is damaged"),
        ("", "line 2 is damaged"),
        ("[]", "line 2 is damaged: no JSON object"),
        ({"kind": "log"}, "step is None, which is no number"),
        (loss_line(-1), "step is -1, which is no whole number"),
        (loss_line(10, "low"), "loss is 'low', which is no number"),
        (run_line(), "step is None"),
        (entropy_line(1, [[1.0, 1.0]]), "entropies is not 2 x 2 numbers"),
        (entropy_line(1, alpha=[1.0]), "alpha is not 2 numbers"),
        (entropy_line(1, thresholds=[0.5, 0.5]), "thresholds is not 2 x 2 numbers"),
        ({"kind": "divergence", "step": 1, "text": "", "action": "pray"}, "action 'pray' is none of stop, rollback"),
    ],
)
def test_damage_elsewhere_is_named_with_its_line(line, message, tmp_path):
    write_log(tmp_path, run_line(), line, loss_line(20))
    with pytest.raises(ValueError, match=r"training_log\.jsonl, line 2 is damaged: .*Delete this line") as error:
        RunLog.load(tmp_path)
    assert message in str(error.value)
    # A last line is damaged too if it is not just cut.
    write_log(tmp_path, run_line(), line)
    with pytest.raises(ValueError, match="line 2 is damaged"):
        RunLog.load(tmp_path)


@pytest.mark.parametrize(
    ("lines", "end", "message"),
    [
        ([], "", "is empty. The run has not begun"),
        (['{"kind": "ru'], "", "is empty. The run has not begun"),
        ([loss_line(1)], "\n", "line 1 is damaged: it does not describe the run"),
        ([run_line(schema_version=2)], "\n", "line 1: schema version 2, where 1 is read"),
        ([run_line(config={"n_head": 2})], "\n", "line 1 is damaged: n_layer is None"),
        ([run_line(notation=None)], "\n", "line 1 is damaged: notation is None"),
    ],
)
def test_files_that_are_no_such_logs_are_refused(lines, end, message, tmp_path):
    write_log(tmp_path, *lines, end=end)
    with pytest.raises(ValueError, match=r"training_log\.jsonl") as error:
        RunLog.load(tmp_path)
    assert message in str(error.value)


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There is no .*training_log\.jsonl\. Give the folder"):
        RunLog.load(tmp_path)


def test_steps_are_counted_on_after_a_rollback(tmp_path):
    log = load(
        tmp_path,
        run_line(),
        loss_line(10),
        {"kind": "divergence", "step": 15, "text": "a loss of 30", "action": "rollback"},
        {"kind": "rumour", "step": 16},
        loss_line(20, 1.0),
    )
    assert [record.step for record in log.training] == [10, 20]
    assert (log.rollbacks, log.diverged_at) == ([15], None)


@pytest.mark.parametrize(
    ("losses", "diverged_at"),
    [
        ([1.0, math.nan, math.inf], 20),
        ([1.0, math.nan, 2.0], None),
        ([math.inf], 10),
        ([1.0, 1.0], None),
    ],
)
def test_a_run_has_diverged_if_no_loss_is_finite_any_more(losses, diverged_at, tmp_path):
    lines = [loss_line(10 * number, loss) for number, loss in enumerate(losses, 1)]
    assert load(tmp_path, run_line(), *lines).diverged_at == diverged_at
    stop = {"kind": "divergence", "step": 7, "text": "loss is nan", "action": "stop"}
    assert load(tmp_path, run_line(), *lines, stop).diverged_at == 7


def test_the_nearest_record_stands_for_a_step(tmp_path):
    log = load(tmp_path, run_line(), *(entropy_line(step) for step in (0, 10, 20)))
    assert [log.nearest_entropies(step).step for step in (0, 4, 5, 6, 19, 500)] == [0, 0, 0, 10, 20, 20]


def test_runs_of_one_architecture_are_told_apart(tmp_path):
    places = {"a": "SM", "b": "SM", "c": NOTATION, "x/d": "SM+G", "y/d": "SM+G"}
    runs = [load(tmp_path / place, run_line(notation)) for place, notation in places.items()]
    assert run_titles(runs) == [
        "SM (a)",
        "SM (b)",
        NOTATION,
        f"SM+G ({tmp_path / 'x' / 'd'})",
        f"SM+G ({tmp_path / 'y' / 'd'})",
    ]
