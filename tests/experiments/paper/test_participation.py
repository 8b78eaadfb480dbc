"""The floor follows the variance of a cohort, and the downlink of late clients what was derived."""

import numpy as np
import pandas as pd
import pytest

from experiments.paper.participation import (
    CLIENTS,
    LAYER,
    downlink_figure,
    downlink_table,
    floor_figure,
    floor_table,
)
from fedraclora.targets import MatrixShape


@pytest.fixture(scope="module")
def floors():
    return floor_table(8, links=240)


def test_the_floor_is_in_proportion_to_the_variance_of_a_cohorts_mean_for_every_rank(floors):
    """C10: (M - S) / (S (M - 1))."""
    part = floors[floors["cohort"].isin([1, 2, 4])]
    means = part.groupby(["rank", "cohort"])[["floor", "variance"]].mean()
    constants = means["floor"] / means["variance"]
    assert constants.max() < 1.3 * constants.min()
    assert part.loc[part["cohort"] == 2, "variance"].iloc[0] == (CLIENTS - 2) / (2 * (CLIENTS - 1))


def test_with_all_clients_there_is_next_to_no_floor(floors):
    full = floors[(floors["rank"] > 1) & (floors["cohort"] == CLIENTS)]["floor"].max()
    assert full < 0.01 * floors[floors["cohort"] == 1]["floor"].min()


def test_the_floor_lies_below_what_the_theory_says_about_it(floors):
    part = floors[floors["variance"] > 0]
    assert (part.groupby(["rank", "cohort"])["floor"].mean() < part.groupby(["rank", "cohort"])["about"].mean()).all()


def test_the_projects_own_bytes_are_what_was_derived():
    layer = MatrixShape(out=12, in_=16)
    table = downlink_table(shape=layer, ranks=(1, 4), fractions=(0.2,), seeds=1)
    np.testing.assert_allclose(table["measured"], table["formula"], rtol=0.1)
    assert (table["measured"] <= 12 * 16).all()
    always = downlink_table(shape=layer, ranks=(4,), fractions=(1.0,), seeds=1)
    assert always["measured"].item() == always["formula"].item() == 12 * 4


def test_figures_can_be_drawn(floors):
    assert len(floor_figure(floors).axes) == 1
    table = pd.DataFrame({"rank": [16, 16], "fraction": [0.5, 1.0], "measured": [1900, 1024]})
    assert len(downlink_figure(table, shape=LAYER).axes) == 1
