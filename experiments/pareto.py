"""Which methods nobody beats in both bytes and accuracy: the Pareto front of a comparison."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from experiments.columns import NUM_REACHED
from experiments.formats import metric_of, targets_of

DIRECTION_NAMES = {"uplink": "uplink", "total": "uplink and downlink"}


@dataclass(frozen=True)
class Spread:
    """A median over seeds between the lowest and the highest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """What one method costs, in MiB, and what it ends with.

    `is_settled`: the median cost is known, and the runs came to their end; only such points can be on the front.
    `is_censored`: some seed never reached the target, and its cost is a lower bound.
    """

    name: str
    cost: Spread
    end: Spread
    is_settled: bool
    is_censored: bool


@dataclass(frozen=True)
class Trade:
    """The points of a comparison: the MiB of a direction up to a target, or of whole runs (None), and the final metric.

    `front` names the settled points that are on the Pareto front of all settled ones, the cheapest first.
    """

    direction: str
    target: str | None
    metric: str
    points: list[Point]
    front: list[str]


def on_front(costs: ArrayLike, gains: ArrayLike) -> NDArray[np.bool_]:
    """Return which points are on the Pareto front: of two, the one with less cost and more gain is better.

    A point is on it unless some other is at least as good in both and better in one; equal points are on it together.
    """
    cost, gain = np.asarray(costs, dtype=np.float64), np.asarray(gains, dtype=np.float64)
    # [i, j]: whether point j is at least as good as point i in both, and better in one.
    is_as_good = (cost <= cost[:, None]) & (gain >= gain[:, None])
    is_better = (cost < cost[:, None]) | (gain > gain[:, None])
    is_beaten: NDArray[np.bool_] = np.any(is_as_good & is_better, axis=1)
    return ~is_beaten


def trade_of(table: pd.DataFrame, direction: str) -> Trade:
    """Return the points of a comparison table for `uplink` or `total` bytes.

    The target is the highest that more than half of the methods reach in the median; where there is none, the bytes are
    those of whole runs. Left out are methods without a model for all clients, and those that cost nothing there, which
    have no place on a logarithmic axis.
    """
    ranked = table[table["is_global"]]
    metric, target = metric_of(ranked), _common_target(ranked, direction)
    rows = ranked.to_dict("records")
    points = [point for row in rows if (point := _point(row, direction, target, metric)).cost.median > 0]
    settled = [point for point in points if point.is_settled]
    sign = 1 if metric == "accuracy" else -1
    is_on = on_front([point.cost.median for point in settled], [sign * point.end.median for point in settled])
    front = [point for point, on in zip(settled, is_on, strict=True) if on]
    return Trade(direction, target, metric, points, [p.name for p in sorted(front, key=lambda p: p.cost.median)])


def _common_target(table: pd.DataFrame, direction: str) -> str | None:
    for target in reversed(targets_of(table)):
        name = f"{direction}_mib_to_{target}"
        is_reached = ~table[f"{name}_is_lower_bound"] & (table[f"{name}_median"] > 0)
        if 2 * is_reached.sum() > len(table):
            return target
    return None


def _point(row: Mapping[Hashable, Any], direction: str, target: str | None, metric: str) -> Point:
    name = f"{direction}_mib" if target is None else f"{direction}_mib_to_{target}"
    is_censored = target is not None and row[f"{NUM_REACHED}{target}"] < row["num_seeds"]
    is_settled = row["num_unfinished"] == 0 if target is None else not row[f"{name}_is_lower_bound"]
    return Point(str(row["method"]), _spread(row, name), _spread(row, f"final_{metric}"), is_settled, is_censored)


def _spread(row: Mapping[Hashable, Any], name: str) -> Spread:
    return Spread(*(float(row[f"{name}_{part}"]) for part in ("median", "min", "max")))
