"""The page of the scaling protocol, out of a record that is made up from known laws, whole and in part."""

import io
import math
import re

import numpy as np
import pytest

from entropy_gpt.evaluation.origin import Origin
from entropy_gpt.programs.study.power_laws import MILLION
from entropy_gpt.programs.study.protocol import timed_settings
from entropy_gpt.programs.study.records import TIMED, Study, StudyRun
from entropy_gpt.programs.study.scaling import Scaling, plot_scaling, scaling_text
from entropy_gpt.programs.study.tables import run_cost

from .example_study import likelihood, make_run, make_study


GPT2, PROPOSAL = "SM+LN+G", "EReg(SM(t_h)+ScFuFFN)"
SEEDS = {1000: 3, 3000: 3, 10_000: 2, 30_000: 1}
# Floor, scale and exponent: the proposal is ahead up to about four million tokens.
LAWS = {(GPT2, 0.0): (1.6, 3.2, 0.3), (GPT2, 0.1): (1.69, 3.0, 0.3), (PROPOSAL, 0.0): (2.1, 2.45, 0.3)}
NOISE = np.random.default_rng(0)


def trained(notation: str, dropout: float, steps: int, seed: int, law, **settings) -> StudyRun:
    """A run whose loss is that of a law, but for a little that its seed makes."""
    floor, scale, exponent = law
    nats = floor + scale * (1024 * steps / MILLION) ** -exponent + NOISE.normal(0, 0.005)
    run = make_run(
        notation,
        nats,
        max_steps=steps,
        seed=seed,
        **{"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout, **settings},
    )
    run.name = f"{notation} {dropout} {steps} {seed} {settings}"
    run.transfer = {"descriptions": likelihood(nats + 2, "descriptions")}
    return run


def timed(run: StudyRun, seconds: float, machine: str = "a machine") -> StudyRun:
    found = StudyRun(f"timed {run.name}", TIMED, timed_settings(run.settings), None, run.notation, run.parameters)
    found.seconds_per_step = found.cpu_seconds_per_step = seconds
    found.origin = Origin(versions={"torch": "2"}, git_revision=None, machine=machine)
    return found


@pytest.fixture(scope="module")
def study() -> Study:
    groups = {
        f"tokens_{steps // 1000}m": [
            trained(notation, dropout, steps, seed, law)
            for (notation, dropout), law in LAWS.items()
            for seed in range(seeds)
        ]
        for steps, seeds in SEEDS.items()
    }
    first = {(run.notation, run.settings["resid_pdrop"]): run for run in groups["tokens_1m"]}
    groups["pace"] = [timed(first[GPT2, 0.0], 0.3), timed(first[GPT2, 0.1], 0.3), timed(first[PROPOSAL, 0.0], 0.2)]
    groups["rates"] = groups["tokens_3m"]
    groups["larger_3m"] = [
        trained(PROPOSAL, 0.0, 3000, 0, (1.7, 2.4, 0.3), n_layer=8, n_embd=384),
    ]
    for run in groups["larger_3m"]:
        run.parameters = 40_000
    for run in groups["tokens_3m"]:
        run.parameters = 20_000 if run.notation == GPT2 else 10_000
    found = make_study(**groups)
    found.missing = {"larger_10m": 3, "smoke_rates": 4}
    return found


@pytest.fixture(scope="module")
def page(study) -> str:
    return scaling_text(study)


def cells(text: str, row: str, table: int = 0) -> list[str]:
    """What stands in a row of one of the tables that have it."""
    lines = [line for line in text.splitlines() if line.startswith(f"| `{row}`")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")[1:]]


def test_gpt2_has_the_dropout_that_is_best_on_validation(study):
    baseline = Scaling(study).baseline
    assert [len(runs) for runs in baseline.values()] == [3, 3, 2, 1]
    dropouts = [{run.settings["resid_pdrop"] for run in runs} for runs in baseline.values()]
    assert dropouts == [{0.1}, {0.1}, {0.1}, {0.0}], "by the laws, dropout costs from 13 million tokens on"


def test_differences_and_crossing_are_those_of_the_laws(page):
    differences = cells(page, PROPOSAL, table=1)
    assert differences[0].startswith("-") and differences[3].startswith("+")
    low, high = map(float, re.search(r"\((\S+) M to (\S+) M\)", differences[4]).groups())
    curves = [np.linspace(1, 30, 3000) ** -0.3 * law[1] + law[0] for law in LAWS.values()]
    crossing = np.linspace(1, 30, 3000)[np.argmax(curves[2] > np.minimum(curves[0], curves[1]))]
    assert differences[4].startswith("up to ")
    assert low <= crossing * 1.15 and crossing / 1.15 <= high, "the lines between the points are not the laws"
    assert differences[6] == "+19.3%"


def test_what_is_predicted_is_what_the_laws_say(study):
    amounts = {group: study.group(group) for group in study.groups if group.startswith("tokens_")}
    plain = {group: [run for run in runs if not run.settings["resid_pdrop"]] for group, runs in amounts.items()}
    differences = cells(scaling_text(make_study(**plain)), PROPOSAL, table=1)
    predicted = re.match(r"(\S+)% \((\S+)% to (\S+)%\)", differences[5])
    low, high = (float(predicted[index]) / 100 for index in (2, 3))
    truth = math.expm1((2.1 + 2.45 * 2100**-0.3) - (1.6 + 3.2 * 2100**-0.3))
    assert low < truth < high


def test_equal_time_gives_the_faster_model_more_tokens(page):
    per_step, *shares = cells(page, PROPOSAL, table=2)
    assert per_step == "200"
    plain = [float(cell.partition("%")[0]) for cell in cells(page, PROPOSAL, table=1)[:3]]
    fast = [float(cell.partition("%")[0]) for cell in shares[:3]]
    assert shares[3] == "", "its curve does not reach as far"
    assert all(share < more for share, more in zip(fast, plain, strict=True))


def test_equal_sizes_lie_between_two_models(study, page):
    scaling = Scaling(study)
    tokens, parameters, _ = cells(page, PROPOSAL, table=3)
    assert tokens == "3.07 M"
    small, (large,) = scaling.rows[PROPOSAL][3_072_000], scaling.larger[PROPOSAL][3_072_000]
    nats = [np.mean([run.test_nats for run in small]), large.test_nats]
    expected = np.mean(nats) - np.mean([run.test_nats for run in scaling.baseline[3_072_000]])
    assert parameters.startswith(f"{math.expm1(expected):+.1%} ("), (
        "20,000 is in the middle of 10,000 and 40,000, as a logarithm"
    )
    assert run_cost(large) > run_cost(small[0])


def test_a_partial_record_says_what_is_not_measured(study, page):
    assert page.startswith("| group | rows not measured yet |\n| --- | ---: |\n| `larger_10m` | 3 |\n\n")
    assert "- Prose: 1,000 tokens of descriptions (descriptions 1.0)." in page
    first = make_study(tokens_1m=study.group("tokens_1m")[:1])
    assert "Nothing can be compared with GPT-2 yet." in scaling_text(first)
    lone = make_study(tokens_1m=[run for run in study.group("tokens_1m") if run.settings["seed"] == 0])
    text = scaling_text(lone)
    assert re.fullmatch(r"[-+]\d+\.\d%", cells(text, PROPOSAL, table=1)[0]), "one seed each has no interval"
    assert "nan" not in text and "The fitted laws" not in text
    two = make_study(tokens_1m=study.group("tokens_1m"), tokens_3m=study.group("tokens_3m"))
    text = scaling_text(two)
    assert cells(text, PROPOSAL, table=1)[3] == "", "nothing is predicted from two numbers of tokens"


def test_seeds_that_diverged_are_counted_in_the_open(study):
    groups = {group: study.group(group) for group in study.groups if group.startswith("tokens_")}
    lost = make_run(PROPOSAL, None, max_steps=1000, seed=7, resid_pdrop=0.0)
    lost.tokens = 100  # where it ended
    alone = make_run(PROPOSAL, None, max_steps=50_000, seed=0, resid_pdrop=0.0)
    text = scaling_text(make_study(**groups | {"tokens_1m": [*groups["tokens_1m"], lost], "tokens_50m": [alone]}))
    quality = cells(text, PROPOSAL)
    assert quality[0].endswith("(1 of 4 diverged)") and quality[4] == "diverged"
    assert cells(text, PROPOSAL, table=1)[4] == ""


def test_a_difference_that_was_not_measured_is_not_shown(study):
    groups = {group: study.group(group) for group in study.groups if group.startswith("tokens_")}
    groups["tokens_3m"] = [run for run in groups["tokens_3m"] if run.notation == GPT2]
    differences = cells(scaling_text(make_study(**groups)), PROPOSAL, table=1)
    assert differences[0] and differences[1] == "" and differences[2]


def test_steps_that_were_timed_on_two_machines_are_not_compared(study):
    groups = {group: study.group(group) for group in study.groups if group != "pace"}
    first = {(run.notation, run.settings["resid_pdrop"]): run for run in groups["tokens_1m"]}
    pace = [timed(first[GPT2, 0.1], 0.3), timed(first[PROPOSAL, 0.0], 0.2, "another machine")]
    text = scaling_text(make_study(**groups, pace=pace))
    assert cells(text, PROPOSAL, table=2)[:3] == ["", "", ""]
    assert "another machine" in text


def test_pictures_are_drawn_of_whole_and_partial_records(study):
    for record in (
        study,
        make_study(tokens_1m=[run for run in study.group("tokens_1m") if run.settings["seed"] == 0]),
    ):
        figure = plot_scaling(Scaling(record))
        labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert labels == [GPT2, PROPOSAL]
        figure.savefig(io.BytesIO(), format="svg")
