"""The convergence bounds of RAC-LoRA against runs: a mean over seeds lies below its bound, up to three standard errors.

G. Malinovsky et al., "Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank
Adaptation", 2024, arXiv 2410.08305. Its own Theorems 5.3 and 5.5 are those of full gradients; the other bounds are
derived in `fedraclora.theory`. Where s^2 and zeta^2 depend on the point they are the most that the runs came across.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from experiments.paper.descent import (
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
    Problem,
    distance,
    geometric_spectrum,
    least_squares,
    logistic_regression,
    low_rank_spectrum,
    quadratic,
    spread_quadratic,
)
from fedraclora import theory
from fedraclora.seeding import generator
from fedraclora.theory import Range, Steps

SHAPE, LINKS, SEEDS = (4, 6), 120, 24
BUDGET = Budget(LINKS, SEEDS)
T = np.arange(LINKS + 1)
EVER = np.inf  # T of a bound's floor
CLIENTS, SAMPLES = 5, 4
APART = Made(CLIENTS, SAMPLES, heterogeneity=0.6, noise=0.5, seed=3)


@dataclass(frozen=True)
class Wells:
    """Components sum log(1 + (W - W_ki)^2) / 2 over the entries: smooth with L = 1, not convex, at least zero."""

    centres: np.ndarray

    def gap(self, W):
        return np.log1p((W[..., None, None, :, :] - self.centres) ** 2).sum((-2, -1)).mean((-2, -1)) / 2

    def gradient(self, W):
        away = W[..., None, None, :, :] - self.centres
        return (away / (1 + away**2)).mean((-4, -3))

    def component(self, W, client, sample):
        away = W - self.centres[client, sample]
        return away / (1 + away**2)


@dataclass(frozen=True)
class Unlike:
    """Clients c_k ||W - W_k||^2 / 2, each of samples that are alike: s^2 is zero, and drift does not cancel."""

    curvatures: np.ndarray
    centres: np.ndarray

    def gap(self, W):
        return self.curvatures.mean() / 2 * ((W - self.optimum) ** 2).sum((-2, -1))

    def gradient(self, W):
        return self.curvatures.mean() * (W - self.optimum)

    def component(self, W, client, sample):
        return self.curvatures[client][..., None, None] * (W - self.centres[client])

    @property
    def optimum(self):
        return np.average(self.centres, axis=0, weights=self.curvatures)


def wells(made=APART):
    centres = 2 * generator(made.seed).standard_normal((made.clients, made.samples, *SHAPE))
    counts = (made.clients, made.samples)
    return Problem("wells", Wells(centres), np.full(SHAPE, 2.0), 1.0, 1.0, 0.0, np.eye(SHAPE[1]), False, counts)


# The half squared distance is there because its bounds are nearly met: they have nothing to spare.
PL = {
    "distance": spread_quadratic(SHAPE, np.ones(6), APART),
    "quadratic": spread_quadratic(SHAPE, geometric_spectrum(6, 10.0), APART),
    "flattened": spread_quadratic(SHAPE, geometric_spectrum(24, 10.0), APART),
    "not strongly convex": spread_quadratic(SHAPE, low_rank_spectrum(6, 2, 0.0), APART),
    "least squares": least_squares(SHAPE, APART, rank=4),
    "logistic": logistic_regression(SHAPE, replace(APART, noise=0.1)),
}
PROBLEMS = {**PL, "wells": wells()}
problems = pytest.mark.parametrize("name", PROBLEMS)
sketchings = pytest.mark.parametrize(
    "sketching",
    [
        Sketching(rank=1), Sketching(rank=3), Sketching(rank=6), Sketching("gaussian", 2), Sketching("selector", 2),
        Sketching("orthonormal", 1, "left"), Sketching("selector", 3, "left"),
    ],
    ids=lambda s: f"{s.law} {s.rank} {s.side}",
)  # fmt: skip
few = pytest.mark.parametrize(
    "sketching",
    [Sketching(rank=1), Sketching(rank=6), Sketching("gaussian", 2, "left")],
    ids=["rank 1", "rank n", "gaussian left"],
)


def isotropic(sketching):
    share = sketching.rank / SHAPE[1 if sketching.side == "right" else 0]
    return Range(share, share)


def constants_of(problem, trace):
    """Return the constants with s^2 and zeta^2 the most of what the runs came across."""
    return replace(problem.constants(), noise=trace.noise, heterogeneity=trace.heterogeneity)


def pooled(problem, trace):
    """Return the constants of all components as one data set: s^2 is the variance within and between clients."""
    return replace(problem.constants(), noise=trace.noise + trace.heterogeneity)


def assert_below(values, bound):
    """Assert that the mean over seeds of `values [seeds, ...]` is at most the bound plus three standard errors."""
    assert bound.is_bound
    assert len(values) >= 20
    mean, error = values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5
    assert np.isfinite(mean).all()
    excess = mean - (bound.values + 3 * error) * (1 + 1e-9)
    assert (excess <= 1e-13).all(), f"{bound.name}: above it by up to {excess.max():.3g}"


def assert_keeps(problem, trace, bounds, arguments):
    """Assert both bounds at every T; a uniformly drawn iterate's ||grad f||^2 is on average no less than the least."""
    nonconvex, pl = bounds
    assert_below(trace.squared_gradients[:, :-1].cumsum(1) / T[1:], nonconvex(T[1:], *arguments))
    if problem.mu:
        assert_below(trace.gaps, pl(T, *arguments))


