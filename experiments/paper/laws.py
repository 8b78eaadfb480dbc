"""Sketch laws: the eigenvalues of E[H], and the steps that each law admits with and without the projector.

H = A^T (A A^T)^+ A is the projector of a RAC-LoRA link (arXiv 2410.08305); lambda_min(E[H]) > 0 is its Assumption 5.1
and r / n the most that it can be for rank r. The draws are the project's own, `fedraclora.sketch`; a law that is not
centred, Uniform(0, 1), stands beside them as a negative control.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator
from numpy.typing import NDArray

from experiments.styles import FOREGROUND, GRID, WIDTH_IN, MethodStyle, drawing_style, method_styles
from fedraclora.seeding import derive_seed, generator
from fedraclora.sketch import LAWS, SketchKey, draw
from fedraclora.theory import projector, raw_step

Array = NDArray[np.float64]

UNCENTRED = "Uniform(0, 1)"
DIM, RANKS = 16, (1, 2, 4, 8, 12, 16)
# Of the draws, this share may have a smaller admissible step than the one shown.
RARE = 0.01


def law_table(draws: int = 1500, *, dim: int = DIM, ranks: Sequence[int] = RANKS) -> pd.DataFrame:
    """Return what is measured of each law and rank: columns law, rank, dim, draws and four numbers.

    `low` and `high` are the extreme eigenvalues of the mean of H; `sure` the step, in units of 1/L, at which a plain
    gradient step on B descends in 99% of draws, 1 / lambda_max(A A^T); `mean` the step that bounds the loss lowest
    in the mean over draws and directions of the gradient, tr E[P] / tr E[P^2] with P = A^T A. Both are 1 for the
    projected step.
    """
    rows = [
        (law, rank, dim, draws, *_measures(_factors(law, rank, dim, draws)))
        for law in (*LAWS, UNCENTRED)
        for rank in ranks
    ]
    return pd.DataFrame(rows, columns=["law", "rank", "dim", "draws", "low", "high", "sure", "mean"])


def _factors(law: str, rank: int, dim: int, draws: int) -> Array:
    """Return `draws` factors A, `[draws, rank, dim]`, links 0, 1, ... of one run."""
    if law == UNCENTRED:
        return generator(derive_seed(0, "laws", "uniform", rank)).uniform(size=(draws, rank, dim))
    keys = (SketchKey(law, derive_seed(0, "laws"), link, "layer", "b", rank, dim) for link in range(draws))
    return np.stack([draw(key).numpy().astype(np.float64) for key in keys])


def _measures(A: Array) -> tuple[float, float, float, float]:
    transposed = A.transpose(0, 2, 1)
    P = transposed @ A
    eigenvalues = np.linalg.eigvalsh(projector(A).mean(0))
    sure = 1 / np.linalg.eigvalsh(A @ transposed)[:, -1]
    best = np.trace(P.mean(0)) / np.trace((P @ P).mean(0))
    return float(eigenvalues[0]), float(eigenvalues[-1]), float(np.quantile(sure, RARE)), float(best)


def eigenvalue_figure(table: pd.DataFrame) -> Figure:
    """Return the range of the eigenvalues of E[H] over r / n, a bar a law, from `law_table`."""
    ranks = sorted(table["rank"].unique())
    laws = list(table["law"].unique())
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for place, (law, style) in enumerate(_styles(laws).items()):
            rows = table[table["law"] == law].set_index("rank").loc[ranks]
            x = np.arange(len(ranks)) + 0.09 * (place - (len(laws) - 1) / 2)
            axes.vlines(x, rows["low"], rows["high"], color=style.color, linewidth=2.2)
            axes.plot(x, rows["low"], style.marker, color=style.color, markersize=3.5, label=law)
        for place, rank in enumerate(ranks):
            share = rank / int(table["dim"].iloc[0])
            label = "r/n" if place == 0 else "_nolegend_"
            axes.hlines(share, place - 0.45, place + 0.45, color=FOREGROUND, linewidth=0.9, linestyle="--", label=label)
        axes.set_xticks(range(len(ranks)), [f"{rank}/{table['dim'].iloc[0]}" for rank in ranks])
        axes.grid(visible=False, axis="x")
        axes.set(xlabel="r / n", ylabel="eigenvalues of the mean of H", ylim=(0, 1.05))
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def step_figure(table: pd.DataFrame) -> Figure:
    """Return the admissible steps of plain gradients on B over r / n, a line a law, from `law_table`."""
    laws = list(table["law"].unique())
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 5.0), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        for axes, column, title in zip(
            panels,
            ("sure", "mean"),
            ("descends in 99% of draws", "best in the mean over draws and directions"),
            strict=True,
        ):
            for law, style in _styles(laws).items():
                rows = table[table["law"] == law]
                axes.plot(rows["rank"], rows[column], color=style.color, marker=style.marker, markersize=4, label=law)
            axes.set_title(title, fontsize=9, loc="left")
            _scale_steps(axes, table)
        dim, ranks = int(table["dim"].iloc[0]), sorted(table["rank"].unique())
        bound = [raw_step(1.0, rank, dim) for rank in ranks]
        panels[1].plot(ranks, bound, color=FOREGROUND, linestyle="--", linewidth=0.9, label="raw, derived: 1/(r+n+1)")
        panels[1].set_xlabel("r / n")
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _styles(laws: Sequence[str]) -> dict[str, MethodStyle]:
    """Return the report's styles, but for the control, which must not share a colour."""
    return method_styles(laws) | {UNCENTRED: MethodStyle("#7a1f1f", (0, ()), "x")}


def _scale_steps(axes: Axes, table: pd.DataFrame) -> None:
    ranks = sorted(table["rank"].unique())
    axes.set(yscale="log", xscale="log", ylabel="step, in 1/L")
    axes.set_xticks(ranks, [f"{rank}/{table['dim'].iloc[0]}" for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(1.0, color=GRID, linewidth=0.9, linestyle=":")
    axes.annotate("projected step", (ranks[-1], 1.0), (0, 3), textcoords="offset points", ha="right", fontsize=8)
    axes.set_ylim(top=2.5)


def orthonormal_rows(draws: np.random.Generator, batch: tuple[int, ...], rank: int, dim: int) -> Array:
    """Return factors A `[*batch, rank, dim]` with orthonormal rows, uniform among those, so that H = A^T A."""
    columns, _ = np.linalg.qr(draws.normal(size=(*batch, dim, rank)))
    return np.ascontiguousarray(columns.swapaxes(-1, -2))
