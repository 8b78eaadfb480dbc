"""Shared against private sketches: the exact rates and floors, which the runs must meet."""

import numpy as np
import pytest

from experiments.paper.seeds import (
    ACCURACY,
    CLIENTS,
    SHIFTS,
    Setting,
    curve_figure,
    losses,
    seed_tables,
    settings,
    summary_figure,
)


def test_a_shared_sketch_does_not_see_the_shifts():
    """The mean of (W - W*_k) H is (W - W*) H."""
    alike, apart = (losses(Setting(4, shift, True), 3, 60) for shift in (0.0, 1.0))
    np.testing.assert_allclose(alike, apart, rtol=1e-9)


def test_without_shifts_private_sketches_are_as_fast_as_derived():
    for clients in (1, 4, 16):
        setting = Setting(clients, 0.0, False)
        values = losses(setting, 200, 10)
        rate = 1 - 1 / 24 / setting.noise
        assert values.mean(0)[10] == pytest.approx(rate**10, rel=0.15)


@pytest.mark.parametrize("clients", [2, 16])
def test_with_shifts_private_sketches_end_at_the_derived_floor(clients):
    setting = Setting(clients, 0.3, False)
    assert losses(setting, 40, 250)[:, 200:].mean() == pytest.approx(setting.floor, rel=0.1)


def test_the_floor_grows_as_the_square_of_the_shift():
    assert Setting(8, 0.2, False).floor == pytest.approx(4 * Setting(8, 0.1, False).floor)
    assert Setting(8, 0.2, True).floor == 0


def test_tables_and_figures_cover_all():
    table, curves = seed_tables(2, 200)
    assert len(table) == 2 * len(settings())
    assert table[table["is_shared"]]["rounds"].notna().all()
    assert table[~table["is_shared"] & (table["shift"] > 0)]["rounds"].isna().all()
    assert (table[~table["is_shared"] & (table["shift"] > 0)]["end"] > ACCURACY).all()
    assert len(curves) == 201 * 2 * len(SHIFTS)
    assert len(curve_figure(curves).axes) == 1
    ticks = summary_figure(table).axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == [str(clients) for clients in CLIENTS]
