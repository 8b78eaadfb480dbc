"""The theory of RAC-LoRA as functions: sketch projectors, closed-form links, admissible steps and convergence bounds.

The chain is that of Malinovsky et al., "Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework
for Low-Rank Adaptation", 2024, arXiv 2410.08305. A link is W+ = W - gamma G H with G = grad f(W) and the projector
H = A^T (A A^T)^+ A of a factor A `[r, n]` that is drawn afresh (side b), or W+ = W - gamma H G (side a).

Notation: f is L-smooth and bounded below, D0 = f(W^0) - f*; PL means ||grad f||^2 >= 2 mu (f - f*); lambda_min and
lambda_max are the extreme eigenvalues of E[H]. All bounds hold in expectation, for draws independent of the past.

The two bounds for full gradients are quoted from the paper as reviews of it give them. All others are derived here, in
the docstrings; the paper's own constants may differ. Leaves out momentum, adaptive optimizers and compression.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedraclora.sketch import LAWS

Array = npt.NDArray[np.float64]

DERIVED = "derived"
ABOUT = "about"
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Constants:
    """What the bounds use of a problem.

    gap: D0 = f(W^0) - f*.
    smoothness: L; with random reshuffling or clients, that of every component.
    mu: the PL constant; only the PL bounds use it.
    noise: s^2, the mean squared distance of a component's gradient to its mean; the most of all points visited.
    heterogeneity: zeta^2, the mean squared distance of a client's gradient to their mean; the most likewise.
    """

    gap: float
    smoothness: float
    mu: float = 0.0
    noise: float = 0.0
    heterogeneity: float = 0.0


@dataclass(frozen=True)
class Steps:
    """Steps of a link that passes over components: `local` is gamma, `num` N, `server` eta (of clients only)."""

    local: float
    num: int
    server: float = 0.0


@dataclass(frozen=True)
class Range:
    """The extreme eigenvalues of E[H], lambda_min and lambda_max."""

    low: float
    high: float

    @property
    def ratio(self) -> float:
        """Return lambda_max / lambda_min: 1 for isotropic laws."""
        return self.high / self.low


@dataclass(frozen=True)
class Bound:
    """A bound at some numbers of links.

    `provenance` says where it comes from; `is_bound` is False of what holds only approximately. `quantity` is what is
    bounded: "gradient" (the least, or a uniformly drawn iterate's, expected ||grad f||^2 of links 0 to T - 1),
    "gap" (E f(W^T) - f*) or "average" (the gap of the average iterate).
    """

    name: str
    provenance: str
    is_bound: bool
    quantity: str
    values: Array


# Sketches


def projector(A: Array) -> Array:
    """Return H = A^T (A A^T)^+ A `[..., n, n]` of factors A `[..., r, n]`: the projector on the rows' span."""
    return _transposed(A) @ np.linalg.pinv(A @ _transposed(A), hermitian=True) @ A


def expected_range(law: str, rank: int, dim: int) -> Range:
    """Return lambda_min and lambda_max of E[H] for a law of `fedraclora.sketch`.

    Each law is invariant under rotations, or under permutations and changes of sign of the coordinates, so that
    E[H] = c I with c = tr E[H] / dim = E[rank of A] / dim. A has full rank, so both ends are rank / dim.

    Random signs alone are linearly dependent with positive probability: c is below rank / dim and known to a range.
    A subspace of dimension k holds at most 2^k of the 2^dim sign vectors (and none for k = 0), so the expected rank
    is at least rank - (2^rank - 2) / 2^dim: exact for ranks 1 and 2, and near rank unless rank is near dim.

    `selector_without_replacement` has this E[H] link by link, but its links are not independent.
    Raises ValueError for an unknown law or a rank that is not in [1, dim].
    """
    if law not in LAWS:
        raise ValueError(f"unknown sketch law {law!r}; the laws are {', '.join(LAWS)}")
    if not 1 <= rank <= dim:
        raise ValueError(f"rank {rank} must lie between 1 and dim = {dim}")
    deficit = (2.0**rank - 2) / 2.0**dim if law == "rademacher" else 0.0
    return Range((rank - deficit) / dim, rank / dim)


def sampled_range(draw: Callable[[int], Array], num: int) -> Range:
    """Return the extreme eigenvalues of the mean of H over the factors `draw(0)` to `draw(num - 1)`, each `[r, n]`.

    An estimate: its range is wider than that of E[H].
    """
    total = sum((projector(draw(index)) for index in range(1, num)), projector(draw(0)))
    eigenvalues = np.linalg.eigvalsh(total / num)
    return Range(float(eigenvalues[0]), float(eigenvalues[-1]))


# Links


def closed_form_link(G: Array, factor: Array, gamma: float, *, side: str = "b") -> Array:
    """Return the trained factor that minimises <G, B A> + ||B A||^2 / (2 gamma): the paper's link, eqs. 3-4.

    Side b: `factor` is A `[r, n]`, the result B* = -gamma G A^T (A A^T)^+ `[m, r]`. Side a: `factor` is B `[m, r]`,
    the result A* = -gamma (B^T B)^+ B^T G `[r, n]`. The product is -gamma G H, or -gamma H G.
    """
    if side == "a":
        return _transposed(closed_form_link(_transposed(G), _transposed(factor), gamma))
    _check_side(side)
    return -gamma * G @ _transposed(factor) @ np.linalg.pinv(factor @ _transposed(factor), hermitian=True)


def gradient_link(G: Array, factor: Array, eta: float, scale: float = 1.0, *, side: str = "b") -> Array:
    """Return the trained factor after one gradient step from zero on f(W + scale B A): B = -eta scale G A^T.

    The update scale B A is -eta scale^2 G A^T A: the projected step of gamma = eta scale^2 where A A^T = I.
    """
    if side == "a":
        return -eta * scale * _transposed(factor) @ G
    _check_side(side)
    return -eta * scale * G @ _transposed(factor)


def subspace_smoothness(A: Array, curvature: Array) -> Array:
    """Return L_H = lambda_max(H C H) `[...]`, the smoothness of f on W + (span of A's rows), C `[n, n]` row by row.

    That is lambda_max(A C A^T) where A A^T = I; never above L = lambda_max(C).
    """
    H = projector(A)
    return np.asarray(np.linalg.eigvalsh(H @ curvature @ H)[..., -1])


# Steps


def smooth_step(smoothness: float) -> float:
    """Return 1 / L, the largest projected step gamma of the bounds for full and stochastic gradients."""
    return 1 / smoothness


def raw_step(smoothness: float, rank: int, dim: int) -> float:
    """Return the best constant step 1 / (L (r + n + 1)) on B, at scale 1, when A has N(0, 1) entries (derived).

    E[A^T A] = r I and E[(A^T A)^2] = r (r + n + 1) I, so E f(W - eta G A^T A) is at most
    f - (eta r - L eta^2 r (r + n + 1) / 2) ||G||^2, least at this eta.
    """
    return 1 / (smoothness * (rank + dim + 1))


def raw_speed(rank: int, dim: int) -> float:
    """Return r / (n + r + 1): with `raw_step` a link contracts the gap by 1 - (mu / L) times this (derived)."""
    return rank / (dim + rank + 1)


def reshuffling_step(smoothness: float, num: int) -> float:
    """Return 1 / (2 L N), the largest step gamma within a shuffled pass over N components."""
    return 1 / (2 * smoothness * num)


def closed_form_gamma(eta: float, alpha: float, rank: int) -> float:
    """Return gamma = eta alpha / r: the closed-form factor of step eta, its product scaled by alpha / r."""
    return eta * alpha / rank


def gradient_gamma(eta: float, alpha: float, rank: int) -> float:
    """Return gamma = eta (alpha / r)^2: a gradient step eta on a factor within W + (alpha / r) B A, A A^T = I."""
    return eta * (alpha / rank) ** 2


# Bounds


def gd_nonconvex(links: npt.ArrayLike, constants: Constants, gamma: float, low: float) -> Bound:
    """Bound E||grad f||^2 by 2 D0 / (lambda_min gamma T) for full gradients, gamma <= 1 / L.

    f(W - gamma G H) <= f - gamma (1 - L gamma / 2) ||G H||^2 and E||G H||^2 >= lambda_min ||G||^2; sum over links.
    """
    _check_step(gamma, smooth_step(constants.smoothness))
    values = _per_link(2 * constants.gap / (low * gamma), links)
    return Bound("full gradient", "paper, Theorem 5.3, as quoted in reviews", True, "gradient", values)


def gd_pl(links: npt.ArrayLike, constants: Constants, gamma: float, low: float) -> Bound:
    """Bound the gap by (1 - gamma mu lambda_min)^T D0 for full gradients under PL, gamma <= 1 / L.

    The descent of `gd_nonconvex` with ||G||^2 >= 2 mu (f - f*).
    """
    _check_step(gamma, smooth_step(constants.smoothness))
    values = _contracted(links, constants.gap, gamma * constants.mu * low, 0.0)
    return Bound("full gradient, PL", "paper, Theorem 5.5, as quoted in reviews", True, "gap", values)


def sgd_nonconvex(links: npt.ArrayLike, constants: Constants, gamma: float, eigenvalues: Range) -> Bound:
    """Bound min E||grad f||^2 by 2 D0 / (gamma lambda_min T) + L gamma (lambda_max / lambda_min) s^2, gamma <= 1 / L.

    For g with E[g] = G and E||g - G||^2 <= s^2, drawn independently of H: E f(W - gamma g H) is at most
    f - gamma (1 - L gamma / 2) ||G H||^2 + (L gamma^2 / 2) E||(g - G) H||^2, and the last mean is at most
    lambda_max s^2. For isotropic laws the second term, the floor, does not depend on r.
    """
    _check_step(gamma, smooth_step(constants.smoothness))
    floor = constants.smoothness * gamma * eigenvalues.ratio * constants.noise
    values = _per_link(2 * constants.gap / (gamma * eigenvalues.low), links) + floor
    return Bound("stochastic gradient", DERIVED, True, "gradient", values)


def sgd_pl(links: npt.ArrayLike, constants: Constants, gamma: float, eigenvalues: Range) -> Bound:
    """Bound the gap by (1 - gamma mu lambda_min)^T D0 + (L gamma / (2 mu)) (lambda_max / lambda_min) s^2, gamma <= 1/L.

    The descent of `sgd_nonconvex` with ||G||^2 >= 2 mu (f - f*).
    """
    _check_step(gamma, smooth_step(constants.smoothness))
    floor = constants.smoothness * gamma / (2 * constants.mu) * eigenvalues.ratio * constants.noise
    values = _contracted(links, constants.gap, gamma * constants.mu * eigenvalues.low, floor)
    return Bound("stochastic gradient, PL", DERIVED, True, "gap", values)


def rr_nonconvex(links: npt.ArrayLike, constants: Constants, steps: Steps, eigenvalues: Range) -> Bound:
    """Bound min E||grad f||^2 by 8 D0 / (3 gamma N lambda_min T) + (4/3) gamma^2 L^2 N (lambda_max/lambda_min) s^2.

    f is the mean of N >= 2 L-smooth components; a link is one shuffled pass over them at a fixed H, gamma <= 1/(2 L N).
    Let W_i be the pass's points and g the mean of their components' gradients. As gamma N <= 1 / L,
    f(W - gamma N g H) <= f - (gamma N / 2) ||G H||^2 + (gamma N / 2) ||(G - g) H||^2, where
    ||(G - g) H||^2 <= (L^2 / N) sum_i ||W_i - W||^2 and, by the lemma of Mishchenko, Khaled and Richtarik (2020,
    arXiv 2006.05988) within the subspace, E sum_i ||W_i - W||^2 <= gamma^2 N^3 ||G H||^2 + gamma^2 N^2 ||s H||^2.
    The first term is at most a quarter of ||G H||^2, and E||s H||^2 <= lambda_max s^2, which leaves
    E f(W+) <= f - (3/8) gamma N lambda_min ||G||^2 + (gamma^3 L^2 N^2 / 2) lambda_max s^2.
    """
    _check_step(steps.local, reshuffling_step(constants.smoothness, steps.num))
    drift = (steps.local * constants.smoothness) ** 2 * steps.num * constants.noise
    return _drift_nonconvex("random reshuffling", links, (constants, steps.local * steps.num, drift), eigenvalues)


def rr_pl(links: npt.ArrayLike, constants: Constants, steps: Steps, eigenvalues: Range) -> Bound:
    """Bound the gap by (1 - (3/4) gamma mu N lambda_min)^T D0 + (2/3)(gamma^2 L^2 N / mu)(lambda_max/lambda_min) s^2.

    The descent of `rr_nonconvex` with ||G||^2 >= 2 mu (f - f*).
    """
    _check_step(steps.local, reshuffling_step(constants.smoothness, steps.num))
    drift = (steps.local * constants.smoothness) ** 2 * steps.num * constants.noise
    return _drift_pl("random reshuffling, PL", links, (constants, steps.local * steps.num, drift), eigenvalues)


def federated_nonconvex(links: npt.ArrayLike, constants: Constants, steps: Steps, eigenvalues: Range) -> Bound:
    """Bound min E||grad f||^2 by 8 D0/(3 eta lambda_min T) + (4/3) L^2 gamma^2 (N^2 zeta^2 + N s^2) times the ratio.

    The ratio is lambda_max / lambda_min. All clients take part; each passes once over its N samples in the shared
    subspace, gamma <= 1 / (2 L N), and the server steps eta <= 1 / L along g, the mean of (W - W_k) / (gamma N).
    As in `rr_nonconvex`, f(W - eta g) <= f - (eta / 2) ||G H||^2 + (eta / 2) ||G H - g||^2, and the lemma, client by
    client, bounds the last square by L^2 gamma^2 (N^2 mean ||G_k H||^2 + N ||s H||^2) with s^2 the mean over clients;
    mean ||G_k H||^2 = ||G H||^2 + ||zeta H||^2, and L^2 gamma^2 N^2 <= 1/4.
    """
    drift = _federated_drift(constants, steps)
    return _drift_nonconvex("federated", links, (constants, steps.server, drift), eigenvalues)


def federated_pl(links: npt.ArrayLike, constants: Constants, steps: Steps, eigenvalues: Range) -> Bound:
    """Bound the gap by (1 - (3/4) eta mu lambda_min)^T D0 + (2/3)(L^2 gamma^2 / mu)(N^2 zeta^2 + N s^2).

    The floor is to be multiplied by lambda_max / lambda_min; the descent is that of `federated_nonconvex`, with PL.
    """
    drift = _federated_drift(constants, steps)
    return _drift_pl("federated, PL", links, (constants, steps.server, drift), eigenvalues)


def nonsmooth(links: npt.ArrayLike, distance: float, lipschitz: float, gamma: float, low: float) -> Bound:
    """Bound the average iterate's gap by R^2 / (2 gamma lambda T) + gamma L0^2 / 2: f convex, L0-Lipschitz.

    H is isotropic, E[H] = lambda I, and R = ||W^0 - W*||. For a subgradient g, E||W - gamma g H - W*||^2 is
    ||W - W*||^2 - 2 gamma lambda <g, W - W*> + gamma^2 lambda ||g||^2; sum over links, use convexity. The best step is
    R / (L0 sqrt(lambda T)).
    """
    values = _per_link(distance**2 / (2 * gamma * low), links) + gamma * lipschitz**2 / 2
    return Bound("convex, non-smooth", DERIVED, True, "average", values)


def participation_floor(constants: Constants, server: float, clients: tuple[int, int], eigenvalues: Range) -> Bound:
    """Say about where the gap stalls when (S, M) = `clients`: S of M clients take part, without replacement.

    It is (2 L eta / (3 mu)) (M - S) / (S (M - 1)) zeta^2 lambda_max / lambda_min: the cohort's mean gradient has
    variance (M - S) / (S (M - 1)) zeta^2 H, which adds (L eta^2 / 2) times it to each round of `federated_pl`. Only
    about, since the clients' passes are taken to return their gradients. Free of r for isotropic laws.
    """
    share, all_clients = clients
    variance = cohort_variance(share, all_clients) * constants.heterogeneity
    floor = 2 * constants.smoothness * server / (3 * constants.mu) * variance * eigenvalues.ratio
    return Bound("partial participation", ABOUT, False, "gap", np.asarray(floor))


def cohort_variance(cohort: int, clients: int) -> float:
    """Return (M - S) / (S (M - 1)): the variance of the mean of S of M, drawn without replacement, over theirs."""
    return (clients - cohort) / (cohort * (clients - 1)) if clients > 1 else 0.0


def bernoulli_speed(probability: float, shape: tuple[int, int], rank: int) -> float:
    """Return p r / m + (1 - p) r / n, lambda_min of a link that samples B with probability p, else A; W is `shape`."""
    num_outputs, num_inputs = shape
    return probability * rank / num_outputs + (1 - probability) * rank / num_inputs


# Catching up


def break_even_links(num_inputs: int, rank: int) -> float:
    """Return n / r: who missed more links than this downloads the m x n weight more cheaply than the links' B."""
    return num_inputs / rank


def expected_catch_up(shape: tuple[int, int], rank: int, probability: float) -> float:
    """Return the expected downlink, in floats, of a client that takes part: W is `shape` = (m, n), A is sampled.

    Clients take part independently with `probability` p. The links since a client's last round are geometric, and
    it pays m r for each, at most m n: m r (1 - (1 - p)^(n/r)) / p where r divides n.
    """
    num_outputs, num_inputs = shape
    whole, rest = divmod(num_inputs, rank)
    absent = (1 - probability) ** whole
    return num_outputs * rank * ((1 - absent) / probability + absent * rest / rank)


def _transposed(matrix: Array) -> Array:
    return np.swapaxes(matrix, -1, -2)


def _check_side(side: str) -> None:
    if side != "b":
        raise ValueError(f"unknown side {side!r}; it is 'b' (A is sampled, B trained) or 'a'")


def _check_step(step: float, largest: float) -> None:
    if not 0 < step <= largest * (1 + _ROUNDING):
        raise ValueError(f"step {step:g} must be positive and at most {largest:g}, the largest that the bound allows")


def _per_link(total: float, links: npt.ArrayLike) -> Array:
    """Return total / T, infinite at T = 0, where no link says anything."""
    T = np.asarray(links, dtype=np.float64)
    return np.where(T > 0, total / np.maximum(T, 1), math.inf)


def _contracted(links: npt.ArrayLike, gap: float, speed: float, floor: float) -> Array:
    return np.asarray((1 - speed) ** np.asarray(links, dtype=np.float64) * gap + floor)


def _federated_drift(constants: Constants, steps: Steps) -> float:
    _check_step(steps.local, reshuffling_step(constants.smoothness, steps.num))
    _check_step(steps.server, smooth_step(constants.smoothness))
    spread = steps.num**2 * constants.heterogeneity + steps.num * constants.noise
    return (steps.local * constants.smoothness) ** 2 * spread


def _drift_nonconvex(
    name: str, links: npt.ArrayLike, terms: tuple[Constants, float, float], eigenvalues: Range
) -> Bound:
    """Sum up E f(W+) <= f - (3/8) eta lambda_min ||G||^2 + (eta / 2) lambda_max drift; `terms` hold eta and drift."""
    constants, step, drift = terms
    values = _per_link(8 * constants.gap / (3 * step * eigenvalues.low), links) + 4 / 3 * eigenvalues.ratio * drift
    return Bound(name, DERIVED, True, "gradient", values)


def _drift_pl(name: str, links: npt.ArrayLike, terms: tuple[Constants, float, float], eigenvalues: Range) -> Bound:
    """Unroll the same descent under PL."""
    constants, step, drift = terms
    floor = 2 / (3 * constants.mu) * eigenvalues.ratio * drift
    values = _contracted(links, constants.gap, 0.75 * step * constants.mu * eigenvalues.low, floor)
    return Bound(name, DERIVED, True, "gap", values)
