"""A reconstruction of the paper's counterexample: where low-rank methods diverge, stall or arrive on a 3 x 3 quadratic.

G. Malinovsky et al., "Randomized Asymmetric Chain of LoRA", 2024, arXiv 2410.08305, Section 3. What reviews quote of it
is f(W) = x^T M x + b^T x with x = vec(W) and M = Diag(10, 1, ..., 1), and rank 1. The linear term, the start and the
law of the first factor could not be read, so that b (ones or Gaussian) and W^0 (zero or Gaussian) are both varied here
and the frozen or first factor is N(0, 1). Hence "reconstruction": its numbers are not the paper's.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.styles import GRID, WIDTH_IN, drawing_style, method_styles
from fedraclora.seeding import derive_seed, generator

Array = NDArray[np.float64]

# L is the largest eigenvalue of the Hessian 2 M; the curvature of entry (i, j) of W is 2 M_ij.
SMOOTHNESS = 20.0
CURVATURE = np.array([[20.0, 2, 2], [2, 2, 2], [2, 2, 2]])
# Step sizes in units of 1 / L.
STEPS = (1.0, 0.25, 0.05)
PROBLEMS = tuple((term, start) for term in ("ones", "Gaussian") for start in ("zero", "Gaussian"))
# A gap above this counts as divergence; the run is frozen there. Initial gaps are about 2 to 50.
DIVERGED = 1e6
ARRIVED = 1e-3
# Gaps below the first are rounding, and have no place on a logarithmic axis.
LEAST, MOST = 1e-16, 1e7
LINK = 50


@dataclass(frozen=True)
class Method:
    """A way to descend by factors: W + B A, B starting at zero; a link ends after `link` steps, never where it is 0.

    At a link's end B A is merged and A ~ N(0, 1) is drawn anew. `trains_both` says whether A moves too; `is_projected`
    replaces the step -gamma G A^T on B by the projected -gamma G A^T (A A^T)^+.
    """

    name: str
    link: int
    trains_both: bool = False
    is_projected: bool = False


METHODS = (
    Method("LoRA", 0, trains_both=True),
    Method("COLA", LINK, trains_both=True),
    Method("AsymmLoRA, plain", 0),
    Method("AsymmLoRA, projected", 0, is_projected=True),
    Method("RAC-LoRA, projected", 1, is_projected=True),
    Method("RAC-LoRA, plain", LINK),
)
# What an earlier, independent run of it found: the share that diverged and the others' median gap, step by step.
DOCUMENT = {
    "LoRA": ("3-10% diverged, else 0.3-1.4", "0.3-1.4", "0.3-1.4"),
    "COLA": ("93-100% diverged", "1e-12, worst 3e-2, 0-3% diverged", "1e-8, worst 1e-5"),
    "AsymmLoRA, plain": ("15-30% diverged, else 1.5-7", "1.5-6.5, 0-3% diverged", "1-6.4"),
    "AsymmLoRA, projected": ("1.5-6", "1.6-6.5", "1.4-5.4"),
    "RAC-LoRA, projected": ("1e-16", "1e-16", "3e-6 to 1e-5"),
    "RAC-LoRA, plain": ("100% diverged", "12-20% diverged, else 1e-11", "1e-8"),
}


def gaps(seeds: int = 40, steps: int = 4000) -> pd.DataFrame:
    """Return f - f* of each run: columns method, step, linear_term, start, seed, iteration, gap (inf: diverged).

    All methods and steps of a seed share the problem, the start and the factors that are drawn.
    """
    frames = [_frame(method, times, values) for method in METHODS for times, values in [_descend(method, seeds, steps)]]
    return pd.concat(frames, ignore_index=True)


def checkpoints(steps: int) -> list[int]:
    """Return the steps at which gaps are kept: 0, then about eight a decade, and the last."""
    return sorted({0, steps, *(round(10 ** (place / 8)) for place in range(int(8 * np.log10(steps)) + 1))})


def _descend(method: Method, seeds: int, steps: int) -> tuple[list[int], Array]:
    """Return the checkpoints and the gaps `[checkpoints, steps, problems, seeds]` of one method."""
    start, optimum = _problems(seeds)
    draws = generator(derive_seed(0, "counterexample", "factors"))
    rate = (np.array(STEPS) / SMOOTHNESS)[:, None, None, None, None]
    W = np.repeat(start[None], len(STEPS), axis=0)
    A, B = np.zeros((*W.shape[:-2], 1, 3)), np.zeros((*W.shape[:-2], 3, 1))
    is_alive = np.ones((*W.shape[:-2], 1, 1))
    times, kept = checkpoints(steps), []
    for step in range(steps + 1):
        point = W + B * A
        gap = _gap(point - optimum)
        is_alive = is_alive * (gap < DIVERGED)[..., None, None]
        if step in times:
            kept.append(gap)
        if step == 0 or (method.link and step % method.link == 0):
            W, B, A = point, np.zeros_like(B), np.broadcast_to(draws.normal(size=A.shape[1:]), A.shape)
        B, A = _step(method, is_alive * rate, CURVATURE * (point - optimum), (B, A))
    return times, np.where(np.array(kept) < DIVERGED, np.array(kept), np.inf)


def _problems(seeds: int) -> tuple[Array, Array]:
    """Return the starts and optima, both `[problems, seeds, 3, 3]`: entry (i, j) of W* is -b_ij over its curvature."""
    draws = generator(derive_seed(0, "counterexample", "problems"))
    gaussian_term, gaussian_start = draws.normal(size=(2, seeds, 3, 3))
    terms = [gaussian_term if term == "Gaussian" else np.ones((seeds, 3, 3)) for term, _ in PROBLEMS]
    starts = [gaussian_start if start == "Gaussian" else np.zeros((seeds, 3, 3)) for _, start in PROBLEMS]
    return np.array(starts), -np.array(terms) / CURVATURE


def _step(method: Method, rate: Array, gradient: Array, factors: tuple[Array, Array]) -> tuple[Array, Array]:
    B, A = factors
    by_b = (gradient * A).sum(-1, keepdims=True)
    if method.is_projected:
        by_b = by_b / (A * A).sum(-1, keepdims=True)
    if method.trains_both:
        A = A - rate * (B * gradient).sum(-2, keepdims=True)
    return B - rate * by_b, A


def _gap(error: Array) -> Array:
    gap: Array = 0.5 * (CURVATURE * error * error).sum((-1, -2))
    return gap


def _frame(method: Method, times: list[int], values: Array) -> pd.DataFrame:
    _, _, num_problems, seeds = values.shape
    names = [times, STEPS, range(num_problems), range(seeds)]
    index = pd.MultiIndex.from_product(names, names=["iteration", "step", "problem", "seed"])
    frame = pd.DataFrame({"gap": values.ravel()}, index=index).reset_index()
    terms = dict(enumerate(PROBLEMS))
    frame["linear_term"] = frame["problem"].map({place: term for place, (term, _) in terms.items()})
    frame["start"] = frame["problem"].map({place: start for place, (_, start) in terms.items()})
    frame.insert(0, "method", method.name)
    return frame.drop(columns="problem")


def rank_one_floor(seeds: int = 40, *, sweeps: int = 400, tries: int = 6) -> pd.DataFrame:
    """Return the least gap that W^0 plus a rank-1 matrix was found to reach: columns linear_term, start, seed, gap.

    Alternating minimisation over B and A, the best of some random starts; no single adapter of rank 1 does better
    than the global minimum, which on 3 x 3 matrices this finds.
    """
    start, optimum = _problems(seeds)
    target = optimum - start
    draws = generator(derive_seed(0, "counterexample", "floor"))
    A = draws.normal(size=(tries, *target.shape[:-2], 1, 3))
    for _ in range(sweeps):
        B = (CURVATURE * target * A).sum(-1, keepdims=True) / (CURVATURE * A * A).sum(-1, keepdims=True)
        A = (CURVATURE * target * B).sum(-2, keepdims=True) / (CURVATURE * B * B).sum(-2, keepdims=True)
        A = A / np.abs(A).max(-1, keepdims=True)
    B = (CURVATURE * target * A).sum(-1, keepdims=True) / (CURVATURE * A * A).sum(-1, keepdims=True)
    best = _gap(B * A - target).min(0)
    rows = [(*problem, seed, best[i, seed]) for i, problem in enumerate(PROBLEMS) for seed in range(seeds)]
    return pd.DataFrame(rows, columns=["linear_term", "start", "seed", "gap"])


def outcomes(frame: pd.DataFrame) -> pd.DataFrame:
    """Return where the runs ended: a row a method, step, linear term and start.

    Columns: diverged (the share), arrived (the share with a gap below 1e-3), median and worst gap of those that did not
    diverge.
    """
    last = frame[frame["iteration"] == frame["iteration"].max()]
    rows = []
    for key, group in last.groupby(["method", "step", "linear_term", "start"], sort=False):
        values = group["gap"].to_numpy(np.float64)
        finite = values[np.isfinite(values)]
        median, worst = (np.median(finite), finite.max()) if len(finite) else (np.nan, np.nan)
        rows.append((*key, 1 - len(finite) / len(values), (values < ARRIVED).mean(), median, worst))
    columns = ["method", "step", "linear_term", "start", "diverged", "arrived", "median", "worst"]
    return pd.DataFrame(rows, columns=columns)


def curves(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the quartiles of the gap over all seeds and problems: method, step, iteration, low, median, high.

    A run that diverged counts as a gap of 1e7.
    """
    finite = frame.assign(gap=frame["gap"].clip(LEAST, MOST))
    groups = finite.groupby(["method", "step", "iteration"], sort=False)["gap"]
    table = pd.DataFrame({"low": groups.quantile(0.25), "median": groups.quantile(0.5), "high": groups.quantile(0.75)})
    return table.reset_index()


