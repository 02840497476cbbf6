"""Costs of a private inference: sums, tables, networks and pictures."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import rgb_to_hsv, to_rgb

from entropy_gpt.evaluation.private_inference.costs.cost_plots import OPERATION_COLORS, draw_costs
from entropy_gpt.evaluation.private_inference.costs.published_cost import as_private_cost
from entropy_gpt.evaluation.private_inference.program.cost import (
    AROUND_BLOCKS,
    TABLE_COLUMNS,
    InferenceCost,
    StepCost,
    by_layer,
    by_operation,
    project,
    set_up_by_operation,
    table_rows,
)
from entropy_gpt.evaluation.private_inference.program.networks import LAN, WAN, Network, parse_network
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings


def example_cost(steps: list[StepCost], protocol: str = "cheetah") -> InferenceCost:
    return InferenceCost(
        notation="SM+ScFuFFN",
        n_layer=2,
        n_embd=48,
        n_head=4,
        vocab_size=101,
        context=12,
        answers=1,
        settings=PrivateSettings(protocol),
        network="threads of one process",
        set_up=[StepCost("set-up", None, 12_000_000, 11_000_000, 2000, 2000, 30.0, 4.0)],
        steps=steps,
        seconds=6.5,
        versions={"spu": "0.9.5"},
        git_revision=None,
        machine="a machine",
    )


STEPS = [
    StepCost("embedding", None, 300_000, 400_000, 2, 3, 1.5, 0.5),
    StepCost("exponential", 0, 2_000_000, 2_500_000, 20, 21, 12.0, 2.0),
    StepCost("FFN", 0, 100_000, 200_000, 2, 2, 1.5, 0.25),
    StepCost("exponential", 1, 1_000_000, 1_500_000, 18, 17, 10.5, 1.0),
    StepCost("head", None, 0, 0, 0, 0, 0.0, 0.0),
]
COUNTS = st.integers(0, 10**9)
STEP_COSTS = st.builds(
    StepCost,
    operation=st.sampled_from(["scores", "FFN", "head"]),
    layer=st.none() | st.integers(0, 3),
    sent_bytes=COUNTS,
    received_bytes=COUNTS,
    sent_messages=COUNTS,
    received_messages=COUNTS,
    round_trips=st.floats(0, 1e4),
    seconds=st.floats(0, 1e4),
)


def test_totals_leave_the_set_up_out():
    cost = example_cost(STEPS)
    assert cost.total_bytes == 8_000_000
    assert cost.set_up_bytes == 23_000_000
    assert cost.round_trips == 25.5
    assert [part.name for part in set_up_by_operation(cost)] == ["set-up"]


def test_of_three_parties_one_counts_for_all():
    assert example_cost(STEPS, "aby3").total_bytes == 12_000_000


@given(st.lists(STEP_COSTS, max_size=8))
def test_sums_are_of_all_steps(steps):
    cost = example_cost(steps)
    for sums in (by_operation(cost), by_layer(cost)):
        assert len({part.name for part in sums}) == len(sums)
        assert sum(part.total_bytes for part in sums) == cost.total_bytes
        assert sum(part.messages for part in sums) == sum(s.sent_messages + s.received_messages for s in steps)
        assert sum(part.round_trips for part in sums) == pytest.approx(sum(step.round_trips for step in steps))
        assert sum(part.seconds for part in sums) == pytest.approx(sum(step.seconds for step in steps))
        assert all(len(row) == 1 + len(TABLE_COLUMNS) for row in table_rows(sums))


def test_tables_tell_one_party_from_all():
    rows = table_rows(by_operation(example_cost(STEPS)))
    assert [row[0] for row in rows] == ["embedding", "exponential", "FFN", "head", "total"]
    assert rows[1] == ("exponential", "7.00", "87.5%", "3.00", "4.00", "76", "22.5", "3.00")
    assert rows[-1] == ("total", "8.00", "100.0%", "3.40", "4.60", "85", "25.5", "3.75")
    assert [part.name for part in by_layer(example_cost(STEPS))] == [AROUND_BLOCKS, "layer 0", "layer 1"]
    assert table_rows([])[0][1:3] == ("0.00", "-")


@given(
    st.integers(1, 999), st.sampled_from(["kbps", "Mbps", "Gbps"]), st.integers(0, 999), st.sampled_from(["us", "ms"])
)
def test_networks_are_read_as_they_are_written(bandwidth, unit, latency, latency_unit):
    network = parse_network(f" {bandwidth} {unit}, {latency}{latency_unit}")
    assert network.bits_per_second == pytest.approx(bandwidth * {"kbps": 1e3, "Mbps": 1e6, "Gbps": 1e9}[unit])
    assert network.round_trip_seconds == pytest.approx(latency * {"us": 1e-6, "ms": 1e-3}[latency_unit])


def test_networks_with_names():
    assert parse_network("lan") == LAN == Network("LAN", 1e9, 1e-3)
    assert parse_network("WAN") == WAN == Network("WAN", 1e8, 0.08)


@pytest.mark.parametrize(
    "text", ["", "fast", "100Mbps", "0Mbps,80ms", "100MB,80ms", "100Mbps,80", "-1Mbps,1ms", "nanMbps,1ms"]
)
def test_other_networks_are_refused(text):
    with pytest.raises(ValueError, match=r"is not known: give LAN \(1Gbps,1ms\)") as caught:
        parse_network(text)
    assert repr(text) in str(caught.value)


@given(st.text())
def test_whatever_is_written_is_a_network_or_an_error_in_a_line(text):
    try:
        network = parse_network(text)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        assert network.bits_per_second > 0 and network.round_trip_seconds >= 0


def test_networks_add_bytes_and_round_trips():
    cost = example_cost(STEPS)
    assert project(cost, Network("none", 1e30, 0)) == pytest.approx(6.5)
    assert project(cost, LAN) == pytest.approx(6.5 + 0.064 + 0.0255)
    assert project(cost, WAN) == pytest.approx(6.5 + 0.64 + 25.5 * 0.08)


def test_a_record_is_read_as_it_was_written(tmp_path):
    cost = example_cost(STEPS)
    cost.save(tmp_path / "cost.json")
    assert InferenceCost.load(tmp_path / "cost.json") == cost


def test_what_results_tell():
    told = as_private_cost(example_cost(STEPS))
    assert (told.protocol, told.context, told.answers) == ("cheetah", 12, 1)
    assert (told.total_bytes, told.rounds) == (8_000_000, 26)
    assert (told.seconds, told.network) == (6.5, "threads of one process")


def test_results_tell_both_phases():
    cost = example_cost(STEPS)
    told = as_private_cost(replace(cost, before=STEPS[:2]))
    assert (told.total_bytes, told.rounds, told.seconds) == (8_000_000 + 5_200_000, 39, 9.0)


def test_pictures(tmp_path):
    unknown = StepCost("something new", 0, 10**6, 10**6, 1, 1, 0.5, 0.1)
    costs = {
        "SM + $x$": example_cost(STEPS),
        "a second model": example_cost([*STEPS, unknown]),
        "none": example_cost([]),
    }
    draw_costs(costs).savefig(tmp_path / "costs.png")
    draw_costs({"none": example_cost([])}).savefig(tmp_path / "empty.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("costs.png", "empty.png"))


def test_bars_say_their_bytes_in_three_figures():
    sizes = {970_612: "0.971 MB", 95_312_345: "95.3 MB", 3_456_789_012: "3,460 MB", 1_234_567_890_123: "1,230,000 MB"}
    figure = draw_costs(
        {name: example_cost([StepCost("FFN", 0, size, 0, 1, 1, 0.5, 0.1)]) for size, name in sizes.items()}
    )
    assert [text.get_text() for text in figure.axes[0].texts if "MB" in text.get_text()] == [*sizes.values()]


def test_the_softmax_as_a_whole_has_a_hue_that_none_of_its_parts_has():
    hues = {name: rgb_to_hsv(to_rgb(color))[0] for name, color in OPERATION_COLORS.items()}
    for part in ("maximum", "exponential", "division"):
        distance = abs(hues["softmax"] - hues[part])
        assert min(distance, 1 - distance) > 1 / 8
    assert len({*OPERATION_COLORS.values()}) == len(OPERATION_COLORS)


def test_every_operation_of_a_program_has_a_colour():
    from entropy_gpt.evaluation.private_inference.program.program import build_steps
    from entropy_gpt.evaluation.private_inference.program.steps import Span
    from tests.architectures import ARCHITECTURES, make_config

    for notation in ARCHITECTURES:
        for settings in (PrivateSettings(answer="token"), PrivateSettings(softmax="stock")):
            steps = build_steps(make_config(notation), settings, Span(0, 8))
            assert {step.operation for step in steps} <= set(OPERATION_COLORS)
