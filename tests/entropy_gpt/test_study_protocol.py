"""The study's protocol: what it asks for, and what waits for what."""

import pytest

from entropy_gpt.commands.study import ARCHITECTURES, LADDER, SCALING, find_protocol
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.programs.study.page import LADDER_RECORD, RECORD, SCALING_RECORD
from entropy_gpt.programs.study.protocol import Run, read_protocol, resolve
from entropy_gpt.programs.study.records import ANSWERED, CONVERTED, TIMED, TRAINED, Study
from tests.entropy_gpt.study.example_study import make_run


SMALL = """
dataset: python-stdlib
vocabulary: 300
test: {}
trained: {max_steps: 10, context: 8, n_layer: 2}
converted: {heal_steps: 5}
answered: {length: 8}
groups:
  rates:
    notation: [SM+LN+G, SM]
    learning_rate: [1e-3, 2e-3]
    seed: 0
  ladder:
    notation: [SM+LN+G, SM]
    learning_rate: {best_in: rates}
    seed: [0, 1]
  converted:
    convert: {group: ladder, notation: SM+LN+G}
    notation: SM
    seed: [0, 1]
  answered:
    answer: {group: ladder}
    notation: SM
    seed: 0
"""


@pytest.fixture
def protocol(tmp_path):
    (tmp_path / "protocol.yaml").write_text(SMALL)
    return read_protocol(tmp_path / "protocol.yaml")


def finish(run: Run, nats: float | None):
    """The run as if it had been measured."""
    result = make_run(run.settings["notation"], nats)
    result.name = run.name
    return result


def rates(protocol, losses: dict[tuple[str, float], float | None]):
    """Measured runs of the first group, by notation and learning rate."""
    runs = [run for row, run in zip(protocol.rows, resolve(protocol.rows, {}), strict=True) if row.group == "rates"]
    found = {run.name: finish(run, losses[run.settings["notation"], run.settings["learning_rate"]]) for run in runs}
    assert len(found) == 4
    return found


def test_lists_are_crossed_and_kinds_have_their_own_settings(protocol):
    assert [row.group for row in protocol.rows].count("ladder") == 4
    assert {row.kind for row in protocol.rows} == {TRAINED, CONVERTED, ANSWERED}
    assert all(row.settings["max_steps"] == 10 for row in protocol.rows if row.kind == TRAINED)
    assert {row.settings["seed"] for row in protocol.rows if row.kind == CONVERTED} == {0, 1}


def test_a_learning_rate_waits_until_all_its_rivals_are_measured(protocol):
    finished = rates(protocol, {("SM+LN+G", 1e-3): 3.0, ("SM+LN+G", 2e-3): 2.0, ("SM", 1e-3): 4.0, ("SM", 2e-3): 5.0})
    runs = resolve(protocol.rows, finished)
    chosen = {
        (row.settings["notation"], row.settings["seed"]): run.settings["learning_rate"]
        for row, run in zip(protocol.rows, runs, strict=True)
        if row.group == "ladder"
    }
    assert chosen == {("SM+LN+G", 0): 2e-3, ("SM+LN+G", 1): 2e-3, ("SM", 0): 1e-3, ("SM", 1): 1e-3}
    finished.popitem()
    runs = resolve(protocol.rows, finished)
    assert [run is None for row, run in zip(protocol.rows, runs, strict=True) if row.group == "ladder"].count(
        True
    ) == 2


def test_what_diverged_is_not_chosen(protocol):
    losses = {("SM+LN+G", 1e-3): 3.0, ("SM+LN+G", 2e-3): None, ("SM", 1e-3): None, ("SM", 2e-3): 5.0}
    runs = resolve(protocol.rows, rates(protocol, losses))
    chosen = {run.settings["notation"]: run.settings["learning_rate"] for run in runs[4:8]}
    assert chosen == {"SM+LN+G": 1e-3, "SM": 2e-3}


def test_the_same_settings_are_the_same_run(protocol):
    losses = dict.fromkeys((name, rate) for name in ("SM+LN+G", "SM") for rate in (1e-3, 2e-3))
    finished = rates(protocol, losses | {("SM+LN+G", 1e-3): 1.0, ("SM", 2e-3): 1.0})
    runs = resolve(protocol.rows, finished)
    of_ladder = [run.name for row, run in zip(protocol.rows, runs, strict=True) if row.group == "ladder"]
    assert len(set(of_ladder)) == 4
    assert len([name for name in of_ladder if name in finished]) == 2, "seed 0 was trained to choose the rate"


