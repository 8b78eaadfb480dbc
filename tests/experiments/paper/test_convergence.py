"""Bounds hold for measured means, the speed is about r/n, and full rank is gradient descent."""

import numpy as np
import pytest

from experiments.paper.convergence import (
    RANKS,
    SHAPE,
    bound_figure,
    convergence_table,
    federated_cases,
    full_rank_error,
    gradient_cases,
    nonconvex_cases,
    penalised_quadratic,
    regression_cases,
    speed_figure,
    speed_table,
    stochastic_cases,
    violations,
)


@pytest.mark.parametrize("cases", [gradient_cases, nonconvex_cases, regression_cases])
def test_the_mean_over_seeds_stays_below_the_papers_bound(cases):
    table = convergence_table(cases(), 8)
    assert violations(table) == 0
    assert set(table["provenance"]) <= {f"paper, Theorem 5.{number}, as quoted in reviews" for number in (3, 5)}


@pytest.mark.parametrize("case", [*stochastic_cases()[::2], *federated_cases()[1:2]], ids=lambda case: case.panel)
def test_the_mean_over_seeds_stays_below_the_derived_bound(case, monkeypatch):
    monkeypatch.setitem(RANKS, "right", (2, 8))
    table = convergence_table([case], 8)
    assert violations(table) == 0
    assert set(table["provenance"]) == {"derived"}
    # The bound says something: it is below the start at the end.
    for _, rows in table.groupby("rank"):
        assert rows["bound"].iloc[-1] < 0.5 * rows["mean"].iloc[0]


def test_what_exceeds_its_bound_is_counted():
    table = convergence_table(gradient_cases()[:1], 2)
    assert violations(table.assign(bound=table["bound"] / 1e3)) > 0


def test_there_are_both_sides_and_all_ranks():
    table = convergence_table(gradient_cases(), 2)
    assert {tuple(sorted(rows["rank"].unique())) for _, rows in table.groupby("panel")} == set(RANKS.values())
    assert len(bound_figure(table).axes) == 2


def test_links_grow_about_as_n_over_r_and_full_rank_is_full_gradients():
    table = speed_table(6)
    assert table["ratio"].notna().all()
    assert (table[table["rank"] == table["dim"]]["ratio"] == 1).all()
    means = table.groupby(["problem", "side", "rank", "dim"])["ratio"].mean().reset_index()
    np.testing.assert_allclose(means["ratio"] / (means["dim"] / means["rank"]), 1.15, atol=0.3)
    assert len(speed_figure(table).axes) == 1
    assert full_rank_error() < 1e-13


def test_the_penalty_is_not_convex_and_its_gradient_is_right():
    problem = penalised_quadratic()
    rng = np.random.default_rng(0)
    W, D = 2 * rng.standard_normal((2, *SHAPE))
    slope = (problem.gap(W + 1e-5 * D) - problem.gap(W - 1e-5 * D)) / 2e-5
    assert slope == pytest.approx((problem.gradient(W) * D).sum(), rel=1e-6)
    flat = np.linalg.eigh(problem.curvature)[1][:, 0]
    point = np.outer(np.ones(SHAPE[0]), np.ones(SHAPE[1]))
    D = np.outer(np.ones(SHAPE[0]), flat)
    bend = ((problem.gradient(point + 1e-5 * D) - problem.gradient(point - 1e-5 * D)) * D).sum()
    assert bend < 0
