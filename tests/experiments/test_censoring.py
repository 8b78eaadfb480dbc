"""Censored quantiles are the least and the most that any completion of the censored seeds has."""

import math
from itertools import product
from statistics import median, quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.censoring import Bounds, Need, interval_quantile, median_bounds, quantile, quantile_bounds

# Few amounts, so that ties, also between reached and censored seeds, are common.
NEEDS = st.lists(st.builds(Need, st.integers(0, 4), st.booleans()), min_size=1, max_size=5)
NEVER = 10**9


def completions(needs, never):
    """Every way in which the seeds could have ended: a censored one at its own amount, later, or never."""
    return product(*([need.amount] if need.is_reached else [*range(need.amount, 7), never] for need in needs))


@given(NEEDS)
def test_a_median_is_bounded_by_all_completions(needs):
    medians = [median(amounts) for amounts in completions(needs, math.inf)]
    assert median_bounds(needs) == Bounds(min(medians), max(medians))


@given(NEEDS, st.sampled_from([1, 3]))
def test_a_quartile_is_bounded_by_all_completions(needs, quarter):
    # One seed twice has the quartiles of one seed; `statistics` wants two.
    found = [quantiles(a * 2 if len(a) == 1 else a, n=4, method="inclusive") for a in completions(needs, NEVER)]
    bounds = quantile_bounds(needs, quarter / 4)
    values = [each[quarter - 1] for each in found]
    assert bounds.low == pytest.approx(min(values))
    assert bounds.high == pytest.approx(max(values)) if math.isfinite(bounds.high) else max(values) > NEVER / 8


@given(NEEDS)
def test_a_median_is_known_only_if_more_than_half_of_the_seeds_reached_the_target_by_then(needs):
    bounds = median_bounds(needs)
    # Of an even number the median lies between the middle two: the upper one counts.
    upper = sorted(need.most for need in needs)[len(needs) // 2]
    num_by_then = sum(need.is_reached and need.amount <= upper for need in needs)
    is_half = 2 * num_by_then > len(needs)
    is_later = all(need.amount >= upper for need in needs if not need.is_reached)
    assert is_half or not bounds.is_known
    assert bounds.is_known or not (is_half and is_later)


@given(NEEDS, st.integers(0, 4), st.integers(1, 3))
def test_a_longer_run_never_lowers_a_bound_and_only_narrows_them(needs, which, more):
    which %= len(needs)
    longer = [
        Need(n.amount + more, n.is_reached) if i == which and not n.is_reached else n for i, n in enumerate(needs)
    ]
    before, after = median_bounds(needs), median_bounds(longer)
    assert before.low <= after.low <= after.high == before.high


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=9))
def test_quantiles_of_plain_values_are_those_of_the_standard_library(values):
    assert [quantile(values, share) for share in (0.25, 0.5, 0.75)] == pytest.approx(
        quantiles(values, n=4, method="inclusive")
    )
    assert quantile(values, 0.5) == median(values)
    assert (quantile(values, 0.0), quantile(values, 1.0)) == (min(values), max(values))


def test_an_infinite_neighbour_without_weight_does_not_count_and_nan_is_never_hidden():
    assert quantile([1.0, 2.0, math.inf], 0.5) == 2.0
    assert quantile([1.0, math.inf, math.inf], 0.25) == math.inf
    assert quantile([math.inf, math.inf], 0.5) == math.inf
    assert math.isnan(quantile([1.0, math.nan, 2.0], 0.0))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=4))
def test_a_median_of_intervals_is_bounded_by_all_choices(pairs):
    medians = [median(choice) for choice in product(*(range(low, low + width + 1) for low, width in pairs))]
    intervals = [Bounds(low, low + width) for low, width in pairs]
    assert interval_quantile(intervals, 0.5) == Bounds(min(medians), max(medians))
