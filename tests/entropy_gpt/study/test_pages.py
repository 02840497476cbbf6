"""The study's tables, pictures and page, of made-up runs and of those that are committed."""

import copy
import itertools
import math
import shutil

import pytest

from entropy_gpt.programs.study.page import (
    CARDS,
    PAGE,
    PICTURES,
    PRIVATE,
    README,
    RECORD,
    gain_text,
    list_conditions,
    study_page,
    write,
    write_cards,
)
from entropy_gpt.programs.study.pictures import find_crossing
from entropy_gpt.programs.study.records import Study
from entropy_gpt.programs.study.tables import (
    conversion_table,
    gpt2_bytes,
    ladder_table,
    list_trained,
    order_table,
    others_table,
    parts_table,
    rates_table,
    readme_table,
    settings_table,
    ways_table,
)
from tests.evaluation.example_results import example_cost

from .example_study import make_run, make_study


BASELINE = [make_run("SM+LN+G", nats, seed=seed) for seed, nats in enumerate((3.0, 3.1, 3.2))]
FUSED = [make_run("SM+ScFuFFN", nats, seed=seed) for seed, nats in enumerate((3.2, 3.3, 3.4))]
TEMPERED = [make_run("SM(t)+ScFuFFN", nats, seed=seed) for seed, nats in enumerate((3.2, 3.3, 3.4))]
PROPOSAL = [make_run("EReg(SM(t)+ScFuFFN)", nats, seed=seed) for seed, nats in enumerate((3.1, 3.2, 3.3))]
LADDER = [*BASELINE, *FUSED, *TEMPERED, *PROPOSAL]


def row(table: str, beginning: str) -> list[str]:
    """The cells of the one row with this beginning."""
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {beginning} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def warmed(run):
    """The same with a longer warm-up, and 0.1 nats better."""
    settings = {name: value for name, value in run.settings.items() if name != "notation"}
    return make_run(run.notation, run.test_nats - 0.1, **settings | {"warmup_steps": 0.2})


def test_the_ladder_holds_each_architecture_against_the_baseline():
    table = ladder_table(make_study(ladder=LADDER), "ladder")
    cells = row(table, "`SM+ScFuFFN`")
    assert cells[2] == f"{math.exp(2.3):.2f} ± {math.exp(2.3) * 0.1:.2f}"
    assert cells[3] == f"{math.exp(3.3):.2f} ± {math.exp(3.3) * 0.1:.2f}"
    assert cells[4:6] == [f"{math.exp(0.2) - 1:+.1%}", f"{3.48 / 2.69 - 1:+.1%}"]
    assert cells[7:9] == ["2.38", "50%"]
    assert float(row(table, "`SM+LN+G`")[-1]) > 2 * float(cells[-1])


def test_seeds_that_diverged_are_told():
    study = make_study(ladder=[*BASELINE, make_run("SM+ScFuFFN", None), *FUSED[1:]])
    table = ladder_table(study, "ladder")
    nats = math.exp(3.35)
    expected = f"{nats:.2f} ± {nats * math.sqrt(0.005):.2f} (1 of 3 diverged)"
    assert row(table, "`SM+ScFuFFN`")[3] == expected
    assert row(table, "`SM+ScFuFFN`")[4] == "", "the seeds that are left may be the easy ones"
    study = make_study(ladder=BASELINE, others=[make_run("SM", None)])
    assert row(others_table(study, ["others"]), "`SM`")[1::7] == ["diverged", "the loss is nan"]


def test_orders_hold_beyond_the_spread_alone():
    runs = [*BASELINE, *(make_run("SM+LN+R", nats, seed=seed) for seed, nats in enumerate((3.01, 3.11, 3.21)))]
    worse = [make_run("SM+R", 3.0), make_run("SM+ScFuFFN", 9.0), make_run("SM+ScFuFFN", 9.1, seed=1)]
    table = order_table(make_study(ladder=[*runs, *worse[1:]], others=worse[:1]), ("others", "ladder"))
    verdicts = [line.rsplit("|", 2)[1].strip() for line in table.splitlines()[2:]]
    assert verdicts == ["undecided", "one seed: no", "one seed: yes"]
    diverged = [make_run("SM+ScFuFFN", None, seed=seed) for seed in range(3)]
    table = order_table(make_study(ladder=[*BASELINE, *diverged]), ("ladder",))
    assert table.splitlines()[2].endswith("| diverged |  | diverged |")


