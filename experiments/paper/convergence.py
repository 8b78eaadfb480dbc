"""Bounds beside what is measured: full and stochastic gradients, random reshuffling and clients, and the r/n speed.

The bounds and where each comes from are those of `fedraclora.theory`, the methods those of `experiments.paper.descent`.
A bound is on a mean over draws: single seeds may lie above it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.paper.descent import Budget, Sketching, Trace, federated, gd, reshuffled, sgd
from experiments.paper.problems import (
    Made,
    Objective,
    Problem,
    geometric_spectrum,
    least_squares,
    logistic_regression,
    quadratic,
    spread_quadratic,
)
from experiments.scales import label_log_scale
from experiments.styles import FOREGROUND, WIDTH_IN, drawing_style, method_styles
from fedraclora.theory import (
    Bound,
    Constants,
    Range,
    Steps,
    expected_range,
    federated_pl,
    gd_nonconvex,
    gd_pl,
    reshuffling_step,
    rr_pl,
    sgd_pl,
    smooth_step,
)

Array = NDArray[np.float64]

SHAPE = (6, 8)
RANKS = {"right": (1, 2, 4, 8), "left": (1, 2, 3, 6)}
ACCURACY = 1e-3
POINTS = 60
# Gaps below this are rounding.
LEAST = 1e-13
# The spread at which samples and clients differ in the stochastic cases.
APART = Made(clients=5, samples=4, heterogeneity=0.3, noise=0.3)


@dataclass(frozen=True)
class Case:
    """A method on a problem, drawn in a panel of its own: `run` measures it and `bound` is what is known of it."""

    panel: str
    problem: Problem
    side: str
    links: int
    run: Callable[[Sketching, Budget], Trace]
    bound: Callable[[Array, Constants, Range], Bound]


@dataclass(frozen=True)
class Penalised:
    """f(W) + weight sum of w^2 / (1 + w^2) over the entries: not convex; its gap is to a lower bound of its minimum.

    The penalty's second derivative lies between -1/2 and 2. The lower bound is the minimum of f.
    """

    base: Objective
    weight: float

    def gap(self, W: Array) -> Array:
        """Return how far the value lies above the minimum of f alone."""
        squares = W * W
        return np.asarray(self.base.gap(W) + self.weight * (squares / (1 + squares)).sum((-2, -1)))

    def gradient(self, W: Array) -> Array:
        """Return the gradient."""
        return np.asarray(self.base.gradient(W) + self.weight * 2 * W / (1 + W * W) ** 2)

    def component(self, W: Array, client: NDArray[np.int64], sample: NDArray[np.int64]) -> Array:
        """Return the gradient: there is one component."""
        return self.gradient(W)


def penalised_quadratic(weight: float = 0.5) -> Problem:
    """Return a quadratic with a non-convex penalty, started away from the penalty's stationary point at zero."""
    plain = quadratic(SHAPE, geometric_spectrum(SHAPE[1], 20))
    smoothness = plain.smoothness + 2 * weight
    return replace(
        plain,
        name="quadratic with a non-convex penalty",
        objective=Penalised(plain.objective, weight),
        start=np.full(SHAPE, 1.5),
        smoothness=smoothness,
        component_smoothness=smoothness,
        mu=0.0,
        is_quadratic=False,
    )


def gradient_cases() -> list[Case]:
    """Return full gradient descent on a PL quadratic, on both sides."""
    problem = quadratic(SHAPE, geometric_spectrum(SHAPE[1], 10))
    return [_gd_case(problem, side, 500) for side in RANKS]


def regression_cases() -> list[Case]:
    """Return full gradient descent on linear and logistic regression."""
    linear = least_squares(SHAPE, Made(samples=120, noise=0.3), ridge=0.05)
    logistic = logistic_regression(SHAPE, Made(samples=120, noise=0.1), ridge=0.1)
    return [_gd_case(linear, "right", 300), _gd_case(logistic, "right", 300), _gd_case(logistic, "left", 300)]


def nonconvex_cases() -> list[Case]:
    """Return full gradient descent without PL, on both sides."""
    problem = penalised_quadratic()
    return [_gd_case(problem, side, 300, is_pl=False) for side in RANKS]


def stochastic_cases() -> list[Case]:
    """Return SGD and random reshuffling on a quadratic whose samples' optima differ."""
    problem = _spread()
    num = problem.counts[0] * problem.counts[1]
    gamma, within = 0.2 * smooth_step(problem.smoothness), reshuffling_step(problem.component_smoothness, num)
    steps = Steps(within, num)
    sgd_case = Case(
        "SGD, step 0.2/L, A drawn",
        problem,
        "right",
        600,
        lambda sketching, budget: sgd(problem, sketching, budget, gamma=gamma),
        lambda links, constants, eigenvalues: sgd_pl(links, constants, gamma, eigenvalues),
    )
    pass_case = Case(
        "random reshuffling, step 1/(2 L N), A drawn",
        problem,
        "right",
        600,
        lambda sketching, budget: reshuffled(problem, sketching, budget, gamma=within),
        lambda links, constants, eigenvalues: rr_pl(links, constants, steps, eigenvalues),
    )
    left = [
        replace(case, side="left", panel=case.panel.replace("A drawn", "B drawn")) for case in (sgd_case, pass_case)
    ]
    return [sgd_case, left[0], pass_case, left[1]]