@problems
@sketchings
def test_full_gradients_keep_to_theorems_5_3_and_5_5(name, sketching):
    """C5: at every T, at the largest step that they allow."""
    problem, low = PROBLEMS[name], isotropic(sketching).low
    found = replace(problem.constants(), smoothness=problem.smoothness)
    gamma = theory.smooth_step(problem.smoothness)
    trace = gd(problem, sketching, BUDGET, gamma=gamma)
    assert_keeps(problem, trace, (theory.gd_nonconvex, theory.gd_pl), (found, gamma, low))


@problems
@few
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_stochastic_gradients_keep_to_their_bounds(name, sketching, share):
    problem, eigenvalues = PROBLEMS[name], isotropic(sketching)
    gamma = share * theory.smooth_step(problem.component_smoothness)
    trace = sgd(problem, sketching, BUDGET, gamma=gamma)
    found = constants_of(problem, trace)
    found = replace(found, noise=found.noise + found.heterogeneity)
    assert_keeps(problem, trace, (theory.sgd_nonconvex, theory.sgd_pl), (found, gamma, eigenvalues))


@problems
@few
def test_random_reshuffling_keeps_to_its_bounds(name, sketching):
    problem, eigenvalues, num = PROBLEMS[name], isotropic(sketching), CLIENTS * SAMPLES
    steps = Steps(theory.reshuffling_step(problem.component_smoothness, num), num)
    trace = reshuffled(problem, sketching, BUDGET, gamma=steps.local)
    found = constants_of(problem, trace)
    found = replace(found, noise=found.noise + found.heterogeneity)
    assert_keeps(problem, trace, (theory.rr_nonconvex, theory.rr_pl), (found, steps, eigenvalues))


@problems
@few
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_clients_keep_to_their_bounds_from_plain_averaging_to_large_server_steps(name, sketching, share):
    problem, eigenvalues, L = PROBLEMS[name], isotropic(sketching), PROBLEMS[name].component_smoothness
    local = share * theory.reshuffling_step(L, SAMPLES)
    for server in (local * SAMPLES, theory.smooth_step(L)):
        steps = Steps(local, SAMPLES, server)
        trace = federated(problem, sketching, BUDGET, steps=steps)
        found = constants_of(problem, trace)
        assert found.heterogeneity > 0
        assert_keeps(problem, trace, (theory.federated_nonconvex, theory.federated_pl), (found, steps, eigenvalues))


@few
def test_clients_that_differ_in_curvature_leave_a_floor_below_that_of_zeta_alone(sketching):
    curvatures, centres = np.array([0.2, 0.6, 1.0]), generator(9).standard_normal((3, *SHAPE))
    objective = Unlike(curvatures, centres)
    mean = float(curvatures.mean())
    problem = Problem("unlike", objective, np.zeros(SHAPE), mean, 1.0, mean, mean * np.eye(6), counts=(3, SAMPLES))
    steps, eigenvalues = Steps(theory.reshuffling_step(1.0, SAMPLES), SAMPLES, 1.0), isotropic(sketching)
    trace = federated(problem, sketching, BUDGET, steps=steps)
    assert trace.noise < 1e-20
    arguments = constants_of(problem, trace), steps, eigenvalues
    assert_keeps(problem, trace, (theory.federated_nonconvex, theory.federated_pl), arguments)
    assert trace.gaps[:, -1].min() > 1e-4


