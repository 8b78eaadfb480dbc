"""The ledger: what every message cost, and the sums that people ask for."""

from collections.abc import Iterable
from dataclasses import dataclass

MIB = 2**20

UP, DOWN = "up", "down"
KINDS = ("setup", "update", "dense", "catch_up", "snapshot", "evaluate", "metrics", "control", "variates")
CATCH_UP_KINDS = ("catch_up", "snapshot")


@dataclass(frozen=True)
class LedgerRow:
    """One message's share of one kind.

    `parameters` counts numbers, `tensor_bytes` their bytes as encoded (container headers not included),
    `record_bytes` the bytes of the serialised Flower message. A message's envelope and plain values are in the row of
    kind `metrics` (uplink) or `control` (downlink), or `setup` for the handshake, so that the rows of a message add
    up to the whole message.
    """

    round: int
    direction: str
    partition: int
    kind: str
    parameters: int
    tensor_bytes: int
    record_bytes: int


@dataclass(frozen=True)
class Traffic:
    """Bytes summed over messages; the first three count tensors, the others whole serialised messages."""

    uplink_bytes: int = 0
    downlink_bytes: int = 0
    catchup_bytes: int = 0
    uplink_record_bytes: int = 0
    downlink_record_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Return uplink plus downlink; the downlink includes what catching up cost."""
        return self.uplink_bytes + self.downlink_bytes

    def __add__(self, other: "Traffic") -> "Traffic":
        """Return the sums of two traffics."""
        return Traffic(*(mine + theirs for mine, theirs in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> tuple[int, ...]:
        return (
            self.uplink_bytes,
            self.downlink_bytes,
            self.catchup_bytes,
            self.uplink_record_bytes,
            self.downlink_record_bytes,
        )


def summarize(rows: Iterable[LedgerRow]) -> Traffic:
    """Return the traffic of some rows."""
    known = list(rows)
    up = [row for row in known if row.direction == UP]
    down = [row for row in known if row.direction == DOWN]
    return Traffic(
        uplink_bytes=sum(row.tensor_bytes for row in up),
        downlink_bytes=sum(row.tensor_bytes for row in down),
        catchup_bytes=sum(row.tensor_bytes for row in down if row.kind in CATCH_UP_KINDS),
        uplink_record_bytes=sum(row.record_bytes for row in up),
        downlink_record_bytes=sum(row.record_bytes for row in down),
    )


def bytes_by_partition(rows: Iterable[LedgerRow]) -> dict[int, int]:
    """Return the tensor bytes that each client sent and received."""
    totals: dict[int, int] = {}
    for row in rows:
        totals[row.partition] = totals.get(row.partition, 0) + row.tensor_bytes
    return totals