def federated_cases() -> list[Case]:
    """Return clients with local passes: plain averaging, a server step of 1/L, and logistic regression."""
    spread = _spread()
    made = replace(APART, samples=8, noise=0.1)
    logistic = logistic_regression(SHAPE, made, ridge=0.2)
    return [
        _federated_case(spread, "right", is_averaging=True),
        _federated_case(spread, "right"),
        _federated_case(spread, "left"),
        _federated_case(logistic, "right"),
    ]


def _spread() -> Problem:
    return spread_quadratic(SHAPE, geometric_spectrum(SHAPE[1], 5), APART)


def _gd_case(problem: Problem, side: str, links: int, *, is_pl: bool = True) -> Case:
    gamma = smooth_step(problem.smoothness)

    def bound(links: Array, constants: Constants, eigenvalues: Range) -> Bound:
        own = replace(constants, smoothness=problem.smoothness)
        return (gd_pl if is_pl else gd_nonconvex)(links, own, gamma, eigenvalues.low)

    def run(sketching: Sketching, budget: Budget) -> Trace:
        return gd(problem, sketching, budget, gamma=gamma)

    return Case(f"{problem.name}, {_drawn(side)}", problem, side, links, run, bound)


def _federated_case(problem: Problem, side: str, *, is_averaging: bool = False) -> Case:
    num = problem.counts[1]
    local = 0.25 * reshuffling_step(problem.component_smoothness, num)
    steps = Steps(local, num, server=local * num if is_averaging else smooth_step(problem.component_smoothness))
    kind = "plain averaging" if is_averaging else "server step 1/L"
    name = "logistic regression, " if problem.name == "logistic regression" else ""
    return Case(
        f"{name}{kind}, {_drawn(side)}",
        problem,
        side,
        500,
        lambda sketching, budget: federated(problem, sketching, budget, steps=steps),
        lambda links, constants, eigenvalues: federated_pl(links, constants, steps, eigenvalues),
    )


def _drawn(side: str) -> str:
    return "A drawn" if side == "right" else "B drawn"


def convergence_table(cases: Sequence[Case], seeds: int) -> pd.DataFrame:
    """Return bound and measurement: panel, rank, links, mean, low, high (10% and 90%), bound, quantity, provenance.

    The quantity is f - f*, or for `gradient` the mean of ||grad f||^2 over the iterates before, whose expectation the
    theorem bounds. s^2 and zeta^2 are the most that any run met.
    """
    return pd.concat([_measured(case, rank, seeds) for case in cases for rank in RANKS[case.side]], ignore_index=True)


def _measured(case: Case, rank: int, seeds: int) -> pd.DataFrame:
    trace = case.run(Sketching(rank=rank, side=case.side), Budget(case.links, seeds))
    constants = replace(case.problem.constants(), noise=trace.noise, heterogeneity=trace.heterogeneity)
    links = np.unique(np.linspace(0, case.links, POINTS).round()).astype(np.int64)
    dim = SHAPE[1] if case.side == "right" else SHAPE[0]
    bound = case.bound(links.astype(np.float64), constants, expected_range("orthonormal", rank, dim))
    values = trace.gaps if bound.quantity == "gap" else _mean_before(trace.squared_gradients)
    values = np.maximum(values[:, links], LEAST)
    low, high = np.quantile(values, [0.1, 0.9], axis=0)
    data = {"links": links, "mean": values.mean(0), "low": low, "high": high, "bound": bound.values}
    return pd.DataFrame(
        {"panel": case.panel, "rank": rank} | data | {"quantity": bound.quantity, "provenance": bound.provenance}
    )


def _mean_before(values: Array) -> Array:
    """Return at T the mean of values 0 to T - 1 along the last axis; at 0 the first value."""
    means = values.cumsum(-1) / np.arange(1, values.shape[-1] + 1)
    return np.concatenate([values[:, :1], means[:, :-1]], axis=1)


def violations(table: pd.DataFrame) -> int:
    """Return at how many points the measured mean exceeds the bound by more than rounding."""
    return int((table["mean"] > table["bound"] * (1 + 1e-9) + 2 * LEAST).sum())


def speed_table(seeds: int) -> pd.DataFrame:
    """Return the links to accuracy over those of full gradient descent: problem, side, rank, dim, seed, ratio.

    The ratio is NaN where a run did not arrive in twelve times the links that the law foresees.
    """
    problems = [
        quadratic(SHAPE, geometric_spectrum(SHAPE[1], 10)),
        least_squares(SHAPE, Made(samples=120, noise=0.3), ridge=0.05),
        logistic_regression(SHAPE, Made(samples=120, noise=0.1), ridge=0.1),
    ]
    rows = []
    for problem in problems:
        full = float(_links(problem, "right", SHAPE[1], 1, 3000)[0])
        for side, dim in (("right", SHAPE[1]), ("left", SHAPE[0])):
            for rank in RANKS[side]:
                links = _links(problem, side, rank, seeds, int(2 * full * dim / rank))
                rows += [(problem.name, side, rank, dim, seed, value / full) for seed, value in enumerate(links)]
    return pd.DataFrame(rows, columns=["problem", "side", "rank", "dim", "seed", "ratio"])


