"""`fedraclora budget`: what each method would send, and how long it would take, without training anything."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.compare import check_names, one_run
from experiments.forecast import Forecast, Known, build_method, forecast, summary_row
from experiments.groups import plain_values
from experiments.settings import BudgetSettings, Settings
from fedraclora.files import write_atomically
from fedraclora.plugins import nearest
from fedraclora.shapes_only import ShapesOnly

log = logging.getLogger("fedraclora")

FITS = ("rank", "local_steps", "rounds_per_link")
# The settings of a budget, under a name that no run has.
ABOUT = "budget_settings.yaml"
# What is asked of a largest setting that no limit bounds.
MOST_STEPS = 2**20
# From here on digits behind the point say nothing.
LARGE = 1000


@dataclass(frozen=True)
class Planned:
    """One method's forecast, and the setting that was fitted: its value, None where none fits or it means nothing."""

    method: str
    told: Forecast
    num_rounds: int
    fitted: int | None = None
    remark: str = ""


def budget(settings: BudgetSettings, known: Known, console: Console, *, model: str | None = None) -> list[Planned]:
    """Print what each method would cost, write `budget.csv` and `budget_rounds.csv` where `out` is given.

    `model` names the model where it is not the settings' plug-in. Raises ValueError for settings that cannot be run.
    """
    _check(settings)
    plans: list[Planned] = []
    with console.status("") as status:
        for method in settings.methods:
            status.update(f"{method}: {settings.rounds} rounds on shapes")
            plans.append(plan(one_run(settings, Path(), method, settings.seed, None), known, fit=settings.fit))
    table = budget_table(plans, fit=settings.fit)
    console.print(render(table, fit=settings.fit))
    for line in remarks(plans, known):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if settings.out is not None:
        _write(settings, plans, table, Path(settings.out), model)
        console.print(f"written: {Path(settings.out) / 'budget.csv'}", markup=False, highlight=False, soft_wrap=True)
    return plans


def _check(settings: BudgetSettings) -> None:
    check_names(settings)
    if settings.fit is not None and settings.fit not in FITS:
        raise ValueError(f"fit={settings.fit!r} is unknown; {nearest(settings.fit, FITS)}")
    folder = None if settings.out is None else Path(settings.out)
    if folder is not None and folder.exists() and any(folder.iterdir()) and not (folder / ABOUT).exists():
        raise ValueError(f"out={folder} holds something that is no budget; name another folder")


def _check_fit(settings: Settings, fit: str) -> None:
    """Raise ValueError where fitting that setting means nothing."""
    if fit == "local_steps":
        if settings.devices == "none" or not settings.deadline_s:
            raise ValueError(
                "fit=local_steps: local steps cost time and no bytes; give devices=... and deadline_s=..., by which "
                "every client has to answer"
            )
    elif settings.budget_mib is settings.uplink_mib is settings.per_client_mib is None:
        raise ValueError(f"fit={fit} needs a limit: budget_mib=..., uplink_mib=... or per_client_mib=...")
    if fit == "rank" and (settings.ranks or settings.client_ranks is not None):
        raise ValueError("fit=rank chooses one rank for all layers and clients; leave ranks and client_ranks out")


def plan(settings: Settings, known: Known, *, fit: str | None = None) -> Planned:
    """Return a method's forecast, with the setting `fit` chosen so that all rounds keep to the limits."""
    name = settings.label or str(settings.method.name)
    if fit is None:
        return Planned(name, forecast(settings, known), settings.rounds)
    _check_fit(settings, fit)
    fitted, remark = _FIT[fit](settings, known)
    chosen = settings if fitted is None else _with(settings, fit, fitted)
    return Planned(name, forecast(chosen, known), settings.rounds, fitted, remark)


# ---- the largest setting that fits


def _with(settings: Settings, name: str, value: int) -> Settings:
    """Return the settings with another value of one of them."""
    if name == "rounds_per_link":
        return replace(settings, method=replace(settings.method, rounds_per_link=value))
    if name == "rank":
        return replace(settings, rank=value)
    return replace(settings, local_steps=value, local_epochs=0)


def _is_affordable(settings: Settings, known: Known) -> bool:
    return len(forecast(settings, known).reports) == settings.rounds


def _fit_rank(settings: Settings, known: Known) -> tuple[int | None, str]:
    """Return the largest rank with which all rounds are affordable; bytes never fall as it grows."""
    least, most = _with(settings, "rank", 1), _largest_rank(settings, known)
    free = replace(settings, budget_mib=None, uplink_mib=None, per_client_mib=None)
    ends = [forecast(_with(free, "rank", rank), known).traffic for rank in (1, most)]
    if most > 1 and ends[0] == ends[1]:
        return None, "its bytes do not depend on the rank"
    if not _is_affordable(least, known):
        return None, "not even rank 1 fits"
    found = largest(lambda rank: _is_affordable(_with(settings, "rank", rank), known), 1, most)
    return found, f"the layers allow no more than {most}" if found == most else ""


def _largest_rank(settings: Settings, known: Known) -> int:
    """Return the largest rank that every target layer can have in this method."""

    def is_possible(rank: int) -> bool:
        try:
            method = build_method(_with(settings, "rank", rank), known.model)
            with ShapesOnly():
                method.open_link(0, dict(known.model.state_dict()))
        except ValueError:
            return False
        return True

    if not is_possible(1):
        # Whatever is wrong has nothing to do with the rank.
        build_method(_with(settings, "rank", 1), known.model)
    most = max(min(weight.shape[0], weight[0].numel()) for weight in known.model.parameters() if weight.ndim > 1)
    return largest(is_possible, 1, most)