def test_rates_are_told_with_those_at_which_models_diverge():
    runs = [make_run("SM", 3.0, learning_rate=1e-3), make_run("SM", None, learning_rate=2e-3)]
    table = rates_table(make_study(rates=[*runs, make_run("SM+R", 3.1, learning_rate=2e-3)]), "rates")
    assert table.splitlines()[0] == "| architecture | 0.001 | 0.002 |"
    assert row(table, "`SM`")[1:] == [f"{math.exp(2.0):.2f}", "diverged"]
    assert row(table, "`SM+R`")[1:] == ["", f"{math.exp(2.1):.2f}"]


def test_parts_are_told_with_the_seeds_that_diverged():
    seeds = [make_run("SM(t)+LN+G", nats, seed=seed) for seed, nats in enumerate((3.0, None))]
    single = [make_run("SM", None), make_run("SM+R", 3.1, seed=1, n_layer=7)]
    table = parts_table(make_study(ladder=LADDER, parts=seeds, stability=single), ("parts", "stability"), "ladder")
    assert row(table, "`SM(t)+LN+G`")[1:6] == ["0.001", "", "2", f"{math.exp(3.0):.2f} (1 of 2 diverged)", ""]
    assert row(table, "`SM`")[4:] == ["diverged", "", "", ""]
    assert row(table, "`SM+R`")[2:6] == ["n_layer 7", "1", f"{math.exp(3.1):.2f}", "+0.0%"]


def test_what_a_setting_does_stands_beside_it():
    runs = [make_run("EReg(SM(t)+ScFuFFN)", 3.0, entropy_tolerance=value) for value in (0.0, 0.2)]
    cells = row(
        settings_table(make_study(tolerance=runs), {"tolerance": "entropy_tolerance"}), "entropy_tolerance | 0.2"
    )
    assert cells[2] == f"{math.exp(3.0):.2f}"


def test_conversions_are_told_with_the_tokens_of_their_teachers():
    converted = [
        make_run("EReg(SM(t)+ScFuFFN)", 3.0, run, heal_steps=50, seed=run.settings["seed"]) for run in BASELINE
    ]
    longer = [make_run("EReg(SM(t)+ScFuFFN)", 3.1, max_steps=150)]
    teacher = make_run("SM+LN+G", 2.9, max_steps=200)
    better = [make_run("EReg(SM(t)+ScFuFFN)", 2.9, teacher, heal_steps=50)]
    groups = {"conversion": converted, "scratch": longer, "scratch_baseline": [teacher], "conversion_teacher": better}
    table = conversion_table(make_study(ladder=LADDER, **groups))
    beginning = "| EReg(SM(t)+ScFuFFN) from SM+LN+G | 0.001 |"
    assert f"{beginning} {50 * 1024:,} | {150 * 1024:,} | 3 |" in table
    assert f"{beginning} {50 * 1024:,} | {250 * 1024:,} | 1 |" in table
    assert f"| EReg(SM(t)+ScFuFFN), from scratch | 0.001 | {150 * 1024:,} | {150 * 1024:,} | 1 |" in table
    diverged = make_run("EReg(SM(t)+ScFuFFN)", None, BASELINE[0], heal_steps=50)
    table = conversion_table(make_study(ladder=LADDER, conversion=[diverged]))
    assert row(table, "EReg(SM(t)+ScFuFFN) from SM+LN+G")[2:6] == ["", "", "1", "diverged"]


def test_ways_of_conversion_are_told_apart():
    told = {"heal_steps": 10, "distill": True}
    runs = [make_run("EReg(SM(t)+ScFuFFN)", 3.0, BASELINE[0], **told, naive=naive) for naive in (True, False)]
    faster = make_run(
        "EReg(SM(t)+ScFuFFN)", 2.9, BASELINE[0], **told | {"heal_steps": 5}, naive=False, learning_rate=2e-3
    )
    study = make_study(conversion_ways=runs, conversion_rate=[runs[1], faster])
    lines = ways_table(study, ("conversion_ways", "conversion_rate")).splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split("|")][:4] for line in lines] == [
        ["5", "yes", "each step", "0.002"],
        ["10", "yes", "nothing", "0.001"],
        ["10", "yes", "each step", "0.001"],
    ]