def test_models_come_from_the_row_of_the_same_seed(protocol):
    losses = dict.fromkeys(((name, rate) for name in ("SM+LN+G", "SM") for rate in (1e-3, 2e-3)), 1.0)
    runs = resolve(protocol.rows, rates(protocol, losses))
    by_name = {run.name: run for run in runs}
    sources = {run.settings["seed"]: by_name[run.source] for run in runs if run.kind == CONVERTED}
    assert {seed: (run.settings["notation"], run.settings["seed"]) for seed, run in sources.items()} == {
        0: ("SM+LN+G", 0),
        1: ("SM+LN+G", 1),
    }
    (answered,) = (run for run in runs if run.kind == ANSWERED)
    assert by_name[answered.source].settings["notation"] == "SM"


def test_what_a_group_depends_on_is_selected_with_it(protocol):
    assert {row.group for row in protocol.select(["answered"])} == {"rates", "ladder", "answered"}
    rows = [row for row in protocol.select(["answered"]) if row.group == "rates"]
    assert {row.settings["notation"] for row in rows} == {"SM"}
    both = {row.group for row in protocol.select(["conv", "answered"])}
    assert both == {*(row.group for row in protocol.select(["conv"])), "answered"}
    with pytest.raises(UserError, match="--only conversions: no group's name begins like that"):
        protocol.select(["ladder", "conversions"])


@pytest.mark.parametrize(
    "change, message",
    [
        (("vocabulary: 300\n", ""), "vocabulary is missing or not known"),
        (("groups:", "colour: blue\ngroups:"), "colour is missing or not known"),
        (("group: ladder, notation: SM+LN+G", "group: lader, notation: SM+LN+G"), "0 rows before it are in .*'lader'"),
        (("best_in: rates", "best_in: rates, n_layer: 3"), "group ladder: 0 rows before it are in the group 'rates'"),
        (("group: ladder, notation: SM+LN+G", "group: rates, notation: SM+LN+G"), "2 rows before it"),
        (("best_in: rates", "best: rates"), "group ladder: {'best': 'rates'} lacks best_in"),
        (("groups:", "groups: 3\nothers:"), "others is missing or not known"),
        (("  rates:", "  rates: 1\n  others:"), "group rates is 1"),
        (("max_steps: 10", "max_steps: [1"), "is no YAML"),
    ],
)
def test_a_protocol_that_is_not_understood_is_refused(tmp_path, change, message):
    assert change[0] in SMALL
    (tmp_path / "protocol.yaml").write_text(SMALL.replace(*change, 1))
    with pytest.raises(UserError, match=message):
        read_protocol(tmp_path / "protocol.yaml")


CASES = """
dataset: python-packages
vocabulary: 300
test: {}
transfer: {}
trained: {max_steps: 10, context: 8, n_layer: 2, resid_pdrop: 0.0, n_embd: 8}
converted: {}
answered: {}
groups:
  pace:
    time: true
    cases: &rows [{notation: SM}, {notation: SM, resid_pdrop: 0.1}]
  rates:
    cases: *rows
    learning_rate: [1e-3, 2e-3]
    seed: 0
  more:
    cases: *rows
    learning_rate: {best_in: rates}
    max_steps: [10, 20]
    seed: 0
"""


def test_cases_are_settings_that_go_together(tmp_path):
    (tmp_path / "protocol.yaml").write_text(CASES)
    protocol = read_protocol(tmp_path / "protocol.yaml")
    cases = {(row.settings["resid_pdrop"], row.settings["learning_rate"]) for row in protocol.rows[2:6]}
    assert cases == {(0.0, 1e-3), (0.0, 2e-3), (0.1, 1e-3), (0.1, 2e-3)}
    runs = resolve(protocol.rows, {})
    nats = {(0.0, 1e-3): 1.0, (0.0, 2e-3): 2.0, (0.1, 1e-3): 4.0, (0.1, 2e-3): 3.0}
    finished = {
        run.name: finish(run, nats[run.settings["resid_pdrop"], run.settings["learning_rate"]]) for run in runs[2:6]
    }
    later = resolve(protocol.rows, finished)[6:]
    chosen = [(run.settings["resid_pdrop"], run.settings["learning_rate"]) for run in later]
    assert chosen == [(0.0, 1e-3), (0.1, 2e-3)] * 2, "each case has the rate that is best for it"


