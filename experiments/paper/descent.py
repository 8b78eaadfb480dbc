"""RAC-LoRA on small problems, batched over seeds: full and stochastic gradients, random reshuffling, and clients.

Links are those of Malinovsky et al., 2024, arXiv 2410.08305: each draws a factor afresh and moves the weight within its
span. Points are `[seeds, m, n]` in float64; all seeds share the problem and its start, and draw for themselves.

Differs from the paper: `plain` solves a link by a gradient step on B at scale 1, as released code does, without the
projector; `inner` and `exact` work longer within the subspace than its theorems say.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from experiments.paper.problems import Array, Problem
from fedraclora.seeding import derive_seed, generator
from fedraclora.theory import Steps, projector

LAWS = ("orthonormal", "gaussian", "selector", "selector_without_replacement", "uniform01")
SOLVERS = ("projected", "plain", "inner", "exact")
SIDES = ("right", "left")


@dataclass(frozen=True)
class Sketching:
    """How a link moves.

    law: of `LAWS`; `gaussian` has N(0, 1) entries, and `uniform01`, which is not centred, is a negative control.
    rank: r, at most n, or m on the left.
    side: "right" draws A `[r, n]` and trains B, "left" draws B and trains A.
    solver: "projected" is the step -gamma G H, "plain" -gamma G A^T A. "inner" makes `inner` projected steps at
        1 / L_H, the smoothness within the subspace, and "exact" minimises there (the quadratic majorant of a problem
        that is not quadratic); both only for full gradients, and they ignore gamma.
    is_shared: whether all clients draw the same factor.
    """

    law: str = "orthonormal"
    rank: int = 1
    side: str = "right"
    solver: str = "projected"
    inner: int = 10
    is_shared: bool = True

    def __post_init__(self) -> None:
        """Refuse an unknown law, side or solver."""
        for value, known in ((self.law, LAWS), (self.side, SIDES), (self.solver, SOLVERS)):
            if value not in known:
                raise ValueError(f"unknown choice {value!r}; it is one of {', '.join(known)}")


@dataclass(frozen=True)
class Budget:
    """How long and how often: `links` T, `seeds` runs, and the root `seed` of their draws."""

    links: int
    seeds: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Trace:
    """What is measured of each seed after 0, 1, ..., T links, `[seeds, T + 1]`; `last` are the points reached."""

    gaps: Array
    squared_gradients: Array
    last: Array
    # The most of s^2 and of zeta^2 at the start of any link of any seed; 0 where not measured.
    noise: float = 0.0
    heterogeneity: float = 0.0


def gd(problem: Problem, sketching: Sketching, budget: Budget, *, gamma: float) -> Trace:
    """Return full gradient descent by links of step gamma."""
    rng = _rng(budget, "gd")
    sampler = Sampler(sketching, problem.shape, (budget.seeds,), rng)

    def link(W: Array) -> Array:
        return _moved(problem, sketching, W, (sampler.draw(), gamma))

    return _run(problem, budget, link)


def sgd(problem: Problem, sketching: Sketching, budget: Budget, *, gamma: float) -> Trace:
    """Return descent along the gradient of one component a link, drawn uniformly."""
    rng = _rng(budget, "sgd")
    sampler = Sampler(sketching, problem.shape, (budget.seeds,), rng)
    clients, samples = problem.counts

    def link(W: Array) -> Array:
        picked = rng.integers(clients, size=budget.seeds), rng.integers(samples, size=budget.seeds)
        G = problem.objective.component(W, *picked)
        return W - gamma * _sketched(sketching, G, sampler.draw())

    return _run(problem, budget, link, is_stochastic=True)


def reshuffled(problem: Problem, sketching: Sketching, budget: Budget, *, gamma: float) -> Trace:
    """Return random reshuffling: a link is one shuffled pass over all components, of step gamma, at one factor.

    The components of all clients count as one data set.
    """
    rng = _rng(budget, "reshuffled")
    sampler = Sampler(sketching, problem.shape, (budget.seeds,), rng)
    samples = problem.counts[1]

    def link(W: Array) -> Array:
        operator = _operator(sketching, sampler.draw())
        for index in _orders(rng, (budget.seeds,), problem.counts[0] * samples).T:
            G = problem.objective.component(W, index // samples, index % samples)
            W = W - gamma * _applied(sketching, G, operator)
        return W

    return _run(problem, budget, link, is_stochastic=True)


def federated(
    problem: Problem, sketching: Sketching, budget: Budget, *, steps: Steps, cohort: int | None = None
) -> Trace:
    """Return Fed-RAC-LoRA: a link is a round of `cohort` clients (all, if None), drawn without replacement.

    Each client passes once over its samples, shuffled, in steps `steps.local`; the server steps `steps.server` along
    the mean of (W - W_k) / (gamma N). A server step of gamma N is plain averaging.
    """
    if steps.num != problem.counts[1]:
        raise ValueError(f"the steps are for {steps.num} samples a client; the problem has {problem.counts[1]}")
    rng = _rng(budget, "federated")
    size = cohort or problem.counts[0]
    batch = (budget.seeds, 1 if sketching.is_shared else size)
    sampler = Sampler(sketching, problem.shape, batch, rng)

    def link(W: Array) -> Array:
        operator = _operator(sketching, sampler.draw())
        chosen = _orders(rng, (budget.seeds,), problem.counts[0])[:, :size]
        local = np.repeat(W[:, None], size, axis=1)
        for index in np.moveaxis(_orders(rng, (budget.seeds, size), steps.num), -1, 0):
            G = problem.objective.component(local, chosen, index)
            local = local - steps.local * _applied(sketching, G, operator)
        moved = np.asarray((local - W[:, None]).mean(1))
        return W + steps.server / (steps.local * steps.num) * moved

    return _run(problem, budget, link, is_stochastic=True)


def floats_to_accuracy(gaps: Array, eps: float, floats_per_link: float) -> Array:
    """Return the floats that each seed sent until its gap was at most `eps` `[seeds]`, infinite if it never was."""
    is_there = gaps <= eps
    return np.where(is_there.any(1), is_there.argmax(1) * float(floats_per_link), np.inf)


def uplink_per_link(problem: Problem, sketching: Sketching) -> int:
    """Return the floats of the factor that a link trains: m r on the right, n r on the left."""
    return sketching.rank * problem.shape[0 if sketching.side == "right" else 1]


@dataclass
class Sampler:
    """Draws a factor `[*batch, r, dim]` a link; dim is n, or m on the left, where the transpose of B is drawn."""

    sketching: Sketching
    shape: tuple[int, int]
    batch: tuple[int, ...]
    rng: np.random.Generator
    _left_over: list[Array] = field(default_factory=list)

    def draw(self) -> Array:
        """Return the next link's factors, independent of those before unless the law is without replacement."""
        rank, dim = self.sketching.rank, self.shape[1 if self.sketching.side == "right" else 0]
        if not 1 <= rank <= dim:
            raise ValueError(f"rank {rank} must lie between 1 and {dim}, the sketched dimension")
        match self.sketching.law:
            case "orthonormal":
                columns = np.linalg.qr(self.rng.standard_normal((*self.batch, dim, rank)))[0]
                return np.asarray(np.swapaxes(columns, -1, -2))
            case "gaussian":
                return self.rng.standard_normal((*self.batch, rank, dim))
            case "uniform01":
                return self.rng.random((*self.batch, rank, dim))
            case "selector":
                return np.eye(dim)[_orders(self.rng, self.batch, dim)[..., :rank]]
        if not self._left_over:
            self._left_over = self._cycle(rank, dim)
        return self._left_over.pop()

    def _cycle(self, rank: int, dim: int) -> list[Array]:
        """Return the factors of ceil(dim / rank) links that together hold each coordinate; the last may wrap."""
        order = _orders(self.rng, self.batch, dim)
        places = [np.arange(first, first + rank) % dim for first in range(0, dim, rank)]
        return [np.eye(dim)[order[..., place]] for place in places]


