"""One run: settings in, a folder with results out; it can be interrupted at any moment and resumed."""

from pathlib import Path
from typing import Any, Protocol

from experiments.folders import find_folder
from experiments.groups import GROUPS
from experiments.problem import Problem, prepare
from experiments.server import Watcher
from experiments.settings import Settings
from fedraclora.plugins import find


class Runtime(Protocol):
    """Where the clients run. A module in `experiments/runtimes` exports `Config` and `build(config) -> Runtime`."""

    def run(self, settings: Settings, problem: Problem, folder: Path, watcher: Watcher) -> dict[str, Any]:
        """Run or continue what the settings describe, in `folder`, and return its summary."""
        ...


def run(settings: Settings, watcher: Watcher) -> dict[str, Any]:
    """Run, or continue, what the settings describe, and return the summary that is written to `summary.json`.

    Raises ValueError before anything is written where the settings cannot be run, and Diverged where training does not
    stay finite. Whatever ends a run, its summary is written.
    """
    runtime: Runtime = find(GROUPS["runtime"], settings.runtime.name).build(settings.runtime)
    problem = prepare(settings)
    return runtime.run(settings, problem, find_folder(settings), watcher)
