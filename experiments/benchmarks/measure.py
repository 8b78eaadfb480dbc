"""Timing on a shared machine: engines take turns in one process, and each repetition says how busy the rest was."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Clock = Callable[[], float]


@dataclass(frozen=True)
class Repetition:
    """One turn of every engine: its seconds by engine, and the cores that all other processes kept busy meanwhile."""

    seconds: Mapping[str, float]
    foreign_cores: float


@dataclass(frozen=True)
class Timing:
    """The repetitions of one workload. A repetition counts as quiet below `QUIET_CORES` of foreign load."""

    repetitions: tuple[Repetition, ...]

    QUIET_CORES = 0.1

    @property
    def quiet(self) -> "Timing":
        """Return the quiet repetitions alone."""
        return Timing(tuple(item for item in self.repetitions if item.foreign_cores < self.QUIET_CORES))

    @property
    def foreign_cores(self) -> float:
        """Return the median foreign load in cores."""
        return statistics.median(item.foreign_cores for item in self.repetitions)

    def seconds(self, engine: str) -> float:
        """Return the median seconds of one round."""
        return statistics.median(item.seconds[engine] for item in self.repetitions)

    def ratio(self, slow: str, fast: str) -> float:
        """Return how many times longer `slow` takes than `fast`: the median of the ratios within a repetition."""
        return statistics.median(item.seconds[slow] / item.seconds[fast] for item in self.repetitions)


def time_in_turns(engines: Mapping[str, Callable[[], object]], repeats: int, clock: Clock) -> Timing:
    """Return the timing of `repeats` repetitions; in each, every engine does one round, after one round unmeasured."""
    for train in engines.values():
        train()
    return Timing(tuple(_repetition(engines, clock) for _ in range(repeats)))


def _repetition(engines: Mapping[str, Callable[[], object]], clock: Clock) -> Repetition:
    seconds = {}
    busy, own, wall = busy_seconds(), time.process_time(), time.perf_counter()
    for name, train in engines.items():
        began = clock()
        train()
        seconds[name] = clock() - began
    foreign = busy_seconds() - busy - (time.process_time() - own)
    return Repetition(seconds, max(0.0, foreign) / (time.perf_counter() - wall))


def busy_seconds(stat: Path = Path("/proc/stat")) -> float:
    """Return the seconds of CPU time that all processes of this machine have used since it started, in steps of 10 ms.

    Time that a hypervisor took away is counted, waiting is not. Returns 0 where the system does not tell.
    """
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
