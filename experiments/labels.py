"""Names at the ends of lines: what a legend of twenty lines cannot do for a reader."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

FONT_SIZE = 8.0
# A figure with names beside it, and what ticks and label of its horizontal axis take of the height.
HEIGHT_IN, MARGIN_IN = 3.6, 0.6
# Of the axes' width: where leaders end, and where names begin.
LEADER_END, NAME_START = 1.03, 1.04


@dataclass(frozen=True)
class LineEnd:
    """A line's name, the data coordinates of its last point, its colour, and whether it stands out."""

    name: str
    x: float
    y: float
    color: str
    is_bold: bool


def spread(wanted: NDArray[np.float64], gap: float, low: float, high: float) -> NDArray[np.float64]:
    """Return places in [low, high], in the order of `wanted` and `gap` apart, with the least sum of squared moves.

    Equal wishes keep the order in which they are given. Where there is no room for `gap`, the places are as far apart
    as the room allows. This is isotonic regression of `wanted[i] - i * gap`, solved by pooling neighbours.
    """
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    order = np.argsort(wanted, kind="stable")
    offsets = gap * np.arange(len(wanted))
    pools: list[tuple[float, int]] = []
    for value in wanted[order] - offsets:
        mean, size = float(value), 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    pooled = np.concatenate([np.zeros(0), *(np.full(size, mean) for mean, size in pools)])
    places = np.empty(len(wanted))
    places[order] = np.clip(pooled, low, high - (offsets[-1] if len(offsets) else 0.0)) + offsets
    return places


def label_ends(axes: Axes, ends: Sequence[LineEnd], height_in: float) -> None:
    """Write each line's name right of the axes, `height_in` inches high, with a dotted line from its end to the name.

    Everything else must have been drawn: the limits of the axes are fixed here.
    """
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    across = axes.transAxes.inverted()
    points = np.array([across.transform(axes.transData.transform((end.x, end.y))) for end in ends]).reshape(-1, 2)
    places = spread(points[:, 1], 1.2 * FONT_SIZE / 72 / height_in, 0.0, 1.0)
    for end, (x, y), place in zip(ends, points, places, strict=True):
        axes.plot(
            [x, 1.0, LEADER_END],
            [y, y, place],
            transform=axes.transAxes,
            color=end.color,
            linestyle=(0, (1, 2)),
            linewidth=0.7,
            clip_on=False,
            zorder=1.5,
        )
        axes.text(
            NAME_START,
            place,
            end.name,
            transform=axes.transAxes,
            color=end.color,
            fontsize=FONT_SIZE,
            fontweight="bold" if end.is_bold else "normal",
            va="center",
        )
