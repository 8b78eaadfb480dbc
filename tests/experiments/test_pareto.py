"""The front holds what nobody beats, by the definition; a trade puts on it only what is known."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba

from experiments.pareto import Trade, on_front, trade_of
from experiments.pareto_figure import pareto_caption, pareto_figure
from experiments.styles import run_styles, variants_of
from experiments.tables import comparison_table
from tests.made_runs import Made, make_runs

# Few values, so that ties are common.
POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


def is_better(one, other):
    """Whether a point is at least as good as another in both, and better in one: less cost, more gain."""
    return one != other and one[0] <= other[0] and one[1] >= other[1]


def front(points):
    return on_front([cost for cost, _ in points], [gain for _, gain in points]).tolist()


@given(POINTS)
def test_a_point_is_on_the_front_iff_nothing_is_better(points):
    assert front(points) == [not any(is_better(other, point) for other in points) for point in points]


@given(POINTS)
def test_every_point_off_the_front_is_beaten_by_one_on_it(points):
    best = [point for point, is_on in zip(points, front(points), strict=True) if is_on]
    for point in points:
        assert point in best or any(is_better(other, point) for other in best)


@given(POINTS)
def test_along_the_front_more_is_gained_only_at_more_cost(points):
    best = sorted({point for point, is_on in zip(points, front(points), strict=True) if is_on})
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(best))


def test_an_infinite_cost_is_beaten_and_no_points_have_no_front():
    assert front([(1.0, 0.5), (math.inf, 0.5), (math.inf, 0.9)]) == [True, False, True]
    assert front([]) == []


def trade(tmp_path, *mades, targets=(), direction="uplink"):
    runs = make_runs(tmp_path, *mades)
    return trade_of(comparison_table(runs, targets=targets, budget_mib=None), direction), runs


CHEAP = Made("cheap", [0.1, 0.5, 0.8, 0.85], up=1.0, down=9.0)
DEAR = Made("dear", [0.1, 0.8, 0.9, 0.95], up=4.0, down=1.0)
WORSE = Made("worse", [0.1, 0.2, 0.8, 0.82], up=2.0, down=9.0)


def test_the_target_is_the_highest_that_most_methods_reach(tmp_path):
    found, _ = trade(tmp_path, CHEAP, DEAR, WORSE, targets=[0.5, 0.8, 0.9])
    assert found.target == "0.8"
    assert {point.name: (point.cost.median, point.end.median) for point in found.points} == {
        "cheap": (2.0, 0.85),
        "dear": (4.0, 0.95),
        "worse": (4.0, 0.82),
    }
    assert found.front == ["cheap", "dear"]


def test_with_the_downlink_counted_another_method_may_hold_the_front_alone(tmp_path):
    found, _ = trade(tmp_path, CHEAP, DEAR, WORSE, targets=[0.8], direction="total")
    assert found.front == ["dear"]


def test_where_most_miss_every_target_whole_runs_are_compared(tmp_path):
    found, _ = trade(tmp_path, CHEAP, DEAR, WORSE, targets=[0.9])
    assert found.target is None
    assert [point.cost.median for point in found.points] == [3.0, 12.0, 6.0]
    assert found.front == ["cheap", "dear"]
    assert "of the whole run" in pareto_caption(found)


def test_a_cost_of_which_only_a_lower_bound_is_known_is_never_on_the_front(tmp_path):
    """A run that ended after 1 MiB without the target might have needed less than all others, or never got there."""
    short = Made("short", [0.1, 0.79], up=1.0)
    found, runs = trade(tmp_path, DEAR, WORSE, short, targets=[0.8])
    points = {point.name: point for point in found.points}
    assert (points["short"].is_settled, points["short"].is_censored, points["short"].cost.median) == (False, True, 1.0)
    assert found.front == ["dear"]
    assert "Hollow" in pareto_caption(found)
    assert drawn(found, runs).arrows == 1


def test_a_median_that_the_missing_seed_cannot_move_is_settled_and_has_an_arrow(tmp_path):
    mades = [Made("m", [0.1, 0.9], seed=0), Made("m", [0.1, 0.2, 0.9], seed=1), Made("m", [0.1] * 6, seed=2)]
    found, runs = trade(tmp_path, *mades, Made("n", [0.1, 0.9], up=5.0), targets=[0.8])
    point = found.points[0]
    assert (point.is_settled, point.is_censored, point.cost.median, point.cost.high) == (True, True, 2.0, 5.0)
    assert drawn(found, runs).arrows == 1


def test_a_run_that_diverged_early_does_not_hold_the_front_by_having_sent_little(tmp_path):
    found, _ = trade(tmp_path, CHEAP, DEAR, Made("broken", [0.1, 0.15], up=0.5, status="diverged"))
    assert found.front == ["cheap", "dear"]
    assert [point.is_settled for point in found.points] == [True, True, False]


def test_a_method_without_a_model_for_all_is_left_out_and_does_not_vote_on_the_target(tmp_path):
    personal = [Made(name, [0.1, 0.1], up=0.1, summed={"is_global": False}) for name in ("p", "q")]
    found, _ = trade(tmp_path, CHEAP, DEAR, *personal, targets=[0.8])
    assert ([point.name for point in found.points], found.target) == (["cheap", "dear"], "0.8")


def test_of_losses_the_smaller_one_is_better(tmp_path):
    good, bad = Made("good", [], up=1.0, losses=[9.0, 0.5]), Made("bad", [], up=2.0, losses=[9.0, 0.7])
    found, runs = trade(tmp_path, good, bad, Made("best", [], up=3.0, losses=[9.0, 0.001]))
    assert found.front == ["good", "best"]
    assert drawn(found, runs).step == [(1.0, 0.5), (3.0, 0.001)]


def test_what_costs_nothing_has_no_place_on_a_logarithmic_axis(tmp_path):
    found, _ = trade(tmp_path, Made("untrained", [0.1]), CHEAP, DEAR)
    assert [point.name for point in found.points] == ["cheap", "dear"]
    # A target that the initial model reaches costs nothing at all.
    assert trade(tmp_path / "b", CHEAP, DEAR, targets=[0.1])[0].target is None


class Drawn:
    """What a figure shows: the front's corners, arrows, hollow markers, and names."""

    def __init__(self, found: Trade, figure) -> None:
        axes = figure.axes[0]
        steps = [line for line in axes.get_lines() if line.get_drawstyle() == "steps-post"]
        self.step = list(zip(*steps[0].get_data(), strict=True))
        self.arrows = sum(text.arrow_patch is not None for text in axes.texts if hasattr(text, "arrow_patch"))
        markers = [line for line in axes.get_lines() if line.get_marker() not in ("None", "", None)]
        self.hollow = sum(to_rgba(line.get_markerfacecolor())[3] == 0 for line in markers)
        self.names = {text.get_text(): text for text in axes.texts if text.get_text()}
        self.legend = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        assert len(markers) == len(found.points)


