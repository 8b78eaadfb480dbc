"""The numbers of a comparison, as columns of one row a method: spreads over seeds, bounds, and pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import pandas as pd

from experiments.area import areas
from experiments.censoring import quantile, quantile_bounds
from experiments.needs import COSTS, Cost, costs_of, needs_of
from experiments.paired import difference_columns, ratio_columns
from experiments.results import Runs
from fedraclora.ledger import MIB

NUM_REACHED = "num_reached_"
DIRECTIONS = ("uplink", "downlink", "catchup", "total")
# Columns for what only some runs measure, and what it is called in `summary.json`.
MEASURED = MappingProxyType(
    {
        "personal_accuracy": "final_personal_accuracy",
        "aggregation_gap": "mean_aggregation_gap",
        "epsilon": "epsilon",
    }
)
SHARES = MappingProxyType({"median": 0.5, "q25": 0.25, "q75": 0.75})


@dataclass(frozen=True)
class Budget:
    """Up to where curves are compared, in MiB; `is_given`: by the settings, not by what the runs spent."""

    mib: float
    is_given: bool


def budgets_of(runs: Runs, budget_mib: float | None) -> dict[str, Budget]:
    """Return the budgets of `total` and `uplink` bytes, the same for all methods.

    Where none is given it is the least that any run spent, so that no curve is prolonged; runs that diverged are, since
    how their curves go on is known, and others need not be cut short for them.
    """
    limits = [settings.get("uplink_mib") for settings in runs.settings]
    uplink_mib = limits[0] if limits and len(set(limits)) == 1 else None
    given = {"total": budget_mib, "uplink": uplink_mib}
    return {
        direction: Budget(_least_spent(runs, COSTS[direction]), is_given=False)
        if value is None
        else Budget(float(value), is_given=True)
        for direction, value in given.items()
    }


def _least_spent(runs: Runs, cost: Cost) -> float:
    spent = {
        (method, int(rows["seed"].iloc[0])): float(rows[cost.column].iloc[-1]) / cost.unit
        for method in runs.methods
        for rows in runs.of(method)
    }
    sound = [value for key, value in spent.items() if not runs.has_diverged(*key)]
    return min(sound or spent.values())


def method_columns(runs: Runs, method: str, targets: Sequence[float], budgets: dict[str, Budget]) -> dict[str, object]:
    """Return the columns about one method alone; `comparison_table` says what they mean."""
    every = runs.of(method)
    columns: dict[str, object] = {"num_seeds": len(every), "num_unfinished": runs.num_unfinished(method)}
    columns |= {"is_global": runs.is_global(method)}
    for direction, budget in budgets.items():
        prefix = "" if direction == "total" else f"{direction}_"
        columns |= {f"{prefix}budget_mib": budget.mib, f"is_{prefix}budget_given": budget.is_given}
    columns |= _metric_columns(runs, method, budgets["total"].mib)
    columns |= _area_columns(runs, method, budgets)
    costs = costs_of(runs)
    for target in targets:
        columns |= {f"{NUM_REACHED}{target:g}": _num_reached(runs, method, target)}
        for cost in costs:
            columns |= _target_columns(runs, method, cost, target)
    return columns | _cost_columns(every) | _measured_columns(runs, method)


def _metric_columns(runs: Runs, method: str, budget_mib: float) -> dict[str, object]:
    evaluated = runs.evaluated(method)
    name = runs.metric.removeprefix("test_")
    # The budget may come out of a division by 2^20, which is exact in float64, so <= needs no tolerance.
    within = [rows[rows["cum_total_bytes"] <= budget_mib * MIB] for rows in evaluated]
    at_budget = [float(rows[runs.metric].iloc[-1]) if len(rows) else math.nan for rows in within]
    final = [float(rows[runs.metric].iloc[-1]) for rows in evaluated]
    return spread(f"{name}_at_budget", at_budget) | spread(f"final_{name}", final)


def _area_columns(runs: Runs, method: str, budgets: dict[str, Budget]) -> dict[str, object]:
    columns: dict[str, object] = {}
    for direction, budget in budgets.items():
        cost = COSTS[direction]
        name = f"mean_{runs.metric.removeprefix('test_')}_over_{direction}"
        columns |= spread(name, areas(runs, method, cost.column, budget.mib * cost.unit))
    return columns


def _num_reached(runs: Runs, method: str, target: float) -> int:
    return sum(need.is_reached for need in needs_of(runs, method, COSTS["total"], target).values())


def _target_columns(runs: Runs, method: str, cost: Cost, target: float) -> dict[str, object]:
    needs, name = list(needs_of(runs, method, cost, target).values()), f"{cost.name}_to_{target:g}"
    columns: dict[str, object] = {}
    for part, share in SHARES.items():
        bounds = quantile_bounds(needs, share) if needs else None
        columns[f"{name}_{part}"] = bounds.low if bounds else math.nan
        columns[f"{name}_{part}_at_most"] = bounds.high if bounds else math.nan
        if part == "median":
            columns[f"{name}_is_lower_bound"] = bounds is not None and not bounds.is_known
    amounts = [need.amount for need in needs]
    columns[f"{name}_min"] = min(amounts, default=math.nan)
    columns[f"{name}_max"] = max(amounts, default=math.nan)
    return columns


def _cost_columns(every: Sequence[pd.DataFrame]) -> dict[str, object]:
    columns: dict[str, object] = {}
    for direction in DIRECTIONS:
        columns |= spread(f"{direction}_mib", [float(rows[f"cum_{direction}_bytes"].iloc[-1]) / MIB for rows in every])
    columns["num_rounds_median"] = quantile([float(rows["round"].iloc[-1]) for rows in every], 0.5)
    seconds = [float(rows.loc[rows["round"] > 0, "round_s"].median()) for rows in every]
    return columns | {"round_s_median": quantile(seconds, 0.5)}


def _measured_columns(runs: Runs, method: str) -> dict[str, object]:
    """Return the columns of what only some runs measure, for all methods those that any method has."""
    columns: dict[str, object] = {}
    for name, key in MEASURED.items():
        if any(runs.summary_values(each, key) for each in runs.methods):
            columns |= spread(name, runs.summary_values(method, key) or [math.nan])
    return columns


def pair_columns(runs: Runs, method: str, reference: str, targets: Sequence[float]) -> dict[str, object]:
    """Return the columns about one method against the reference, seed by seed."""
    columns = {"is_reference": method == reference} | difference_columns(runs, method, reference)
    for target in targets:
        for cost in costs_of(runs):
            columns |= ratio_columns(runs, (method, reference), cost, target)
    return columns


def spread(name: str, values: Sequence[float]) -> dict[str, object]:
    """Return the columns `_median`, `_q25`, `_q75`, `_min` and `_max` of values over seeds."""
    columns: dict[str, object] = {f"{name}_{part}": quantile(values, share) for part, share in SHARES.items()}
    is_known = not any(map(math.isnan, values))
    columns[f"{name}_min"] = min(values) if is_known else math.nan
    columns[f"{name}_max"] = max(values) if is_known else math.nan
    return columns