def test_steps_are_timed_once_for_all_rates_and_lengths(tmp_path):
    (tmp_path / "protocol.yaml").write_text(CASES)
    protocol = read_protocol(tmp_path / "protocol.yaml")
    timed = {run.name for run in resolve(protocol.rows, {})[:2]}
    assert [row.kind for row in protocol.rows[:3]] == [TIMED, TIMED, TRAINED]
    assert len(timed) == 2 and {row.timed.name for row in protocol.rows[2:]} == timed


def test_the_protocol_of_scaling_compares_all_rows_at_few_tokens_first():
    protocol = read_protocol(find_protocol(SCALING))
    everything = protocol.select()
    rows = [row for row in everything if row.group.startswith("tokens_")]
    steps = [row.steps for row in rows]
    assert steps == sorted(steps)
    assert {count: steps.count(count) for count in steps} == {1000: 21, 3000: 14, 10_000: 7 + 4, 30_000: 4}
    assert {row.timed.name for row in rows} == {row.timed.name for row in everything if row.group == "pace"}


def test_runs_that_choose_a_rate_are_counted_nowhere_else():
    rows = read_protocol(find_protocol(SCALING)).rows
    tuning = {row.settings["seed"] for row in rows if "rates" in row.group and row.kind == TRAINED}
    counted = {row.settings["seed"] for row in rows if "tokens_" in row.group or row.group.startswith("larger")}
    assert tuning and not tuning & counted


def test_the_ladder_trains_what_the_study_trained_as_the_same_run():
    rows = read_protocol(find_protocol(LADDER)).rows
    baseline = {run.name for run in Study.load(RECORD).group("warm_ladder") if run.notation == "SM+LN+G"}
    runs = [run.name for row, run in zip(rows, resolve(rows, {}), strict=True) if row.group == "norm"]
    assert baseline == set(runs[::2]) and not baseline & set(runs[1::2])


def test_the_ladder_has_each_function_in_each_architecture_with_as_many_seeds():
    rows = [row for row in read_protocol(find_protocol(LADDER)).select() if row.kind == TRAINED]
    seeds: dict[tuple, set] = {}
    for row in rows:
        key = (row.settings["notation"], row.settings.get("log_sum_coefficient", 0))
        seeds.setdefault(key, set()).add(row.settings["seed"])
    architectures = ("{}(t_h)+ScFuFFN", "{}+LN+G", "EReg({}(t_h)+ScFuFFN)")
    functions = [("SM", 0), *((function, 1e-3) for function in ("SM", "Pow4", "Pow2", "ClSM"))]
    wanted = {(each.format(function), weight) for each in architectures for function, weight in functions}
    assert seeds == {each: {0, 1, 2} for each in wanted}


def test_the_list_of_packages_is_part_of_what_runs_share(tmp_path, monkeypatch):
    (tmp_path / "protocol.yaml").write_text(CASES)
    protocol = read_protocol(tmp_path / "protocol.yaml")
    before = protocol.shared
    monkeypatch.setattr("entropy_gpt.programs.study.protocol.hash_pins", lambda: "sha256:another")
    assert before["pins"] != protocol.shared["pins"] == "sha256:another"
    (tmp_path / "protocol.yaml").write_text(SMALL)
    assert "pins" not in read_protocol(tmp_path / "protocol.yaml").shared


def test_a_protocol_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no\\.yaml can't be read"):
        read_protocol(tmp_path / "no.yaml")


def test_the_committed_protocol_is_what_the_study_says():
    protocol = read_protocol(find_protocol(ARCHITECTURES))
    everything = protocol.select()
    assert not any(row.group.startswith("smoke") for row in everything)
    seeds = {(row.settings["notation"], row.settings["seed"]) for row in everything if row.group == "ladder"}
    assert len(seeds) == 15
    assert {row.group for row in protocol.select(["smoke"])} == {
        *("smoke_training", "smoke_ladder", "smoke_conversion", "smoke_private")
    }
    assert find_protocol(ARCHITECTURES).read_text().startswith("# The study")


def test_the_hash_is_of_what_a_protocol_says(tmp_path):
    path = tmp_path / "protocol.yaml"
    hashes = []
    for text in (SMALL, f"# A comment.\n{SMALL}", SMALL.replace("seed: 0", "seed: 1")):
        path.write_text(text)
        hashes.append(read_protocol(path).hash)
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("name, record", [(ARCHITECTURES, RECORD), (SCALING, SCALING_RECORD), (LADDER, LADDER_RECORD)])
def test_the_committed_records_are_of_the_committed_protocols(name, record):
    assert Study.load(record).protocol == read_protocol(find_protocol(name)).hash
