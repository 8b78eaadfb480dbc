"""What each seed needs to reach a target: bytes of a direction, or simulated seconds."""

from dataclasses import dataclass
from types import MappingProxyType

import pandas as pd

from experiments.censoring import Need
from experiments.results import Runs
from fedraclora.ledger import MIB


@dataclass(frozen=True)
class Cost:
    """Something that a run spends: how columns of tables call it, a column of `rounds.csv` and what to divide it by."""

    name: str
    column: str
    unit: float


TIME = Cost("simulated_s", "cum_simulated_s", 1)
COSTS = MappingProxyType(
    {
        "uplink": Cost("uplink_mib", "cum_uplink_bytes", MIB),
        "total": Cost("total_mib", "cum_total_bytes", MIB),
        "time": TIME,
    }
)


TIME_UNITS = MappingProxyType({"hours": 3600, "minutes": 60, "seconds": 1})


def time_unit(longest: float) -> str:
    """Return the unit for seconds up to `longest`: the largest of which that is two at least, or seconds."""
    return next((name for name, seconds in TIME_UNITS.items() if longest >= 2 * seconds), "seconds")


def costs_of(runs: Runs) -> list[Cost]:
    """Return what some run of a comparison measured the cost of; time only where it is simulated."""
    return [cost for cost in COSTS.values() if any(has_cost(runs, method, cost) for method in runs.methods)]


def has_cost(runs: Runs, method: str, cost: Cost) -> bool:
    """Return whether all runs of a method say what each evaluated round had cost up to its end."""
    return all(cost.column in rows and bool(rows[cost.column].notna().all()) for rows in runs.evaluated(method))


def needs_of(runs: Runs, method: str, cost: Cost, target: float) -> dict[int, Need]:
    """Return by seed what a method spent up to its first evaluated round with that accuracy; nothing without the cost.

    A seed that never got there is censored at its last evaluation, the last moment at which it is known to be below.
    """
    if not has_cost(runs, method, cost):
        return {}
    return {int(rows["seed"].iloc[0]): _need(rows, cost, target) for rows in runs.evaluated(method)}


def _need(rows: pd.DataFrame, cost: Cost, target: float) -> Need:
    hits = rows[rows["test_accuracy"] >= target]
    return Need(float((rows.iloc[-1] if hits.empty else hits.iloc[0])[cost.column]) / cost.unit, not hits.empty)