def outcome_rows(table: pd.DataFrame) -> list[list[str]]:
    """Return the outcomes as text beside the document's: a row a method and step, ranges over the four problems."""
    rows = []
    for method in METHODS:
        for place, step in enumerate(STEPS):
            group = table[(table["method"] == method.name) & (table["step"] == step)]
            rows.append(
                [
                    f"{method.name}, {step:g}/L",
                    _percent_range(group["diverged"]),
                    _number_range(group["median"]),
                    f"{group['worst'].max():.1e}" if group["worst"].notna().any() else "-",
                    DOCUMENT[method.name][place],
                ]
            )
    return rows


def _percent_range(shares: "pd.Series[float]") -> str:
    low, high = (round(100 * value) for value in (shares.min(), shares.max()))
    return f"{low}%" if low == high else f"{low}-{high}%"


def _number_range(values: "pd.Series[float]") -> str:
    if values.isna().all():
        return "-"
    low, high = (f"{value:.1e}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def claims(table: pd.DataFrame, floor: pd.DataFrame) -> list[list[str]]:
    """Return what reviews quote the paper as claiming, what was measured here, and whether the two agree."""

    def share(method: str, step: float, column: str) -> float:
        return float(table[(table["method"] == method) & (table["step"] == step)][column].mean())

    small = [float(table[(table["method"] == "COLA") & (table["step"] == step)]["median"].max()) for step in STEPS[1:]]
    lora, cola = share("LoRA", 1.0, "diverged"), share("COLA", 1.0, "diverged")
    stuck = min(1 - share("AsymmLoRA, projected", step, "arrived") for step in STEPS)
    rac = share("RAC-LoRA, projected", 1.0, "arrived")
    plain = share("RAC-LoRA, plain", 1.0, "diverged")
    lora_gap = float(table[(table["method"] == "LoRA") & (table["step"] == STEPS[2])]["median"].median())
    return [
        ["LoRA diverges at 1/L", f"{lora:.0%} of runs diverged", _verdict(lora > 0.5)],
        ["COLA diverges at 1/L", f"{cola:.0%} of runs diverged", _verdict(cola > 0.5)],
        ["AsymmLoRA ends at a wrong point", f"{stuck:.0%} of projected runs ended above 1e-3", _verdict(stuck > 0.5)],
        [
            "LoRA with small steps ends far from the optimum",
            f"median gap {lora_gap:.2g}; the best matrix of rank 1 has {floor['gap'].median():.2g}",
            f"{_verdict(lora_gap > ARRIVED)}, but no matrix of rank 1 can do much better",
        ],
        [
            "COLA with small steps ends far from the optimum",
            f"median gap at most {max(small):.1e}",
            _verdict(max(small) > ARRIVED),
        ],
        ["RAC-LoRA reaches the optimum at 1/L", f"{rac:.0%} of projected runs did", _verdict(rac > 0.5)],
        [
            "the same with plain steps on B (what released code runs)",
            f"{plain:.0%} of runs diverged",
            "not claimed: the projector makes the difference, not the frozen factor" if plain > 0.5 else "not claimed",
        ],
    ]


def _verdict(holds: bool) -> str:
    return "reproduced" if holds else "not reproduced"


def gap_figure(table: pd.DataFrame) -> Figure:
    """Return the gap against gradient steps, one panel a step size, from `curves`."""
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 6.6), layout="constrained")
        panels = figure.subplots(len(STEPS), 1, sharex=True, sharey=True)
        for axes, step in zip(panels, STEPS, strict=True):
            _panel(axes, table[table["step"] == step])
            axes.set_title("step 1/L" if step == 1 else f"step {step:g}/L", fontsize=9, loc="left")
            axes.set_ylabel("f - f*")
        panels[-1].set_xlabel("gradient steps")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _panel(axes: Axes, table: pd.DataFrame) -> None:
    for name, style in method_styles([method.name for method in METHODS]).items():
        line = table[(table["method"] == name) & (table["iteration"] > 0)]
        iterations, median = line["iteration"].to_numpy(), line["median"].to_numpy()
        axes.fill_between(iterations, line["low"], line["high"], color=style.color, alpha=0.13, linewidth=0)
        every = max(1, len(iterations) // 6)
        first = list(method_styles([method.name for method in METHODS])).index(name) % every
        axes.plot(
            iterations,
            median,
            color=style.color,
            marker=style.marker,
            markersize=4,
            markevery=(first, every),
            linewidth=1.5,
            label=name,
        )
    axes.axhline(MOST, color=GRID, linewidth=0.8, linestyle=":")
    axes.text(1.1, MOST / 3, "diverged", va="top", fontsize=8, color=GRID)
    axes.set(xscale="log", yscale="log", ylim=(LEAST / 3, MOST * 5))
