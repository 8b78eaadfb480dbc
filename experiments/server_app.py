"""The ServerApp: settings from the run config, then the same rounds as in any other runtime.

`hydra` in the run config holds the overrides of the command line as one text, such as "method=full rounds=5".
"""

import logging
import shlex
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from experiments.folders import find_folder
from experiments.groups import compose
from experiments.problem import prepare
from experiments.server import serve
from experiments.settings import Settings

log = logging.getLogger("fedraclora")

app = ServerApp()


class LogRounds:
    """A watcher that logs one line a round."""

    def on_round(self, row: dict[str, Any], num_rounds: int) -> None:
        """Log a round's row of `rounds.csv`."""
        shown = ("num_ok", "num_failed", "num_missing", "train_loss", "test_accuracy", "uplink_bytes", "downlink_bytes")
        values = ", ".join(f"{name} {row[name]:.6g}" for name in shown if row.get(name) is not None)
        log.info("round %d of %d: %s", row["round"], num_rounds, values)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run config describes over Flower's grid."""
    _log_to_flower()
    settings = compose(shlex.split(str(context.run_config.get("hydra", ""))))
    folder = folder_of(settings)
    log.info("results go to %s", folder.resolve())
    serve(settings, prepare(settings), folder, LogRounds(), make_grid=lambda *_: grid)


def folder_of(settings: Settings) -> Path:
    """Return the folder of the run; one that is named may hold other files, but no other run.

    Raises ValueError where it holds a run that is not to be resumed.
    """
    if settings.out is None:
        return find_folder(settings)
    folder = Path(settings.out)
    if (folder / "state.json").exists() and not settings.resume:
        raise ValueError(f"out={folder} holds a run; continue it with resume=true, or name another folder")
    return folder


def _log_to_flower() -> None:
    """Let the project's lines appear in Flower's log, once."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fedraclora: %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