def _rng(budget: Budget, method: str) -> np.random.Generator:
    return generator(derive_seed(budget.seed, "descent", method))


def _run(problem: Problem, budget: Budget, link: Callable[[Array], Array], *, is_stochastic: bool = False) -> Trace:
    W = np.repeat(problem.start[None], budget.seeds, axis=0)
    gaps, gradients = np.empty((budget.links + 1, budget.seeds)), np.empty((budget.links + 1, budget.seeds))
    noise, heterogeneity = 0.0, 0.0
    for time in range(budget.links + 1):
        W = link(W) if time else W
        gaps[time], gradients[time] = problem.gap(W), (problem.gradient(W) ** 2).sum((-2, -1))
        if is_stochastic and (time == 0 or not problem.is_noise_constant):
            noise = max(noise, float(problem.noise(W).max()))
            heterogeneity = max(heterogeneity, float(problem.heterogeneity(W).max()))
    return Trace(gaps.T, gradients.T, W, noise, heterogeneity)


def _orders(rng: np.random.Generator, batch: tuple[int, ...], num: int) -> NDArray[np.int64]:
    """Return independent random permutations `[*batch, num]`."""
    return np.argsort(rng.random((*batch, num)), axis=-1)


def _operator(sketching: Sketching, A: Array) -> Array:
    """Return H = A^T (A A^T)^+ A, or A^T A for the plain solver; the others have no fixed operator."""
    if sketching.solver == "projected":
        return np.swapaxes(A, -1, -2) @ A if _is_orthonormal(sketching) else projector(A)
    if sketching.solver == "plain":
        return np.asarray(np.swapaxes(A, -1, -2) @ A)
    raise ValueError(f"the solver {sketching.solver!r} needs full gradients; use 'projected' or 'plain'")


