"""The comparison of methods in numbers: what accuracy a byte buys, with spread over seeds and with censoring.

A run that never reached a target is right-censored: the bytes it had spent at its last evaluation are a lower bound of
what it needs. Such runs stay in every median, which is then a lower bound too unless the runs that did reach the target
settle it.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from experiments.results import Runs
from fedraclora.ledger import MIB

NOT_MEASURED = "-"
NUM_REACHED = "num_reached_"
DIRECTIONS = ("uplink", "downlink", "catchup", "total")
# Columns for what only some runs measure, and what it is called in `summary.json`.
MEASURED = {
    "personal_accuracy": "final_personal_accuracy",
    "aggregation_gap": "mean_aggregation_gap",
    "epsilon": "epsilon",
}
MEANINGS = {
    "personal_accuracy": (
        "The personal accuracy is that of the clients' own models, after their local steps, on examples that they held "
        "out, over the cohort of the last round."
    ),
    "aggregation_gap": (
        "The aggregation gap is how far what a round merged is from the mean of the clients' own changes, relative to "
        "that mean, averaged over the rounds."
    ),
    "epsilon": "Epsilon is what the whole run spent of differential privacy, for its privacy.level and privacy.delta.",
}
# A table of more methods than this has a row a method on the terminal, too, without the columns least needed.
MAX_COLUMNS = 6
LEAST_NEEDED = ["seeds", "rounds", "s a round"]


def comparison_table(runs: Runs, *, targets: Sequence[float], budget_mib: float | None) -> pd.DataFrame:
    """Return one row a method, all columns numeric but `method`.

    The metric at the budget is that of the last evaluated round whose `cum_total_bytes` is within `budget_mib` (2^20
    bytes); None takes the smallest total that any run spent, and `is_budget_given` says which. Columns that end with
    `_median`, `_min` and `_max` are over seeds. `*_mib_to_T_*` is the first evaluated round with at least accuracy T;
    `num_reached_T` counts the seeds that got there, the others enter with what they had spent, and
    `*_mib_to_T_is_lower_bound` tells whether that leaves the median a lower bound. Runs without accuracies are compared
    by their test loss and have no targets. `num_unfinished` counts the runs that diverged, failed or were interrupted.
    A method that is not `is_global` makes no model for all clients; its test metric is that of the part they share.
    """
    budget = _smallest_total(runs) if budget_mib is None else budget_mib
    reachable = sorted(set(targets)) if runs.metric == "test_accuracy" else []
    measured = _measured_columns(runs)
    rows = []
    for method in runs.methods:
        row: dict[str, object] = {"method": method, "num_seeds": len(runs.of(method))}
        row |= {"num_unfinished": runs.num_unfinished(method), "is_global": runs.is_global(method)}
        row |= {"budget_mib": budget, "is_budget_given": budget_mib is not None}
        row |= _metric_columns(runs, method, budget)
        for target in reachable:
            row |= _target_columns(runs.evaluated(method), target)
        rows.append(row | _cost_columns(runs.of(method)) | measured[method])
    return pd.DataFrame(rows)


def _smallest_total(runs: Runs) -> float:
    return min(float(rows["cum_total_bytes"].iloc[-1]) / MIB for method in runs.methods for rows in runs.of(method))


def _metric_columns(runs: Runs, method: str, budget_mib: float) -> dict[str, object]:
    evaluated = runs.evaluated(method)
    name = runs.metric.removeprefix("test_")
    # The budget may come out of a division by 2^20, which is exact in float64, so <= needs no tolerance.
    within = [rows[rows["cum_total_bytes"] <= budget_mib * MIB] for rows in evaluated]
    at_budget = [float(rows[runs.metric].iloc[-1]) if len(rows) else math.nan for rows in within]
    final = [float(rows[runs.metric].iloc[-1]) for rows in evaluated]
    return _spread(f"{name}_at_budget", at_budget) | _spread(f"final_{name}", final)


def _target_columns(evaluated: Sequence[pd.DataFrame], target: float) -> dict[str, object]:
    hits = [rows[rows["test_accuracy"] >= target] for rows in evaluated]
    is_reached = [len(hit) > 0 for hit in hits]
    columns: dict[str, object] = {f"{NUM_REACHED}{target:g}": sum(is_reached)}
    for direction in ("uplink", "total"):
        # Where the target was missed, the last evaluation is the last moment at which it is known to be missed.
        known = [
            float(hit[f"cum_{direction}_bytes"].iloc[0]) if len(hit) else float(rows[f"cum_{direction}_bytes"].iloc[-1])
            for hit, rows in zip(hits, evaluated, strict=True)
        ]
        name = f"{direction}_mib_to_{target:g}"
        columns |= _spread(name, [value / MIB for value in known])
        columns[f"{name}_is_lower_bound"] = _is_median_lower_bound(known, is_reached)
    return columns


def _is_median_lower_bound(known: Sequence[float], is_reached: Sequence[bool]) -> bool:
    worst_case = [value if reached else math.inf for value, reached in zip(known, is_reached, strict=True)]
    return float(np.median(worst_case)) != float(np.median(known))


def _cost_columns(every: Sequence[pd.DataFrame]) -> dict[str, object]:
    columns: dict[str, object] = {}
    for direction in DIRECTIONS:
        spent = [float(rows[f"cum_{direction}_bytes"].iloc[-1]) / MIB for rows in every]
        columns |= _spread(f"{direction}_mib", spent)
    columns["num_rounds_median"] = float(np.median([float(rows["round"].iloc[-1]) for rows in every]))
    seconds = [float(rows.loc[rows["round"] > 0, "round_s"].median()) for rows in every]
    return columns | {"round_s_median": float(np.median(seconds))}


def _measured_columns(runs: Runs) -> dict[str, dict[str, object]]:
    """Return by method the columns of what only some runs measure, for all methods those that any method has."""
    columns: dict[str, dict[str, object]] = {method: {} for method in runs.methods}
    for name, key in MEASURED.items():
        found = {method: runs.summary_values(method, key) for method in runs.methods}
        if any(found.values()):
            for method, values in found.items():
                columns[method] |= _spread(name, values or [math.nan])
    return columns


def _spread(name: str, values: Sequence[float]) -> dict[str, object]:
    return {
        f"{name}_median": float(np.median(values)),
        f"{name}_min": float(np.min(values)),
        f"{name}_max": float(np.max(values)),
    }


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


def text_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a comparison table as people read it: strings, ranges over seeds in brackets, censored values marked."""
    metric = metric_of(table)
    unit = ", %" if metric == "accuracy" else ""
    text = pd.DataFrame({"method": table["method"], "seeds": table["num_seeds"].map(str)})
    budget = format_number(float(table["budget_mib"].iloc[0]))
    text[f"{metric} at {budget} MiB{unit}"] = _metric_cells(table, f"{metric}_at_budget", metric)
    for target in targets_of(table):
        for direction in ("uplink", "total"):
            text[f"{direction} MiB to {format_target(target)}"] = _byte_cells(table, direction, target)
    text[f"final {metric}{unit}"] = _metric_cells(table, f"final_{metric}", metric)
    for name in measured_in(table):
        kind, unit = ("accuracy", ", %") if name == "personal_accuracy" else (name, "")
        cells = pd.Series(_metric_cells(table, name, kind))
        text[name.replace("_", " ") + unit] = cells.where(table[f"{name}_median"].notna(), NOT_MEASURED)
    for direction in ("uplink", "downlink", "catchup"):
        if table[f"{direction}_mib_max"].any():
            title = "catch-up" if direction == "catchup" else direction
            text[f"{title} MiB"] = table[f"{direction}_mib_median"].map(format_number)
    text["rounds"] = table["num_rounds_median"].map(format_number)
    text["s a round"] = table["round_s_median"].map(format_number)
    return text


