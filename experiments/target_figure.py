"""The figure of what each seed needed to a target: reached ones filled, censored ones hollow with an arrow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.censoring import Need, median_bounds
from experiments.columns import NUM_REACHED
from experiments.formats import format_target, targets_of
from experiments.needs import COSTS, TIME, TIME_UNITS, Cost, costs_of, needs_of, time_unit
from experiments.results import Runs
from experiments.scales import label_log_scale
from experiments.styles import FOREGROUND, WIDTH_IN, MethodStyle, drawing_style

ARROW_PT = 13.0
# How far apart the seeds of a method are drawn, of the distance between methods.
SPREAD = 0.5
LABELS = {"uplink": "uplink of all clients", "total": "uplink and downlink of all clients", "time": "simulated time"}


@dataclass(frozen=True)
class Reach:
    """What every seed of every method needs to a target, in `unit`s of what `way` counts."""

    way: str
    target: str
    unit: str
    needs: Mapping[str, Sequence[Need]]


def reaches_of(runs: Runs, table: pd.DataFrame) -> list[Reach]:
    """Return by way of spending what the seeds need to the highest target that half of all seeds reached.

    Where there is none it is the highest that any seed reached, and nothing where none was.
    """
    target = _shown_target(table)
    ways = [way for way, cost in COSTS.items() if cost in costs_of(runs)]
    return [] if target is None else [_reach(runs, way, COSTS[way], target) for way in ways]


def _shown_target(table: pd.DataFrame) -> str | None:
    reached = {target: int(table[f"{NUM_REACHED}{target}"].sum()) for target in reversed(targets_of(table))}
    half = [target for target, num in reached.items() if 2 * num >= table["num_seeds"].sum()]
    return next(iter([*half, *(target for target, num in reached.items() if num)]), None)


def _reach(runs: Runs, way: str, cost: Cost, target: str) -> Reach:
    found = {method: list(needs_of(runs, method, cost, float(target)).values()) for method in runs.methods}
    needs = {method: of for method, of in found.items() if of}
    if cost is not TIME:
        return Reach(way, target, "MiB", needs)
    unit = time_unit(max(need.amount for of in needs.values() for need in of))
    scaled = {
        method: [Need(need.amount / TIME_UNITS[unit], need.is_reached) for need in of] for method, of in needs.items()
    }
    return Reach(way, target, unit, scaled)


def reach_caption(reach: Reach) -> str:
    """Return the sentences that say how to read the figure of what the seeds need to a target."""
    needs = [need for of in reach.needs.values() for need in of]
    opening = (
        f"What each seed spent up to its first evaluated round with {format_target(reach.target)}; upright line: the "
        "median."
    )
    if all(need.is_reached for need in needs):
        return opening
    return (
        f"{opening} Hollow with an arrow: a seed that did not reach it, at what it had spent. Dotted, with an arrow: "
        "the least that the median can be. Beside a name: how many seeds reached the target."
    )


def reach_figure(reach: Reach, styles: Mapping[str, MethodStyle]) -> Figure:
    """Return a row of dots a method, one a seed, and the median over seeds or the least that it can be."""
    with drawing_style():
        # Many seeds need more room not to hide one another.
        height = 0.27 + 0.02 * max(0, max(map(len, reach.needs.values())) - 4)
        figure = Figure(figsize=(WIDTH_IN, 0.9 + height * len(reach.needs)), layout="constrained")
        axes = figure.add_subplot()
        for row, (method, needs) in enumerate(reach.needs.items()):
            _draw_seeds(axes, row, needs, styles[method])
            _draw_median(axes, row, needs)
        axes.set_yticks(range(len(reach.needs)), [_name(*item) for item in reach.needs.items()])
        axes.set_ylim(len(reach.needs) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        _scale(axes, [need.amount for needs in reach.needs.values() for need in needs])
        axes.set_xlabel(f"{LABELS[reach.way]} to {format_target(reach.target)}, {reach.unit}")
    return figure


def _name(method: str, needs: Sequence[Need]) -> str:
    num_reached = sum(need.is_reached for need in needs)
    return method if num_reached == len(needs) else f"{method}, {num_reached}/{len(needs)}"


def _draw_seeds(axes: Axes, row: int, needs: Sequence[Need], style: MethodStyle) -> None:
    for i, need in enumerate(needs):
        y = row + SPREAD * (i / max(1, len(needs) - 1) - 0.5) * (len(needs) > 1)
        face = style.color if need.is_reached else "none"
        axes.plot([need.amount], [y], style.marker, color=style.color, markerfacecolor=face, markersize=4.5, zorder=3.0)
        if not need.is_reached:
            _draw_arrow(axes, need.amount, y, style.color)


def _draw_median(axes: Axes, row: int, needs: Sequence[Need]) -> None:
    bounds = median_bounds(needs)
    dashes = "solid" if bounds.is_known else (0, (1, 1.2))
    place = [row - 0.36, row + 0.36]
    axes.plot([bounds.low, bounds.low], place, color=FOREGROUND, linewidth=1.3, linestyle=dashes, zorder=2.5)
    if not bounds.is_known:
        _draw_arrow(axes, bounds.low, row, FOREGROUND)


def _draw_arrow(axes: Axes, x: float, y: float, color: str) -> None:
    arrow = {"arrowstyle": "<-", "color": color, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, y), (ARROW_PT, 0), textcoords="offset points", arrowprops=arrow)


def _scale(axes: Axes, amounts: Sequence[float]) -> None:
    """Scale the horizontal axis by logarithm, unless a seed needed nothing, which has no place on such an axis."""
    axes.margins(x=0.08)
    if min(amounts) > 0:
        axes.set_xscale("log")
        label_log_scale(axes.xaxis, min(amounts), max(amounts))
