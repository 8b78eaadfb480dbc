"""Flower's own simulation runtime: the ClientApp in Ray's worker processes, under a SuperLink of our own."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.problem import Problem
from experiments.runtimes import flower
from experiments.runtimes.processes import Processes
from experiments.runtimes.superlink import start_superlink
from experiments.server import Watcher, interrupted
from experiments.settings import Settings


@dataclass
class Config:
    """Settings of the simulation.

    num_cpus: cores that one client takes; with fewer than there are, several clients run at once.
    num_gpus: the share of an accelerator that one client takes.
    """

    num_cpus: int = 1
    num_gpus: float = 0.0


@dataclass(frozen=True)
class Simulation:
    """One run: a SuperLink is started for it and stopped after it."""

    config: Config

    def run(self, settings: Settings, problem: Problem, folder: Path, watcher: Watcher) -> dict[str, Any]:
        """Run or continue what the settings describe, in `folder`, and return its summary."""
        with interrupted(settings, problem, folder), simulation_superlink(folder) as processes:
            return self.submit(processes, settings, folder, watcher)

    def submit(self, processes: Processes, settings: Settings, folder: Path, watcher: Watcher) -> dict[str, Any]:
        """Run on a SuperLink that is there."""
        federation = {
            "num-supernodes": settings.num_clients,
            "client-resources-num-cpus": self.config.num_cpus,
            "client-resources-num-gpus": self.config.num_gpus,
        }
        run = flower.submit(processes, settings, folder, federation)
        return flower.follow(processes, run, settings, folder, watcher)


def simulation_superlink(folder: Path) -> AbstractContextManager[Processes]:
    """Return the programs of a simulation, to be used in a `with` block: one SuperLink with its files in `folder`."""
    return start_superlink(folder / "flower", ["--simulation", "--insecure"], root_certificates=None)


def build(config: Config) -> Simulation:
    """Return the runtime. Raises ValueError for settings that make no sense."""
    if config.num_cpus < 1 or config.num_gpus < 0:
        raise ValueError(
            f"runtime.num_cpus={config.num_cpus} must be at least 1, runtime.num_gpus={config.num_gpus} not negative"
        )
    return Simulation(config)
