"""Quantiles over seeds of which some are right-censored: what is known of them, as bounds, and nothing more.

A seed that did not reach a target is censored at what it had spent: it needs at least that, or it never gets there. So
a quantile over seeds has a smallest possible value (every censored seed would have got there at once) and a largest one
(none ever would). Where the two are equal the quantile is known. For the median that takes more than half of the seeds
that reached the target at or below it, and no censored seed that could still push it lower. Where they differ the
median is at least the smallest value, written `> x`. Unlike a Kaplan-Meier estimate, this assumes nothing of the seeds
that are censored; where that estimate and this one are both known without a seed censored below them, they agree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """What one seed spent up to its target, or had spent when it was last seen below it: it needs at least that."""

    amount: float
    is_reached: bool

    @property
    def most(self) -> float:
        """Return the largest amount that it can be."""
        return self.amount if self.is_reached else math.inf


@dataclass(frozen=True)
class Bounds:
    """The smallest and the largest value that something can have."""

    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Return whether there is one possible value only."""
        return self.low == self.high


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which a `share` (0 to 1) of `values` lies, linear between neighbours; NaN if any is.

    A half gives the median, with the mean of the middle two for an even number. Values may be infinite.
    """
    if any(map(math.isnan, values)):
        return math.nan
    place = (len(values) - 1) * share
    below, part = int(place), place % 1.0
    ordered = sorted(values)
    low, high = ordered[below], ordered[min(below + 1, len(values) - 1)]
    # An infinite neighbour with no weight must not turn the sum into NaN.
    return low if part == 0 or low == high else (1 - part) * low + part * high


def quantile_bounds(needs: Sequence[Need], share: float) -> Bounds:
    """Return the smallest and the largest quantile that any completion of the censored seeds has.

    A completion gives each censored seed any amount from its own up to infinity. A quantile never falls when an amount
    grows, so the two extremes are those with all of them at their least and at infinity.
    """
    return interval_quantile([Bounds(need.amount, need.most) for need in needs], share)


def median_bounds(needs: Sequence[Need]) -> Bounds:
    """Return `quantile_bounds` of a half: a known median, or its smallest and its largest possible value."""
    return quantile_bounds(needs, 0.5)


def interval_quantile(intervals: Sequence[Bounds], share: float) -> Bounds:
    """Return the smallest and the largest quantile of values of which each lies somewhere in its own interval."""
    lows, highs = [interval.low for interval in intervals], [interval.high for interval in intervals]
    return Bounds(quantile(lows, share), quantile(highs, share))
