"""Small problems whose constants are known: the test bed of the bounds in `fedraclora.theory`.

An objective is a mean over `clients` of means over `samples` of components f_ki; with one of each, it is a plain
function. Weights are `[..., m, n]` in float64: leading axes, such as one of seeds, are computed at once. L, mu and f*
come from the data (eigenvalues; a linear solve, or Newton's method to rounding), not from a run of the methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedraclora.seeding import derive_seed, generator
from fedraclora.theory import Constants

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

# Eigenvalues below this share of the largest count as zero.
_ZERO = 1e-10


class Objective(Protocol):
    """A mean of components, by its parts: f - f*, the gradient of f, and the gradients of single components."""

    def gap(self, W: Array) -> Array:
        """Return f(W) - f* `[...]`."""
        ...

    def gradient(self, W: Array) -> Array:
        """Return grad f(W) `[..., m, n]`."""
        ...

    def component(self, W: Array, client: Indices, sample: Indices) -> Array:
        """Return the gradients `[..., m, n]` at W of the components that the indices `[...]` name."""
        ...


@dataclass(frozen=True)
class Problem:
    """An objective with its constants and a start `[m, n]`.

    smoothness: L of f.
    component_smoothness: the largest L of a component; the step of passes over components depends on it.
    mu: the PL constant of f.
    curvature: C `[n, n]` with f(W + D) <= f(W) + <G, D> + tr(D C D^T) / 2, or Q `[m, n, m, n]` with <D, Q D> instead.
    is_quadratic: whether that is an equality.
    counts: the numbers of clients and of samples each.
    is_noise_constant: whether s^2 and zeta^2 are the same at all points.
    """

    name: str
    objective: Objective
    start: Array
    smoothness: float
    component_smoothness: float
    mu: float
    curvature: Array
    is_quadratic: bool = True
    counts: tuple[int, int] = (1, 1)
    is_noise_constant: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Return (m, n)."""
        num_outputs, num_inputs = self.start.shape
        return num_outputs, num_inputs

    def gap(self, W: Array) -> Array:
        """Return f(W) - f* `[...]`."""
        return self.objective.gap(W)

    def gradient(self, W: Array) -> Array:
        """Return grad f(W) `[..., m, n]`."""
        return self.objective.gradient(W)

    def components(self, W: Array) -> Array:
        """Return the gradients of all components `[..., clients, samples, m, n]`."""
        clients, samples = np.indices(self.counts)
        points = np.broadcast_to(W[..., None, None, :, :], (*W.shape[:-2], *self.counts, *self.shape))
        return self.objective.component(
            points, np.broadcast_to(clients, points.shape[:-2]), np.broadcast_to(samples, points.shape[:-2])
        )

    def noise(self, W: Array) -> Array:
        """Return s^2 at W `[...]`: the mean over clients of their components' variance."""
        gradients = self.components(W)
        return np.asarray(_squared(gradients - gradients.mean(-3, keepdims=True)).mean((-2, -1)))

    def heterogeneity(self, W: Array) -> Array:
        """Return zeta^2 at W `[...]`: the variance of the clients' gradients."""
        gradients = self.components(W).mean(-3)
        return np.asarray(_squared(gradients - gradients.mean(-3, keepdims=True)).mean(-1))

    def constants(self, points: Array | None = None) -> Constants:
        """Return what the bounds use, with s^2 and zeta^2 the most of `points` `[..., m, n]`, else those of the start.

        For `spread_quadratic` these do not depend on the point. L is that of the components.
        """
        W = self.start[None] if points is None else points
        noise, spread = float(self.noise(W).max()), float(self.heterogeneity(W).max())
        return Constants(float(self.gap(self.start)), self.component_smoothness, self.mu, noise, spread)


