"""The paper's table: sums of measured parts, ratios, records that are kept, and pages."""

import json
from dataclasses import replace

import pytest

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.costs.cost_model import predict, predict_phases, program_config
from entropy_gpt.evaluation.private_inference.costs.measured_inference import Inference
from entropy_gpt.evaluation.private_inference.costs.paper_table import (
    NOTATIONS,
    TODAY,
    PaperTable,
    add_up,
    add_up_all,
    add_up_phases,
    find_cheapest,
    list_rows,
    page_markdown,
    paper_ratios,
    table_markdown,
    take_blocks,
    take_ends,
    take_prepared,
    take_typical_block,
)
from entropy_gpt.evaluation.private_inference.inference import NETWORKS, TWO_PARTY
from entropy_gpt.evaluation.private_inference.parties.session import Outcome
from entropy_gpt.evaluation.private_inference.parties.terms import Terms
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost, StepCost
from entropy_gpt.evaluation.private_inference.program.counting import OWNED_BATCHES
from entropy_gpt.evaluation.private_inference.program.networks import LAN, Network
from entropy_gpt.evaluation.private_inference.program.prices import load_prices
from entropy_gpt.evaluation.private_inference.program.program import build_steps
from entropy_gpt.evaluation.private_inference.program.steps import Span
from tests.slow import slow_cases


CONTEXT = 16
SIZES = {"n_layer": 3, "n_embd": 96, "n_head": 4, "vocab_size": 300}
SMALL_GPT2 = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}


def place_of(step) -> tuple[str, int]:
    return step.operation, -1 if step.layer is None else step.layer


def record(inference: Inference, steps: list[StepCost]):
    """Steps with the conditions that a measurement would have here and now."""
    terms = Terms(inference.config, inference.config.notation, inference.settings, "")
    return Outcome(steps=steps).cost(terms, inference.context, 1, NETWORKS[TWO_PARTY])


def predicted(inference: Inference):
    """A record of what is predicted; a second for each megabyte."""
    steps = predict(inference.config, inference.settings, Span(0, inference.context))
    return record(
        inference,
        [
            StepCost(s.operation, s.layer, int(s.total_bytes), 0, 1, 1, s.round_trips, s.total_bytes / 1e6)
            for s in steps
        ],
    )


def make_table(notations=NOTATIONS, context=CONTEXT, sizes=SIZES, **fields) -> PaperTable:
    rows = list_rows(notations, context, **sizes)
    ends = predicted(take_ends(rows[0]))
    return PaperTable(add_up_all(rows, {row.title: predicted(take_blocks(row)) for row in rows}, ends), ends, **fields)


def test_rows_are_what_is_run_today_and_each_architecture_once():
    rows = list_rows(["SM+LN+G", "SM + LN + G", "SM+ScFuFFN"], CONTEXT, **SIZES)
    assert [row.title for row in rows] == [TODAY, "SM+LN+G", "SM+ScFuFFN"]
    assert rows[0].config.notation == "SM+LN+G"
    assert rows[0].settings != rows[1].settings == rows[2].settings


def test_all_parts_have_the_forms_of_the_chosen_network():
    rows = list_rows(["SM+ScFuFFN"], CONTEXT, network="LAN", **SIZES)
    assert {part.settings.network for row in rows for part in (row, take_blocks(row), take_ends(row))} == {"LAN"}


@pytest.mark.parametrize(
    ("notation", "sizes", "error", "message"),
    [
        ("SM+LM", {}, ValueError, "Unknown token 'LM'"),
        ("SM", {"n_head": 5}, ValueError, "n_head=5 does not divide n_embd=96"),
        ("SM+LN+Act(silu)", {}, PrivateInferenceError, "activation_function='silu' has no private form"),
    ],
)
def test_other_models_are_refused(notation, sizes, error, message):
    with pytest.raises(error, match=message):
        list_rows([notation], CONTEXT, **{**SIZES, **sizes})


@pytest.mark.parametrize(
    ("notation", "layers"),
    [
        ("SM+LN+G", 1),
        ("SM+ScFuFFNi3", 5),
        *slow_cases(*((notation, 3) for notation in NOTATIONS), ("SM+ScFuFFNi1", 2)),
        ("EReg(SM(t)+LN+R+ScFFNi[0,2])", 4),
    ],
)
def test_a_model_is_the_sum_of_its_parts(notation, layers):
    for row in list_rows([notation], CONTEXT, **{**SIZES, "n_layer": layers}):
        blocks = take_blocks(row)
        assert blocks.config.n_layer <= 4
        total = add_up(row, predicted(blocks), predicted(take_ends(row)))
        steps = build_steps(program_config(row.config), row.settings, Span(0, CONTEXT))
        assert sorted(map(place_of, total.steps)) == sorted(map(place_of, steps))
        # The first block finds triples that the set-up left, for which later ones need a batch.
        batch = load_prices().bytes[OWNED_BATCHES]
        assert total.total_bytes == pytest.approx(row.predict_bytes(), abs=1.01 * layers * batch)
        assert total.seconds == pytest.approx(sum(step.seconds for step in total.steps))
        assert (total.notation, total.n_layer, total.vocab_size) == (row.title, layers, 300) or row.title == TODAY