@pytest.mark.parametrize("name", ["distance", "quadratic", "logistic", "wells"])
def test_the_bounds_hold_for_a_law_that_is_not_isotropic_with_its_own_eigenvalues(name):
    sketching, problem = Sketching("uniform01", 1), PROBLEMS[name]
    sampler = Sampler(sketching, SHAPE, (), generator(1))
    eigenvalues = theory.sampled_range(lambda _: sampler.draw(), 3000)
    assert eigenvalues.ratio > 10
    gamma, low = theory.smooth_step(problem.component_smoothness), eigenvalues.low
    found = problem.constants()
    full = gd(problem, sketching, BUDGET, gamma=gamma)
    assert_keeps(problem, full, (theory.gd_nonconvex, theory.gd_pl), (found, gamma, low))
    trace = sgd(problem, sketching, BUDGET, gamma=gamma)
    found = constants_of(problem, trace)
    found = replace(found, noise=found.noise + found.heterogeneity)
    assert_keeps(problem, trace, (theory.sgd_nonconvex, theory.sgd_pl), (found, gamma, eigenvalues))


@pytest.mark.parametrize("name", PL)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_plain_steps_on_normal_factors_contract_as_derived_and_diverge_at_1_over_l(name, rank):
    """E f - f* is at most (1 - (mu / L) r / (n + r + 1))^T D0 at the step 1 / (L (n + r + 1))."""
    problem, sketching, n = PL[name], Sketching("gaussian", rank, solver="plain"), SHAPE[1]
    trace = gd(problem, sketching, BUDGET, gamma=theory.raw_step(problem.smoothness, rank, n))
    speed = problem.mu / problem.smoothness * theory.raw_speed(rank, n)
    values = (1 - speed) ** T * float(problem.gap(problem.start))
    assert_below(trace.gaps, theory.Bound("plain", theory.DERIVED, True, "gap", values))
    if name == "distance":
        wild = gd(problem, sketching, Budget(20, SEEDS), gamma=1 / problem.smoothness)
        assert wild.gaps[:, -1].mean() > 10 * wild.gaps[:, 0].mean()


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_subgradients_of_the_sum_of_absolute_values_keep_to_the_non_smooth_bound(rank, share):
    """f(W) = sum |W - W*| is Lipschitz with L0 = sqrt(m n), and far from smooth."""
    sampler = Sampler(Sketching(rank=rank), SHAPE, (SEEDS,), generator(5))
    optimum = generator(6).standard_normal(SHAPE)
    distance_, lipschitz, low = float(np.linalg.norm(optimum)), float(np.prod(SHAPE)) ** 0.5, rank / SHAPE[1]
    gamma = share * distance_ / (lipschitz * (low * LINKS) ** 0.5)
    W, total, values = np.zeros((SEEDS, *SHAPE)), np.zeros((SEEDS, *SHAPE)), []
    for time in T[1:]:
        total += W
        values.append(np.abs(total / time - optimum).sum((-2, -1)))
        W = W - gamma * np.sign(W - optimum) @ theory.projector(sampler.draw())
    assert_below(np.stack(values, axis=1), theory.nonsmooth(T[1:], distance_, lipschitz, gamma, low))