def test_the_crossing_lies_between_two_amounts_of_healing():
    def seeds(nats: float, *source, **settings):
        differences = (-0.01, 0.0, 0.01)
        return [
            make_run(PROPOSAL[0].notation, nats + d, *source, seed=s, **settings) for s, d in enumerate(differences)
        ]

    scratch = [seeds(3.0)]
    converted = [
        seeds(nats, BASELINE[0], heal_steps=steps) for steps, nats in ((10, 3.3), (20, 3.1), (40, 2.9), (80, 2.7))
    ]
    tokens, nats = find_crossing(scratch, converted)
    assert (tokens / 1024, nats) == (pytest.approx(30), pytest.approx(3.0))
    assert find_crossing(scratch, converted[:2]) is None
    assert find_crossing(scratch, [converted[1], seeds(2.99, BASELINE[0], heal_steps=40)]) is None, "within the error"
    # By the seeds that all have, of which the first two are the better ones; one is none to tell an error by.
    tokens, nats = find_crossing(scratch, [converted[1][:2], *converted[2:]])
    assert (tokens / 1024, nats) == (pytest.approx(30), pytest.approx(2.995))
    assert find_crossing(scratch, [converted[1][:1], *converted[2:3]]) is None


def test_what_answered_privately_shows_what_it_took():
    other, answered = make_run("SM+R", 3.2), make_run("SM+R", 3.2, max_steps=1)
    answered.source, answered.cost = other.name, example_cost(total_bytes=12_340_000)
    smaller = make_run("SM", 3.2, max_steps=1)
    smaller.source, smaller.cost = other.name, example_cost(total_bytes=1)
    others = [other, make_run("SM", 3.3)]
    study = make_study(ladder=LADDER, others=others, private_others=[answered], smoke_private=[smaller])
    assert [row(others_table(study, ["others"]), name)[-3] for name in ("`SM+R`", "`SM`")] == ["12.3", ""]


def test_prices_fall_with_what_is_left_out():
    assert gpt2_bytes("SM+LN+G") > gpt2_bytes("SM+LN+R") > gpt2_bytes("EReg(SM(t)+ScFuFFN)") > gpt2_bytes("SM+ScFuFFN")


def test_the_page_tells_what_is_missing():
    causes = [make_run("EReg(SM(t)+G)", 3.5)]
    study = make_study(ladder=LADDER, warm_ladder=[warmed(run) for run in LADDER], causes=causes)
    study.missing = {"tolerance": 6, "smoke_private": 2}
    text = study_page(study)
    assert "3 seeds each, and 20% of the steps to warm up.\n" in text
    assert "3 seeds each, and 5% of the steps to warm up.\nThis is" in text
    main, paper = text.split("## With the paper's warm-up")
    assert [row(part, "`SM+LN+G`")[3][:5] for part in (main, paper)] == [
        f"{math.exp(nats):.2f}" for nats in (3.0, 3.1)
    ]
    assert row(main, "`EReg(SM(t)+G)`")[5] == f"{math.expm1(3.5 - 2.9):+.1%}"
    assert "Not measured yet, rows of each group: tolerance (6).\n" in text
    assert "## The main architectures" in text
    assert "## What the penalty" not in text
    for lacking in ([], BASELINE, PROPOSAL, [*BASELINE, make_run("EReg(SM(t)+ScFuFFN)", None)]):
        with pytest.raises(ValueError, match="run --only ladder"):
            study_page(make_study(ladder=lacking, warm_ladder=LADDER))
        with pytest.raises(ValueError, match="--only warm_ladder"):
            study_page(make_study(ladder=LADDER, warm_ladder=lacking))


def test_conditions_name_every_commit_once():
    study = make_study(ladder=LADDER)
    for run, revision in zip(study.runs.values(), itertools.cycle(("a" * 40, "b" * 40))):
        run.validation = copy.deepcopy(run.validation)
        run.validation.conditions.git_revision = revision

    def told():
        return list_conditions(study, "ladder", study.runs.values())[-1]

    assert f"torch 2; commit {'a' * 12} or {'b' * 12}; a machine." in told()
    run.validation.conditions.machine = "another"
    assert f" or {'b' * 12}; a machine; or torch 2; commit " in told()
    assert told().endswith("; another.")
    assert list_conditions(study, "ladder", BASELINE)[-1].endswith("a machine.")


