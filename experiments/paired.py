"""Differences between a method and a reference, seed by seed.

Runs of one seed share the split, the initial weights and the cohorts, so what they share drops out of a difference.
Pairs are the seeds that both methods ran on the same split. A ratio of what two runs needed to reach a target has
bounds where one of them never got there, and none at all where neither did.
"""

import math
from collections.abc import Mapping, Sequence

from experiments.censoring import Bounds, Need, interval_quantile, quantile
from experiments.needs import Cost, needs_of
from experiments.results import Runs

REFERENCE = "full"


def reference_of(methods: Sequence[str]) -> str:
    """Return the method that the others are held against: `full`, or the first one where it is not among them."""
    return REFERENCE if REFERENCE in methods else methods[0]


def sign_test(num_ahead: int, num_behind: int) -> float:
    """Return the exact two-sided p-value of a sign test; ties are left out before.

    It is how often a fair coin, thrown for each pair, would fall at least as unevenly.
    """
    num = num_ahead + num_behind
    tail = sum(math.comb(num, k) for k in range(min(num_ahead, num_behind) + 1))
    return min(1.0, tail / float(2 ** (num - 1))) if num else 1.0


def ratio_bounds(need: Need, reference: Need) -> Bounds:
    """Return the bounds of `need / reference`; nothing over nothing is 1."""
    return Bounds(_ratio(need.amount, reference.most), _ratio(need.most, reference.amount))


def _ratio(one: float, other: float) -> float:
    if one == other:
        # Both infinite cannot be: of the two at most one is taken at its largest.
        return 1.0
    return math.inf if other == 0 else one / other


def is_less(need: Need, other: Need) -> bool:
    """Return whether a need is certainly smaller: a seed that was below the target after x needs more than x."""
    return need.is_reached and (need.amount < other.amount or (need.amount == other.amount and not other.is_reached))


def pairs_of(runs: Runs, method: str, reference: str) -> list[int]:
    """Return the seeds that both methods ran on the same split."""
    splits = [
        {int(summary["seed"]): summary["split_digest"] for summary in runs.summaries if summary["method"] == name}
        for name in (method, reference)
    ]
    return [seed for seed, split in splits[0].items() if splits[1].get(seed, None) == split]


def difference_columns(runs: Runs, method: str, reference: str) -> dict[str, object]:
    """Return the columns about the final metric of a method minus that of the reference; ahead is more, of losses less.

    Without a pair medians and ranges are NaN.
    """
    seeds = pairs_of(runs, method, reference)
    own, theirs = _final(runs, method), _final(runs, reference)
    differences = [own[seed] - theirs[seed] for seed in seeds]
    sign = 1 if runs.metric == "test_accuracy" else -1
    name = f"final_{runs.metric.removeprefix('test_')}_difference"
    return {
        "num_pairs": len(seeds),
        f"{name}_median": quantile(differences, 0.5) if seeds else math.nan,
        f"{name}_min": min(differences, default=math.nan),
        f"{name}_max": max(differences, default=math.nan),
        **_sign_columns(name, [sign * difference for difference in differences]),
    }


def _final(runs: Runs, method: str) -> Mapping[int, float]:
    return {int(rows["seed"].iloc[0]): float(rows[runs.metric].iloc[-1]) for rows in runs.evaluated(method)}


def ratio_columns(runs: Runs, pair: tuple[str, str], cost: Cost, target: float) -> dict[str, object]:
    """Return the columns about what a method needs to a target over what the reference needs; ahead is less.

    The median over seeds lies between `_median` and `_median_at_most`, equal where it is known; `_min` and `_max` are
    the least and the most that any seed's ratio can be. Without a pair, or without the cost, all are NaN.
    """
    own, theirs = (needs_of(runs, name, cost, target) for name in pair)
    both = [(own[seed], theirs[seed]) for seed in pairs_of(runs, *pair) if seed in own and seed in theirs]
    ratios = [ratio_bounds(*needs) for needs in both]
    median = interval_quantile(ratios, 0.5) if ratios else Bounds(math.nan, math.nan)
    name = f"{cost.name}_ratio_to_{target:g}"
    return {
        f"{name}_median": median.low,
        f"{name}_median_at_most": median.high,
        f"{name}_min": min((ratio.low for ratio in ratios), default=math.nan),
        f"{name}_max": max((ratio.high for ratio in ratios), default=math.nan),
        **_sign_columns(name, [is_less(a, b) - is_less(b, a) for a, b in both]),
    }


def _sign_columns(name: str, leads: Sequence[float]) -> dict[str, object]:
    num_ahead, num_behind = sum(lead > 0 for lead in leads), sum(lead < 0 for lead in leads)
    return {
        f"{name}_num_ahead": num_ahead,
        f"{name}_num_behind": num_behind,
        f"{name}_sign_test_p": sign_test(num_ahead, num_behind),
    }