def _fit_rounds_per_link(settings: Settings, known: Known) -> tuple[int | None, str]:
    """Return the shortest link with which all rounds are affordable: the longer it is, the less there is to catch up.

    0, a link that never closes, is the longest.
    """
    if not any(item.name == "rounds_per_link" for item in fields(settings.method)):
        return None, "it has no link length"
    for length in [*range(1, settings.rounds + 1), 0]:
        if _is_affordable(_with(settings, "rounds_per_link", length), known):
            return length, "of the link lengths that fit the shortest, the nearest to the published 1"
    return None, "no link length fits"


def _fit_local_steps(settings: Settings, known: Known) -> tuple[int | None, str]:
    """Return the most local steps with which every client answers by the deadline, in every round."""

    def is_in_time(steps: int) -> bool:
        slowest = forecast(_with(settings, "local_steps", steps), known).slowest_s
        return slowest is not None and slowest <= settings.deadline_s

    if not is_in_time(1):
        is_affordable = bool(forecast(_with(settings, "local_steps", 1), known).reports)
        return None, "not even one local step fits the deadline" if is_affordable else "no round is affordable"
    return largest(is_in_time, 1, MOST_STEPS), ""


_FIT: Mapping[str, Callable[[Settings, Known], tuple[int | None, str]]] = {
    "rank": _fit_rank,
    "rounds_per_link": _fit_rounds_per_link,
    "local_steps": _fit_local_steps,
}


def largest(holds: Callable[[int], bool], least: int, most: int) -> int:
    """Return the largest number in [least, most] for which `holds`, given that it holds for `least` and ends once."""
    # Doubling first: what fits is often far below what could be.
    step, low, high = 1, least, most + 1
    while low + step < high and holds(low + step):
        low, step = low + step, 2 * step
    high = min(high, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


# ---- what is shown


def budget_table(plans: Sequence[Planned], *, fit: str | None) -> pd.DataFrame:
    """Return one row a method."""
    rows = []
    for each in plans:
        row = summary_row(each.method, each.told, each.num_rounds)
        rows.append(row if fit is None else {"method": row.pop("method"), fit: each.fitted, **row})
    return pd.DataFrame(rows)


HEADINGS = {
    "uplink_mib_a_round": "up a round",
    "downlink_mib_a_round": "down a round",
    "uplink_mib": "uplink",
    "downlink_mib": "downlink",
    "catchup_mib": "of it catch-up",
    "total_mib": "total",
    "most_of_one_client_mib": "most of a client",
    "hours": "hours",
}
# More methods than this get a row each, with what is asked for most.
MAX_COLUMNS = 6
SHORT = ("uplink_mib_a_round", "downlink_mib_a_round", "total_mib", "hours")


def render(table: pd.DataFrame, *, fit: str | None) -> Table:
    """Return the table for a terminal; bytes in MiB of tensors, all clients together."""
    shown = Table(title="MiB of tensors, all clients together", title_justify="left", box=SIMPLE_HEAD)
    is_long = len(table) > MAX_COLUMNS
    names = [name for name in HEADINGS if name in table and (not is_long or name in SHORT)]
    cells = {"method": table["method"].astype(str).tolist()}
    if fit is not None:
        cells[fit] = ["-" if pd.isna(value) else f"{value:.0f}" for value in table[fit]]
    cells["rounds"] = table["rounds"].astype(str).tolist()
    for name in names:
        cells[HEADINGS[name]] = [_cell(name, row) for row in table.to_dict("records")]
    rows = [[name, *values] for name, values in cells.items()]
    head, *body = list(zip(*rows, strict=True)) if is_long else rows
    for place, heading in enumerate(head):
        shown.add_column(heading if heading != "method" or is_long else "", justify="left" if place == 0 else "right")
    for row in body:
        shown.add_row(*row)
    return shown


def _cell(name: str, row: Mapping[Hashable, Any]) -> str:
    value = float(row[name])
    number = f"{value:,.0f}" if value >= LARGE else f"{value:.4g}"
    if not row["all_answer"]:
        return f"~ {number}"
    return number if row["is_exact"] or name == "hours" else f"<= {number}"


def remarks(plans: Sequence[Planned], known: Known) -> list[str]:
    """Return what has to be said of the table."""
    lines = [f"{each.method}: {each.remark}" for each in plans if each.remark]
    lines += [
        f"{each.method}: {len(each.told.reports)} of {each.num_rounds} rounds: {each.told.stop_reason}"
        for each in plans
        if each.told.stop_reason is not None
    ]
    lines += [
        f"{each.method}: ~: not all clients will answer in time (the slowest takes {each.told.slowest_s:.3g} s a "
        "round), which is not reckoned with"
        for each in plans
        if not each.told.all_answer
    ]
    if not all(each.told.is_exact for each in plans):
        lines.append("<=: the most that it may be; the size of such messages depends on their numbers")
    num_parameters = sum(tensor.numel() for tensor in known.model.parameters())
    lines.append(f"the model has {num_parameters:,} parameters; every client that is asked is supposed to answer")
    return lines


def _write(
    settings: BudgetSettings, plans: Sequence[Planned], table: pd.DataFrame, folder: Path, model: str | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "budget.csv", index=False)
    rounds = [each.told.rounds().assign(method=each.method) for each in plans]
    pd.concat(rounds).to_csv(folder / "budget_rounds.csv", index=False)
    values = plain_values(settings) | ({} if model is None else {"model": model})
    write_atomically(folder / ABOUT, OmegaConf.to_yaml(OmegaConf.create(values)).encode())
