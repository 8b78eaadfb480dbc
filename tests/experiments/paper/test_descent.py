"""The methods on problems of known constants, held to the bounds of `fedraclora.theory`.

A mean over 24 seeds is to be at most bound + three standard errors of that mean, at every T.
"""

import numpy as np
import pytest

from experiments.paper.descent import (
    Budget,
    Sketching,
    federated,
    floats_to_accuracy,
    gd,
    reshuffled,
    sgd,
    uplink_per_link,
)
from experiments.paper.problems import Made, distance, geometric_spectrum, least_squares, quadratic, spread_quadratic
from fedraclora import theory
from fedraclora.seeding import generator
from fedraclora.theory import Constants, Range, Steps

SHAPE, LINKS = (4, 6), 80
BUDGET = Budget(LINKS, seeds=24)
T = np.arange(LINKS + 1)
CLIENTS, SAMPLES = 5, 4


def problem_of(family, clients=1):
    made = Made(clients, SAMPLES if clients > 1 else 8, heterogeneity=0.5, noise=0.5, seed=3)
    if family == "quadratic":
        return spread_quadratic(SHAPE, geometric_spectrum(SHAPE[1], 10.0), made)
    return least_squares(SHAPE, made, rank=4)


def constants_of(problem, trace):
    """Return the constants with s^2 and zeta^2 the most of what the runs visited."""
    found = problem.constants()
    noise, spread = trace.noise, trace.heterogeneity
    return Constants(found.gap, found.smoothness, found.mu, noise, spread)


def assert_bounded(values, bound):
    """Assert the mean over seeds `[seeds, T + 1]` below the bound and a margin of three standard errors."""
    assert bound.is_bound
    mean, error = values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5
    assert (mean <= bound.values + 3 * error + 1e-12).all(), (mean / bound.values).max()


def least_mean(squared_gradients):
    """Return each seed's squared gradient at the link before T whose mean is least, `[seeds, T + 1]`."""
    mean = squared_gradients.mean(0)
    best = [int(mean[: max(time, 1)].argmin()) for time in T]
    return squared_gradients[:, best]


def assert_both(trace, nonconvex, pl):
    assert_bounded(least_mean(trace.squared_gradients), nonconvex)
    assert_bounded(trace.gaps, pl)


cases = pytest.mark.parametrize("family", ["quadratic", "least squares"])
ranks = pytest.mark.parametrize("rank", [1, 3, 6])


@cases
@ranks
def test_full_gradients_keep_to_their_bounds(family, rank):
    problem = problem_of(family)
    gamma, constants = 1 / problem.component_smoothness, problem.constants()
    trace = gd(problem, Sketching(rank=rank), BUDGET, gamma=gamma)
    low = rank / SHAPE[1]
    assert_both(trace, theory.gd_nonconvex(T, constants, gamma, low), theory.gd_pl(T, constants, gamma, low))


@cases
@ranks
def test_stochastic_gradients_keep_to_their_bounds(family, rank):
    problem, range_ = problem_of(family), Range(rank / SHAPE[1], rank / SHAPE[1])
    gamma = 0.5 / problem.component_smoothness
    trace = sgd(problem, Sketching(rank=rank), BUDGET, gamma=gamma)
    constants = constants_of(problem, trace)
    assert_both(trace, theory.sgd_nonconvex(T, constants, gamma, range_), theory.sgd_pl(T, constants, gamma, range_))


@cases
@ranks
def test_random_reshuffling_keeps_to_its_bounds(family, rank):
    problem, range_ = problem_of(family), Range(rank / SHAPE[1], rank / SHAPE[1])
    steps = Steps(theory.reshuffling_step(problem.component_smoothness, 8), 8)
    trace = reshuffled(problem, Sketching(rank=rank), BUDGET, gamma=steps.local)
    constants = constants_of(problem, trace)
    assert_both(trace, theory.rr_nonconvex(T, constants, steps, range_), theory.rr_pl(T, constants, steps, range_))