def test_the_first_and_the_last_block_are_taken_for_themselves():
    (_, row) = list_rows(["SM+LN"], CONTEXT, **{**SIZES, "n_layer": 4})
    steps = [StepCost("scores", layer, size, size, 1, 1, size / 10, 1.0) for layer, size in enumerate((200, 100, 10))]
    ends = [StepCost(operation, None, 1, 1, 1, 1, 0.5, 1.0) for operation in ("embedding", "norm", "head")]
    total = add_up(row, record(take_blocks(row), [*ends, *steps]), record(take_ends(row), [*ends, *steps]))
    assert total.total_bytes == 2 * (1 + 200 + 100 + 100 + 10 + 1 + 1)
    assert total.seconds == 7
    assert total.round_trips == 0.5 + 20 + 10 + 10 + 1 + 0.5 + 0.5


@pytest.mark.parametrize(
    ("notation", "layers", "typical"),
    [("SM+LN+G", 4, 1), ("SM+ScFuFFN", 5, 1), ("SM+R+FFNi[1]", 6, 2), ("SM", 1, 0)],
)
def test_the_typical_block_stands_for_most(notation, layers, typical):
    (_, row) = list_rows([notation], CONTEXT, **{**SIZES, "n_layer": layers})
    blocks = take_blocks(row)
    steps = [StepCost("scores", layer, 1, 0, 1, 1, 0.5, 1.0) for layer in (None, *range(blocks.config.n_layer))]
    block = take_typical_block(row, record(blocks, steps))
    assert [step.layer for step in block.steps] == [typical]
    assert (block.n_layer, block.seconds) == (1, 1.0)


def test_the_cheapest_is_none_of_today():
    rows = list_rows(["SM+LN+G", "SM"], CONTEXT, **SIZES)
    assert find_cheapest(rows, {TODAY: 1, "SM+LN+G": 3, "SM": 2}).title == "SM"


def test_the_papers_ratios_are_of_its_own_sizes():
    rows = {row.title: record(row, []) for row in list_rows([*NOTATIONS, "SM"], 128, **SMALL_GPT2)}
    ratios = {title: paper_ratios(cost) for title, cost in rows.items()}
    assert ratios["SM+ScFuFFN"] == ratios["EReg(SM(t)+ScFuFFN)"] == pytest.approx((3.94, 1.72), abs=0.005)
    assert ratios["SM+LN+R"] == pytest.approx((2.68, 1.35), abs=0.005)
    assert ratios["SM+LN+G"] == ratios[TODAY] == (1, 1)
    assert ratios["SM"] is None
    assert paper_ratios(replace(rows["SM+LN+R"], context=256)) is None
    assert paper_ratios(replace(rows["SM+LN+R"], n_layer=18)) is None


class TestWhatIsKept:
    @pytest.fixture
    def inference(self):
        return take_blocks(list_rows(["SM+LN+R"], CONTEXT, **SIZES)[1])

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "record.json"

    def test_is_found_again(self, inference, path):
        assert inference.load_measured(path) is None
        cost = predicted(inference)
        cost.save(path)
        assert inference.load_measured(path) == cost

    @pytest.mark.parametrize(
        ("field", "value"),
        [("git_revision", "another"), ("n_embd", 48), ("context", 17), ("notation", "SM"), ("machine", "another")],
    )
    def test_of_other_conditions_is_refused(self, inference, path, field, value):
        replace(predicted(inference), **{field: value}).save(path)
        with pytest.raises(ValueError, match=rf"record.json .* other conditions \({field} {value} then, [^;]* now\)"):
            inference.load_measured(path)

    def test_of_other_settings_and_versions_is_refused(self, inference, path):
        cost = predicted(inference)
        replace(cost, settings=replace(cost.settings, softmax="stock"), versions={"spu": "0.1"}).save(path)
        with pytest.raises(ValueError, match=r"softmax stock then, efficient now; .*spu 0.1 then, .*jax None then"):
            inference.load_measured(path)

    def test_of_a_time_before_forms_had_a_network_is_read_and_refused(self, inference, path):
        cost = predicted(inference)
        cost.save(path)
        record = json.loads(path.read_text()) | {"schema_version": 3}
        path.write_text(json.dumps(record))
        assert inference.load_measured(path) == cost
        del record["content"]["settings"]["network"]
        path.write_text(json.dumps(record))
        assert InferenceCost.load(path).steps == cost.steps
        with pytest.raises(ValueError, match=r"\(network .*, before forms were chosen for one then, [^;]* now\)"):
            inference.load_measured(path)

    def test_that_is_broken_is_refused(self, inference, path):
        path.write_text("{", encoding="utf-8")
        with pytest.raises(ValueError, match="it is no JSON"):
            inference.load_measured(path)


