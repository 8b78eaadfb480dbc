"""One sentence that says what accuracy a byte buys, from a comparison table; it claims no more than the table holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from experiments.formats import format_metric, format_number, format_target, metric_of, targets_of


@dataclass(frozen=True)
class _Need:
    """What one method needs to reach a target, in MiB; a lower bound where too few seeds reached it."""

    method: str
    median: float
    low: float
    high: float
    is_lower_bound: bool
    num_reached: int
    num_seeds: int

    @property
    def seeds(self) -> str:
        """Return how many seeds stand behind the median, and their range."""
        if self.num_seeds == 1:
            return "one seed"
        if self.num_reached < self.num_seeds:
            return f"median of {self.num_seeds} seeds, of which {self.num_reached} reached it"
        return f"median of {self.num_seeds} seeds, {format_number(self.low)} to {format_number(self.high)}"


def headline(table: pd.DataFrame) -> str:
    """Return the best-supported answer in a comparison table as plain text.

    It is the smallest median uplink to the highest target that some method reached; where none was reached, or the runs
    have no accuracy, it is the best metric within the budget. Methods without a model for all clients have no such
    metric and are left out.
    """
    table = table[table["is_global"]]
    if table.empty:
        return "No method here makes a model for all clients; read their personal accuracies."
    for target in reversed(targets_of(table)):
        if any(not need.is_lower_bound for need in _needs(table, "uplink", target)):
            return _answer_to_target(table, target)
    return _answer_at_budget(table)


def _needs(table: pd.DataFrame, direction: str, target: str) -> list[_Need]:
    name = f"{direction}_mib_to_{target}"
    needs = [
        _Need(
            method=str(row["method"]),
            median=float(row[f"{name}_median"]),
            low=float(row[f"{name}_min"]),
            high=float(row[f"{name}_max"]),
            is_lower_bound=bool(row[f"{name}_is_lower_bound"]),
            num_reached=int(row[f"num_reached_{target}"]),
            num_seeds=int(row["num_seeds"]),
        )
        for row in table.to_dict("records")
    ]
    return sorted(needs, key=lambda need: need.median)


def _answer_to_target(table: pd.DataFrame, target: str) -> str:
    needs = _needs(table, "uplink", target)
    best = next(need for need in needs if not need.is_lower_bound)
    text = (
        f"{best.method} reaches {format_target(target)} test accuracy with {format_number(best.median)} MiB of uplink"
    )
    text += f" ({best.seeds})"
    rival = next((need for need in needs if need is not best and not need.is_lower_bound), None)
    text += f", {_compare(best, rival)}" if rival is not None and best.median > 0 else ""
    missed = [need for need in needs if need.is_lower_bound]
    text += _list_missed("not reached by", [need for need in missed if need.median >= best.median])
    # A method whose runs ended before the best one's bytes might have needed less.
    text += _list_missed("ended too early to be ranked", [need for need in missed if need.median < best.median])
    return f"{text}.{_answer_with_downlink(table, target, best.method)}"


def _compare(best: _Need, rival: _Need) -> str:
    ratio = rival.median / best.median
    if ratio < 1.05:
        return f"about as much as {rival.method}"
    is_overlapping = best.high >= rival.low and max(best.num_seeds, rival.num_seeds) > 1
    caution = ", though the seeds overlap" if is_overlapping else ""
    return f"{ratio:.1f} times less than {rival.method}{caution}"


def _list_missed(what: str, missed: Sequence[_Need]) -> str:
    ends = ", ".join(f"{need.method} (after {format_number(need.median)} MiB)" for need in missed)
    return f"; {what}: {ends}" if ends else ""


def _answer_with_downlink(table: pd.DataFrame, target: str, best_uplink: str) -> str:
    needs = _needs(table, "total", target)
    best = next((need for need in needs if not need.is_lower_bound), None)
    if best is None or best.method == best_uplink or needs[0] is not best:
        return ""
    need = f"{format_number(best.median)} MiB in total ({best.seeds})"
    return f" With the downlink counted, {best.method} needs least: {need}."


def _answer_at_budget(table: pd.DataFrame) -> str:
    metric = metric_of(table)
    name, is_loss = f"{metric}_at_budget", metric == "loss"
    ranked = table.dropna(subset=[f"{name}_median"]).sort_values(f"{name}_median", ascending=is_loss, kind="stable")
    opening = f"ithin {format_number(float(table['budget_mib'].iloc[0]))} MiB in total"
    targets = targets_of(table)
    missed = (
        f"No method reached {format_target(targets[0])} test accuracy in the median of its seeds; w" if targets else "W"
    )
    opening = missed + opening
    if ranked.empty:
        return f"{opening}, no method was evaluated."
    best = ranked.iloc[0]
    values = [format_metric(float(best[f"{name}_{part}"]), metric) for part in ("median", "min", "max")]
    unit = "" if is_loss else " %"
    seeds = f"median of {best['num_seeds']} seeds, {values[1]} to {values[2]}" if best["num_seeds"] > 1 else "one seed"
    text = f"{opening}, {best['method']} reaches {values[0]}{unit} test {metric} ({seeds})"
    return f"{text}{_compare_at_budget(ranked, name)}."


def _compare_at_budget(ranked: pd.DataFrame, name: str) -> str:
    if len(ranked) == 1:
        return ""
    best, rival = ranked.iloc[0], ranked.iloc[1]
    metric = metric_of(ranked)
    value = format_metric(float(rival[f"{name}_median"]), metric)
    is_overlapping = best[f"{name}_min"] <= rival[f"{name}_max"] and rival[f"{name}_min"] <= best[f"{name}_max"]
    caution = ", though the seeds overlap" if is_overlapping and max(best["num_seeds"], rival["num_seeds"]) > 1 else ""
    return f", ahead of {rival['method']} at {value}{'' if metric == 'loss' else ' %'}{caution}"
