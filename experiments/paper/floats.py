"""Floats sent up to an accuracy, against the rank: what the worst-case theory says of communication, and what it omits.

In f(W) = (1/2) tr((W - W*) C (W - W*)^T), with L and mu the extreme positive eigenvalues of C, a link of rank r sends
m r floats where A is drawn (n r where B is). At the step 1/L the theorem needs (n/r) (L/mu) log(1/eps) links, thus
m n (L/mu) log(1/eps) floats for every rank and both sides (derived here: mathematics.md, 2.3.1): a low rank saves
nothing. What can save (2.3.2):

- the step 1/L_H, L_H the curvature of the link's own subspace, lambda_max(A C A^T);
- the exact minimum over B, (W - W*) C A^T (A C A^T)^+, which needs no second message;
- a server step above 1/L, which small ranks bear since a random subspace rarely holds the steepest direction;
- a task of low rank: C with k positive eigenvalues only, so that a link of rank k or more can solve it at once.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.paper.laws import orthonormal_rows
from experiments.scales import label_log_scale
from experiments.styles import FOREGROUND, PALETTE, WIDTH_IN, drawing_style, method_styles
from fedraclora.seeding import derive_seed, generator

Array = NDArray[np.float64]

OUT, DIM = 6, 24
RANKS, SIDE_A_RANKS = (1, 2, 4, 8, 16, 24), (1, 2, 3, 6)
ACCURACY, CONDITION = 1e-3, 100.0
TASK_RANKS = (2, 4, 8, 24)
# In units of 1 / L; full gradient descent diverges from 2 on.
STEPS = (1.0, 1.8, 4.0)
EXACT, LOCAL = "exact in the subspace", "1/L_H"
LARGEST = 1e12


@dataclass(frozen=True)
class Run:
    """How one line's runs descend: trained factor (`b` or `a`), rank, and the link's rule.

    `rule` is `exact`, `local` (1/L_H) or `step` (`step` / L).
    """

    name: str
    rank: int
    side: str = "b"
    rule: str = "step"
    step: float = 1.0

    @property
    def floats(self) -> int:
        """Return the floats of one link."""
        return self.rank * (OUT if self.side == "b" else DIM)


def curvature(eigenvalues: Array) -> Array:
    """Return a symmetric C with these eigenvalues and random eigenvectors, the same in every call."""
    q, _ = np.linalg.qr(generator(derive_seed(0, "floats", "basis")).normal(size=(DIM, DIM)))
    C: Array = (q * eigenvalues) @ q.T
    return C


def geometric_spectrum() -> Array:
    """Return eigenvalues from 1 to 1 / 100, L = 1 and mu = 1 / 100."""
    return np.geomspace(1, 1 / CONDITION, DIM)


def low_rank_spectrum(task_rank: int) -> Array:
    """Return so many eigenvalues, from 1 to 1 / 10, and zeros: f depends on W in `task_rank` input directions only."""
    return np.pad(np.geomspace(1, 0.1, task_rank), (0, DIM - task_rank))


def links_to_accuracy(C: Array, run: Run, seeds: int, *, most: int = 8000) -> Array:
    """Return the links until f - f* is a thousandth of its start, `[seeds]`; inf where that does not happen."""
    draws = generator(derive_seed(0, "floats", "runs"))
    error = -draws.normal(size=(seeds, OUT, DIM))
    start = _gap(error, C)
    reached = np.full(seeds, np.inf)
    for link in range(1, most + 1):
        error = error - _update(error, C, run, draws)
        gap = _gap(error, C)
        reached = np.where((gap <= ACCURACY * start) & np.isinf(reached), link, reached)
        if np.isfinite(reached).all() or gap.max() > LARGEST:
            break
    return reached


def _gap(error: Array, C: Array) -> Array:
    gap: Array = 0.5 * ((error @ C) * error).sum((-1, -2))
    return gap


def _update(error: Array, C: Array, run: Run, draws: np.random.Generator) -> Array:
    """Return what a link takes from W; L is 1."""
    gradient = error @ C
    if run.side == "a":
        rows = orthonormal_rows(draws, (len(error),), run.rank, OUT)
        return run.step * (rows.swapaxes(-1, -2) @ (rows @ gradient))
    A = orthonormal_rows(draws, (len(error),), run.rank, DIM)
    by_b = gradient @ A.swapaxes(-1, -2)
    if run.rule == "step":
        return run.step * (by_b @ A)
    inner = A @ C @ A.swapaxes(-1, -2)
    if run.rule == "local":
        return by_b @ A / np.linalg.eigvalsh(inner)[:, -1][:, None, None]
    return by_b @ np.linalg.pinv(inner, rcond=1e-10, hermitian=True) @ A


def regime_table(seeds: int = 20) -> pd.DataFrame:
    """Return floats to accuracy by rule and rank: columns regime, side, rank, seed, links, floats (inf: not reached)."""
    C = curvature(geometric_spectrum())
    runs = [Run(f"{step:g}/L", rank, step=step) for step in STEPS for rank in RANKS]
    runs += [Run("1/L, side a", rank, side="a") for rank in SIDE_A_RANKS]
    runs += [Run(LOCAL, rank, rule="local") for rank in RANKS]
    runs += [Run(EXACT, rank, rule="exact") for rank in RANKS]
    return pd.concat([_rows(C, run, seeds) for run in runs], ignore_index=True)


def task_table(seeds: int = 20) -> pd.DataFrame:
    """Return the same for tasks of low rank at 1/L and exactly solved, with the further column task_rank."""
    frames = []
    for task_rank in TASK_RANKS:
        C = curvature(low_rank_spectrum(task_rank))
        for rank in RANKS:
            for run in (Run("1/L", rank), Run(EXACT, rank, rule="exact")):
                frames.append(_rows(C, run, seeds).assign(task_rank=task_rank))
    return pd.concat(frames, ignore_index=True)


def _rows(C: Array, run: Run, seeds: int) -> pd.DataFrame:
    links = links_to_accuracy(C, run, seeds)
    data = {"seed": range(seeds), "links": links, "floats": run.floats * links}
    return pd.DataFrame({"regime": run.name, "side": run.side, "rank": run.rank} | data)


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
    style: dict[str, object] = {"markersize": 4.5, "linewidth": 1.4, "elinewidth": 1, **how}
    axes.errorbar(mean.index, mean, yerr=[(mean - low).clip(0), (high - mean).clip(0)], **style)


def _finish(axes: Axes, low: float, high: float) -> None:
    axes.set(xscale="log", yscale="log", xlabel="rank r", ylabel=f"floats up to {ACCURACY:g}", ylim=(low, high))
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
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
