"""What the server remembers between rounds beside the chain, and the budget that it keeps to."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedraclora.ledger import MIB, LedgerRow, Traffic, bytes_by_partition, summarize


class BudgetTooSmall(ValueError):
    """Not even one round fits the budget."""


@dataclass(frozen=True)
class Budget:
    """Limits on tensor bytes: of all traffic, of the uplink, and of any one client; None is no limit."""

    total_bytes: float | None = None
    uplink_bytes: float | None = None
    per_client_bytes: float | None = None


@dataclass
class ServerState:
    """The server's memory after `round` rounds; with the chain it is all that a run needs to go on.

    The handshake is round 0, and -1 says that not even that has been.

    By partition: `held` counts the closed links that a client is known to hold, `last_used` is the last round whose
    reply was used (where its state starts from), `spent` its tensor bytes so far.
    """

    round: int = -1
    traffic: Traffic = field(default_factory=Traffic)
    held: dict[int, int] = field(default_factory=dict)
    last_used: dict[int, int] = field(default_factory=dict)
    spent: dict[int, int] = field(default_factory=dict)

    def charge(self, rows: list[LedgerRow]) -> Traffic:
        """Add the rows of a round to the sums and return the round's own traffic."""
        traffic = summarize(rows)
        self.traffic = self.traffic + traffic
        for partition, num_bytes in bytes_by_partition(rows).items():
            self.spent[partition] = self.spent.get(partition, 0) + num_bytes
        return traffic

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "ServerState":
        """Return the state that `to_json` wrote, after a trip through JSON (which turns integer keys into text)."""
        by_partition = {name: _integer_keys(value[name]) for name in ("held", "last_used", "spent")}
        return ServerState(round=value["round"], traffic=Traffic(**value["traffic"]), **by_partition)


def _integer_keys(mapping: Mapping[str, int]) -> dict[int, int]:
    return {int(key): number for key, number in mapping.items()}


def exceeded(budget: Budget, state: ServerState, down: Mapping[int, int], up_each: int) -> str | None:
    """Return which limit the next round would break, in words, or None.

    `down` holds the downlink bytes by client of the cohort, `up_each` what each of them would send.
    """
    uplink = up_each * len(down)
    total = sum(down.values()) + uplink
    most = max((state.spent.get(partition, 0) + size + up_each for partition, size in down.items()), default=0)
    checks = (
        ("budget_mib", budget.total_bytes, state.traffic.total_bytes + total, total),
        ("uplink_mib", budget.uplink_bytes, state.traffic.uplink_bytes + uplink, uplink),
        ("per_client_mib", budget.per_client_bytes, most, most),
    )
    for name, limit, after, cost in checks:
        if limit is not None and after > limit:
            return f"the next round takes {_mib(cost)} MiB and would bring {name} to {_mib(after)} of {_mib(limit)} MiB"
    return None


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:.4g}"
