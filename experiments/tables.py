"""The comparison of methods in words: what accuracy a byte buys, with spread over seeds and with censoring.

A run that never reached a target is right-censored: the bytes it had spent at its last evaluation are a lower bound of
what it needs (`experiments/censoring.py`). Nothing here looks at the best of several rounds: final means the last
evaluated round, and the mean accuracy over bytes counts all of them.
"""

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from experiments.captions import paired_caption, table_caption
from experiments.columns import NUM_REACHED, budgets_of, method_columns, pair_columns
from experiments.formats import (
    LEAST_SEEDS,
    NOT_MEASURED,
    Column,
    costs_in,
    format_bounds,
    format_metric,
    format_number,
    format_target,
    measured_in,
    metric_of,
    reference_in,
    targets_of,
)
from experiments.paired import reference_of
from experiments.results import Runs

__all__ = ["comparison_table", "format_metric", "paired_table", "render_table", "text_table"]

WAYS = ("total", "uplink")
# A table of more methods than this has a row a method on the terminal, too, without the columns least needed.
MAX_COLUMNS = 6
LEAST_NEEDED = ["seeds", "rounds", "s a round"]


def comparison_table(runs: Runs, *, targets: Sequence[float], budget_mib: float | None) -> pd.DataFrame:
    """Return one row a method, all columns numeric but `method`.

    - Columns that end with `_median`, `_q25`, `_q75` (quartiles), `_min` and `_max` are over seeds.
    - The metric at the budget is that of the last evaluated round whose `cum_total_bytes` is within `budget_mib` (2^20
      bytes); None takes the smallest total that any run spent, and `is_budget_given` says which.
    - `mean_*_over_total` is the mean of the metric over bytes up to that budget (`experiments/area.py`), and
      `mean_*_over_uplink` over uplink bytes up to `uplink_budget_mib`: the setting `uplink_mib` where all runs have it,
      else the smallest uplink of any run. Runs that diverged do not lower a budget.
    - `num_reached_T` counts the seeds with an evaluated round of at least accuracy T. What they needed to the first one
      is in `uplink_mib_to_T_*`, `total_mib_to_T_*` and, where time is simulated, `simulated_s_to_T_*`. The others enter
      with what they had spent, so `_median`, `_q25` and `_q75` are the smallest possible values and `*_at_most` the
      largest; `*_is_lower_bound` says that the median is not known (`experiments/censoring.py`). Runs without
      accuracies are compared by their test loss and have no targets.
    - Of several methods one `is_reference`; columns with `_difference_` and `_ratio_` pair the others with it, seed by
      seed (`experiments/paired.py`).
    - `num_unfinished` counts the runs that diverged, failed or were interrupted. A method that is not `is_global` makes
      no model for all clients; its test metric is that of the part they share.
    """
    reachable = sorted(set(targets)) if runs.metric == "test_accuracy" else []
    budgets, reference = budgets_of(runs, budget_mib), reference_of(runs.methods)
    rows = []
    for method in runs.methods:
        row: dict[str, object] = {"method": method} | method_columns(runs, method, reachable, budgets)
        rows.append(row | (pair_columns(runs, method, reference, reachable) if len(runs.methods) > 1 else {}))
    return pd.DataFrame(rows)


