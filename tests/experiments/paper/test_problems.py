"""Problems: gradients by finite differences, constants by eigenvalues, and the PL inequality at random points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from experiments.paper.problems import (
    Made,
    distance,
    geometric_spectrum,
    least_squares,
    logistic_regression,
    low_rank_spectrum,
    quadratic,
    spread_quadratic,
)

SHAPE = (3, 5)
MADE = Made(3, 4, heterogeneity=0.5, noise=0.3, seed=1)
PROBLEMS = {
    "distance": distance(SHAPE),
    "quadratic": quadratic(SHAPE, geometric_spectrum(5, 20.0)),
    "flattened": quadratic(SHAPE, geometric_spectrum(15, 20.0)),
    "low rank": quadratic(SHAPE, low_rank_spectrum(5, 2, 0.0)),
    "spread": spread_quadratic(SHAPE, geometric_spectrum(5, 20.0), MADE),
    "rank-deficient": least_squares(SHAPE, MADE, rank=3),
    "ridge": least_squares(SHAPE, MADE, ridge=0.1),
    "logistic": logistic_regression(SHAPE, MADE),
}
each = pytest.mark.parametrize("name", PROBLEMS)


def points(num, seed=0):
    return 2 * np.random.default_rng(seed).standard_normal((num, *SHAPE))


@each
def test_gradients_are_the_finite_differences(name):
    problem, W, D, step = PROBLEMS[name], points(4), points(4, 1), 1e-5
    slope = (problem.gap(W + step * D) - problem.gap(W - step * D)) / (2 * step)
    np.testing.assert_allclose((problem.gradient(W) * D).sum((-2, -1)), slope, rtol=1e-6, atol=1e-7)


@each
def test_the_mean_of_the_components_is_the_gradient(name):
    W = points(4)
    np.testing.assert_allclose(PROBLEMS[name].components(W).mean((1, 2)), PROBLEMS[name].gradient(W), atol=1e-12)


@each
def test_smoothness_and_mu_are_the_extreme_eigenvalues_of_the_hessian(name):
    problem, size, step = PROBLEMS[name], SHAPE[0] * SHAPE[1], 1e-4
    moved = step * np.eye(size).reshape(size, *SHAPE)
    hessian = ((problem.gradient(moved) - problem.gradient(-moved)) / (2 * step)).reshape(size, size)
    eigenvalues = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    positive = eigenvalues[eigenvalues > 1e-7]
    if problem.is_quadratic:
        assert positive[-1] == pytest.approx(problem.smoothness, rel=1e-6)
        assert positive[0] == pytest.approx(problem.mu, rel=1e-6)
    else:
        assert problem.mu * (1 - 1e-6) <= positive[0] <= positive[-1] <= problem.smoothness * (1 + 1e-6)


@each
@hypothesis_settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_pl_holds_and_gaps_are_not_negative(name, seed):
    """||grad f||^2 >= 2 mu (f - f*), and <= 2 L (f - f*)."""
    problem, W = PROBLEMS[name], points(5, seed)
    gap, squared = problem.gap(W), (problem.gradient(W) ** 2).sum((-2, -1))
    assert (gap >= -1e-12).all()
    assert (squared >= 2 * problem.mu * gap * (1 - 1e-9)).all()
    assert (squared <= 2 * problem.smoothness * gap * (1 + 1e-9)).all()


def test_the_spread_of_quadratics_is_the_same_at_all_points():
    problem = PROBLEMS["spread"]
    for measure in (problem.noise, problem.heterogeneity):
        np.testing.assert_allclose(measure(points(3)), float(measure(points(1))[0]), rtol=1e-10)
        assert measure(points(1)) > 0
