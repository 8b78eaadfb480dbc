"""A run's `summary.json`, made from the tables on disk."""

import functools
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.recorder import Recorder
from experiments.settings import Settings, name_of
from fedraclora.files import write_json

PACKAGES = ("fedraclora", "flwr", "numpy", "torch")
BYTE_SUMS = ("uplink", "downlink", "catchup", "total", "uplink_record", "downlink_record")


def write_summary(recorder: Recorder, settings: Settings, known: dict[str, Any]) -> dict[str, Any]:
    """Write `summary.json` and return it; `known` holds what the tables do not say: status and digests."""
    rounds = pd.read_csv(recorder.folder / "rounds.csv")
    evaluated, last = rounds.dropna(subset=["test_loss"]), rounds.iloc[-1]
    summary = {
        "method": name_of(settings),
        "seed": settings.seed,
        "num_rounds": int(last["round"]),
        "final_test_accuracy": _last(evaluated["test_accuracy"]),
        "final_test_loss": _last(evaluated["test_loss"]),
        "final_personal_accuracy": _last(rounds["personal_accuracy"].dropna()),
        "mean_aggregation_gap": _mean(rounds["aggregation_gap"].dropna()),
        "epsilon": _last(rounds["epsilon"].dropna()),
        **{f"{name}_bytes": int(last[f"cum_{name}_bytes"]) for name in BYTE_SUMS},
        "targets": {str(target): first_crossing(rounds, target) for target in settings.target_accuracies},
        "simulated_s": _last(rounds["cum_simulated_s"]),
        "wall_s": round(recorder.wall_s, 3),
        "commit": commit(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        **known,
    }
    write_json(recorder.folder / "summary.json", summary)
    return summary


@functools.cache
def commit() -> str | None:
    """Return the commit of the checkout that this program runs from, with `-dirty` where files differ from it."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def _last(values: "pd.Series[float]") -> float | None:
    return None if values.empty or pd.isna(values.iloc[-1]) else float(values.iloc[-1])


def _mean(values: "pd.Series[float]") -> float | None:
    return None if values.empty else float(values.mean())


def first_crossing(rounds: pd.DataFrame, target: float) -> dict[str, int | float] | None:
    """Return the round that first reached a test accuracy and the bytes up to its end, or None.

    With `simulated_s` up to there, too, where time is simulated.
    """
    reached = rounds[rounds["test_accuracy"] >= target]
    if reached.empty:
        return None
    first = reached.iloc[0]
    simulated_s = first["cum_simulated_s"]
    return {
        "round": int(first["round"]),
        "uplink_bytes": int(first["cum_uplink_bytes"]),
        "total_bytes": int(first["cum_total_bytes"]),
        **({} if pd.isna(simulated_s) else {"simulated_s": float(simulated_s)}),
    }
