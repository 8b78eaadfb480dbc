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


@each
def test_components_are_as_smooth_as_stated_and_one_of_them_no_more(name):
    problem, W, V = PROBLEMS[name], points(200) / 10, points(200, 1) / 10
    change = problem.components(W) - problem.components(V)
    ratios = ((change**2).sum((-2, -1)) / ((W - V) ** 2).sum((-2, -1))[:, None, None]) ** 0.5
    assert ratios.max() <= problem.component_smoothness * (1 + 1e-9)
    assert ratios.max() > 0.2 * problem.component_smoothness
    assert problem.component_smoothness >= problem.smoothness * (1 - 1e-9)


@each
def test_the_gap_is_zero_where_gradient_descent_ends(name):
    """And nowhere less: f* is from a solve, this from a thousand steps."""
    problem = PROBLEMS[name]
    W = problem.start
    for _ in range(1500):
        W = W - problem.gradient(W) / problem.smoothness
    assert abs(float(problem.gap(W))) < 1e-12
    assert problem.gap(problem.start) > 1e-3


def test_curvature_bounds_the_loss_from_above_and_equals_it_for_quadratics():
    for problem in PROBLEMS.values():
        W, D = points(50), points(50, 1)
        C = problem.curvature
        curved = D @ C if C.ndim == 2 else np.einsum("ijkl,skl->sij", C, D)
        model = problem.gap(W) + ((problem.gradient(W) + curved / 2) * D).sum((-2, -1))
        assert (problem.gap(W + D) <= model + 1e-9).all()
        assert np.allclose(problem.gap(W + D), model, rtol=1e-9) == problem.is_quadratic


@pytest.mark.parametrize("family", [least_squares, logistic_regression])
def test_heterogeneity_sets_clients_apart(family):
    """By more than the chance of their samples does."""
    spreads = [
        float(family(SHAPE, Made(4, 400, heterogeneity, 0.1, seed=2)).heterogeneity(points(1))[0])
        for heterogeneity in (0.0, 1.0)
    ]
    assert spreads[1] > 3 * spreads[0]


@pytest.mark.parametrize("name", ["spread", "ridge", "logistic"])
def test_spreads_are_the_variances_within_and_between_clients(name):
    problem, W = PROBLEMS[name], points(1)
    gradients, within, between = problem.components(W)[0], 0.0, 0.0
    for own in gradients:
        between += float(((own.mean(0) - problem.gradient(W[0])) ** 2).sum()) / 3
        within += sum(float(((one - own.mean(0)) ** 2).sum()) for one in own) / 12
    assert float(problem.noise(W)[0]) == pytest.approx(within)
    assert float(problem.heterogeneity(W)[0]) == pytest.approx(between)


def test_the_spread_of_quadratics_grows_as_the_square_of_its_knobs():
    C = geometric_spectrum(5, 20.0)
    one, two = (spread_quadratic(SHAPE, C, Made(3, 4, k * 0.5, k * 0.3)).constants() for k in (1, 2))
    assert two.heterogeneity == pytest.approx(4 * one.heterogeneity)
    assert two.noise == pytest.approx(4 * one.noise)
    assert two.gap == pytest.approx(one.gap)


def test_known_constants_of_simple_families():
    half = distance(SHAPE)
    assert (half.smoothness, half.mu, half.counts) == (1.0, 1.0, (1, 1))
    assert float(half.gap(half.start)) == pytest.approx(float((half.gradient(half.start) ** 2).sum()) / 2)
    assert quadratic(SHAPE, geometric_spectrum(5, 20.0)).mu == pytest.approx(0.05)
    assert quadratic(SHAPE, low_rank_spectrum(5, 2, 0.0)).mu == 1.0
    assert np.linalg.matrix_rank(PROBLEMS["rank-deficient"].curvature) == 3
    np.testing.assert_array_equal(low_rank_spectrum(4, 1, 0.1), [1.0, 0.1, 0.1, 0.1])


def test_settings_without_a_problem_are_refused():
    with pytest.raises(ValueError, match="n = 5 or m n = 15 eigenvalues; found 4"):
        quadratic(SHAPE, np.ones(4))
    with pytest.raises(ValueError, match="must be positive"):
        logistic_regression(SHAPE, MADE, ridge=0.0)
