"""What a run will cost, before it is run: bytes from a dry run on shapes, and seconds where devices are simulated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import nn

from experiments.combinations import check_combination
from experiments.devices import Device, load_devices, pair_time, round_time
from experiments.groups import GROUPS
from experiments.problem import check_choices, make_adapter, round_settings
from experiments.settings import Settings
from fedraclora.ledger import DOWN, MIB, UP, Traffic, bytes_by_partition
from fedraclora.local_config import LocalConfig
from fedraclora.plugins import find
from strategies.dry_run import DryRun
from strategies.method import Method
from strategies.rounds import RoundReport
from strategies.state import BudgetTooSmall

HOUR_S = 3600
BYTES = ("uplink_bytes", "downlink_bytes", "catchup_bytes")


@dataclass(frozen=True)
class Known:
    """What is known before a run: the model's shapes, and how many examples each client has (empty: unknown).

    The model may lie on the meta device.
    """

    model: nn.Module
    num_examples: Sequence[int] = ()


@dataclass(frozen=True)
class Forecast:
    """What a run will send, round by round, and how long it will take.

    `is_exact` says that the bytes are those of the run, and not the most that they may be; `stop_reason` which limit
    ends it early. `seconds` is simulated time, None where no devices are simulated: it counts tensors only, so that it
    is a little short of what the run itself will say, whose messages have headers, too. `slowest_s` is the longest that
    any one client takes for a round, and `all_answer` whether the devices let every client answer in time, which a
    forecast supposes.
    """

    reports: Sequence[RoundReport]
    is_exact: bool
    stop_reason: str | None
    seconds: float | None = None
    slowest_s: float | None = None
    all_answer: bool = True

    @property
    def traffic(self) -> Traffic:
        """Return the tensor bytes of all rounds."""
        return sum((report.traffic for report in self.reports), start=Traffic())

    @property
    def most_of_one_client(self) -> int:
        """Return the bytes of the client that sends and receives most."""
        return max(bytes_by_partition(row for report in self.reports for row in report.rows).values(), default=0)

    def rounds(self) -> pd.DataFrame:
        """Return one row a round: its bytes by direction, and cumulated."""
        rows = [
            {
                "round": report.round,
                "uplink_bytes": report.traffic.uplink_bytes,
                "downlink_bytes": report.traffic.downlink_bytes,
                "catchup_bytes": report.traffic.catchup_bytes,
            }
            for report in self.reports
        ]
        table = pd.DataFrame(rows, columns=["round", *BYTES])
        for name in BYTES:
            table[f"cum_{name}"] = table[name].cumsum()
        return table


def forecast(settings: Settings, known: Known) -> Forecast:
    """Return what the run that the settings describe will cost.

    Raises ValueError for settings that cannot be run, as `prepare` does, the machine's own aside. A run that cannot
    afford its first round has no rounds.
    """
    check_choices(settings)
    rounds = round_settings(settings)
    method = build_method(settings, known.model)
    check_combination(settings, method, rounds)
    told = DryRun(method, dict(known.model.state_dict()), rounds)
    try:
        reports = list(told.rounds_to(settings.rounds))
    except BudgetTooSmall:
        reports = []
    devices = load_devices(settings.devices, settings.num_clients, settings.seed)
    if not devices or not reports:
        return Forecast(reports, told.is_exact, told.stop_reason)
    steps = _steps(rounds.local, settings.num_clients, known.num_examples)
    times = [_times(report, devices, steps, settings.deadline_s) for report in reports]
    seconds, slowest = sum(time for time, _ in times), max(slowest for _, slowest in times)
    all_answer = all(device.availability == 1 and device.dropout == 0 for device in devices)
    all_answer &= not settings.deadline_s or slowest <= settings.deadline_s
    return Forecast(reports, told.is_exact, told.stop_reason, seconds, slowest, all_answer)


def build_method(settings: Settings, model: nn.Module) -> Method:
    """Return the method of the settings over a model. Raises ValueError where they do not fit."""
    plugin: Any = find(GROUPS["method"], settings.method.name)
    method: Method = plugin.build(settings.method, make_adapter(settings, model))
    return method


def _steps(local: LocalConfig, num_clients: int, num_examples: Sequence[int]) -> dict[int, int]:
    """Return each client's local steps a round."""
    if local.epochs and not num_examples:
        raise ValueError(
            f"local_epochs={local.epochs} takes as many steps as a client has batches, which a model without a data "
            "set does not tell; set local_steps (and local_epochs=0) to have time predicted"
        )
    return {client: local.num_steps(num_examples[client] if num_examples else 1) for client in range(num_clients)}


def _times(
    report: RoundReport, devices: Sequence[Device], steps: Mapping[int, int], deadline_s: float
) -> tuple[float, float]:
    """Return how long a round takes, and how long its slowest client would without a deadline."""
    down = dict.fromkeys((row.partition for row in report.rows), 0)
    down |= bytes_by_partition(row for row in report.rows if row.direction == DOWN)
    up = bytes_by_partition(row for row in report.rows if row.direction == UP)
    # Who is only told of links does not train.
    busy = {who: steps[who] if who in up else 0 for who in down}
    slowest = max(pair_time(devices[who], size, up.get(who, 0), busy[who]) for who, size in down.items())
    return round_time(devices, down, up, busy, deadline_s), slowest


def summary_row(name: str, told: Forecast, num_rounds: int) -> dict[str, Any]:
    """Return one method's row of the budget table: MiB of tensors, all clients together."""
    traffic, count = told.traffic, max(1, len(told.reports))
    row: dict[str, Any] = {
        "method": name,
        "rounds": len(told.reports),
        "uplink_mib_a_round": traffic.uplink_bytes / count / MIB,
        "downlink_mib_a_round": traffic.downlink_bytes / count / MIB,
        "uplink_mib": traffic.uplink_bytes / MIB,
        "downlink_mib": traffic.downlink_bytes / MIB,
        "catchup_mib": traffic.catchup_bytes / MIB,
        "total_mib": traffic.total_bytes / MIB,
        "most_of_one_client_mib": told.most_of_one_client / MIB,
        "is_exact": told.is_exact,
        "all_answer": told.all_answer,
        "is_whole": len(told.reports) == num_rounds,
        "stop_reason": told.stop_reason or "",
    }
    return row if told.seconds is None else row | {"hours": told.seconds / HOUR_S}
