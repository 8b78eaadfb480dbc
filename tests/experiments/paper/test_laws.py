"""Sketch laws: the eigenvalues of E[H] are r/n, but for the law that is not centred."""

import numpy as np
import pytest

from experiments.paper.laws import UNCENTRED, eigenvalue_figure, law_table, orthonormal_rows, step_figure
from fedraclora.seeding import generator
from fedraclora.sketch import LAWS
from fedraclora.theory import raw_step

DIM, RANKS = 8, (1, 3, 8)
# Laws whose rows are orthonormal, so that a plain step is the projected one; a single row of signs is so too.
ORTHONORMAL = ("orthonormal", "selector", "selector_without_replacement", "sparse_sign")


@pytest.fixture(scope="module")
def table():
    return law_table(400, dim=DIM, ranks=RANKS).set_index(["law", "rank"])


@pytest.mark.parametrize("law", LAWS)
def test_the_eigenvalues_of_a_projects_law_surround_r_over_n(table, law):
    for rank in RANKS:
        row = table.loc[(law, rank)]
        # Signs may repeat a row, and then have a smaller rank than r.
        below = 0.12 if law == "rademacher" else 0.08
        assert rank / DIM - below < row["low"] <= rank / DIM + 1e-6
        assert row["high"] < rank / DIM + 0.08


def test_the_uncentred_law_loses_most_of_the_smallest_eigenvalue(table):
    """An independent count over 20,000 draws, n = 8, r = 1: 0.033 to 0.765."""
    row = table.loc[(UNCENTRED, 1)]
    assert row["low"] == pytest.approx(0.033, abs=0.01)
    assert row["high"] == pytest.approx(0.765, abs=0.03)


@pytest.mark.parametrize("law", ORTHONORMAL)
def test_with_orthonormal_rows_the_plain_step_is_the_projected_one(table, law):
    for rank in RANKS:
        np.testing.assert_allclose(table.loc[(law, rank)][["sure", "mean"]], 1.0, rtol=1e-5)


def test_plain_steps_on_normal_factors_must_be_as_small_as_derived(table):
    for rank in RANKS:
        assert table.loc[("raw", rank)]["mean"] == pytest.approx(raw_step(1.0, rank, DIM), rel=0.1)
        assert table.loc[("raw", rank)]["sure"] < raw_step(1.0, rank, DIM)


def test_figures_show_every_law(table):
    flat = table.reset_index()
    for figure in (eigenvalue_figure(flat), step_figure(flat)):
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert set(names) >= {*LAWS, UNCENTRED}


def test_batched_rows_are_orthonormal_and_isotropic():
    A = orthonormal_rows(generator(0), (4000, 1), 3, DIM)
    np.testing.assert_allclose(A @ A.swapaxes(-1, -2), np.broadcast_to(np.eye(3), (4000, 1, 3, 3)), atol=1e-12)
    np.testing.assert_allclose((A.swapaxes(-1, -2) @ A).mean((0, 1)), 3 / DIM * np.eye(DIM), atol=0.03)
