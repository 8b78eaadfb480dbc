"""What is installed here, which runtimes will work, and a round over the loopback interface to see it."""

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.groups import compose
from experiments.run import run
from experiments.runtimes.processes import free_port, program

PACKAGES = ("fedraclora", "flwr", "ray", "torch", "numpy", "hydra-core", "pandas", "flwr-datasets")
PROGRAMS = ("flwr", "flower-superlink", "flower-supernode", "flower-superexec")
SIMULATION = "runtime=simulation"
TINY = ("dataset=digits", "num_clients=2", "fraction=1", "rounds=1", "local_steps=2", "threads=1", "rank=2")
Check = Callable[[], str]


class Quiet:
    """A watcher that shows nothing."""

    def on_round(self, row: dict[str, Any], num_rounds: int) -> None:
        """Show nothing."""


def examine(console: Console) -> bool:
    """Show what works here, and return whether the in-process and the deployment runtime do.

    A simulation needs Ray, which is an extra; that it is missing is said and is no failure.
    """
    table = Table("", "", "", title="fedraclora doctor", show_header=False)
    works: dict[str, bool] = {}
    for name, check in _checks().items():
        with console.status(f"{name} ..."):
            try:
                works[name], said = True, check()
            except Exception as error:  # noqa: BLE001
                # Whatever is wrong, the other checks are still worth knowing.
                works[name], said = False, f"{type(error).__name__}: {error}"
        table.add_row(name, "[green]works" if works[name] else "[red]does not", said)
    console.print(table)
    return all(is_fine for name, is_fine in works.items() if name != SIMULATION)


def _checks() -> dict[str, Check]:
    return {
        "packages": _packages,
        "machine": _machine,
        "Flower's programs": _programs,
        "loopback ports": lambda: f"free: {free_port()}, {free_port()}",
        "clean-up": _clean_up,
        "runtime=in_process": lambda: _one_round("in_process"),
        SIMULATION: _simulation,
        "runtime=deployment": lambda: f"{_one_round('deployment')}: two nodes, one round",
    }


def _packages() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} missing")
    return f"Python {sys.version.split()[0]}, " + ", ".join(found)


def _machine() -> str:
    devices = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    return f"{torch.get_num_threads()} threads, accelerators: {', '.join(devices) or 'none'}, {free_gib:.0f} GiB free"


def _programs() -> str:
    return ", ".join(Path(program(name)).name for name in PROGRAMS)


def _clean_up() -> str:
    if not Path("/proc/self/environ").exists():
        return "no /proc here: programs that Flower's programs start are ended by those alone"
    return "whatever a run starts is ended with it, even where it is killed"


def _simulation() -> str:
    if importlib.util.find_spec("ray") is None:
        raise RuntimeError("Ray is not installed; install fedraclora with its extra [simulation]")
    return f"Ray {version('ray')} is installed"


def _one_round(runtime: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(compose([*TINY, f"runtime={runtime}"]), out=str(Path(folder) / "run"))
        summary = run(settings, Quiet())
        return f"accuracy {summary['final_test_accuracy']:.2f}, chain {summary['chain_digest'][:12]}"
