"""The console command `fedraclora`: finds the application's folders and hands over to `experiments.cli`."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

APP_FOLDER = Path(__file__).resolve().parent / "_app"


def main() -> int:
    """Return the exit code of `experiments.cli.main`.

    A wheel keeps `strategies`, `clients` and `experiments` in `fedraclora/_app`; a checkout has no such folder and
    finds the three beside `fedraclora`.
    """
    if APP_FOLDER.is_dir():
        # First on the path: another distribution may have installed one of these common names.
        sys.path.insert(0, str(APP_FOLDER))
    # By name, because this package imports no layer above it.
    run_command: Callable[[], int] = importlib.import_module("experiments.cli").main
    return run_command()