@dataclass(frozen=True)
class Made:
    """How data are made: for `clients` of `samples` each.

    heterogeneity: the standard deviation between clients of their optima, in each entry.
    noise: the same between the samples of a client; for classes, the share of labels that are drawn at random.
    seed: what the draws come from.
    """

    clients: int = 1
    samples: int = 1
    heterogeneity: float = 0.0
    noise: float = 0.0
    seed: int = 0


# Spectra


def geometric_spectrum(dim: int, condition: float) -> Array:
    """Return eigenvalues in geometric progression from 1 to 1 / condition."""
    return np.geomspace(1.0, 1.0 / condition, dim)


def low_rank_spectrum(dim: int, effective: int, tail: float) -> Array:
    """Return `effective` eigenvalues 1 and the others `tail`; with tail 0, PL without strong convexity."""
    return np.where(np.arange(dim) < effective, 1.0, tail)


# Families


def distance(shape: tuple[int, int], seed: int = 0) -> Problem:
    """Return f(W) = ||W - W*||^2 / 2: L = mu = 1, f* = 0."""
    return replace(quadratic(shape, np.ones(shape[1]), seed=seed), name="half squared distance")


def quadratic(shape: tuple[int, int], spectrum: Sequence[float] | Array, *, seed: int = 0) -> Problem:
    """Return f(W) = <W - W*, C (W - W*)> / 2, rotated at random; f* = 0.

    With n eigenvalues C acts on each row of W; with m n, on the flattened weight. mu is the least that is not zero.
    """
    return replace(spread_quadratic(shape, spectrum, Made(seed=seed)), name="PL quadratic")


def spread_quadratic(shape: tuple[int, int], spectrum: Sequence[float] | Array, made: Made) -> Problem:
    """Return the mean of `quadratic` functions of one curvature, whose optima differ between samples and clients.

    The optima average to W*, within and between clients as their draws say. s^2 and zeta^2 are the same at all points.
    """
    rng = generator(derive_seed(made.seed, "problems", "quadratic"))
    optimum = rng.standard_normal(shape)
    curvature = _curvature(shape, np.asarray(spectrum, dtype=np.float64), rng)
    between = _centred(rng.standard_normal((made.clients, 1, *shape)), 0)
    within = _centred(rng.standard_normal((made.clients, made.samples, *shape)), 1)
    centres = optimum + made.heterogeneity * between + made.noise * within
    eigenvalues = np.asarray(spectrum, dtype=np.float64)
    return Problem(
        "quadratic of spread optima",
        _Spread(curvature, optimum, centres),
        np.zeros(shape),
        float(eigenvalues.max()),
        float(eigenvalues.max()),
        _least_positive(eigenvalues),
        curvature,
        counts=(made.clients, made.samples),
        is_noise_constant=True,
    )


def least_squares(shape: tuple[int, int], made: Made, *, rank: int | None = None, ridge: float = 0.0) -> Problem:
    """Return linear regression, f_ki(W) = (||W x - y||^2 + ridge ||W||^2) / 2, on inputs that span `rank` dimensions.

    A rank below n and no ridge make f PL without strong convexity. y = W_k x + noise, W_k the client's own weight.
    """
    num_outputs, num_inputs = shape
    rng = generator(derive_seed(made.seed, "problems", "regression"))
    inputs = _inputs(rng, made, num_inputs, rank or num_inputs)
    targets = _responses(rng, made, inputs, num_outputs)
    targets += made.noise * rng.standard_normal(targets.shape)
    return _fitted("least squares" if ridge == 0 else "ridge regression", _Fitted(inputs, targets, ridge, False))


def logistic_regression(shape: tuple[int, int], made: Made, *, ridge: float = 0.1) -> Problem:
    """Return multinomial logistic regression over m classes, f_ki(W) = log-loss + ridge ||W||^2 / 2, n inputs.

    L comes from Boehning's bound, Hessian <= I (x) C / 2 + ridge with C the inputs' second moment; mu is the ridge.
    """
    if ridge <= 0:
        raise ValueError(f"ridge {ridge} must be positive: without it the optimum may not exist")
    num_outputs, num_inputs = shape
    rng = generator(derive_seed(made.seed, "problems", "classes"))
    inputs = _inputs(rng, made, num_inputs, num_inputs)
    labels = _responses(rng, made, inputs, num_outputs).argmax(-1)
    is_random = rng.random(labels.shape) < made.noise
    labels = np.where(is_random, rng.integers(num_outputs, size=labels.shape), labels)
    return _fitted("logistic regression", _Fitted(inputs, np.eye(num_outputs)[labels], ridge, True))


