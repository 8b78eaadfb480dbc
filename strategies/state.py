"""What the server remembers between rounds beside the chain, and the budget that it keeps to."""

import secrets
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from fedraclora.ledger import MIB, LedgerRow, Traffic, bytes_by_partition, summarize
from strategies.memory import Memory


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
    reply was used (where its state starts from), `spent` its tensor bytes so far. `draws_otherwise` lists those whose
    machines draw other factors and are sent them. `chain_id` names the chain to the clients, whatever becomes of the
    run and its nodes; it is made once, at random. `held_open` is the version whose open link a client still has, and
    `open_since` the version since which each factor of the open link has stood as it is.

    `clip` is the current bound on the norms where it adapts, `num_steps` the private local steps that each client has
    taken and `num_examples` the examples it took them on; `secret` is a seed that nobody else knows, for cohorts that
    must not be guessed. `memory` holds tensors and is written to a file of its own.
    """

    round: int = -1
    traffic: Traffic = field(default_factory=Traffic)
    held: dict[int, int] = field(default_factory=dict)
    last_used: dict[int, int] = field(default_factory=dict)
    spent: dict[int, int] = field(default_factory=dict)
    draws_otherwise: list[int] = field(default_factory=list)
    chain_id: str = field(default_factory=lambda: secrets.token_hex(16))
    held_open: dict[int, int] = field(default_factory=dict)
    open_since: dict[str, int] = field(default_factory=dict)
    clip: float | None = None
    num_steps: dict[int, int] = field(default_factory=dict)
    num_examples: dict[int, int] = field(default_factory=dict)
    secret: int = field(default_factory=lambda: secrets.randbits(62))
    memory: Memory = field(default_factory=Memory)

    def charge(self, rows: list[LedgerRow]) -> Traffic:
        """Add the rows of a round to the sums and return the round's own traffic."""
        traffic = summarize(rows)
        self.traffic = self.traffic + traffic
        for partition, num_bytes in bytes_by_partition(rows).items():
            self.spent[partition] = self.spent.get(partition, 0) + num_bytes
        return traffic

    def to_json(self) -> dict[str, Any]:
        """Return the state, but for its memory, as plain values."""
        parts = {name: deepcopy(getattr(self, name)) for name in (*_BY_PARTITION, *_PLAIN)}
        return {"traffic": asdict(self.traffic)} | parts

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "ServerState":
        """Return the state that `to_json` wrote, after a trip through JSON (which turns integer keys into text)."""
        parts: dict[str, Any] = {name: _integer_keys(value[name]) for name in _BY_PARTITION}
        parts |= {name: value[name] for name in _PLAIN}
        return ServerState(traffic=Traffic(**value["traffic"]), **parts)


_BY_PARTITION = ("held", "last_used", "spent", "held_open", "num_steps", "num_examples")
_PLAIN = ("round", "draws_otherwise", "chain_id", "open_since", "clip", "secret")


def _integer_keys(mapping: Mapping[str, int]) -> dict[int, int]:
    return {int(key): number for key, number in mapping.items()}


def exceeded(budget: Budget, state: ServerState, down: Mapping[int, int], up: Mapping[int, int]) -> str | None:
    """Return which limit the next round would break, in words, or None.

    `down` and `up` hold the bytes of the round by client; not all who are sent something answer with tensors.
    """
    uplink = sum(up.values())
    total = sum(down.values()) + uplink
    most = max((state.spent.get(who, 0) + size + up.get(who, 0) for who, size in down.items()), default=0)
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