@cases
@ranks
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_clients_keep_to_their_bounds_with_small_local_steps_and_large_server_steps(family, rank, share):
    problem, range_ = problem_of(family, CLIENTS), Range(rank / SHAPE[1], rank / SHAPE[1])
    local = share * theory.reshuffling_step(problem.component_smoothness, SAMPLES)
    steps = Steps(local, SAMPLES, 1 / problem.component_smoothness)
    trace = federated(problem, Sketching(rank=rank), BUDGET, steps=steps)
    constants = constants_of(problem, trace)
    assert_both(
        trace,
        theory.federated_nonconvex(T, constants, steps, range_),
        theory.federated_pl(T, constants, steps, range_),
    )


def test_subgradients_of_the_sum_of_absolute_values_keep_to_the_non_smooth_bound():
    rank, gamma, seeds = 2, 0.05, 24
    rng = generator(5)
    optimum = rng.standard_normal(SHAPE)
    W, total, values = np.zeros((seeds, *SHAPE)), np.zeros((seeds, *SHAPE)), []
    for time in range(1, LINKS + 1):
        total += W
        values.append(np.abs(total / time - optimum).sum((-2, -1)))
        A = np.linalg.qr(rng.standard_normal((seeds, SHAPE[1], rank)))[0]
        W = W - gamma * np.sign(W - optimum) @ A @ np.swapaxes(A, -1, -2)
    lipschitz = float(np.prod(SHAPE)) ** 0.5
    bound = theory.nonsmooth(T[1:], float(np.linalg.norm(optimum)), lipschitz, gamma, rank / SHAPE[1])
    assert_bounded(np.stack(values, axis=1), bound)


def test_c9_the_floor_of_reshuffling_falls_faster_with_the_step_than_that_of_stochastic_gradients():
    """The bounds fall as gamma^2 and gamma. With one curvature for all components a pass errs by gamma^2 with mean zero
    to leading order, and 1 / gamma links add up: the floor falls as gamma^3, by 8 in place of the bound's 4.
    """
    problem, full = problem_of("quadratic"), Sketching(rank=6)
    largest = theory.reshuffling_step(1.0, 8)
    ratios = {}
    for method in (reshuffled, sgd):
        floors = [method(problem, full, Budget(300, 24), gamma=g).gaps[:, -50:].mean() for g in (largest, largest / 2)]
        ratios[method] = floors[0] / floors[1]
    assert 4 < ratios[reshuffled] < 12
    assert ratios[sgd] < 3


def test_r_equal_to_n_is_full_gradient_descent():
    problem = quadratic(SHAPE, geometric_spectrum(6, 10.0))
    trace, W = gd(problem, Sketching(rank=6), Budget(20, 2), gamma=1.0), problem.start
    for _ in range(20):
        W = W - problem.gradient(W)
    np.testing.assert_allclose(trace.last, np.stack([W, W]), atol=1e-12)


@pytest.mark.parametrize(("side", "share"), [("right", 2 / 6), ("left", 2 / 4)])
def test_the_mean_factor_on_half_the_squared_distance(side, share):
    trace = gd(distance(SHAPE), Sketching(rank=2, side=side), Budget(10, 60), gamma=0.5)
    shares = (1 - trace.gaps[:, 1:] / trace.gaps[:, :-1]) / 0.75
    assert abs(shares.mean() - share) < 5 * shares.std() / shares.size**0.5


def test_exact_links_descend_at_least_as_far_as_steps_in_the_subspace():
    problem = quadratic(SHAPE, geometric_spectrum(6, 10.0))
    exact, inner, step = (
        gd(problem, Sketching(rank=3, solver=solver, inner=4), Budget(1, 20), gamma=1.0).gaps[:, 1]
        for solver in ("exact", "inner", "projected")
    )
    assert (exact <= inner + 1e-12).all()
    assert (inner <= step + 1e-12).all()


def test_floats_to_accuracy_count_the_links_until_it_and_are_infinite_without():
    gaps = np.array([[1.0, 0.5, 0.1], [1.0, 0.9, 0.8]])
    np.testing.assert_array_equal(floats_to_accuracy(gaps, 0.5, 8), [8, np.inf])
    assert uplink_per_link(distance(SHAPE), Sketching(rank=2)) == 8
    assert uplink_per_link(distance(SHAPE), Sketching(rank=2, side="left")) == 12
