"""The methods against small programs of their own, and their special cases against each other.

That they keep to the bounds of `fedraclora.theory` is tested in `tests/conformance/test_bounds.py`.
"""

from dataclasses import replace

import numpy as np
import pytest

from experiments.paper.descent import (
    LAWS,
    Budget,
    Sampler,
    Sketching,
    federated,
    floats_to_accuracy,
    gd,
    reshuffled,
    sgd,
    uplink_per_link,
)
from experiments.paper.problems import (
    Made,
    distance,
    geometric_spectrum,
    least_squares,
    logistic_regression,
    quadratic,
    spread_quadratic,
)
from fedraclora.seeding import generator
from fedraclora.theory import Steps

SHAPE = (4, 6)
SPECTRUM = geometric_spectrum(6, 10.0)
FULL = Sketching(rank=6)
sides = pytest.mark.parametrize("side", ["right", "left"])


def sampler(law, rank, batch=(3, 2), side="right"):
    return Sampler(Sketching(law, rank, side), SHAPE, batch, generator(1))


def spread(clients=5, samples=4, heterogeneity=0.5, noise=0.5):
    return spread_quadratic(SHAPE, SPECTRUM, Made(clients, samples, heterogeneity, noise, seed=3))


@pytest.mark.parametrize("law", LAWS)
@sides
def test_factors_have_the_sketched_dimension_and_differ_between_seeds_clients_and_links(law, side):
    drawing = sampler(law, 2, (4, 3), side)
    first, second = drawing.draw(), drawing.draw()
    assert first.shape == (4, 3, 2, 6 if side == "right" else 4)
    flat = np.concatenate([first, second]).reshape(24, -1)
    assert len(np.unique(flat, axis=0)) > (4 if "selector" in law else 23)
    assert (np.linalg.matrix_rank(first) == 2).all()
    if law not in ("gaussian", "uniform01"):
        np.testing.assert_allclose(
            first @ np.swapaxes(first, -1, -2), np.broadcast_to(np.eye(2), (4, 3, 2, 2)), atol=1e-12
        )


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_selectors_without_replacement_hold_every_coordinate_in_each_cycle(rank):
    drawing = sampler("selector_without_replacement", rank)
    for _ in range(3):
        cycle = np.concatenate([drawing.draw() for _ in range(-(-6 // rank))], axis=-2)
        assert (cycle.sum(-2) >= 1).all()
        assert (cycle.sum(-2) == 1).all() == (6 % rank == 0)


def test_two_seeds_move_differently_and_the_same_root_seed_repeats():
    problem = quadratic(SHAPE, SPECTRUM)
    once, again = (gd(problem, Sketching(rank=2), Budget(5, 3, seed=1), gamma=1.0) for _ in range(2))
    np.testing.assert_array_equal(once.gaps, again.gaps)
    assert len(set(once.gaps[:, -1])) == 3
    other = gd(problem, Sketching(rank=2), Budget(5, 3, seed=2), gamma=1.0)
    assert not np.array_equal(once.gaps, other.gaps)


def test_r_equal_to_n_is_full_gradient_descent():
    problem = quadratic(SHAPE, SPECTRUM)
    trace, W = gd(problem, FULL, Budget(20, 2), gamma=0.7), problem.start
    for time in range(21):
        assert trace.gaps[:, time] == pytest.approx([float(problem.gap(W))] * 2, rel=1e-12)
        assert trace.squared_gradients[:, time] == pytest.approx([(problem.gradient(W) ** 2).sum()] * 2, rel=1e-12)
        W, reached = W - 0.7 * problem.gradient(W), W
    np.testing.assert_allclose(trace.last, np.stack([reached, reached]), atol=1e-12)


@sides
@pytest.mark.parametrize("law", ["orthonormal", "gaussian"])
def test_a_link_moves_the_weight_by_a_matrix_of_rank_r(side, law):
    problem = quadratic(SHAPE, SPECTRUM)
    for solver in ("projected", "plain", "inner", "exact"):
        trace = gd(problem, Sketching(law, 2, side, solver), Budget(1, 5), gamma=0.1)
        assert (np.linalg.matrix_rank(trace.last - problem.start, tol=1e-10) == 2).all()


def test_the_plain_solver_is_the_projected_one_for_orthonormal_factors_only():
    problem = quadratic(SHAPE, SPECTRUM)
    for law, is_same in (("orthonormal", True), ("selector", True), ("gaussian", False)):
        plain, projected = (
            gd(problem, Sketching(law, 2, solver=solver), Budget(5, 3), gamma=0.01).gaps
            for solver in ("plain", "projected")
        )
        assert np.allclose(plain, projected, rtol=1e-10) == is_same


@sides
@pytest.mark.parametrize("length", [6, 24])
def test_exact_links_have_no_slope_left_in_their_subspace_and_inner_steps_approach_them(side, length):
    problem = quadratic(SHAPE, geometric_spectrum(length, 10.0))
    start = float(problem.gap(problem.start))
    found = {}
    for solver, inner in (("projected", 1), ("inner", 4), ("inner", 400), ("exact", 1)):
        found[solver, inner] = gd(problem, Sketching("gaussian", 2, side, solver, inner), Budget(1, 20), gamma=1.0)
    gaps = {key: trace.gaps[:, 1] for key, trace in found.items()}
    np.testing.assert_allclose(gaps["exact", 1], gaps["inner", 400], rtol=1e-9)
    assert (gaps["exact", 1] <= gaps["inner", 4]).all()
    assert (gaps["inner", 4] <= gaps["projected", 1] + 1e-12).all()
    moved = found["exact", 1].last - problem.start
    slope = (problem.gradient(found["exact", 1].last) * moved).sum((-2, -1))
    assert np.abs(slope).max() < 1e-10 * start


@sides
def test_steps_at_one_over_the_majorants_smoothness_descend_where_the_problem_is_not_quadratic(side):
    problem = logistic_regression(SHAPE, Made(samples=40, noise=0.1), ridge=0.05)
    gaps = {solver: gd(problem, Sketching(rank=2, side=side, solver=solver), Budget(15, 20), gamma=1.0).gaps
            for solver in ("inner", "exact")}  # fmt: skip
    for values in gaps.values():
        assert (np.diff(values, axis=1) <= 1e-12).all()
    assert gaps["inner"][:, -1].mean() < gaps["exact"][:, -1].mean()  # ten steps of a majorant against one


def test_reshuffling_one_component_is_gradient_descent_and_one_client_is_reshuffling():
    alone = quadratic(SHAPE, SPECTRUM)
    np.testing.assert_allclose(
        reshuffled(alone, FULL, Budget(5, 2), gamma=0.5).gaps, gd(alone, FULL, Budget(5, 2), gamma=0.5).gaps, rtol=1e-9
    )
    one = spread(clients=1, samples=2, noise=0.0)
    by_client = federated(one, FULL, Budget(5, 2), steps=Steps(0.2, 2, 0.4))
    np.testing.assert_allclose(by_client.gaps, reshuffled(one, FULL, Budget(5, 2), gamma=0.2).gaps, rtol=1e-9)


def test_a_pass_visits_every_component_once_in_orders_that_differ():
    """With steps gamma on <W - W_i, W - W_i> / 2 the order weighs the optima by (1 - gamma)^(places left)."""
    problem = spread_quadratic(SHAPE, np.ones(6), Made(1, 3, noise=1.0))
    centres = problem.objective.centres[0]
    last = reshuffled(problem, FULL, Budget(1, 40), gamma=0.5).last
    weights = np.array([0.125, 0.25, 0.5])
    orders = [(i, j, 3 - i - j) for i in range(3) for j in range(3) if i != j]
    expected = np.stack([np.tensordot(weights, centres[list(order)], 1) for order in orders])
    distances = np.abs(last[:, None] - expected[None]).max((-2, -1))
    assert (distances.min(1) < 1e-12).all()
    assert set(distances.argmin(1)) == set(range(6))


def test_stochastic_steps_use_one_component_each_of_all_clients():
    problem = spread_quadratic(SHAPE, np.ones(6), Made(2, 2, heterogeneity=1.0, noise=1.0))
    last = sgd(problem, FULL, Budget(1, 40), gamma=1.0).last
    distances = np.abs(last[:, None] - problem.objective.centres.reshape(4, *SHAPE)[None]).max((-2, -1))
    assert (distances.min(1) < 1e-12).all()
    assert set(distances.argmin(1)) == set(range(4))


@pytest.mark.parametrize("cohort", [1, 2, 3])
def test_a_round_averages_a_cohort_of_distinct_clients(cohort):
    problem = spread_quadratic(SHAPE, np.ones(6), Made(3, 1, heterogeneity=1.0))
    centres = problem.objective.centres[:, 0]
    last = federated(problem, FULL, Budget(1, 40), steps=Steps(1.0, 1, 1.0), cohort=cohort).last
    chosen = {1: [[0], [1], [2]], 2: [[0, 1], [0, 2], [1, 2]], 3: [[0, 1, 2]]}[cohort]
    distances = np.abs(last[:, None] - np.stack([centres[some].mean(0) for some in chosen])[None]).max((-2, -1))
    assert (distances.min(1) < 1e-12).all()
    assert set(distances.argmin(1)) == set(range(len(chosen)))


def test_the_server_step_is_eta_along_the_mean_pseudo_gradient():
    problem, sketching = spread(), Sketching(rank=3)
    plain, double = (
        federated(problem, sketching, Budget(1, 4), steps=Steps(0.05, 4, server)).last - problem.start
        for server in (0.2, 0.4)
    )
    np.testing.assert_allclose(double, 2 * plain, atol=1e-12)


def test_private_sketches_of_alike_clients_save_rounds_and_of_unlike_ones_leave_a_floor():
    """One step: the mean of G H_k descends faster than G H, but the mean of G_k H_k is not zero at the optimum."""
    steps, budget = Steps(0.05, 1, 1.0), Budget(150, 10)
    found = {}
    for heterogeneity in (0.0, 0.5):
        problem = spread(8, 1, heterogeneity, 0.0)
        for is_shared in (True, False):
            trace = federated(problem, Sketching(rank=1, is_shared=is_shared), budget, steps=steps)
            found[heterogeneity, is_shared] = trace.gaps.mean(0)
    np.testing.assert_allclose(found[0.0, True], found[0.5, True], rtol=1e-6)
    assert found[0.0, False][-1] < found[0.0, True][-1]
    assert found[0.5, False][-1] > 10 * found[0.5, True][-1]


def test_measured_spreads_are_the_most_of_any_link():
    """From a start near the optimum they grow."""
    problem = least_squares(SHAPE, Made(3, 4, heterogeneity=0.5, noise=0.1), ridge=0.1)
    near = gd(problem, FULL, Budget(300, 1), gamma=1 / problem.smoothness).last
    trace = sgd(replace(problem, start=near[0]), FULL, Budget(10, 5), gamma=1 / problem.component_smoothness)
    for found, measure in ((trace.noise, problem.noise), (trace.heterogeneity, problem.heterogeneity)):
        assert found >= measure(np.concatenate([near, trace.last])).max()
        assert found > float(measure(near)[0])


def test_choices_that_cannot_be_run_are_refused():
    problem = spread()
    with pytest.raises(ValueError, match="unknown choice 'haar'"):
        Sketching("haar")
    with pytest.raises(ValueError, match="between 1 and 4"):
        gd(problem, Sketching(rank=5, side="left"), Budget(1), gamma=1.0)
    with pytest.raises(ValueError, match="full gradients"):
        sgd(problem, Sketching(solver="exact"), Budget(1), gamma=1.0)
    with pytest.raises(ValueError, match="the problem has 4"):
        federated(problem, Sketching(), Budget(1), steps=Steps(0.1, 3, 1.0))


def test_floats_to_accuracy_count_the_links_until_it_and_are_infinite_without():
    gaps = np.array([[1.0, 0.5, 0.1], [1.0, 0.9, 0.8]])
    np.testing.assert_array_equal(floats_to_accuracy(gaps, 0.5, 8), [8, np.inf])
    assert uplink_per_link(distance(SHAPE), Sketching(rank=2)) == 8
    assert uplink_per_link(distance(SHAPE), Sketching(rank=2, side="left")) == 12
