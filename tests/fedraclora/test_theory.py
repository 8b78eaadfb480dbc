"""The theory's functions: eigenvalues, links, steps, and what its bounds say of themselves."""

import itertools

import numpy as np
import pytest

from fedraclora import theory
from fedraclora.sketch import LAWS, SketchKey, draw
from fedraclora.theory import Constants, Range, Steps

CONSTANTS = Constants(gap=3.0, smoothness=2.0, mu=0.5, noise=1.5, heterogeneity=0.7)
HALF = Range(0.5, 0.5)


@pytest.mark.parametrize("law", LAWS)
def test_the_sampled_range_is_near_the_expected_one(law):
    def factor(link):
        return draw(SketchKey(law, 1, link, "layer", "b", 3, 8)).numpy().astype(np.float64)

    found, expected = theory.sampled_range(factor, 1000), theory.expected_range(law, 3, 8)
    assert expected.low <= expected.high
    assert found.low == pytest.approx(expected.low, abs=0.06)
    assert found.high == pytest.approx(expected.high, abs=0.06)


@pytest.mark.parametrize(("rank", "dim"), [(1, 3), (2, 2), (2, 4), (3, 3), (3, 4), (4, 4)])
def test_random_signs_have_the_expected_rank_that_all_their_matrices_have(rank, dim):
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=rank * dim))).reshape(-1, rank, dim)
    expected = float(np.linalg.matrix_rank(signs).mean()) / dim
    found = theory.expected_range("rademacher", rank, dim)
    assert found.low - 1e-12 <= expected <= found.high
    if rank <= 2:
        assert found.low == pytest.approx(expected)
    np.testing.assert_allclose(theory.projector(signs).mean(0), expected * np.eye(dim), atol=1e-12)


def test_other_laws_are_isotropic_and_unknown_ones_and_ranks_are_refused():
    for law in set(LAWS) - {"rademacher"}:
        assert theory.expected_range(law, 3, 8) == Range(3 / 8, 3 / 8)
    with pytest.raises(ValueError, match="unknown sketch law 'haar'"):
        theory.expected_range("haar", 1, 2)
    with pytest.raises(ValueError, match="between 1 and dim = 2"):
        theory.expected_range("raw", 3, 2)


def test_projectors_of_dependent_rows_have_the_rank_of_their_span():
    H = theory.projector(np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]]))
    np.testing.assert_allclose(H, [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]], atol=1e-12)
    A = np.random.default_rng(0).standard_normal((5, 2, 4))
    np.testing.assert_allclose(theory.projector(A), np.stack([np.linalg.pinv(a) @ a for a in A]), atol=1e-12)


def test_a_law_that_is_not_centred_has_a_wide_range():
    rng = np.random.default_rng(0)
    assert theory.sampled_range(lambda _: rng.random((1, 8)), 1000).ratio > 10


@pytest.mark.parametrize("side", ["a", "b"])
def test_links_are_projected_steps(side):
    rng = np.random.default_rng(0)
    G = rng.standard_normal((5, 7))
    drawn = rng.standard_normal((5, 2) if side == "a" else (2, 7))
    trained = theory.closed_form_link(G, drawn, 0.3, side=side)
    H = theory.projector(drawn.T if side == "a" else drawn)
    product, step = (drawn @ trained, H @ G) if side == "a" else (trained @ drawn, G @ H)
    np.testing.assert_allclose(product, -0.3 * step, atol=1e-12)
    once = theory.gradient_link(G, drawn, 0.3, 2.0, side=side)
    update = 2 * (drawn @ once if side == "a" else once @ drawn)
    np.testing.assert_allclose(update, -1.2 * (drawn @ drawn.T @ G if side == "a" else G @ drawn.T @ drawn))


def test_the_smoothness_within_a_subspace_is_that_of_a_c_a():
    rng = np.random.default_rng(0)
    A = np.linalg.qr(rng.standard_normal((6, 2)))[0].T
    C = np.diag(np.arange(1.0, 7.0))
    assert theory.subspace_smoothness(A, C) == pytest.approx(np.linalg.eigvalsh(A @ C @ A.T)[-1])
    assert theory.subspace_smoothness(np.eye(6), C) == pytest.approx(6.0)


def test_bounds_against_numbers_worked_out_by_hand():
    steps = Steps(local=0.05, num=4, server=0.5)
    drift = (0.05 * 2) ** 2
    expected = {
        theory.gd_nonconvex: (0.5, 0.5, 2 * 3 / (0.5 * 0.5 * 10)),
        theory.gd_pl: (0.5, 0.5, (1 - 0.125) ** 10 * 3),
        theory.sgd_nonconvex: (0.5, HALF, 2 * 3 / (0.5 * 0.5 * 10) + 2 * 0.5 * 1.5),
        theory.sgd_pl: (0.5, HALF, (1 - 0.125) ** 10 * 3 + 2 * 0.5 / 1 * 1.5),
        theory.rr_nonconvex: (steps, HALF, 8 * 3 / (3 * 0.05 * 4 * 0.5 * 10) + 4 / 3 * drift * 4 * 1.5),
        theory.rr_pl: (steps, HALF, (1 - 0.75 * 0.05 * 0.5 * 4 * 0.5) ** 10 * 3 + 2 / 3 * drift * 4 / 0.5 * 1.5),
        theory.federated_nonconvex: (
            steps, HALF, 8 * 3 / (3 * 0.5 * 0.5 * 10) + 4 / 3 * drift * (16 * 0.7 + 4 * 1.5)
        ),
        theory.federated_pl: (
            steps, HALF, (1 - 0.75 * 0.5 * 0.5 * 0.5) ** 10 * 3 + 2 / 3 * drift / 0.5 * (16 * 0.7 + 4 * 1.5)
        ),
    }  # fmt: skip
    for bound, (step, eigenvalues, value) in expected.items():
        found = bound(10, CONSTANTS, step, eigenvalues)
        assert float(found.values) == pytest.approx(value), bound.__name__
        assert found.is_bound
        assert ("paper" in found.provenance) == bound.__name__.startswith("gd")


