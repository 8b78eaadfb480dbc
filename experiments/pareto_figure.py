"""The figure of a Pareto front: what each method costs and what it ends with, and which of them nobody beats."""

import math
from collections.abc import Mapping

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.formats import format_target
from experiments.labels import HEIGHT_IN, MARGIN_IN, LineEnd, label_ends
from experiments.pareto import DIRECTION_NAMES, Point, Trade
from experiments.scales import label_log_scale, scale_end
from experiments.styles import (
    FOREGROUND,
    WIDTH_IN,
    MethodStyle,
    Variant,
    drawing_style,
    is_by_compressor,
    legend_columns,
)

ARROW_PT = 14.0


def pareto_caption(trade: Trade) -> str:
    """Return the sentences that say how to read the figure of a trade."""
    what = DIRECTION_NAMES[trade.direction]
    if trade.target is None:
        opening = f"Final {trade.metric} against the {what} of the whole run."
        hollow = "Hollow: some run did not come to its end; not on the front."
    else:
        opening = f"Final {trade.metric} against the {what} up to the first round with {format_target(trade.target)}."
        hollow = (
            "Arrow: some seed never got there, and its cost is a lower bound. Hollow: so is the median; not on the "
            "front."
        )
    sentences = [opening, "Point: median over seeds; bars: lowest to highest; line: the front, unbeaten in both."]
    if trade.metric == "accuracy":
        sentences.append("Heights go by the logarithm of the error.")
    is_plain = all(point.is_settled and not point.is_censored for point in trade.points)
    return " ".join(sentences if is_plain else [*sentences, hollow])


def pareto_figure(trade: Trade, styles: Mapping[str, MethodStyle], variants: Mapping[str, Variant]) -> Figure:
    """Return the final metric against cost, a point a method, with the front as a step line.

    Where compressors are compared, a legend says which colour is which method, and which marker which compressor.
    """
    with drawing_style():
        handles = _legend_handles(trade, styles, variants)
        columns = legend_columns([str(handle.get_label()) for handle in handles], handle=6)
        room = 0.18 * -(-len(handles) // columns)
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN + room), layout="constrained")
        axes = figure.add_subplot()
        for point in trade.points:
            _draw_point(axes, point, styles[point.name], is_on_front=point.name in trade.front)
        _draw_front(axes, trade)
        _scale_axes(axes, trade)
        _label_points(axes, trade, styles)
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


def _scale_axes(axes: Axes, trade: Trade) -> None:
    costs = [cost for point in trade.points for cost in (point.cost.low, point.cost.high) if cost > 0]
    axes.set_xscale("log")
    label_log_scale(axes.xaxis, min(costs), max(costs))
    ends = [end for point in trade.points for end in (point.end.low, point.end.high) if math.isfinite(end)]
    scale_end(axes, trade.metric, ends)
    axes.margins(x=0.08, y=0.1)
    where = "whole run" if trade.target is None else f"to {format_target(trade.target)}"
    axes.set_xlabel(f"{DIRECTION_NAMES[trade.direction]} of all clients, {where}, MiB")
    axes.set_ylabel(f"final test {trade.metric}")


def _label_points(axes: Axes, trade: Trade, styles: Mapping[str, MethodStyle]) -> None:
    ends = [
        LineEnd(point.name, point.cost.median, point.end.median, styles[point.name].color, point.name in trade.front)
        for point in trade.points
        if math.isfinite(point.end.median)
    ]
    label_ends(axes, ends, HEIGHT_IN - MARGIN_IN)


def _draw_point(axes: Axes, point: Point, style: MethodStyle, *, is_on_front: bool) -> None:
    x, y, color = point.cost.median, point.end.median, style.color
    # A seed that was there before the first round cost nothing, which a logarithmic axis cannot show.
    across = ([point.cost.low or x, point.cost.high], [y, y])
    for bar in (across, ([x, x], [point.end.low, point.end.high])):
        axes.plot(*bar, color=color, linewidth=0.8, alpha=0.6, zorder=2.0)
    face = color if point.is_settled else "none"
    size = 8.0 if is_on_front else 5.5
    axes.plot([x], [y], style.marker, color=color, markerfacecolor=face, markersize=size, zorder=3.0)
    if point.is_censored:
        arrow = {"arrowstyle": "<-", "color": color, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (point.cost.high, y), (ARROW_PT, 0), textcoords="offset points", arrowprops=arrow)


def _draw_front(axes: Axes, trade: Trade) -> None:
    points = {point.name: point for point in trade.points}
    x = [points[name].cost.median for name in trade.front]
    y = [points[name].end.median for name in trade.front]
    axes.plot(x, y, color=FOREGROUND, linewidth=1.0, alpha=0.7, drawstyle="steps-post", zorder=1.5)


def _legend_handles(trade: Trade, styles: Mapping[str, MethodStyle], variants: Mapping[str, Variant]) -> list[Artist]:
    """Return one a colour (a method) and one a marker (a compressor), or none where each name has its own of both."""
    if not is_by_compressor(variants):
        return []
    shown = {point.name: styles[point.name] for point in trade.points}
    colors = {variants[name].method: style.color for name, style in shown.items()}
    markers = {variants[name].compressor: style.marker for name, style in shown.items()}
    return [
        *(Patch(color=color, label=method) for method, color in colors.items()),
        *(
            Line2D([], [], linestyle="none", color=FOREGROUND, marker=marker, markersize=6, label=compressor)
            for compressor, marker in markers.items()
        ),
    ]