def test_what_the_penalty_is_worth_is_told_with_its_error():
    told = gain_text(make_study(warm=LADDER), "warm")
    assert f"changes that of SM(t)+ScFuFFN by {math.expm1(-0.1):+.1%}, with a standard error of" in told
    assert f"of {math.exp(-0.1) * 0.1 * math.sqrt(2 / 3):.1%}." in told
    one_seed = make_study(warm=[*BASELINE, *FUSED, *TEMPERED, PROPOSAL[0]])
    assert gain_text(one_seed, "warm").endswith("%.") and "nan" not in gain_text(one_seed, "warm")
    diverged = [make_run(run.notation, None) for run in TEMPERED[:1]]
    assert gain_text(make_study(warm=[*BASELINE, *FUSED, *diverged, *PROPOSAL]), "warm") == ""
    told = gain_text(make_study(warm=[*BASELINE, *FUSED, *diverged, *TEMPERED[1:], *PROPOSAL]), "warm")
    assert f"changes that of SM(t)+ScFuFFN by {math.expm1(-0.1):+.1%}" in told
    assert told.endswith("Seeds with which one of them diverged are left out.")


def test_everything_is_drawn(tmp_path):
    converted = [
        make_run("EReg(SM(t)+ScFuFFN)", nats, BASELINE[0], heal_steps=n) for n, nats in ((10, 3.4), (99, 3.0))
    ]
    tolerances = [make_run("EReg(SM(t)+ScFuFFN)", 3.0, entropy_tolerance=value) for value in (0.0, 0.2)]
    tolerances.append(make_run("EReg(SM(t)+ScFuFFN)", None, entropy_tolerance=0.4))
    scratch = [make_run("EReg(SM(t)+ScFuFFN)", 3.1, max_steps=150)]
    others = [make_run("SM+R", 3.2), make_run("SM", None)]
    study = make_study(ladder=LADDER, conversion=converted, scratch=scratch, tolerance=tolerances, others=others)
    warm = make_study(warm_ladder=[warmed(run) for run in LADDER])
    study.runs |= warm.runs
    study.groups |= warm.groups
    study.save(tmp_path / "study.json")
    for page in ("README.md", "study.md"):
        (tmp_path / page).write_text("By hand.\n<!-- study: begin -->\n<!-- study: end -->\nBy hand too.\n")
    write(tmp_path / "study.json", tmp_path / "study.md", tmp_path / "pictures", tmp_path / "README.md")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        *("pareto.png", "others.png", "heads.png", "tolerance.png", "conversion.png")
    }
    for page, table in (("README.md", readme_table), ("study.md", ladder_table)):
        text = (tmp_path / page).read_text()
        assert table(study, "warm_ladder") in text
        assert text.startswith("By hand.\n<!--")
        assert text.endswith("-->\nBy hand too.\n")


def test_the_page_and_the_readme_show_the_committed_record(tmp_path, undrawn):
    for page in (PAGE, README):
        shutil.copy(page, tmp_path)
    write(RECORD, tmp_path / PAGE.name, tmp_path, tmp_path / README.name)
    for page in (PAGE, README):
        assert (tmp_path / page.name).read_text() == page.read_text(), "run: python -m entropy_gpt.programs.study.page"
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in PICTURES.glob("*.png")}


def test_the_cards_of_the_study_are_those_of_its_models(tmp_path):
    write_cards(folder=tmp_path)
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {path.name: path.read_text() for path in CARDS.iterdir()} == fresh, (
        "run: python -m entropy_gpt.programs.study.page"
    )
    study = Study.load(RECORD)
    assert fresh.keys() == {f"{run.source}.md" for run in study.group(*PRIVATE)}


def test_committed_runs_are_of_commits_without_changes():
    measured = list_trained(Study.load(RECORD).runs.values())
    revisions = [(run.cost or run.validation.conditions).git_revision for run in measured]
    assert len(revisions) >= 20
    assert not any(revision.endswith("+changes") for revision in revisions)


def test_records_are_read_back_as_they_were_written(tmp_path):
    study = make_study(ladder=[*LADDER, make_run("SM", None)])
    study.save(tmp_path / "study.json")
    assert Study.load(tmp_path / "study.json") == study