class TestPages:
    def test_a_row_for_each_architecture_beside_the_paper(self):
        sums = {row.title: record(row, []) for row in list_rows(NOTATIONS, 128, **SMALL_GPT2)}
        for size, cost in zip((8, 4, 2, 1, 2), sums.values(), strict=True):
            cost.steps, cost.seconds = [StepCost("FFN", 0, size * 10**6, 0, 10, 20, 5.0, size)], float(size)
        network = Network("300Mbps,20ms", 3e8, 0.02)
        table = PaperTable(sums, record(take_ends(list_rows([], 128, **SMALL_GPT2)[0]), []), networks=(LAN, network))
        lines = table_markdown(table).splitlines()
        assert len(lines) == 2 + len(sums)
        assert lines[0].endswith("| s on LAN | s on 300Mbps,20ms |")
        assert lines[2] == f"| {TODAY} | 8.0 | 1.00 | 1.00 | 8.0 | 1.00 | 1.00 | 8 | 8 |"
        assert lines[5] == "| SM+ScFuFFN | 1.0 | 8.00 | 3.94 | 1.0 | 8.00 | 1.72 | 1 | 1 |"
        assert any("arXiv 2501.03489, table 2" in note and "25.32 GB and 8.21 minutes" in note for note in table.notes)

    def test_of_other_sizes_the_paper_says_nothing(self):
        table = make_table()
        assert all(row[3] == row[6] == "-" for row in table.rows)
        assert not any("paper" in note for note in table.notes)

    def test_embedding_and_head_are_told_apart(self):
        table = make_table()
        (note,) = (note for note in table.notes if "vocabulary of 300" in note)
        parts = [next(step for step in table.ends.steps if step.operation == name) for name in ("embedding", "head")]
        assert all(f"{part.total_bytes / 1e6:,.1f} MB and {part.seconds:,.1f} s" in note for part in parts)

    def test_like_is_compared_with_like(self):
        start = "Times fewer bytes than SM+LN+G with the same economies: SM "
        assert any(note.startswith(start) for note in notes(["SM+LN+G", "SM"]))
        assert not any("same economies" in note for note in (*notes(["SM"]), *notes(["SM+LN+G"])))

    def test_a_whole_run_tells_the_error_of_the_sum(self):
        table = make_table()
        total = table.sums["SM+ScFuFFN"]
        steps = [StepCost("FFN", 0, round(total.total_bytes / 1.1), 0, 1, 1, 0.5, 0.0)]
        whole = replace(total, steps=steps, seconds=total.seconds / 0.8)
        (note,) = (note for note in replace(table, whole=whole).notes if note.startswith("A whole run of SM+ScFuFFN"))
        assert "(+10.00%)" in note
        assert "(-20.0%)" in note

    def test_a_page_has_table_notes_picture_and_origin(self):
        table = make_table()
        page = page_markdown(table, "costs.png")
        assert table_markdown(table) in page
        assert all(note in page for note in table.notes)
        assert "](costs.png)" in page
        assert table.baseline.machine in page


def notes(notations: list[str]) -> list[str]:
    return make_table(notations).notes


class TestTwoPhases:
    @staticmethod
    def predicted_phases(inference: Inference):
        """A record of what is predicted for both phases; a second for each megabyte."""
        phases = predict_phases(inference.config, inference.settings, [Span(0, inference.context)])
        before, after = (
            [
                StepCost(s.operation, s.layer, int(s.total_bytes), 0, 1, 1, s.round_trips, s.total_bytes / 1e6)
                for s in steps
            ]
            for steps in phases
        )
        return replace(record(inference, after), before=before)

    @pytest.mark.parametrize("notation", ["SM+ScFuFFN", "SM+LN+G"])
    def test_a_model_is_the_sum_of_its_parts(self, notation):
        _, row = list_rows([notation], CONTEXT, **{**SIZES, "n_layer": 5})
        prepared = take_prepared(row)
        parts = (take_blocks(prepared), take_ends(prepared))
        assert len({part.title for part in parts} | {take_blocks(row).title, take_ends(row).title}) == 4
        phases = add_up_phases([row], {part.title: self.predicted_phases(part) for part in parts})[row.title]
        whole = self.predicted_phases(prepared)
        # The first block finds triples that the set-up left, for which later ones need a batch.
        batches = 1.01 * 5 * load_prices().bytes[OWNED_BATCHES]
        assert phases.cost.total_bytes == pytest.approx(whole.total_bytes, abs=batches)
        assert phases.cost.first_phase().total_bytes == pytest.approx(whole.first_phase().total_bytes, rel=0.02)
        table = make_table([notation], phases={row.title: phases})
        (cells,) = table.phase_rows
        assert len(cells) == len(table.phase_headings)
        assert "| in two phases | MB before | MB after |" in table_markdown(table)
        assert "phases" not in table_markdown(make_table([notation]))
        assert any("done before it comes" in note for note in table.notes)