@dataclass(frozen=True)
class _Spread:
    """Components <W - W_ki, C (W - W_ki)> / 2; centres `[clients, samples, m, n]`."""

    curvature: Array
    optimum: Array
    centres: Array

    def gap(self, W: Array) -> Array:
        away = W - self.optimum
        return np.asarray((away * _curved(self.curvature, away)).sum((-2, -1)) / 2)

    def gradient(self, W: Array) -> Array:
        return _curved(self.curvature, W - self.optimum)

    def component(self, W: Array, client: Indices, sample: Indices) -> Array:
        return _curved(self.curvature, W - self.centres[client, sample])


@dataclass(frozen=True)
class _Fitted:
    """Linear models on inputs `[clients, samples, n]`, targets `[clients, samples, m]`: squares, or the log-loss."""

    inputs: Array
    targets: Array
    ridge: float
    is_logistic: bool
    best: float = 0.0

    def gap(self, W: Array) -> Array:
        return self.loss(W) - self.best

    def loss(self, W: Array) -> Array:
        outputs = W @ self._flat(self.inputs).T
        targets = self._flat(self.targets).T
        if self.is_logistic:
            losses = _log_sum_exp(outputs) - (outputs * targets).sum(-2)
        else:
            losses = ((outputs - targets) ** 2).sum(-2) / 2
        return np.asarray(losses.mean(-1) + self.ridge / 2 * _squared(W))

    def gradient(self, W: Array) -> Array:
        inputs = self._flat(self.inputs)
        residuals = self._predicted(W @ inputs.T, -2) - self._flat(self.targets).T
        return residuals @ inputs / len(inputs) + self.ridge * W

    def component(self, W: Array, client: Indices, sample: Indices) -> Array:
        inputs, targets = self.inputs[client, sample], self.targets[client, sample]
        residuals = self._predicted((W * inputs[..., None, :]).sum(-1), -1) - targets
        return np.asarray(residuals[..., :, None] * inputs[..., None, :] + self.ridge * W)

    def _predicted(self, outputs: Array, axis: int) -> Array:
        return _softmax(outputs, axis) if self.is_logistic else outputs

    @staticmethod
    def _flat(values: Array) -> Array:
        return values.reshape(-1, values.shape[-1])


def _fitted(name: str, objective: _Fitted) -> Problem:
    inputs = objective.inputs.reshape(-1, objective.inputs.shape[-1])
    shape = (objective.targets.shape[-1], objective.inputs.shape[-1])
    share = 0.5 if objective.is_logistic else 1.0
    curvature = share * inputs.T @ inputs / len(inputs) + objective.ridge * np.eye(shape[1])
    eigenvalues = np.asarray(np.linalg.eigvalsh(curvature), dtype=np.float64)
    optimum = _newton(objective, np.zeros(shape)) if objective.is_logistic else _solved(objective, curvature)
    return Problem(
        name,
        replace(objective, best=float(objective.loss(optimum))),
        np.zeros(shape),
        float(eigenvalues[-1]),
        float(share * (inputs**2).sum(-1).max() + objective.ridge),
        objective.ridge if objective.is_logistic else _least_positive(eigenvalues),
        curvature,
        is_quadratic=not objective.is_logistic,
        counts=(objective.inputs.shape[0], objective.inputs.shape[1]),
    )


