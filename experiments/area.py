"""The area under a budget curve: the mean accuracy over bytes, which counts every byte and not only the last one.

A run is a step function of what it has spent: at any moment it has the accuracy of its last evaluated round, and before
the first evaluation the initial one. Nobody chooses among rounds, so a curve that falls again loses by it.
"""

from collections.abc import Sequence

import numpy as np

from experiments.results import Runs


def mean_up_to(budget: float, costs: Sequence[float], values: Sequence[float], *, beyond: float | None = None) -> float:
    """Return the mean over [0, budget] of the step function with `values[i]` from `costs[i]` on.

    Before the first cost it has the first value. From the last cost on it has the last value, or `beyond` where that is
    given. Costs never fall. With no budget it is the value there.
    """
    starts = [0.0, *costs[1:]] + ([] if beyond is None else [costs[-1]])
    heights = [*values] + ([] if beyond is None else [beyond])
    if budget <= 0:
        return [height for start, height in zip(starts, heights, strict=True) if start <= 0][-1]
    widths = np.diff(np.clip([*starts, np.inf], 0.0, budget))
    # A step of no width must not count, whatever its height: losses may be infinite.
    return sum(height * float(width) for height, width in zip(heights, widths, strict=True) if width > 0) / budget


def areas(runs: Runs, method: str, column: str, budget: float) -> list[float]:
    """Return for each seed the mean of the metric over a cumulative column of `rounds.csv` up to `budget`.

    A run that ended before the budget keeps its last value: that is the model it has. One that diverged has none, and
    counts with the worst value it ever had from its last evaluation on.
    """
    worst = min if runs.metric == "test_accuracy" else max
    found = []
    for rows in runs.evaluated(method):
        values = rows[runs.metric].tolist()
        beyond = worst(values) if runs.has_diverged(method, int(rows["seed"].iloc[0])) else None
        found.append(mean_up_to(budget, rows[column].tolist(), values, beyond=beyond))
    return found
