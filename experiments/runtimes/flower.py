"""Flower's command line as a runtime needs it: a connection, a submitted run, and what becomes of it.

The exit code of `flwr run` says nothing of the run, so its status is asked for until it has ended. What the run
computes is written by the ServerApp into the run's folder, and read from there.
"""

import json
import logging
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.groups import to_overrides
from experiments.outcomes import AT_BUDGET, FINISHED, error_of
from experiments.runtimes.app_folder import app_folder
from experiments.runtimes.processes import Processes, program
from experiments.server import Watcher
from experiments.settings import Settings
from fedraclora.files import read_json, write_json

CONNECTION, SUPERLINK = "fedraclora", "superlink"
POLL_S, ASK_S = 0.5, 10.0
ENDED = "finished:"
COMPLETED = "finished:completed"


@dataclass(frozen=True)
class Address:
    """Where a SuperLink listens, and the certificate that proves it (None: no encryption)."""

    host_port: str
    root_certificates: str | None = None


def environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's programs: a home of their own, nothing installed and nothing reported."""
    return {
        "FLWR_HOME": str(home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray knows no passwords: this is what keeps it to the loopback interface on other systems, and here, too.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # The user's own plug-ins lie in the current folder.
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
    }


def write_connection(home: Path, address: Address) -> None:
    """Write Flower's `config.toml` with one connection."""
    security = "insecure = true"
    if address.root_certificates is not None:
        security = f"root-certificates = {toml_string(str(Path(address.root_certificates).resolve()))}"
    named = [f"[superlink.{CONNECTION}]", f"address = {toml_string(address.host_port)}", security]
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text("\n".join(["[superlink]", f'default = "{CONNECTION}"', "", *named, ""]))


def toml_string(text: str) -> str:
    """Return a text as TOML writes it; a JSON string is one, but for the character DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_value(value: str | int) -> str:
    """Return a text or a number as TOML writes it."""
    return toml_string(value) if isinstance(value, str) else str(value)


def submit(processes: Processes, settings: Settings, folder: Path, federation: Mapping[str, object]) -> int:
    """Submit the run whose results go to `folder`, and return Flower's number for it."""
    config = folder / "flower" / "run_config.toml"
    overrides = to_overrides(with_folder(settings, folder))
    values = {"hydra": shlex.join(overrides), "replica-path": str((folder / "replicas").resolve())}
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("".join(f"{key} = {toml_string(value)}\n" for key, value in values.items()), encoding="utf-8")
    command = [program("flwr"), "run", str(app_folder(folder / "flower" / "app")), CONNECTION]
    command += ["--run-config", str(config), "--format", "json"]
    if federation:
        command += ["--federation-config", " ".join(f"{key}={value}" for key, value in federation.items())]
    printed = processes.run(command)
    try:
        return int(json.loads(printed[printed.index("{") :])["run-id"])
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"Flower did not accept the run: {printed.strip()}") from error


def with_folder(settings: Settings, folder: Path) -> Settings:
    """Return the settings with the folder's full path: the ServerApp runs in another process, elsewhere."""
    return replace(settings, out=str(folder.resolve()))


def follow(processes: Processes, run: int, settings: Settings, folder: Path, watcher: Watcher) -> dict[str, Any]:
    """Show the rounds as they are written until the run has ended, and return its summary.

    Flower's own counts of the run go to `flower/run.json`. Asking Flower starts a program of some seconds, so it is
    asked when the summary appears, and else now and then. Raises what ended the run in its own process, and
    RuntimeError where that is not known or our SuperLink has ended; a node that ends is the server's business.
    """
    shown, before, asked = last_round(folder), summary_stamp(folder), 0.0
    status = ""
    while not status.startswith(ENDED):
        processes.check(SUPERLINK)
        if time.monotonic() - asked > ASK_S or summary_stamp(folder) != before:
            described, asked = describe(processes, run), time.monotonic()
            status = str(described["status"])
            write_json(folder / "flower" / "run.json", described)
        # After the question, so that no row is missed that came before its answer.
        for row in rows_after(folder, shown):
            watcher.on_round(row, settings.rounds)
            shown = row["round"]
        time.sleep(POLL_S)
    return outcome(folder, status, processes.tail(SUPERLINK), before=before)


def summary_stamp(folder: Path) -> int:
    """Return when a folder's summary was written, in nanoseconds; 0 where there is none."""
    path = folder / "summary.json"
    return path.stat().st_mtime_ns if path.exists() else 0


def last_round(folder: Path) -> int:
    """Return the last round of the table in a folder, -1 where there is none."""
    rows = rows_after(folder, -1)
    return rows[-1]["round"] if rows else -1


def rows_after(folder: Path, round: int) -> list[dict[str, Any]]:
    """Return the whole rows of `rounds.csv` beyond a round, without the cells that are empty."""
    path = folder / "rounds.csv"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if not whole:
        return []
    table = pd.read_csv(StringIO(whole))
    rows = table[table["round"] > round].to_dict("records")
    return [{str(key): value for key, value in row.items() if not pd.isna(value)} for row in rows]


def describe(processes: Processes, run: int) -> dict[str, Any]:
    """Return what Flower says of a run: its status and the bytes that it counted.

    Raises RuntimeError where the SuperLink does not say.
    """
    printed = processes.run([program("flwr"), "ls", CONNECTION, "--run-id", str(run), "--format", "json"])
    try:
        described: dict[str, Any] = json.loads(printed[printed.index("{") :])["runs"][0]
    except (ValueError, LookupError) as error:
        raise RuntimeError(f"the SuperLink says nothing of run {run}: {printed.strip()}") from error
    return described


def stop(processes: Processes, run: int) -> None:
    """Stop a run."""
    processes.run([program("flwr"), "stop", str(run), CONNECTION, "--format", "json"])


def outcome(folder: Path, status: str, log: str, *, before: int) -> dict[str, Any]:
    """Return the summary of a run that ended well; raise what ended it otherwise.

    `before` is the stamp of the summary that was there when the run was submitted, which says nothing of this run. A
    SuperLink on another machine keeps the results there: then there is nothing to return.
    """
    is_new = summary_stamp(folder) != before
    summary: dict[str, Any] = read_json(folder / "summary.json") if is_new else {}
    if status == COMPLETED and summary.get("status") in (FINISHED, AT_BUDGET, None):
        if not summary:
            logging.getLogger("fedraclora").info("the results are on the SuperLink's machine, in %s", folder.resolve())
        return summary
    if "error" in summary:
        raise error_of(summary["status"], summary["error"])
    raise RuntimeError(f"Flower ended the run as {status}; the end of its log:\n{log}")
