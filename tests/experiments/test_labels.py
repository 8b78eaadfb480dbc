"""Names beside the ends of lines keep their order, stay apart, and move as little as they can."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from experiments.labels import LineEnd, label_ends, spread

WISHES = st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=20).map(np.array)


@given(WISHES, st.floats(0.001, 0.2))
def test_places_keep_the_order_stay_apart_and_lie_inside(wanted, gap):
    places = spread(wanted, gap, 0.0, 1.0)
    room = min(gap, 1.0 / max(1, len(wanted) - 1))
    order = np.argsort(wanted, kind="stable")
    assert np.all(np.diff(places[order]) >= room - 1e-12)
    assert places.min() >= -1e-12
    assert places.max() <= 1 + 1e-12


@given(st.lists(st.integers(0, 20), unique=True, min_size=1, max_size=20))
def test_wishes_that_are_apart_are_granted(steps):
    wanted = np.array(steps) / 20
    np.testing.assert_allclose(spread(wanted, 0.05, 0.0, 1.0), wanted, atol=1e-12)


@given(WISHES.filter(lambda wanted: len(wanted) <= 8), st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_no_other_places_that_keep_order_and_gap_move_less(wanted, drawn):
    gap = 0.1
    order = np.argsort(wanted, kind="stable")
    other = np.empty(len(wanted))
    # Any sorted numbers in what room the gaps leave, with the gaps added, are places that would do.
    other[order] = np.sort(drawn[: len(wanted)]) * (1 - gap * (len(wanted) - 1)) + gap * np.arange(len(wanted))
    moves = np.square(spread(wanted, gap, 0.0, 1.0) - wanted).sum()
    assert moves <= np.square(other - wanted).sum() + 1e-9


def test_two_equal_wishes_part_evenly_in_their_order():
    np.testing.assert_allclose(spread(np.array([0.5, 0.5]), 0.2, 0.0, 1.0), [0.4, 0.6])
    assert spread(np.zeros(0), 0.2, 0.0, 1.0).tolist() == []


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_leader_begins_where_its_line_ends(scale):
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([1, 10], [0.2, 0.8])
    axes.set_xscale(scale)
    # Another one that ends there, too, pushes the names off the lines' height.
    label_ends(axes, [LineEnd(name, 10.0, 0.8, "black", True) for name in ("one", "two")], 3.0)
    for line, text in zip(axes.get_lines()[-2:], axes.texts, strict=True):
        x, y = line.get_data()
        np.testing.assert_allclose(
            axes.transAxes.transform((x[0], y[0])), axes.transData.transform((10.0, 0.8)), atol=1e-6
        )
        assert text.get_position()[1] == y[-1] != y[0]
