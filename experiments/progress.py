"""What a running program shows: a live line on a terminal, one log line a round elsewhere."""

import logging
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

MIB = 2**20
log = logging.getLogger("fedraclora")


class Display:
    """A progress bar of rounds; use it as a context manager. `title` names the run that is shown."""

    def __init__(self, console: Console, *, num_runs: int = 1) -> None:
        self._is_live, self._num_runs, self._done = console.is_terminal, num_runs, 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not self._is_live)
        self._task = self._progress.add_task("", total=None, state="")
        self.title = ""

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
        self._done += 1
        self.title = title if self._num_runs == 1 else f"[{self._done}/{self._num_runs}] {title}"
        self._progress.reset(self._task, description=self.title, state="")

    def on_round(self, row: dict[str, Any], num_rounds: int) -> None:
        """Show one round."""
        state = f"round {row['round']}/{num_rounds}  {_score(row)}  up {row['cum_uplink_bytes'] / MIB:.3f} MiB"
        self._progress.update(self._task, total=num_rounds, completed=row["round"], state=state)
        if not self._is_live and (self._num_runs == 1 or row["round"] == num_rounds):
            log.info("%s: %s", self.title, state)


def _score(row: dict[str, Any]) -> str:
    if row.get("test_accuracy") is not None:
        return f"accuracy {row['test_accuracy']:.3f}"
    return f"loss {row['test_loss']:.3g}" if row.get("test_loss") is not None else ""


def start_logging(console: Console) -> None:
    """Send the project's log lines through `console`, and silence Flower's own below warnings."""
    log.handlers = [RichHandler(console=console, show_path=False, show_time=False, show_level=False)]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("flwr").setLevel(logging.ERROR)