def drawn(found, runs):
    return Drawn(found, pareto_figure(found, run_styles(runs), variants_of(runs)))


def test_the_figure_steps_along_the_front_and_writes_its_names_in_bold(tmp_path):
    found, runs = trade(tmp_path, CHEAP, DEAR, WORSE, targets=[0.8])
    figure = drawn(found, runs)
    assert figure.step == [(2.0, 0.85), (4.0, 0.95)]
    assert {name: text.get_fontweight() for name, text in figure.names.items()} == {
        "cheap": "bold",
        "dear": "bold",
        "worse": "normal",
    }
    assert (figure.arrows, figure.hollow, figure.legend) == (0, 0, [])


def test_a_hollow_point_is_one_that_is_not_settled(tmp_path):
    found, runs = trade(tmp_path, CHEAP, DEAR, Made("short", [0.1, 0.2]), targets=[0.8])
    assert drawn(found, runs).hollow == 1


def test_with_compressors_colours_are_methods_and_markers_are_compressors(tmp_path):
    plain = {"uplink": {"name": "none"}, "memory": {"feedback": "none"}}
    small = {"uplink": {"name": "int8"}, "memory": {"feedback": "none"}}
    mades = [
        Made("a", [0.1, 0.9], 4.0, settings={"method": {"name": "a"}, **plain}),
        Made("a_int8", [0.1, 0.89], 1.0, settings={"method": {"name": "a"}, **small}),
        Made("b", [0.1, 0.8], 4.0, settings={"method": {"name": "b"}, **plain}),
        Made("b_int8", [0.1, 0.79], 1.0, settings={"method": {"name": "b"}, **small}),
    ]
    found, runs = trade(tmp_path, *mades)
    assert found.front == ["a_int8", "a"]
    assert drawn(found, runs).legend == ["a", "b", "none", "int8"]


@pytest.mark.parametrize("ends", [(0.1, 0.97), (0.931, 0.932), (0.5, 0.5), (0.99, 1.0), (0.0, 1.0)])
def test_any_accuracies_have_their_place_on_the_axis_and_ticks_beside_them(tmp_path, ends):
    found, runs = trade(tmp_path, *(Made(f"m{i}", [0.1, end], up=1.0 + i) for i, end in enumerate(ends)))
    axes = pareto_figure(found, run_styles(runs), variants_of(runs)).axes[0]
    low, high = axes.get_ylim()
    assert any(low <= tick <= high for tick in axes.get_yticks())
    heights = axes.transData.transform([(1.0, end) for end in sorted(ends)])[:, 1]
    bottom, top = axes.transAxes.transform([(0, 0), (0, 1)])[:, 1]
    assert bottom < heights[0]
    assert heights[-1] < top
    assert heights[0] < heights[-1] or ends[0] == ends[1]


def test_heights_go_by_the_logarithm_of_the_error(tmp_path):
    found, runs = trade(tmp_path, *(Made(f"m{i}", [0.1, end], up=1.0 + i) for i, end in enumerate((0.5, 0.99))))
    axes = pareto_figure(found, run_styles(runs), variants_of(runs)).axes[0]
    # Each halves the error of the one before.
    heights = axes.transData.transform([(1.0, end) for end in (0.6, 0.8, 0.9, 0.95)])[:, 1]
    np.testing.assert_allclose(np.diff(heights), np.diff(heights)[0], rtol=0.01)
