"""Simulated time: a device for each client turns bytes and local steps into seconds.

A message takes its device's latency and its bytes over the link; the bytes are those of the whole serialised message
(`strategies/wire.py`), which are what a link carries. All clients of a round work at the same time. A synchronous round
ends with its last answer, or at the deadline where some have not answered by then. Not modelled: the server's own link
and its own work, which take no time, and links that several clients share.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from math import isfinite
from pathlib import Path

import pandas as pd

from experiments.settings import Settings
from fedraclora.plugins import nearest
from fedraclora.seeding import derive_seed, generator, stream

BITS_PER_BYTE, MEGA = 8, 1e6
# What `devices` says where no time is simulated.
NO_DEVICES = "none"
HANDSHAKE = 0


@dataclass(frozen=True)
class Device:
    """One client's link and speed.

    Rates are in Mbit/s (10^6 bits a second), `latency_s` is that of one message one way, `steps_per_s` counts local
    steps. `availability` is the probability that the client can be reached in a round, `dropout` that a client which
    was asked does not answer.
    """

    uplink_mbps: float
    downlink_mbps: float
    latency_s: float
    steps_per_s: float
    availability: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no device."""
        for name in ("uplink_mbps", "downlink_mbps", "steps_per_s"):
            value = getattr(self, name)
            if not (value > 0 and isfinite(value)):
                raise ValueError(f"{name}={value} must be positive and finite")
        if not (self.latency_s >= 0 and isfinite(self.latency_s)):
            raise ValueError(f"latency_s={self.latency_s} must be finite, and at least 0")
        for name in ("availability", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a probability and must lie in [0, 1]")


# Rates and latencies (half a round trip) of `lte` and `broadband`: the Speedtest Global Index of September 2020, when
# mobile was mostly LTE: 36 Mbit/s down, 11 up and 40 ms; fixed lines 86 down, 46 up and 21 ms. Those of `datacentre`:
# what cloud providers give a common virtual machine, and two machines of one region.
# Steps: a batch of 32 through an MLP of 200,000 weights takes about 4e7 operations, of which a phone does some 4e9 a
# second, a laptop 2e10; on an accelerator the launches of a step take half a millisecond. Larger models take longer:
# measure yours, and write a CSV.
PRESETS: Mapping[str, Device] = {
    "lte": Device(uplink_mbps=10, downlink_mbps=35, latency_s=0.02, steps_per_s=100),
    "broadband": Device(uplink_mbps=45, downlink_mbps=85, latency_s=0.01, steps_per_s=500),
    "datacentre": Device(uplink_mbps=10_000, downlink_mbps=10_000, latency_s=0.0005, steps_per_s=2000),
}
# A third of the clients each.
MIXED = "mixed"

_COLUMNS = tuple(item.name for item in fields(Device))
_REQUIRED = tuple(item.name for item in fields(Device) if item.default is MISSING)
_CLIENT = "client"


# ---- time


def pair_time(device: Device, down_bytes: int, up_bytes: int, steps: int) -> float:
    """Return the seconds from a message's leaving the server to its answer's arrival there."""
    received = device.latency_s + BITS_PER_BYTE * down_bytes / (MEGA * device.downlink_mbps)
    trained = steps / device.steps_per_s
    return received + trained + device.latency_s + BITS_PER_BYTE * up_bytes / (MEGA * device.uplink_mbps)


def round_end(busy: Mapping[int, float], deadline_s: float, *, silent: Collection[int] = ()) -> float:
    """Return when a synchronous round ends; `deadline_s` 0 is no deadline.

    `busy` holds the second at which each client's answer comes, or would come from a `silent` one: without a deadline
    the server learns of the loss then, with one it waits for it. With nobody to ask a round lasts until the deadline.
    """
    last = max(busy.values(), default=deadline_s)
    return deadline_s if deadline_s and (silent or last > deadline_s) else last


def round_time(
    devices: Sequence[Device],
    down_bytes: Mapping[int, int],
    up_bytes: Mapping[int, int],
    steps: Mapping[int, int],
    deadline_s: float = 0.0,
) -> float:
    """Return the seconds of a round in which every client of `down_bytes` is sent one message and answers it.

    All by partition; what `up_bytes` and `steps` do not name is 0.
    """
    busy = {
        who: pair_time(devices[who], size, up_bytes.get(who, 0), steps.get(who, 0)) for who, size in down_bytes.items()
    }
    return round_end(busy, deadline_s)


class Timeline:
    """The clock of a run: who can be reached in a round, whose answer comes in time, and how long a round lasts.

    Coins depend on the run's root seed, the round and the partition alone, so a resumed run goes on with the same. In
    the handshake everybody is there and answers.
    """

    def __init__(self, devices: Sequence[Device], *, seed: int, deadline_s: float = 0.0) -> None:
        self.devices, self._deadline_s, self._root = list(devices), deadline_s, _root(seed)
        self._round: int | None = None
        self._busy: dict[int, float] = {}
        self._silent: set[int] = set()

    def reaches(self, round: int, partition: int) -> bool:
        """Return whether a client can be reached in a round."""
        return round == HANDSHAKE or self._coin("availability", round, partition) < self.devices[partition].availability

    def receives(self, round: int, partition: int, *, down_bytes: int, up_bytes: int, steps: int) -> bool:
        """Note that a client was sent a message and made an answer; return whether the server gets it in time.

        A client's next message of the same round, if any, leaves when its answer to the one before has come.
        """
        if round != self._round:
            self._round, self._busy, self._silent = round, {}, set()
        took = pair_time(self.devices[partition], down_bytes, up_bytes, steps)
        self._busy[partition] = self._busy.get(partition, 0.0) + took
        if round == HANDSHAKE:
            return True
        if self._coin("dropout", round, partition) < self.devices[partition].dropout:
            self._silent.add(partition)
            return False
        return not self._deadline_s or self._busy[partition] <= self._deadline_s

    def seconds(self, round: int) -> float:
        """Return how long a round lasted. The handshake has no deadline."""
        deadline_s = 0.0 if round == HANDSHAKE else self._deadline_s
        is_known = round == self._round
        return round_end(self._busy if is_known else {}, deadline_s, silent=self._silent if is_known else ())

    def _coin(self, name: str, round: int, partition: int) -> float:
        """Return a number in [0, 1)."""
        return float(generator(derive_seed(self._root, name, "round", round, "client", partition)).random())


def _root(seed: int) -> int:
    """Return the seed of all that is drawn about devices: who takes part is decided in the cohort's stream."""
    return derive_seed(stream(seed, "cohort"), "devices")


# ---- where devices come from


def timeline_of(settings: Settings) -> Timeline | None:
    """Return the clock of a run, None where no time is simulated. Raises ValueError as `load_devices`."""
    devices = load_devices(settings.devices, settings.num_clients, settings.seed)
    return Timeline(devices, seed=settings.seed, deadline_s=settings.deadline_s) if devices else None


def load_devices(text: str, num_clients: int, seed: int) -> list[Device]:
    """Return the device of each partition: a preset's for all, thirds (`mixed`), or the rows of a CSV file.

    `none` gives no devices. Raises ValueError for a name that is unknown and for a file that cannot be used.
    """
    if text == NO_DEVICES:
        return []
    if text in PRESETS:
        return [PRESETS[text]] * num_clients
    if text == MIXED:
        order, kinds = generator(derive_seed(_root(seed), MIXED)).permutation(num_clients), list(PRESETS.values())
        return [kinds[place % len(kinds)] for place in order]
    if text.endswith(".csv"):
        try:
            return _devices_of(_read_table(Path(text)), num_clients)
        except ValueError as error:
            raise ValueError(f"devices={text}: {error}") from error
    raise ValueError(
        f"devices={text!r} is neither a preset nor a .csv file; {nearest(text, [*PRESETS, MIXED, NO_DEVICES])}"
    )


def device_table(devices: Sequence[Device]) -> pd.DataFrame:
    """Return the devices as a table that `load_devices` would read from a file."""
    table = pd.DataFrame([asdict(device) for device in devices], columns=list(_COLUMNS), dtype=float)
    table.insert(0, _CLIENT, range(len(table)))
    return table


def _read_table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, skipinitialspace=True)
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from error
    missing = [name for name in _REQUIRED if name not in table]
    if missing:
        raise ValueError(f"columns {missing} are missing; it holds {list(table)}")
    unknown = [name for name in table if name not in (_CLIENT, *_COLUMNS)]
    if unknown:
        # A column that is misspelt must not count as left out.
        raise ValueError(f"column {unknown[0]!r} is unknown; {nearest(str(unknown[0]), [_CLIENT, *_COLUMNS])}")
    if table.empty:
        raise ValueError("it holds no row")
    for name in table:
        if not pd.api.types.is_numeric_dtype(table[name]) or table[name].isna().any():
            raise ValueError(f"column {name!r} must hold a number in every row")
    return table


def _devices_of(table: pd.DataFrame, num_clients: int) -> list[Device]:
    found: list[Device] = []
    for number, row in enumerate(table.to_dict("records")):
        try:
            found.append(Device(**{name: float(row[name]) for name in _COLUMNS if name in row}))
        except ValueError as error:
            # As a text editor counts: the header is line 1.
            raise ValueError(f"line {number + 2}: {error}") from error
    if _CLIENT not in table:
        return [found[partition % len(found)] for partition in range(num_clients)]
    clients = list(table[_CLIENT])
    if len(set(clients)) < len(clients):
        raise ValueError("column 'client' names a client twice")
    by_client = dict(zip(clients, found, strict=True))
    without = [partition for partition in range(num_clients) if partition not in by_client]
    if without:
        raise ValueError(f"client {without[0]} has no row; column 'client' must name each of 0 to {num_clients - 1}")
    return [by_client[partition] for partition in range(num_clients)]
