"""Curves of finished runs: what a byte, or a round, buys, as median and range over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from experiments.plots import FOREGROUND, WIDTH_IN, MethodStyle, drawing_style, legend_columns, method_styles
from experiments.results import Runs
from fedraclora.ledger import MIB

MAX_POINTS = 300


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


@dataclass(frozen=True)
class Curve:
    """One seed's step function: `y[i]` holds from `x[i]` up to the next one."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]

    def at(self, grid: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the values at `grid`, none of which may lie before the first x: the last evaluation by then."""
        values: NDArray[np.float64] = self.y[np.searchsorted(self.x, grid, side="right") - 1]
        return values


def curve_figure(runs: Runs, axis: Axis, guides: Guides) -> Figure:
    """Return the metric of all methods against `axis`: the median over seeds, the range as a band, each seed thin."""
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 3.6), layout="constrained")
        axes = figure.add_subplot()
        styles = method_styles(runs.methods)
        for method, style in styles.items():
            _draw_method(axes, _curves(runs, method, axis), style, is_log=axis.is_log)
        _set_x_axis(axes, axis)
        _set_y_axis(axes, runs.metric)
        _draw_guides(axes, guides if runs.metric == "test_accuracy" else Guides(budget_mib=guides.budget_mib), axis)
        handles = [_legend_line(style) for style in styles.values()]
        figure.legend(handles, list(styles), loc="outside lower center", ncols=legend_columns(list(styles)))
    return figure


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


def _curves(runs: Runs, method: str, axis: Axis) -> list[Curve]:
    return [
        Curve(rows[axis.column].to_numpy(np.float64) / axis.unit, rows[runs.metric].to_numpy(np.float64))
        for rows in runs.evaluated(method)
    ]


def _thin(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # Dense at the start, where curves climb; long runs would otherwise make pages of many megabytes.
    if len(values) <= MAX_POINTS:
        return values
    kept = np.unique(np.geomspace(1, len(values), MAX_POINTS).round().astype(np.int64)) - 1
    thinned: NDArray[np.float64] = values[kept]
    return thinned


def _draw_method(axes: Axes, curves: Sequence[Curve], style: MethodStyle, *, is_log: bool) -> None:
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
        linewidth=1.6,
        marker=style.marker,
        markersize=4,
        markevery=0.12 if len(grid) > 1 else None,
        drawstyle="steps-post",
    )


def _legend_line(style: MethodStyle) -> Line2D:
    return Line2D([], [], color=style.color, linestyle=style.dashes, linewidth=1.6, marker=style.marker, markersize=4)


def _set_x_axis(axes: Axes, axis: Axis) -> None:
    axes.set_xlabel(axis.label)
    drawn = np.concatenate([np.asarray(line.get_xdata(), dtype=np.float64) for line in axes.get_lines()])
    if not axis.is_log:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif drawn.size:
        axes.set_xscale("log")
        num_decades = float(np.log10(drawn.max() / drawn.min()))
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if num_decades < 2.5 else (1.0,), numticks=12))
        axes.xaxis.set_major_formatter(FuncFormatter(_plain_number))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _set_y_axis(axes: Axes, metric: str) -> None:
    axes.set_ylabel(metric.replace("_", " "))
    if metric == "test_accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        return
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()])
    if drawn.size and drawn.min() > 0 and drawn.max() > 20 * drawn.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(_plain_number))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _plain_number(value: float, _position: int | None = None) -> str:
    return f"{value:g}"


def _draw_guides(axes: Axes, guides: Guides, axis: Axis) -> None:
    for target in guides.targets:
        axes.axhline(target, color=FOREGROUND, linestyle=(0, (4, 3)), linewidth=0.8, alpha=0.7, zorder=1)
        axes.text(1.01, target, f"{100 * target:g} %", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    if guides.budget_mib is not None and axis is TOTAL:
        axes.axvline(guides.budget_mib, color=FOREGROUND, linestyle=(0, (1, 2)), linewidth=1.0, zorder=1)
        place = axes.get_xaxis_transform()
        axes.text(guides.budget_mib, 1.01, "budget", transform=place, ha="center", va="bottom", fontsize=8)