def _metric_cells(table: pd.DataFrame, name: str, metric: str) -> list[str]:
    """Return medians and ranges; a `metric` of `accuracy` is shown in percent."""
    cells = []
    for row in table.to_dict("records"):
        median, low, high = (format_metric(row[f"{name}_{part}"], metric) for part in ("median", "min", "max"))
        cells.append(median if row["num_seeds"] == 1 or low == high else f"{median} ({low} to {high})")
    return cells


def _byte_cells(table: pd.DataFrame, direction: str, target: str) -> list[str]:
    name = f"{direction}_mib_to_{target}"
    cells = []
    for row in table.to_dict("records"):
        median, low, high = (format_number(row[f"{name}_{part}"]) for part in ("median", "min", "max"))
        num_reached, num_seeds = row[f"{NUM_REACHED}{target}"], row["num_seeds"]
        cell = f"> {median}" if row[f"{name}_is_lower_bound"] else median
        if num_reached < num_seeds:
            cell += f" ({num_reached}/{num_seeds} reached)"
        elif low != high:
            cell += f" ({low} to {high})"
        cells.append(cell)
    return cells


def table_caption(table: pd.DataFrame) -> str:
    """Return the sentences that say how to read a comparison table."""
    metric, budget = metric_of(table), format_number(float(table["budget_mib"].iloc[0]))
    origin = "the budget" if bool(table["is_budget_given"].iloc[0]) else "the smallest total that a run spent"
    caption = (
        f"Medians over seeds, lowest to highest in brackets. The {metric} at {budget} MiB ({origin}, uplink and "
        "downlink of all clients) is that of the last evaluated round within it."
    )
    if targets_of(table):
        caption += (
            " MiB to a target are counted up to the first evaluated round that reaches it; “>” marks a lower bound: "
            "too few seeds reached the target to know the median."
        )
    caption += " Uplink, downlink and the catch-up in it are those of whole runs."
    caption += "" if metric == "accuracy" else " These runs report no accuracy, so accuracy targets do not apply."
    return " ".join([caption, *(MEANINGS[name] for name in measured_in(table))])


def render_table(table: pd.DataFrame) -> Table:
    """Return a comparison table for the terminal: a column a method, or a row each, with medians only."""
    text = text_table(table).set_index("method")
    is_long = len(text) > MAX_COLUMNS
    rows = text.drop(columns=LEAST_NEEDED).map(lambda cell: cell.partition(" (")[0]) if is_long else text.T
    rest = " Brackets, seeds, rounds and seconds are left out here: see the report." if is_long else ""
    rendered = Table(caption=table_caption(table) + rest, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    rendered.add_column("", no_wrap=True)
    for name in rows.columns:
        rendered.add_column(escape(str(name)), justify="right", overflow="fold")
    for name, cells in zip(rows.index, rows.to_numpy(), strict=True):
        rendered.add_row(escape(str(name)), *cells)
    return rendered
