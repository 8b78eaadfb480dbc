"""How a comparison table is read: what it has columns for, and its numbers as people write them."""

import math
from dataclasses import dataclass

import pandas as pd

from experiments.columns import MEASURED, NUM_REACHED
from experiments.needs import COSTS, TIME, TIME_UNITS, time_unit

NOT_MEASURED = "-"
# With fewer seeds quartiles say nothing that the median, the least and the most do not say.
LEAST_SEEDS = 4


def targets_of(table: pd.DataFrame) -> list[str]:
    """Return the targets that a comparison table has columns for, as they are written in its column names."""
    return [column.removeprefix(NUM_REACHED) for column in table.columns if column.startswith(NUM_REACHED)]


def metric_of(table: pd.DataFrame) -> str:
    """Return the name of what a comparison table compares: `accuracy` or `loss`."""
    return "accuracy" if "final_accuracy_median" in table.columns else "loss"


def measured_in(table: pd.DataFrame) -> list[str]:
    """Return what only some runs measure, of which a comparison table has columns."""
    return [name for name in MEASURED if f"{name}_median" in table.columns]


def format_number(value: float) -> str:
    """Return a number with three significant digits, without an exponent from a thousandth up."""
    if math.isnan(value):
        return "not known"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def format_metric(value: float, metric: str) -> str:
    """Return an accuracy as a percentage and a loss with three significant digits, both without unit."""
    return f"{100 * value:.1f}" if metric == "accuracy" and not math.isnan(value) else format_number(value)


def format_target(target: str) -> str:
    """Return an accuracy target as a percentage, for instance `92.5 %`."""
    return f"{100 * float(target):g} %"


def reference_in(table: pd.DataFrame) -> str:
    """Return the method of a comparison table against which the others are held."""
    return str(table.loc[table["is_reference"], "method"].iloc[0])


@dataclass(frozen=True)
class Column:
    """How a table's columns about one cost start, what people call them, and what one of their units holds."""

    name: str
    title: str
    unit: float


def costs_in(table: pd.DataFrame) -> list[Column]:
    """Return the costs of which a table says what is needed to targets; time in the unit that suits its largest."""
    columns = [Column(cost.name, f"{way} MiB", 1) for way, cost in COSTS.items() if cost is not TIME]
    ends = [name for name in table.columns if name.startswith(f"{TIME.name}_to_") and name.endswith("_max")]
    if ends and targets_of(table):
        unit = time_unit(float(table[ends].max().max()))
        columns.append(Column(TIME.name, f"simulated {unit}", TIME_UNITS[unit]))
    return columns


def format_bounds(low: float, high: float) -> str:
    """Return a number that is not negative, or what is known of it: `> 2`, `< 5`, `2 to 5`."""
    if low == high:
        return format_number(low)
    if math.isinf(high):
        return f"> {format_number(low)}" if low > 0 else "not known"
    return f"< {format_number(high)}" if low == 0 else f"{format_number(low)} to {format_number(high)}"