def test_bounds_are_vectors_over_t_and_say_nothing_before_the_first_link():
    times, steps = np.array([0, 1, 10]), Steps(0.05, 4, 0.5)
    for bound, step in (
        (theory.gd_nonconvex, 0.5), (theory.gd_pl, 0.5), (theory.rr_nonconvex, steps), (theory.federated_pl, steps)
    ):  # fmt: skip
        eigenvalues = 0.5 if bound.__name__.startswith("gd") else HALF
        found = bound(times, CONSTANTS, step, eigenvalues)
        for time, value in zip(times, found.values, strict=True):
            assert float(bound(time, CONSTANTS, step, eigenvalues).values) == value
        assert found.values[0] == (np.inf if found.quantity == "gradient" else pytest.approx(3, abs=2))


def test_a_range_of_eigenvalues_raises_floors_by_its_ratio_and_slows_by_its_low_end():
    for bound, step in (
        (theory.sgd_pl, 0.5),
        (theory.rr_pl, Steps(0.05, 4)),
        (theory.federated_pl, Steps(0.05, 4, 0.5)),
    ):
        wide, isotropic = (float(bound(np.inf, CONSTANTS, step, r).values) for r in (Range(0.1, 0.5), HALF))
        assert wide == pytest.approx(5 * isotropic)
        assert float(bound(1, CONSTANTS, step, Range(0.1, 0.1)).values) > float(bound(1, CONSTANTS, step, HALF).values)


def test_the_non_smooth_bound_is_least_at_r_over_l0_root_lambda_t():
    best = 2.0 / (3.0 * (0.25 * 100) ** 0.5)
    least = float(theory.nonsmooth(100, 2.0, 3.0, best, 0.25).values)
    assert least == pytest.approx(2.0 * 3.0 / (0.25 * 100) ** 0.5)
    assert min(float(theory.nonsmooth(100, 2.0, 3.0, best * s, 0.25).values) for s in (0.9, 1.1)) > least


def test_moments_of_normal_factors_are_those_of_the_plain_step():
    """E[A^T A] = r I and E[(A^T A)^2] = r (r + n + 1) I; the step is their ratio, the speed r times it."""
    A = np.random.default_rng(0).standard_normal((40_000, 3, 4))
    P = np.swapaxes(A, 1, 2) @ A
    first, second = P.mean(0).trace() / 4, (P @ P).mean(0).trace() / 4
    assert theory.raw_step(1.0, 3, 4) == pytest.approx(first / second, rel=0.02)
    assert theory.raw_speed(3, 4) == pytest.approx(first**2 / second, rel=0.02)
    assert theory.smooth_step(4.0) == 0.25
    assert theory.reshuffling_step(4.0, 5) == 1 / 40


@pytest.mark.parametrize(("shape", "rank", "probability"), [((4, 8), 2, 0.3), ((3, 7), 2, 0.1), ((3, 7), 7, 0.5)])
def test_catching_up_costs_what_clients_with_random_participation_pay(shape, rank, probability):
    missed = np.random.default_rng(0).geometric(probability, 200_000)
    paid = np.minimum(missed * shape[0] * rank, shape[0] * shape[1])
    assert theory.expected_catch_up(shape, rank, probability) == pytest.approx(paid.mean(), rel=0.01)


def test_an_unknown_side_is_refused():
    for link in (theory.closed_form_link, theory.gradient_link):
        with pytest.raises(ValueError, match="unknown side 'ab'"):
            link(np.eye(2), np.eye(2), 1.0, side="ab")


def test_steps_beyond_what_a_bound_allows_are_refused():
    with pytest.raises(ValueError, match=r"at most 0\.5"):
        theory.gd_pl(1, CONSTANTS, 0.6, 0.5)
    with pytest.raises(ValueError, match="at most"):
        theory.rr_pl(1, CONSTANTS, Steps(0.1, 4), HALF)


def test_the_floor_of_participation_is_no_bound_and_none_with_all_clients():
    found = theory.participation_floor(CONSTANTS, 0.5, (4, 8), HALF)
    assert not found.is_bound
    assert float(found.values) == pytest.approx(2 * 2 * 0.5 / 1.5 * 4 / (4 * 7) * 0.7)
    assert theory.cohort_variance(8, 8) == 0 == theory.cohort_variance(1, 1)


def test_steps_speeds_and_catching_up():
    assert theory.closed_form_gamma(0.1, 6, 2) == pytest.approx(0.3)
    assert theory.gradient_gamma(0.1, 6, 2) == pytest.approx(0.9)
    assert theory.raw_step(2.0, 3, 4) == pytest.approx(1 / 16)
    assert theory.raw_speed(3, 4) == pytest.approx(3 / 8)
    assert theory.bernoulli_speed(0.25, (4, 8), 2) == pytest.approx(0.25 / 2 + 0.75 / 4)
    assert theory.break_even_links(768, 8) == 96
    assert theory.expected_catch_up((4, 8), 2, 1.0) == 8
    assert theory.expected_catch_up((4, 8), 2, 0.5) == pytest.approx(16 * (1 - 0.5**4))
    assert theory.expected_catch_up((4, 8), 2, 1e-9) == pytest.approx(32)