def _solved(objective: _Fitted, curvature: Array) -> Array:
    inputs, targets = objective._flat(objective.inputs), objective._flat(objective.targets)  # noqa: SLF001
    return targets.T @ inputs / len(inputs) @ np.linalg.pinv(curvature, rcond=_ZERO, hermitian=True)


def _newton(objective: _Fitted, W: Array, sweeps: int = 200) -> Array:
    """Return the optimum by damped Newton steps with the exact Hessian, until the gradient is rounding."""
    inputs = objective._flat(objective.inputs)  # noqa: SLF001
    for _ in range(sweeps):
        gradient = objective.gradient(W)
        if np.abs(gradient).max() < 1e-14:
            break
        P = _softmax(inputs @ W.T, -1)
        classes = P[:, :, None] * (np.eye(P.shape[1]) - P[:, None, :])
        hessian = np.einsum("sij,sk,sl->ikjl", classes, inputs, inputs, optimize=True).reshape(W.size, W.size)
        hessian = hessian / len(inputs) + objective.ridge * np.eye(W.size)
        step = np.linalg.solve(hessian, gradient.ravel()).reshape(W.shape)
        damping = 1.0
        while damping > 1e-6 and objective.loss(W - damping * step) > objective.loss(W):
            damping /= 2
        W = W - damping * step
    return W


def _inputs(rng: np.random.Generator, made: Made, dim: int, rank: int) -> Array:
    """Return Gaussian inputs whose coordinates' deviations fall from 1 to 1/2, in a random subspace of `rank`."""
    scales = np.where(np.arange(dim) < rank, np.linspace(1.0, 0.5, dim), 0.0)
    return rng.standard_normal((made.clients, made.samples, dim)) * scales @ _rotation(rng, dim)


def _responses(rng: np.random.Generator, made: Made, inputs: Array, num_outputs: int) -> Array:
    """Return W_k x of every input `[clients, samples, m]`, W_k a common weight plus the client's own."""
    common = rng.standard_normal((num_outputs, inputs.shape[-1]))
    own = made.heterogeneity * rng.standard_normal((made.clients, *common.shape))
    return np.asarray(np.einsum("ksn,kmn->ksm", inputs, common + own))


def _curvature(shape: tuple[int, int], spectrum: Array, rng: np.random.Generator) -> Array:
    """Return the rotated matrix of a spectrum: `[n, n]`, or `[m, n, m, n]` when it has m n eigenvalues."""
    rows, size = shape[1], shape[0] * shape[1]
    if len(spectrum) not in (rows, size):
        raise ValueError(f"a spectrum has n = {rows} or m n = {size} eigenvalues; found {len(spectrum)}")
    rotation = _rotation(rng, len(spectrum))
    matrix = rotation * spectrum @ rotation.T
    return matrix if len(spectrum) == rows else matrix.reshape(*shape, *shape)


def _curved(curvature: Array, D: Array) -> Array:
    """Return D C, or Q D."""
    if curvature.ndim == 2:
        return D @ curvature
    flat = D.reshape(*D.shape[:-2], -1)
    return (flat @ curvature.reshape(flat.shape[-1], -1)).reshape(D.shape)


def _rotation(rng: np.random.Generator, dim: int) -> Array:
    return np.asarray(np.linalg.qr(rng.standard_normal((dim, dim)))[0])


def _centred(values: Array, axis: int) -> Array:
    return np.asarray(values - values.mean(axis, keepdims=True))


def _least_positive(eigenvalues: Array) -> float:
    return float(eigenvalues[eigenvalues > _ZERO * eigenvalues.max()].min())


def _squared(matrix: Array) -> Array:
    return np.asarray((matrix**2).sum((-2, -1)))


def _softmax(outputs: Array, axis: int) -> Array:
    exponentials = np.exp(outputs - outputs.max(axis, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis, keepdims=True))


def _log_sum_exp(outputs: Array) -> Array:
    most = outputs.max(-2)
    return np.asarray(most + np.log(np.exp(outputs - most[..., None, :]).sum(-2)))
