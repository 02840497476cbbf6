"""Pictures of models side by side: the front, labels that do not overlap, and curves with gaps."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from entropy_gpt.evaluation.showing.comparison_plots import (
    LONGEST_NAME,
    pareto_front,
    plot_entropy_quantiles,
    plot_frequencies,
    plot_positions,
    plot_tradeoff,
    shorten,
)
from entropy_gpt.evaluation.showing.label_placement import label_points
from tests.slow import slow_but

from .example_results import example_heads, example_likelihood, example_result, example_results


def test_the_front_is_what_none_surpasses():
    points = [(25.32, 2.69), (9.44, 2.76), (6.43, 3.48), (6.43, 3.21), (10, 2.8), (6.43, 3.21)]
    assert pareto_front(points) == [3, 5, 1, 0]
    assert pareto_front([(1, 1)]) == [0]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_whatever_is_off_the_front_is_surpassed_by_something_on_it(points):
    front = [points[index] for index in pareto_front(points)]
    assert front == sorted(front)
    for point in points:
        surpassed = any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in front)
        assert surpassed != (point in front)


@given(
    st.lists(
        st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.text("Wil ", min_size=1, max_size=30)),
        min_size=1,
        max_size=10,
    )
)
def test_labels_cover_neither_one_another_nor_points_nor_the_edge(models):
    figure = Figure(figsize=(8, 5), dpi=100)
    axes = figure.add_axes((0.05, 0.05, 0.9, 0.9), xlim=(0, 1), ylim=(0, 1))
    points = [(x, y) for x, y, _ in models]
    boxes = label_points(axes, points, [name for *_, name in models], ["black"] * len(models), [(0, 0.5), (1, 0.5)])
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)
    room = axes.get_window_extent()
    for box in boxes:
        assert not any(box.contains(*point) for point in axes.transData.transform(points))
        assert room.containsx(box.x0) and room.containsx(box.x1) and room.containsy(box.y0) and room.containsy(box.y1)
    # What was promised is what is drawn.
    for box, text in zip(boxes, axes.texts, strict=True):
        drawn = text.get_window_extent()
        assert (drawn.x0, drawn.y1) == pytest.approx((box.x0, box.y1), abs=1)


def test_no_room_is_told():
    axes = Figure(figsize=(2, 1), dpi=100).add_axes((0, 0, 1, 1))
    assert label_points(axes, [(0.5, 0.5)] * 30, ["a rather long name"] * 30, ["black"] * 30, [(0, 0), (1, 0)]) is None


def picture_size(path):
    assert path.read_bytes().startswith(b"\x89PNG")
    return path.stat().st_size


@pytest.mark.slow
def test_a_picture_grows_until_its_labels_have_room(tmp_path):
    names = [f"{index} {'W' * LONGEST_NAME}" for index in range(40)]
    plot_tradeoff(names[:3], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], "cost").savefig(tmp_path / "few.png")
    plot_tradeoff(names, [1.0] * 40, [2.0] * 40, "cost").savefig(tmp_path / "many.png")
    assert picture_size(tmp_path / "many.png") > picture_size(tmp_path / "few.png")


@pytest.mark.parametrize("perplexities", [[2.0, 3.0], [2.0, 2e5]])
def test_costs_and_perplexities_may_be_near_or_far_apart(perplexities, tmp_path):
    for costs in ([1.0, 1.0], [1e-3, 1e9]):
        plot_tradeoff(["$a$", "_b"], costs, perplexities, "cost").savefig(tmp_path / "tradeoff.png")
        assert picture_size(tmp_path / "tradeoff.png") > 5000


def test_deviations_are_drawn_where_they_are_known(tmp_path):
    def draw(name, deviations):
        plot_tradeoff(["a", "b"], [1.0, 2.0], [3.0, 2.0], "cost", deviations).savefig(tmp_path / name)
        return (tmp_path / name).read_bytes()

    plain = draw("plain.png", None)
    assert draw("unknown.png", [math.nan, math.nan]) == plain
    assert draw("one.png", [0.5, math.nan]) != plain


def test_curves_are_drawn_of_one_and_of_many(tmp_path):
    infinite = example_result("infinite", likelihood=example_likelihood())
    infinite.likelihood.likelihood.by_position[1].nats = float("inf")
    infinite.likelihood.likelihood.by_frequency = infinite.likelihood.likelihood.by_frequency[2:3]
    for results in ([infinite], [infinite, *example_results(), *example_results()]):
        for plot in (plot_positions, plot_frequencies):
            plot(results).savefig(tmp_path / "curves.png")
            assert picture_size(tmp_path / "curves.png") > 5000


def draw_quantiles_of(*results) -> Figure:
    return plot_entropy_quantiles([result.heads.heads for result in results], [result.name for result in results])


@pytest.mark.parametrize("count", slow_but([5], [1, 2, 4, 5]))
def test_quantiles_are_drawn_in_panels(count, tmp_path):
    results = [example_result(str(index), heads=example_heads(layers=2, heads=3)) for index in range(count)]
    results[0].heads.heads.entropy_quantiles[1][2][0] = float("nan")
    draw_quantiles_of(*results).savefig(tmp_path / "quantiles.png")
    assert picture_size(tmp_path / "quantiles.png") > 5000


@pytest.mark.parametrize("count", [1, 3])
def test_legends_fit_into_the_picture(count):
    figure = draw_quantiles_of(*(example_result(f"{n}", heads=example_heads(layers=1, heads=1)) for n in range(count)))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 >= 0
    assert legend.get_window_extent().x1 <= figure.bbox.width
    names = [example_result(f"{n}{'W' * LONGEST_NAME}", likelihood=example_likelihood()) for n in range(3)]
    figure = plot_positions(names)
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x1 <= figure.bbox.width


def test_medians_are_compared_with_that_of_uniform_attention():
    heads = example_heads(layers=1, heads=1, context=128)
    axes = draw_quantiles_of(example_result(heads=heads)).axes[0]
    (line,) = (line for line in axes.lines if line.get_label() == "median of uniform attention")
    uniform = torch.arange(1, 129, dtype=torch.float64).log()
    assert line.get_ydata()[0] == pytest.approx(uniform.quantile(0.5).item())
    assert heads.heads.entropy.uniform_quantile(0.05) == pytest.approx(math.log(1 + 0.05 * 127), abs=0.01)


def test_panels_share_a_scale_on_which_all_is_seen():
    low, high = (example_result(heads=example_heads(layers=1, heads=1)) for _ in range(2))
    low.heads.heads.entropy_quantiles, high.heads.heads.entropy_quantiles = [[[0.1] * 5]], [[[4.8] * 5]]
    axes = draw_quantiles_of(low, high).axes[0]
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 4.8


def test_a_single_quantile_is_a_line(tmp_path):
    result = example_result(heads=example_heads(layers=1, heads=1))
    result.heads.heads.quantile_levels = [0.9]
    result.heads.heads.entropy_quantiles = [[[1.0]]]
    draw_quantiles_of(result).savefig(tmp_path / "quantiles.png")
    assert picture_size(tmp_path / "quantiles.png") > 5000


def test_names_lose_their_middle_and_are_no_formulas():
    assert shorten("a\n b") == "a b"
    assert shorten("$x$") == r"\$x\$"
    assert len(shorten("x" * 100)) <= LONGEST_NAME + 1
    assert shorten("x" * LONGEST_NAME) == "x" * LONGEST_NAME
