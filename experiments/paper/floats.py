"""Floats sent up to an accuracy, against the rank: what the worst-case theory says of communication, and what it omits.

In f(W) = (1/2) tr((W - W*) C (W - W*)^T), with L and mu the extreme positive eigenvalues of C, a link of rank r sends
m r floats where A is drawn (n r where B is). At the step 1/L the theorem needs (n/r) (L/mu) log(1/eps) links, thus
m n (L/mu) log(1/eps) floats for every rank and both sides (derived here): a low rank saves
nothing. What can save (2.3.2):

- the step 1/L_H, L_H the curvature of the link's own subspace, lambda_max(A C A^T);
- the exact minimum over B, (W - W*) C A^T (A C A^T)^+, which needs no second message;
- a server step above 1/L, which small ranks bear since a random subspace rarely holds the steepest direction;
- a task of low rank: C with k positive eigenvalues only, so that a link of rank k or more can solve it at once.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.paper.descent import Budget, Sketching, floats_to_accuracy, gd, uplink_per_link
from experiments.paper.problems import Problem, geometric_spectrum, quadratic
from experiments.scales import label_log_scale
from experiments.styles import FOREGROUND, PALETTE, WIDTH_IN, drawing_style, method_styles

Array = NDArray[np.float64]

OUT, DIM = 6, 24
RANKS = {"right": (1, 2, 4, 8, 16, 24), "left": (1, 2, 3, 6)}
ACCURACY, CONDITION = 1e-3, 100.0
TASK_RANKS = (2, 4, 8, 24)
# In units of 1 / L; full gradient descent diverges from 2 on.
STEPS = (1.0, 1.8, 4.0)
LOCAL, EXACT = "1/L_H", "exact in the subspace"
# These end well above what runs on tasks of low rank need.
MOST_OF_TASKS = {"1/L": 5_000, EXACT: 2_200}


@dataclass(frozen=True)
class Regime:
    """One line's rule for a link: a solver of `experiments.paper.descent`, a step in units of 1/L, and a side.

    Runs end after `most` floats, well above what they need.
    """

    name: str
    most: int
    solver: str = "projected"
    step: float = 1.0
    side: str = "right"


REGIMES = (
    *(Regime(f"{step:g}/L", int(4_000 + 14_000 / step), step=step) for step in STEPS),
    Regime("1/L, B drawn", 18_000, side="left"),
    Regime(LOCAL, 15_000, solver="inner"),
    Regime(EXACT, 5_500, solver="exact"),
)


def task_spectrum(task_rank: int) -> Array:
    """Return so many eigenvalues, from 1 to 1 / 10, and zeros: f depends on W in `task_rank` input directions only."""
    return np.pad(np.geomspace(1, 0.1, task_rank), (0, DIM - task_rank))


def regime_table(seeds: int = 20) -> pd.DataFrame:
    """Return floats to accuracy by rule and rank: columns regime, rank, seed, floats (inf: not reached)."""
    problem = quadratic((OUT, DIM), geometric_spectrum(DIM, CONDITION))
    runs = [(regime, rank) for regime in REGIMES for rank in RANKS[regime.side]]
    return pd.concat([_rows(problem, regime, rank, seeds) for regime, rank in runs], ignore_index=True)


def task_table(seeds: int = 20) -> pd.DataFrame:
    """Return the same for tasks of low rank at 1/L and exactly solved, with the further column task_rank."""
    regimes = [replace(regime, most=MOST_OF_TASKS[regime.name]) for regime in (REGIMES[0], REGIMES[-1])]
    runs = [(regime, rank) for regime in regimes for rank in RANKS["right"]]
    frames = [
        _rows(quadratic((OUT, DIM), task_spectrum(task_rank)), regime, rank, seeds).assign(task_rank=task_rank)
        for task_rank in TASK_RANKS
        for regime, rank in runs
    ]
    return pd.concat(frames, ignore_index=True)


def _rows(problem: Problem, regime: Regime, rank: int, seeds: int) -> pd.DataFrame:
    sketching = Sketching(rank=rank, side=regime.side, solver=regime.solver, inner=1)
    each = uplink_per_link(problem, sketching)
    budget = Budget(-(-regime.most // each), seeds)
    # A step that is too large for a rank diverges, beyond any number.
    with np.errstate(over="ignore", invalid="ignore"):
        gaps = gd(problem, sketching, budget, gamma=regime.step / problem.smoothness).gaps
    floats = floats_to_accuracy(gaps, ACCURACY * float(problem.gap(problem.start)), each)
    return pd.DataFrame({"regime": regime.name, "rank": rank, "seed": range(seeds), "floats": floats})


def worst_case_floats(condition: float = CONDITION) -> float:
    """Return m n (L / mu) log(1 / eps), which the theorem needs at 1/L for every rank (derived here)."""
    return OUT * DIM * condition * float(np.log(1 / ACCURACY))


def regime_figure(table: pd.DataFrame) -> Figure:
    """Return floats to accuracy against rank, a line a rule, from `regime_table`."""
    names = list(table["regime"].unique())
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for name, style in method_styles(names).items():
            _line(axes, table[table["regime"] == name], color=style.color, marker=style.marker, label=name)
        bound = worst_case_floats()
        axes.axhline(bound, color=FOREGROUND, linestyle="--", linewidth=1, label="bound at 1/L, derived")
        _finish(axes, 70, 2 * bound)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def task_figure(table: pd.DataFrame) -> Figure:
    """Return floats to accuracy against rank, a colour a task's rank, from `task_table`."""
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for place, task_rank in enumerate(sorted(table["task_rank"].unique())):
            rows = table[table["task_rank"] == task_rank]
            color = PALETTE[place]
            exact, step = rows[rows["regime"] == EXACT], rows[rows["regime"] == "1/L"]
            _line(axes, step, color=color, marker="o", linestyle=":", label=f"1/L, task rank {task_rank}")
            _line(axes, exact, color=color, marker="s", label=f"exact, task rank {task_rank}")
        _finish(axes, 8, 2e4)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _line(axes: Axes, table: pd.DataFrame, **how: str) -> None:
    """Draw the mean over seeds, with bars from 10% to 90%; ranks at which a run did not arrive are left out."""
    groups = table.groupby("rank")["floats"]
    mean = groups.mean()
    mean = mean[np.isfinite(mean)]
    low, high = (groups.quantile(share).reindex(mean.index) for share in (0.1, 0.9))
    style: dict[str, Any] = {"markersize": 4.5, "linewidth": 1.4, "elinewidth": 1, **how}
    axes.errorbar(mean.index, mean, yerr=[(mean - low).clip(0), (high - mean).clip(0)], **style)


def _finish(axes: Axes, low: float, high: float) -> None:
    axes.set(xscale="log", yscale="log", xlabel="rank r", ylabel=f"floats up to {ACCURACY:g}", ylim=(low, high))
    axes.set_xticks(RANKS["right"], [str(rank) for rank in RANKS["right"]])
    axes.xaxis.minorticks_off()
    label_log_scale(axes.yaxis, low, high)


def spread_over_ranks(table: pd.DataFrame, regime: str) -> float:
    """Return the largest mean number of floats of a regime over its smallest, across ranks."""
    means = table[table["regime"] == regime].groupby("rank")["floats"].mean()
    return float(means.max() / means.min())


def mean_floats(table: pd.DataFrame, regime: str, rank: int) -> float:
    """Return the mean floats of a regime at one rank."""
    rows = table[(table["regime"] == regime) & (table["rank"] == rank)]
    return float(rows["floats"].mean())
