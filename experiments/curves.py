"""Curves of finished runs: what a byte, or a round, buys, as median and range over seeds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from experiments.labels import HEIGHT_IN, MARGIN_IN, LineEnd, label_ends
from experiments.needs import TIME, TIME_UNITS, has_cost, time_unit
from experiments.results import Runs
from experiments.scales import label_log_scale, scale_metric
from experiments.styles import FOREGROUND, PALETTE, WIDTH_IN, MethodStyle, drawing_style, run_styles
from fedraclora.ledger import MIB

MAX_POINTS = 300
GAP = "aggregation_gap"
LEAST_GAP = 1e-17


@dataclass(frozen=True)
class Guides:
    """The reference lines of a curve figure: accuracies (horizontal) and MiB (vertical, on the total axis only)."""

    targets: Sequence[float] = ()
    budget_mib: float | None = None


@dataclass(frozen=True)
class Axis:
    """What a curve figure has on its horizontal axis: a column of `rounds.csv`, what to divide it by, and its label."""

    column: str
    unit: float
    label: str
    is_log: bool


UPLINK = Axis("cum_uplink_bytes", MIB, "uplink of all clients, MiB", True)
TOTAL = Axis("cum_total_bytes", MIB, "uplink and downlink of all clients, MiB", True)
ROUND = Axis("round", 1, "round", False)


def time_axis(runs: Runs) -> Axis | None:
    """Return the axis of simulated time in a unit that suits the longest run, or None where no time is simulated."""
    ends = [float(rows[TIME.column].max()) for method in timed(runs) for rows in runs.evaluated(method)]
    if not ends:
        return None
    unit = time_unit(max(ends))
    return Axis(TIME.column, TIME_UNITS[unit], f"simulated time, {unit}", True)


def timed(runs: Runs) -> list[str]:
    """Return the methods whose runs simulate time."""
    return [method for method in runs.methods if has_cost(runs, method, TIME)]


@dataclass(frozen=True)
class Curve:
    """One seed's step function: `y[i]` holds from `x[i]` up to the next one."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]

    def at(self, grid: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values at `grid`, none of which may lie before the first x: the last evaluation by then."""
        values: NDArray[np.float64] = self.y[np.searchsorted(self.x, grid, side="right") - 1]
        return values


def curve_figure(runs: Runs, axis: Axis, guides: Guides, *, front: Collection[str]) -> Figure:
    """Return the metric of all methods against `axis`: the median over seeds, the range as a band, each seed thin.

    Of more methods than there are colours those on the `front` stand out, and the others are a thin median. On the axis
    of time are the methods that have it.
    """
    methods = timed(runs) if axis.column == TIME.column else runs.methods
    curves = {method: _curves(runs, method, axis, runs.metric) for method in methods}
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
        axes = figure.add_subplot()
        ends = _draw_methods(axes, curves, run_styles(runs), axis, front)
        _set_x_axis(axes, axis)
        _set_y_axis(axes, runs.metric)
        _draw_guides(axes, guides if runs.metric == "test_accuracy" else Guides(budget_mib=guides.budget_mib), axis)
        label_ends(axes, ends, HEIGHT_IN - MARGIN_IN)
    return figure


def gap_figure(runs: Runs) -> Figure:
    """Return the aggregation gap by round of the methods that measured it, drawn as in `curve_figure`.

    What is smaller than `LEAST_GAP`, as zero is, is drawn there: a logarithmic axis has no place for it.
    """
    curves = {
        method: [
            Curve(rows["round"].to_numpy(np.float64), rows[GAP].clip(lower=LEAST_GAP).to_numpy(np.float64))
            for rows in runs.measured(method, GAP)
        ]
        for method in methods_with_gap(runs)
    }
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
        axes = figure.add_subplot()
        ends = _draw_methods(axes, curves, run_styles(runs), ROUND, ())
        _set_x_axis(axes, ROUND)
        axes.set_yscale("log")
        axes.set_ylabel("gap of the aggregation, relative")
        _draw_rounding(axes, runs)
        label_ends(axes, ends, HEIGHT_IN - MARGIN_IN)
    return figure


def methods_with_gap(runs: Runs) -> list[str]:
    """Return the methods of which some run measured the aggregation gap."""
    return [method for method in runs.methods if runs.measured(method, GAP)]


def median_and_range(curves: Sequence[Curve], *, is_log: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a grid of x and the rows lowest, median, highest over seeds there, shape [3, points].

    The grid holds every x at which some seed changes, between the latest first and the earliest last evaluation, so
    that all seeds stand behind each value; a logarithmic axis has no place for zero.
    """
    start, end = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    grid = np.unique(np.concatenate([curve.x for curve in curves]))
    grid = _thin(grid[(grid >= start) & (grid <= end) & ((grid > 0) | (not is_log))])
    values = np.stack([curve.at(grid) for curve in curves])
    return grid, np.stack([values.min(axis=0), np.median(values, axis=0), values.max(axis=0)])


def _curves(runs: Runs, method: str, axis: Axis, metric: str) -> list[Curve]:
    return [
        Curve(rows[axis.column].to_numpy(np.float64) / axis.unit, rows[metric].to_numpy(np.float64))
        for rows in runs.measured(method, metric)
    ]


def _thin(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # Dense at the start, where curves climb; long runs would otherwise make pages of many megabytes.
    if len(values) <= MAX_POINTS:
        return values
    kept = np.unique(np.geomspace(1, len(values), MAX_POINTS).round().astype(np.int64)) - 1
    thinned: NDArray[np.float64] = values[kept]
    return thinned


def _draw_methods(
    axes: Axes,
    curves: Mapping[str, Sequence[Curve]],
    styles: Mapping[str, MethodStyle],
    axis: Axis,
    front: Collection[str],
) -> list[LineEnd]:
    """Draw all methods, those on the front last, and return where their lines end."""
    is_few = len(curves) <= len(PALETTE)
    ends = {}
    for method in sorted(curves, key=lambda name: name in front):
        is_bold = is_few or method in front
        draw = _draw_bold if is_bold else _draw_thin
        x, y = draw(axes, curves[method], styles[method], is_log=axis.is_log)
        if np.isfinite(y):
            ends[method] = LineEnd(method, x, y, styles[method].color, is_bold and not is_few)
    return [ends[method] for method in curves if method in ends]


def _draw_bold(axes: Axes, curves: Sequence[Curve], style: MethodStyle, *, is_log: bool) -> tuple[float, float]:
    if len(curves) > 1:
        for curve in curves:
            x = _thin(curve.x[(curve.x > 0) | (not is_log)])
            axes.plot(x, curve.at(x), color=style.color, linewidth=0.6, alpha=0.3, drawstyle="steps-post")
    grid, (low, median, high) = median_and_range(curves, is_log=is_log)
    if len(curves) > 1:
        axes.fill_between(grid, low, high, step="post", color=style.color, alpha=0.16, linewidth=0)
    axes.plot(
        grid,
        median,
        color=style.color,
        linestyle=style.dashes,
        linewidth=1.8,
        marker=style.marker,
        markersize=4,
        markevery=0.12 if len(grid) > 1 else None,
        drawstyle="steps-post",
        zorder=2.5,
    )
    return _last(grid, median)


def _draw_thin(axes: Axes, curves: Sequence[Curve], style: MethodStyle, *, is_log: bool) -> tuple[float, float]:
    grid, (_, median, _) = median_and_range(curves, is_log=is_log)
    axes.plot(grid, median, color=style.color, linestyle=style.dashes, linewidth=0.8, alpha=0.6, drawstyle="steps-post")
    return _last(grid, median)


def _last(grid: NDArray[np.float64], median: NDArray[np.float64]) -> tuple[float, float]:
    return (float(grid[-1]), float(median[-1])) if len(grid) else (float("nan"), float("nan"))


def _set_x_axis(axes: Axes, axis: Axis) -> None:
    axes.set_xlabel(axis.label)
    drawn = np.concatenate([np.asarray(line.get_xdata(), dtype=np.float64) for line in axes.get_lines()])
    if not axis.is_log:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif drawn.size:
        axes.set_xscale("log")
        label_log_scale(axes.xaxis, float(drawn.min()), float(drawn.max()))


def _set_y_axis(axes: Axes, metric: str) -> None:
    axes.set_ylabel(metric.replace("_", " "))
    drawn = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()]
    scale_metric(axes, metric.removeprefix("test_"), list(np.concatenate(drawn)))


def _draw_guides(axes: Axes, guides: Guides, axis: Axis) -> None:
    for target in guides.targets:
        axes.axhline(target, color=FOREGROUND, linestyle=(0, (4, 3)), linewidth=0.8, alpha=0.7, zorder=1)
        place = axes.get_yaxis_transform()
        axes.text(0.01, target, f"{100 * target:g} %", transform=place, va="bottom", fontsize=8)
    if guides.budget_mib is not None and axis is TOTAL:
        axes.axvline(guides.budget_mib, color=FOREGROUND, linestyle=(0, (1, 2)), linewidth=1.0, zorder=1)
        place = axes.get_xaxis_transform()
        axes.text(guides.budget_mib, 1.01, "budget", transform=place, ha="center", va="bottom", fontsize=8)


def _draw_rounding(axes: Axes, runs: Runs) -> None:
    """Draw the unit roundoff of the numbers that the clients send: smaller gaps are rounding."""
    for dtype in sorted({str(settings.get("dtype", "float32")) for settings in runs.settings}):
        roundoff = float(np.finfo(dtype).eps) / 2
        axes.axhline(roundoff, color=FOREGROUND, linestyle=(0, (4, 3)), linewidth=0.8, alpha=0.7, zorder=1)
        place = axes.get_yaxis_transform()
        axes.text(0.01, roundoff, f"rounding in {dtype}", transform=place, va="bottom", fontsize=8)
