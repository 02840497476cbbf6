"""The page of the ladder of attention functions, out of a made-up record and out of the committed one."""

import io
import math
import shutil

import pytest

from entropy_gpt.programs.study.ladder import ladder_text, plot_ladder
from entropy_gpt.programs.study.page import LADDER_PAGE, write_ladder
from entropy_gpt.programs.study.records import StudyRun
from entropy_gpt.programs.study.tables import gpt2_cost

from .example_study import make_run, make_study


SOFTMAX, POWER4 = "SM(t_h)+ScFuFFN", "Pow4(t_h)+ScFuFFN"


def seeds(notation: str, *nats: float | None, source: StudyRun | None = None, **settings) -> list[StudyRun]:
    return [make_run(notation, each, source, seed=seed, **settings) for seed, each in enumerate(nats)]


@pytest.fixture
def study():
    weight = {"log_sum_coefficient": 1e-3}
    groups = {
        "fused": [*seeds(SOFTMAX, 3.0, 3.1, 3.2), *seeds(POWER4, 3.02, 3.12, 3.22, **weight)],
        "norm": [*seeds("SM+LN+G", 3.0, 3.2), *seeds("Pow4+LN+G", None, 3.2, **weight)],
        "penalized": seeds(SOFTMAX, 2.95, 3.05, 3.15, **weight),
    }
    of_healing = {"heal_steps": 250, "settings": weight}
    groups["healed"] = [
        *seeds(SOFTMAX, 2.9, source=groups["norm"][0], heal_steps=250),
        *seeds(POWER4, 2.95, source=groups["norm"][0], **of_healing),
    ]
    found = make_study(**groups)
    found.missing = {"functions": 18, "smoke_training": 2}
    return found


def rows(text: str, notation: str) -> list[list[str]]:
    """The cells of all rows of an architecture."""
    lines = [line for line in text.splitlines() if line.startswith(f"| `{notation}` |")]
    return [[cell.strip() for cell in line.strip("|").split("|")[1:]] for line in lines]


def test_functions_are_held_against_softmax_without_and_with_their_penalty(study):
    text = ladder_text(study)
    scratch, healed, cost = rows(text, POWER4)
    assert scratch[0:2] == ["0.001", "3"]
    assert [cell.split(" ± ")[0] for cell in scratch[4:]] == [f"{math.expm1(each):+.1%}" for each in (0.02, 0.07)]
    error = math.exp(0.02) * math.sqrt(2 / 3) * 0.1
    assert scratch[4].endswith(f" ± {error:.1%}")
    assert healed[4:] == [f"{math.expm1(0.05):+.1%}", ""], (
        "one seed has no error, and penalised softmax was not healed"
    )
    plain, penalized, *_ = rows(text, SOFTMAX)
    assert plain[4:] == ["", ""] and penalized[4].startswith(f"{math.expm1(-0.05):+.1%}") and penalized[5] == ""
    assert [float(cell.replace(",", "")) for cell in cost[2:]] == [
        pytest.approx(value, abs=0.5) for value in (gpt2_cost(POWER4)[0] / 1e6, gpt2_cost(POWER4)[1])
    ]


def test_seeds_that_diverged_are_told_and_compared_nowhere(study):
    cells = rows(ladder_text(study), "Pow4+LN+G")[0]
    assert cells[3].endswith("(1 of 2 diverged)") and cells[4] == "+0.0%"


def test_a_partial_record_says_what_is_not_measured(study):
    text = ladder_text(study)
    assert text.startswith("| group | rows not measured yet |\n| --- | ---: |\n| `functions` | 18 |\n\n")
    assert "Measured between two processes" not in text and "nan" not in text
    for alone in (seeds(SOFTMAX, None), seeds(SOFTMAX, 3.0)):
        assert "ladder.png" not in ladder_text(make_study(fused=alone))


def test_the_picture_has_every_rung_once(study):
    figure = plot_ladder(study)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels)) == 7
    assert {f"{SOFTMAX}, penalised", f"{POWER4}, healed", "Pow4+LN+G"} <= set(labels)
    figure.savefig(io.BytesIO(), format="svg")


def test_the_page_shows_the_committed_record(tmp_path, undrawn):
    shutil.copy(LADDER_PAGE, tmp_path)
    write_ladder(page=tmp_path / LADDER_PAGE.name)
    assert (tmp_path / LADDER_PAGE.name).read_text() == LADDER_PAGE.read_text(), (
        "run: python -m entropy_gpt.programs.study.page"
    )