# ---- C4: a problem whose mean factor is known exactly


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("gamma", [0.3, 1.0, 1.7])
def test_c4_half_the_squared_distance_contracts_by_1_minus_2_gamma_minus_gamma_squared_times_r_over_n(side, gamma):
    """||D - gamma D H||^2 = ||D||^2 - (2 gamma - gamma^2) ||D H||^2; at gamma = 1 it is Theorem 5.5, with nothing to
    spare.
    """
    for law in ("orthonormal", "gaussian", "selector"):
        sketching = Sketching(law, 2, side)
        trace = gd(distance(SHAPE), sketching, Budget(20, 100), gamma=gamma)
        factor = 1 - (2 * gamma - gamma**2) * isotropic(sketching).low
        # Selectors at gamma = 1 reach the optimum exactly; until then every link's mean factor is the same.
        is_away = trace.gaps[:, :-1] > 0
        ratios = trace.gaps[:, 1:][is_away] / trace.gaps[:, :-1][is_away]
        assert abs(ratios.mean() - factor) < 4 * ratios.std() / ratios.size**0.5
        # In expectation from the start, so that the factors of a seed's links are seen to be independent of its past.
        errors = 4 * trace.gaps.std(0, ddof=1) / 10
        assert (abs(trace.gaps.mean(0) - trace.gaps[0, 0] * factor ** np.arange(21))[:8] <= errors[:8] + 1e-12).all()


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_the_speed_of_a_random_side_is_the_mean_of_both_sides_speeds(probability):
    rng = generator(8)
    left, right = (Sampler(Sketching(rank=2, side=side), SHAPE, (4000,), rng) for side in ("left", "right"))
    G = np.broadcast_to(rng.standard_normal(SHAPE), (4000, *SHAPE))
    samples_b = rng.random(4000)[:, None, None] < probability
    step = np.where(samples_b, theory.projector(left.draw()) @ G, G @ theory.projector(right.draw()))
    kept = (step**2).sum((-2, -1)) / (G**2).sum((-2, -1))
    assert abs(kept.mean() - theory.bernoulli_speed(probability, SHAPE, 2)) < 4 * kept.std() / 4000**0.5


# ---- C9: floors of stochastic methods


