"""A round's rules and its record: who takes part, when a round counts, what it cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, Message

from fedraclora.delivery import CATCH_UPS
from fedraclora.ledger import UP, LedgerRow, Traffic
from fedraclora.local_config import LocalConfig
from fedraclora.plan import Sending
from fedraclora.privacy import Privacy
from fedraclora.seeding import derive_seed, generator, stream
from fedraclora.server_rule import ServerRule
from strategies.merging import Robust
from strategies.state import Budget
from strategies.wire import record_bytes

WEIGHTINGS = ("examples", "uniform")
BROADCASTS = ("lazy", "eager")
QUERY_PARTITION = "query.partition"
QUERY_LINKS = "query.links"
# Stands in the ledger for a node that never said which partition it owns.
NOBODY = -1


@dataclass(frozen=True)
class RoundSettings:
    """How rounds are run: who takes part, how they train, and when a round counts.

    `fraction` of the `num_clients` partitions is sampled a round; a round with fewer than `min_replies` usable
    replies leaves the model unchanged; `weighting` is by `examples` or `uniform`; `seed` is the run's root seed.

    `catch_up` is how a client that missed links is brought up to date (`fedraclora.delivery.CATCH_UPS`); `broadcast`
    says whether clients outside the cohort get closed links each round (`eager`) or when next sampled (`lazy`).
    A reply whose tensors' Euclidean norm exceeds `max_norm` is refused. A round ends `timeout_s` after its messages
    went out, and the server waits `connect_s` for all clients before it begins with those that are there.

    `sending` is how updates travel up, `downlink` the compressor of what travels down (as text), and
    `whole_probability` that of MARINA's coin. `rule` is the server's optimiser, `robust` what takes the place of the
    mean, `privacy` what is hidden by noise; where `is_deployed` noise and cohorts come from the operating system's
    entropy. `ranks` and `lr_scales` are by partition (empty: the same for all), `alpha` is the run's where it is given.
    With `verify` each round measures how far what it merged is from the mean of the clients' products.
    """

    num_clients: int
    fraction: float
    local: LocalConfig
    seed: int
    min_replies: int = 1
    weighting: str = "examples"
    budget: Budget = field(default_factory=Budget)
    catch_up: str = "cheapest"
    broadcast: str = "lazy"
    max_norm: float = 1e6
    timeout_s: float = 3600.0
    connect_s: float = 120.0
    sending: Sending = field(default_factory=Sending)
    downlink: str = ""
    whole_probability: float = 0.1
    rule: ServerRule = field(default_factory=ServerRule)
    robust: Robust = field(default_factory=Robust)
    privacy: Privacy | None = None
    is_deployed: bool = False
    ranks: tuple[int, ...] = ()
    lr_scales: tuple[float, ...] = ()
    alpha: float | None = None
    verify: bool = False

    def __post_init__(self) -> None:
        """Refuse values with which no round can be run."""
        if self.num_clients < 1 or not 0 < self.fraction <= 1:
            raise ValueError(f"num_clients={self.num_clients} must be at least 1, fraction={self.fraction} in (0, 1]")
        if not 1 <= self.min_replies <= self.cohort_size:
            raise ValueError(f"min_replies={self.min_replies} must lie between 1 and the cohort's {self.cohort_size}")
        choices = (("weighting", WEIGHTINGS), ("catch_up", CATCH_UPS), ("broadcast", BROADCASTS))
        for name, valid in choices:
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; valid: {', '.join(valid)}")
        for name in ("max_norm", "timeout_s", "connect_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")

        for name in ("ranks", "lr_scales"):
            found = getattr(self, name)
            if found and (len(found) != self.num_clients or not min(found) > 0):
                raise ValueError(
                    f"{name} must be positive, one for each of num_clients={self.num_clients}; found {found}"
                )
        if not 0 < self.whole_probability <= 1:
            raise ValueError(f"whole_probability={self.whole_probability} must lie in (0, 1]")

    @property
    def cohort_size(self) -> int:
        """Return the clients sampled a round: the nearest whole number, at least one."""
        return max(1, round(self.fraction * self.num_clients))


@dataclass(frozen=True)
class RoundReport:
    """One round as it went. Round 0 is the handshake.

    `aggregation_gap` is measured where asked for. `personal_accuracy` is that of the clients' own models, after their
    local steps, on the examples that they held out. `clip` bounded the updates where privacy asks for it. `lost` is, by
    purpose, the mean share of what the clients remembered that the new link's basis cost.
    """

    round: int
    link: int
    num_clients: int = 0
    num_ok: int = 0
    num_failed: int = 0
    num_missing: int = 0
    num_retried: int = 0
    is_updated: bool = False
    has_diverged: bool = False
    train_loss: float = float("nan")
    aggregation_gap: float = float("nan")
    personal_accuracy: float = float("nan")
    clip: float = float("nan")
    lost: dict[str, float] = field(default_factory=dict)
    round_s: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)
    rows: list[LedgerRow] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)


def sample_cohort(seed: int, round: int, settings: RoundSettings) -> list[int]:
    """Return the sorted partitions of a round, drawn without replacement from the run's own cohort stream."""
    order = generator(derive_seed(stream(seed, "cohort"), "round", round))
    chosen = order.choice(settings.num_clients, size=settings.cohort_size, replace=False)
    return sorted(int(partition) for partition in chosen)


def flip_coin(seed: int, round: int, probability: float) -> bool:
    """Return MARINA's coin of a round, the same for all clients: whether they send everything."""
    coin = derive_seed(stream(seed, "batches"), "coin", round)
    return bool(generator(coin).random() < probability)


def ledger_rows(
    message: Message, round: int, direction: str, partition: int, *, content: Mapping[str, int] | None = None
) -> list[LedgerRow]:
    """Return the ledger rows of one message: one for each array record, named by kind, and one for all the rest.

    `content` is the `content_bytes` of its content, which messages with the same content need not count again.
    """
    parts = record_bytes(message, content=content)
    rest = "metrics" if direction == UP else "control"
    if message.metadata.message_type == QUERY_PARTITION:
        rest = "setup"
    rows = [LedgerRow(round, direction, partition, rest, 0, 0, parts.pop(""))]
    for kind, size in parts.items():
        arrays = list(message.content.array_records[kind].values())
        num_bytes = sum(_array_bytes(array) for array in arrays)
        rows.append(LedgerRow(round, direction, partition, kind, sum(map(_count, arrays)), num_bytes, size))
    return rows


def _count(array: Array) -> int:
    return int(np.prod(array.shape))


def _array_bytes(array: Array) -> int:
    """Return the bytes of an array's numbers; the bytes that came where they are fewer than its shape and type say."""
    try:
        stated = _count(array) * np.dtype(array.dtype).itemsize
    except TypeError:
        return len(array.data)
    return min(stated, len(array.data))
