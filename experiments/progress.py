"""What a running program shows: a live line on a terminal, one log line a round elsewhere."""

import logging
from collections.abc import Mapping
from math import isnan
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fedraclora.ledger import MIB

log = logging.getLogger("fedraclora")


class Display:
    """A progress bar of the rounds of one run after the other; use it as a context manager.

    With `logs_rounds` it writes a line a round where nobody watches live, without it a line at the end of each run.
    """

    def __init__(self, console: Console, *, logs_rounds: bool) -> None:
        self._is_live, self._logs_rounds = console.is_terminal, logs_rounds
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not self._is_live)
        self._task = self._progress.add_task("", total=None, state="")
        self._title = self._state = ""

    def __enter__(self) -> "Display":
        """Start to show."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()

    def start_run(self, title: str) -> None:
        """Begin a new run."""
        self._title = title
        self._progress.reset(self._task, description=title, state="")

    def end_run(self) -> None:
        """Write the run's last state where its rounds were not written."""
        if not self._logs_rounds:
            log.info("%s: %s", self._title, self._state)

    def on_round(self, row: dict[str, Any], num_rounds: int) -> None:
        """Show one round."""
        self._state = state = (
            f"round {row['round']}/{num_rounds}  {_score(row)}  up {row['cum_uplink_bytes'] / MIB:.3f} MiB"
        )
        self._progress.update(self._task, total=num_rounds, completed=row["round"], state=state)
        if not self._is_live and self._logs_rounds:
            log.info("%s: %s", self._title, state)


def _score(row: Mapping[str, Any]) -> str:
    parts = []
    if row.get("test_accuracy") is not None:
        parts.append(f"accuracy {row['test_accuracy']:.3f}")
    elif row.get("test_loss") is not None:
        parts.append(f"loss {row['test_loss']:.3g}")
    return "  ".join([*parts, *beside(row, "personal_accuracy", "epsilon")])


def beside(row: Mapping[str, Any], personal: str, epsilon: str) -> list[str]:
    """Return in words what only some runs have: the entries of `row` under these names, where they hold a number."""
    known = {name: row[name] for name in (personal, epsilon) if row.get(name) is not None and not isnan(row[name])}
    words = {personal: "personal accuracy {:.3f}", epsilon: "epsilon {:.3g}"}
    return [words[name].format(value) for name, value in known.items()]


def start_logging(console: Console) -> None:
    """Send the project's log lines to `console`, and silence Flower's own below errors."""
    # Lines that go to a file keep their length.
    is_live = console.is_terminal
    handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False)
    log.handlers = [handler if is_live else logging.StreamHandler(console.file)]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("flwr").setLevel(logging.ERROR)
