"""Floats to accuracy: flat in the rank at 1/L, and below it where the subspace is used."""

import numpy as np
import pytest

from experiments.paper.floats import (
    ACCURACY,
    DIM,
    EXACT,
    LOCAL,
    OUT,
    RANKS,
    mean_floats,
    regime_figure,
    regime_table,
    spread_over_ranks,
    task_figure,
    task_spectrum,
    task_table,
    worst_case_floats,
)
from experiments.paper.problems import geometric_spectrum, quadratic

SEEDS = 4


@pytest.fixture(scope="module")
def regimes():
    return regime_table(SEEDS)


@pytest.fixture(scope="module")
def tasks():
    return task_table(SEEDS)


def test_the_floats_are_flat_in_the_rank_at_one_over_l(regimes):
    """Within a fifth over ranks 1 to n, on either side, and of full gradient descent."""
    assert spread_over_ranks(regimes, "1/L") < 1.2
    assert spread_over_ranks(regimes, "1/L, B drawn") < 1.2
    full = mean_floats(regimes, "1/L", DIM)
    assert mean_floats(regimes, "1/L, B drawn", 1) == pytest.approx(full, rel=0.2)


def test_no_run_at_one_over_l_exceeds_the_bound(regimes):
    rows = regimes[regimes["regime"].isin(["1/L", "1/L, B drawn"])]
    assert rows["floats"].max() <= worst_case_floats()


def test_at_full_rank_it_is_gradient_descent(regimes):
    """Computed here without sketches: the error of eigenvalue l shrinks by 1 - l a step."""
    problem = quadratic((OUT, DIM), geometric_spectrum(DIM, 100))
    W, links = problem.start, 0
    while problem.gap(W) > ACCURACY * problem.gap(problem.start):
        W, links = W - problem.gradient(W), links + 1
    assert mean_floats(regimes, "1/L", DIM) == links * OUT * DIM


def test_steps_of_the_subspace_save_floats(regimes):
    at_step = mean_floats(regimes, "1/L", 8)
    assert mean_floats(regimes, LOCAL, 8) < 0.7 * at_step
    assert mean_floats(regimes, EXACT, 8) < 0.25 * at_step
    assert mean_floats(regimes, EXACT, DIM) == OUT * DIM
    # L_H is L where the subspace is all there is.
    assert mean_floats(regimes, LOCAL, DIM) == mean_floats(regimes, "1/L", DIM)


def test_small_ranks_bear_a_server_step_that_makes_full_gradients_diverge(regimes):
    assert mean_floats(regimes, "4/L", 1) < 0.4 * mean_floats(regimes, "1/L", 1)
    assert np.isinf(mean_floats(regimes, "4/L", DIM))


def test_with_rank_one_the_exact_link_is_the_local_step(regimes):
    by_seed = {name: regimes[(regimes["regime"] == name) & (regimes["rank"] == 1)] for name in (LOCAL, EXACT)}
    np.testing.assert_array_equal(by_seed[LOCAL]["floats"], by_seed[EXACT]["floats"])


def test_a_link_of_the_tasks_rank_solves_it_at_once(tasks):
    rows = tasks[(tasks["regime"] == EXACT) & (tasks["rank"] >= tasks["task_rank"])]
    assert (rows["floats"] == OUT * rows["rank"]).all()
    below = tasks[(tasks["regime"] == EXACT) & (tasks["rank"] < tasks["task_rank"])]
    assert (below["floats"] > OUT * below["rank"]).all()


def test_a_low_rank_task_saves_nothing_at_one_over_l(tasks):
    for _, rows in tasks[tasks["regime"] == "1/L"].groupby("task_rank"):
        assert spread_over_ranks(rows, "1/L") < 1.3


def test_a_task_depends_on_as_many_directions_as_it_says():
    assert np.linalg.matrix_rank(quadratic((OUT, DIM), task_spectrum(4)).curvature) == 4


def test_figures_can_be_drawn(regimes, tasks):
    for figure in (regime_figure(regimes), task_figure(tasks)):
        assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == [str(rank) for rank in RANKS["right"]]