def tail(trace):
    """Return the mean gap over the last third of the links."""
    return float(trace.gaps[:, -trace.gaps.shape[1] // 3 :].mean())


C9 = spread_quadratic(SHAPE, geometric_spectrum(6, 3.0), Made(1, 8, noise=0.5, seed=3))


def floors(method, rank, steps):
    """Return the measured floor at each step, after ten times as many links as the bound needs to fall by 1/e."""
    num = 8 if method is reshuffled else 1
    found = []
    for gamma in steps:
        links = int(10 / (gamma * num * C9.mu * rank / SHAPE[1]))
        found.append(tail(method(C9, Sketching(rank=rank), Budget(links, SEEDS), gamma=gamma)))
    return np.array(found)


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_c9_the_floor_of_stochastic_gradients_falls_as_gamma(rank):
    steps = np.array([0.2, 0.1])
    found, eigenvalues = floors(sgd, rank, steps), Range(rank / 6, rank / 6)
    bounds = [float(theory.sgd_pl(EVER, C9.constants(), gamma, eigenvalues).values) for gamma in steps]
    assert (found < bounds).all()
    assert bounds[0] / bounds[1] == pytest.approx(2)
    assert found[0] / found[1] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_c9_the_floor_of_reshuffling_falls_at_least_as_gamma_squared(rank):
    """The bound falls as gamma^2. With one curvature for all components the error of a pass has mean zero at the
    optimum, and its square, of order gamma^4, is forgotten at a rate of order gamma: the floor falls as gamma^3.
    """
    steps = theory.reshuffling_step(1.0, 8) * np.array([1.0, 0.5])
    found, eigenvalues = floors(reshuffled, rank, steps), Range(rank / 6, rank / 6)
    bounds = [float(theory.rr_pl(EVER, C9.constants(), Steps(g, 8), eigenvalues).values) for g in steps]
    assert (found < bounds).all()
    assert bounds[0] / bounds[1] == pytest.approx(4)
    assert found[0] / found[1] == pytest.approx(8, rel=0.2)


def test_c9_the_floor_of_reshuffling_falls_between_gamma_squared_and_its_cube_when_curvatures_differ():
    """A pass then also errs by gamma^2 on average, against a pull of gamma: a gap of order gamma^2 beside the other."""
    problem = replace(least_squares((2, 2), Made(1, 4, noise=1.0, seed=40)), is_noise_constant=True)
    largest, found = theory.reshuffling_step(problem.component_smoothness, 4), []
    for gamma in (largest, largest / 2):
        links = int(12 / (gamma * 4 * problem.mu))
        found.append(tail(reshuffled(problem, Sketching(rank=2), Budget(links, SEEDS), gamma=gamma)))
    assert 4 < found[0] / found[1] < 7


def test_c9_the_floors_of_the_bounds_are_free_of_r_and_measured_ones_do_not_rise_as_r_falls():
    step = theory.reshuffling_step(1.0, 8)
    for bound, gamma in ((theory.sgd_pl, 0.2), (theory.rr_pl, Steps(step, 8))):
        values = [float(bound(EVER, C9.constants(), gamma, Range(r / 6, r / 6)).values) for r in (1, 2, 6)]
        assert values == pytest.approx([values[0]] * 3, rel=1e-12)
    by_rank = [floors(reshuffled, rank, [step])[0] for rank in (1, 2, 6)]
    assert by_rank[0] < by_rank[1] < by_rank[2]
    by_rank = [floors(sgd, rank, [0.2])[0] for rank in (1, 2, 6)]
    assert by_rank == pytest.approx([by_rank[2]] * 3, rel=0.15)


# ---- C10: floors of partial participation


def cohort_floor(cohort, rank, samples=1):
    """Return the problem and a run of 8 clients of which `cohort` take part, eta = 0.5 / L."""
    made = Made(8, samples, heterogeneity=0.5, noise=0.2, seed=4)
    problem = spread_quadratic(SHAPE, geometric_spectrum(6, 3.0), made)
    steps = Steps(0.02 / samples, samples, 0.5)
    links = int(9 / (0.5 * problem.mu * rank / SHAPE[1]))
    return problem, federated(problem, Sketching(rank=rank), Budget(links, SEEDS), steps=steps, cohort=cohort)


@pytest.mark.parametrize("samples", [1, 4])
def test_c10_floors_go_as_m_minus_s_over_s_times_m_minus_1_whatever_r(samples):
    found = {(s, r): tail(cohort_floor(s, r, samples)[1]) for s in (2, 4, 8) for r in (1, 2, 6)}
    ratio = theory.cohort_variance(2, 8) / theory.cohort_variance(4, 8)
    assert ratio == pytest.approx(3)
    for rank in (1, 2, 6):
        assert found[2, rank] / found[4, rank] == pytest.approx(ratio, rel=0.15)
        assert found[2, rank] == pytest.approx(found[2, 6], rel=0.2)
        assert found[8, rank] < 0.02 * found[4, rank]


@pytest.mark.parametrize("cohort", [2, 4, 8])
@pytest.mark.parametrize("rank", [1, 6])
def test_c10_with_one_sample_a_client_the_cohorts_mean_is_a_stochastic_gradient_and_keeps_to_its_bound(cohort, rank):
    """Its variance is (M - S) / (S (M - 1)) zeta^2, which is s^2 in the bound; the statement for N > 1 is no bound."""
    problem, trace = cohort_floor(cohort, rank)
    found = constants_of(problem, trace)
    found = replace(found, noise=theory.cohort_variance(cohort, 8) * found.heterogeneity)
    times, eigenvalues = np.arange(trace.gaps.shape[1]), Range(rank / 6, rank / 6)
    assert_below(trace.gaps, theory.sgd_pl(times, found, 0.5, eigenvalues))
    assert not theory.participation_floor(found, 0.5, (cohort, 8), eigenvalues).is_bound


# ---- C11: what the rank does to the uplink


def test_c11_uplink_floats_to_an_accuracy_do_not_depend_on_r_or_the_side():
    """Links go as n / r and floats per link as m r: full gradient descent sends m n T floats, and so do all."""
    problem, needed = quadratic((6, 8), geometric_spectrum(8, 20.0)), []
    for side, ranks in (("right", (1, 2, 4, 8)), ("left", (1, 2, 3, 6))):
        for rank in ranks:
            sketching = Sketching(rank=rank, side=side)
            links = 3000 // uplink_per_link(problem, sketching)
            trace = gd(problem, sketching, Budget(links, SEEDS), gamma=1.0)
            floats = floats_to_accuracy(trace.gaps, 1e-3 * trace.gaps[0, 0], uplink_per_link(problem, sketching))
            needed.append(float(floats.mean()))
    assert max(needed) / min(needed) < 1.25, needed