def text_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a comparison table as people read it: strings, ranges over seeds in brackets, censored values marked."""
    metric = metric_of(table)
    unit = ", %" if metric == "accuracy" else ""
    text = pd.DataFrame({"method": table["method"], "seeds": table["num_seeds"].map(str)})
    budget = format_number(float(table["budget_mib"].iloc[0]))
    text[f"{metric} at {budget} MiB{unit}"] = _metric_cells(table, f"{metric}_at_budget", metric)
    for way in WAYS:
        text[f"mean {metric} over {way}{unit}"] = _metric_cells(table, f"mean_{metric}_over_{way}", metric)
    for title, column, target in target_titles(table):
        text[title] = _target_cells(table, column, target)
    text[f"final {metric}{unit}"] = _metric_cells(table, f"final_{metric}", metric)
    for name in measured_in(table):
        kind, unit = ("accuracy", ", %") if name == "personal_accuracy" else (name, "")
        cells = pd.Series(_metric_cells(table, name, kind))
        text[name.replace("_", " ") + unit] = cells.where(table[f"{name}_median"].notna(), NOT_MEASURED)
    for direction in ("uplink", "downlink", "catchup"):
        if table[f"{direction}_mib_max"].any():
            title = "catch-up" if direction == "catchup" else direction
            text[f"{title} MiB"] = _metric_cells(table, f"{direction}_mib", "mib")
    text["rounds"] = table["num_rounds_median"].map(format_number)
    text["s a round"] = table["round_s_median"].map(format_number)
    return text


def target_titles(table: pd.DataFrame) -> list[tuple[str, Column, str]]:
    """Return the titles of the columns of `text_table` about targets, with their cost and their target."""
    return [
        (f"{column.title} to {format_target(target)}", column, target)
        for target in targets_of(table)
        for column in costs_in(table)
    ]


def _metric_cells(table: pd.DataFrame, name: str, metric: str) -> list[str]:
    """Return medians, ranges and, of enough seeds, quartiles; a `metric` of `accuracy` is shown in percent."""
    cells = []
    for row in table.to_dict("records"):
        parts = ("median", "min", "max", "q25", "q75")
        median, low, high, q25, q75 = (format_metric(row[f"{name}_{part}"], metric) for part in parts)
        quartiles = f"; IQR {q25} to {q75}" if row["num_seeds"] >= LEAST_SEEDS else ""
        cells.append(median if low == high else f"{median} ({low} to {high}{quartiles})")
    return cells


def _target_cells(table: pd.DataFrame, column: Column, target: str) -> list[str]:
    """Return what methods need to a target: `2`, or `> 2` where that is only the least that the median can be."""
    parts = ("median", "median_at_most", "q25", "q25_at_most", "q75", "q75_at_most", "min", "max")
    cells = []
    for row in table.to_dict("records"):
        known = {part: row[f"{column.name}_to_{target}_{part}"] / column.unit for part in parts}
        cells.append(_target_cell(known, row[f"{NUM_REACHED}{target}"], row["num_seeds"]))
    return cells


def _target_cell(known: Mapping[str, float], num_reached: int, num_seeds: int) -> str:
    if math.isnan(known["median"]):
        return NOT_MEASURED
    notes = []
    if num_reached < num_seeds:
        notes.append(f"{num_reached}/{num_seeds} reached")
        if known["median"] < known["median_at_most"] < math.inf:
            notes.append(f"at most {format_number(known['median_at_most'])}")
    elif format_number(known["min"]) != format_number(known["max"]):
        notes.append(f"{format_number(known['min'])} to {format_number(known['max'])}")
    if notes and num_reached and num_seeds >= LEAST_SEEDS:
        notes.append(f"IQR {_at_least(known, 'q25')} to {_at_least(known, 'q75')}")
    return _at_least(known, "median") + (f" ({'; '.join(notes)})" if notes else "")


def _at_least(known: Mapping[str, float], part: str) -> str:
    """Return a value, or `> x` where only the least that it can be is known."""
    is_known = known[part] == known[f"{part}_at_most"]
    return format_number(known[part]) if is_known else f"> {format_number(known[part])}"


def paired_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the methods of a comparison table against the reference, seed by seed, as people read it.

    It has no rows where there is one method only.
    """
    if "is_reference" not in table:
        return pd.DataFrame({"method": []})
    reference, others = reference_in(table), table[~table["is_reference"]]
    metric = metric_of(table)
    unit = ", points" if metric == "accuracy" else ""
    name = f"final_{metric}_difference"
    text = pd.DataFrame({"method": others["method"], "pairs": others["num_pairs"].map(str)})
    text[f"final {metric} minus that of {reference}{unit}"] = [
        _difference_cell(row, name, metric) for row in others.to_dict("records")
    ]
    for target in targets_of(table):
        for column in costs_in(table):
            cells = [_ratio_cell(row, f"{column.name}_ratio_to_{target}") for row in others.to_dict("records")]
            text[f"{column.title.removesuffix(' MiB')} to {format_target(target)} over that of {reference}"] = cells
    return text


def _difference_cell(row: Mapping[Hashable, Any], name: str, metric: str) -> str:
    if row["num_pairs"] == 0:
        return NOT_MEASURED
    scale, spec = (100, "+.1f") if metric == "accuracy" else (1, "+.3g")
    median, low, high = (f"{scale * row[f'{name}_{part}']:{spec}}" for part in ("median", "min", "max"))
    return _with_notes(row, name, median, "" if low == high else f"{low} to {high}")


def _ratio_cell(row: Mapping[Hashable, Any], name: str) -> str:
    if math.isnan(row[f"{name}_median"]):
        return NOT_MEASURED
    low, high = row[f"{name}_min"], row[f"{name}_max"]
    is_told = math.isfinite(high) and format_number(low) != format_number(high)
    notes = f"{format_number(low)} to {format_number(high)}" if is_told else ""
    return _with_notes(row, name, format_bounds(row[f"{name}_median"], row[f"{name}_median_at_most"]), notes)


def _with_notes(row: Mapping[Hashable, Any], name: str, text: str, notes: str) -> str:
    ahead = f"ahead in {row[f'{name}_num_ahead']} of {row['num_pairs']}"
    p = f"p {row[f'{name}_sign_test_p']:.2g}" if row["num_pairs"] > 1 else ""
    return f"{text} ({'; '.join(note for note in (notes, ahead, p) if note)})"


def render_table(table: pd.DataFrame) -> Table:
    """Return a comparison table for the terminal: a column a method, or a row each, with medians only."""
    is_long = len(table) > MAX_COLUMNS
    text = text_table(table).set_index("method")
    rows = text.drop(columns=LEAST_NEEDED).map(_short) if is_long else _with_pairs(text, table).T
    rest = [" Brackets, seeds, rounds, seconds and pairs are left out here: see the report."] if is_long else []
    if not is_long and len(table) > 1:
        rest = [" " + paired_caption(table)]
    caption = "".join([table_caption(table), *rest])
    rendered = Table(caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    rendered.add_column("", no_wrap=is_long)
    for name in rows.columns:
        rendered.add_column(escape(str(name)), justify="right", overflow="fold")
    for name, cells in zip(rows.index, rows.to_numpy(), strict=True):
        rendered.add_row(escape(str(name)), *map(escape, cells))
    return rendered


def _with_pairs(text: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    pairs = paired_table(table).set_index("method")
    return text.join(pairs.drop(columns="pairs", errors="ignore")).fillna(NOT_MEASURED)


def _short(cell: str) -> str:
    """Return a cell without its brackets, but with how many seeds reached the target where not all did."""
    reached = re.search(r"\((\d+/\d+) reached", cell)
    return cell.partition(" (")[0] + (f", {reached[1]}" if reached else "")