def _is_orthonormal(sketching: Sketching) -> bool:
    return sketching.law not in ("gaussian", "uniform01")


def _applied(sketching: Sketching, G: Array, operator: Array) -> Array:
    return np.asarray(G @ operator if sketching.side == "right" else operator @ G)


def _sketched(sketching: Sketching, G: Array, A: Array) -> Array:
    return _applied(sketching, G, _operator(sketching, A))


def _moved(problem: Problem, sketching: Sketching, W: Array, drawn: tuple[Array, float]) -> Array:
    """Return the points after a link with the factor and the step `drawn`, by the solver that was asked for."""
    A, gamma = drawn
    if sketching.solver in ("projected", "plain"):
        return W - gamma * _sketched(sketching, problem.gradient(W), A)
    basis = np.swapaxes(np.linalg.qr(np.swapaxes(A, -1, -2))[0], -1, -2)
    if sketching.solver == "exact":
        return W + _minimiser(problem, sketching.side, W, basis)
    largest = np.linalg.eigvalsh(_restricted(problem, sketching.side, basis))[:, -1]
    H = np.swapaxes(basis, -1, -2) @ basis
    for _ in range(sketching.inner):
        W = W - _applied(sketching, problem.gradient(W), H) / largest[:, None, None]
    return W


def _restricted(problem: Problem, side: str, basis: Array) -> Array:
    """Return the curvature in coordinates of the subspace, `[seeds, q, q]`, or `[1, q, q]` if it is the same for all.

    With one C for all rows it acts on each row of the trained factor: A C A^T on the right, C itself on the left. Else
    it is the whole matrix on that factor's entries, q = m r or r n.
    """
    C = problem.curvature
    if C.ndim == 2:
        return basis @ C @ np.swapaxes(basis, -1, -2) if side == "right" else C[None]
    pattern = "ijkl,srj,stl->sirkt" if side == "right" else "ijkl,sri,stk->srjtl"
    restricted = np.einsum(pattern, C, basis, basis, optimize=True)
    size = basis.shape[-2] * problem.shape[0 if side == "right" else 1]
    return np.asarray(restricted.reshape(len(basis), size, size))


def _minimiser(problem: Problem, side: str, W: Array, basis: Array) -> Array:
    """Return the update within the subspace that minimises <G, D> + <D, Q D> / 2."""
    G, transposed = problem.gradient(W), np.swapaxes(basis, -1, -2)
    within = G @ transposed if side == "right" else basis @ G
    inverse = np.linalg.pinv(_restricted(problem, side, basis), rcond=1e-12, hermitian=True)
    if problem.curvature.ndim == 2:
        trained = -within @ inverse
    else:
        trained = -(inverse @ within.reshape(len(within), -1, 1)).reshape(within.shape)
    return np.asarray(trained @ basis if side == "right" else transposed @ trained)