def _links(problem: Problem, side: str, rank: int, seeds: int, most: int) -> Array:
    """Return the links of full gradient steps 1/L until the gap is a thousandth of its start, `[seeds]`."""
    gamma = smooth_step(problem.smoothness)
    gaps = gd(problem, Sketching(rank=rank, side=side), Budget(most, seeds), gamma=gamma).gaps
    is_there = gaps <= ACCURACY * gaps[:, :1]
    return np.where(is_there.any(1), is_there.argmax(1), np.nan)


def full_rank_error(links: int = 20) -> float:
    """Return the largest difference between a chain of rank n and gradient descent without sketches, over the start.

    Differences are of points, relative to the largest entry of what gradient descent reaches.
    """
    problem = quadratic(SHAPE, geometric_spectrum(SHAPE[1], 10))
    gamma, W = smooth_step(problem.smoothness), problem.start
    for _ in range(links):
        W = W - gamma * problem.gradient(W)
    reached = gd(problem, Sketching(rank=SHAPE[1]), Budget(links, 2), gamma=gamma).last
    return float(np.abs(reached - W).max() / np.abs(W).max())


def bound_figure(table: pd.DataFrame) -> Figure:
    """Return measured means and bounds against links, a panel a case and a colour a rank, from `convergence_table`."""
    panels = list(table["panel"].unique())
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 0.9 + 2.2 * len(panels)), layout="constrained")
        for axes, panel in zip(np.ravel(figure.subplots(len(panels), 1)), panels, strict=True):
            _bound_panel(axes, table[table["panel"] == panel])
            axes.set_title(panel, fontsize=9, loc="left")
        axes.set_xlabel("links")
    return figure


def _bound_panel(axes: Axes, table: pd.DataFrame) -> None:
    ranks = sorted(table["rank"].unique())
    for rank, style in zip(ranks, method_styles([str(rank) for rank in ranks]).values(), strict=True):
        rows = table[table["rank"] == rank]
        links = rows["links"].to_numpy()
        every = len(links) // 5
        how: dict[str, Any] = {"marker": style.marker, "markersize": 4, "markevery": (2, every), "linewidth": 1.5}
        axes.plot(links, rows["mean"], color=style.color, label=f"r = {rank}", **how)
        axes.fill_between(links, rows["low"], rows["high"], color=style.color, alpha=0.18, linewidth=0)
        bound = rows["bound"].to_numpy()
        axes.plot(links, np.where(np.isfinite(bound), bound, np.nan), color=style.color, linewidth=1.1, linestyle="--")
    axes.plot([], [], color=FOREGROUND, linewidth=1.1, linestyle="--", label="bound")
    is_gap = table["quantity"].iloc[0] == "gap"
    axes.set(yscale="log", ylabel="f - f*" if is_gap else "mean of ||grad f||²")
    bottom = max(float(table["low"].min()) / 2, 1e-8 * float(table["mean"].max()))
    axes.set_ylim(bottom=bottom)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, handlelength=1.8)


def speed_figure(table: pd.DataFrame) -> Figure:
    """Return links to accuracy over those of full gradient descent against n/r (or m/r), from `speed_table`."""
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 4.2), layout="constrained")
        axes = figure.add_subplot()
        names = [(problem, side) for problem in table["problem"].unique() for side in RANKS]
        styles = method_styles([f"{problem}, {_drawn(side)}" for problem, side in names])
        for place, ((problem, side), (label, style)) in enumerate(zip(names, styles.items(), strict=True)):
            rows = table[(table["problem"] == problem) & (table["side"] == side)]
            groups = rows.groupby(rows["dim"] / rows["rank"])["ratio"]
            mean, low, high = groups.mean(), groups.quantile(0.1), groups.quantile(0.9)
            # Markers of one n/r stand beside each other.
            x = mean.index.to_numpy() * 1.025 ** (place - len(names) / 2)
            error = [(mean - low).clip(0), (high - mean).clip(0)]
            axes.errorbar(x, mean, yerr=error, color=style.color, marker=style.marker, linestyle="none", label=label)
        ends = [1.0, float((table["dim"] / table["rank"]).max())]
        axes.plot(ends, ends, color=FOREGROUND, linestyle="--", linewidth=1, label="about n/r, m/r")
        axes.set(xscale="log", yscale="log", xlabel="n/r (A drawn) or m/r (B drawn)")
        axes.set_ylabel(f"links to {ACCURACY:g}, over full gradients")
        label_log_scale(axes.xaxis, *ends)
        label_log_scale(axes.yaxis, *ends)
        figure.legend(loc="outside lower center", ncols=2)
    return figure
