"""The axes that several figures share: bytes on a logarithmic scale, accuracies in percent, plain numbers as ticks."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)
from numpy.typing import NDArray

# Added to every error, so that a perfect accuracy has a place on a logarithmic scale.
ADDED_ERROR = 1e-4


def label_log_scale(axis: Axis, smallest: float, largest: float) -> None:
    """Put plain numbers on a logarithmic axis whose values go from `smallest` to `largest`, both positive."""
    num_decades = float(np.log10(largest / smallest))
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if num_decades < 2.5 else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(plain_number))
    axis.set_minor_formatter(NullFormatter())


def scale_metric(axes: Axes, metric: str, values: Sequence[float]) -> None:
    """Scale the vertical axis for `accuracy` (percent) or `loss`, the latter logarithmic where it spans much."""
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif len(values) and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(plain_number))
        axes.yaxis.set_minor_formatter(NullFormatter())


def scale_end(axes: Axes, metric: str, values: Sequence[float]) -> None:
    """Scale the vertical axis for final metrics: accuracies by the logarithm of the error, losses as in `scale_metric`.

    So 96 % and 98 % are as far apart as 92 % and 96 %, and one method at 10 % does not push all others together.
    """
    if metric != "accuracy":
        scale_metric(axes, metric, values)
        return
    axes.set_yscale("function", functions=(_to_log_error, _from_log_error))
    low, high = _to_log_error(np.array([min(values), max(values)]))
    margin = max(0.1 * (high - low), 0.02)
    axes.set_ylim(*_from_log_error(np.array([low - margin, high + margin])))
    axes.yaxis.set_major_locator(FixedLocator(_accuracy_ticks(*axes.get_ylim())))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{100 * value:g}%"))


def _accuracy_ticks(low: float, high: float) -> list[float]:
    """Return accuracies in [low, high] with round errors, or an even grid where those are few."""
    ticks = [round(1 - head * 10.0**-power, 6) for power in range(1, 5) for head in (10, 8, 5, 3, 2)]
    within = [tick for tick in ticks if low <= tick <= high]
    if len(within) >= 3:
        return within
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= min(high, 1.0)]


def _to_log_error(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
    return -np.log10(np.maximum(1.0 - np.asarray(accuracy) + ADDED_ERROR, 1e-3 * ADDED_ERROR))


def _from_log_error(value: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 + ADDED_ERROR - 10.0 ** -np.asarray(value)


def plain_number(value: float, _position: int | None = None) -> str:
    """Return a tick's number without an exponent where it is not tiny or huge."""
    return f"{value:g}"
