"""Finished comparisons as small data: what figures and tables are made of, without models, ledgers and logs.

A stored comparison is a folder with three files: `rounds.csv.gz` (every run's rounds), `ledger.csv` (sums by kind) and
`runs.json` (summaries with seeds, versions and commit; the settings that all runs share, and those that differ).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.results import Runs, load_runs
from fedraclora.files import write_atomically

ROUNDS, LEDGER, ABOUT = "rounds.csv.gz", "ledger.csv", "runs.json"
# Where files lie is another machine's business; of what was read the name is kept.
PLACES = ("out", "resume")
FILES = (".path", "start_from", "devices")
# Enough digits for any figure, and half the bytes.
DIGITS = 6


def is_stored(folder: Path) -> bool:
    """Return whether a folder holds a stored comparison."""
    return (folder / ABOUT).is_file()


def store(runs: Runs, folder: Path) -> None:
    """Write a comparison's runs as small data. The same runs give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rounds = runs.rounds.dropna(axis="columns", how="all")
    for name in rounds.select_dtypes("float").columns:
        rounds[name] = rounds[name].map(_rounded)
    # No time stamp, so that data that did not change is no change.
    rounds.to_csv(folder / ROUNDS, index=False, compression={"method": "gzip", "mtime": 0})
    runs.ledger.to_csv(folder / LEDGER, index=False)
    settings = [_without_places(each) for each in runs.settings]
    shared = {key: value for key, value in settings[0].items() if all(_has(each, key, value) for each in settings)}
    about = {
        # An error's text may name folders.
        "summaries": [{key: value for key, value in each.items() if key != "error"} for each in runs.summaries],
        "shared_settings": shared,
        "settings": [{key: value for key, value in each.items() if key not in shared} for each in settings],
    }
    write_atomically(folder / ABOUT, (json.dumps(about, indent=1, sort_keys=True) + "\n").encode())


def read_runs(folders: Sequence[Path]) -> Runs:
    """Return the runs of finished runs' folders, or of stored comparisons. Raises ValueError for both at once."""
    stored = [folder for folder in folders if is_stored(folder)]
    if stored and len(stored) < len(folders):
        raise ValueError(f"{stored[0]} is a stored comparison; give such folders, or those of runs, not both")
    return load_stored(folders) if stored else load_runs(folders)


def load_stored(folders: Sequence[Path]) -> Runs:
    """Return the runs of stored comparisons. Raises FileNotFoundError for a folder that holds none."""
    for folder in folders:
        missing = [name for name in (ROUNDS, LEDGER, ABOUT) if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder} holds no stored comparison: {', '.join(missing)} is missing")
    abouts: list[dict[str, Any]] = [json.loads((folder / ABOUT).read_text(encoding="utf-8")) for folder in folders]
    rounds = pd.concat([pd.read_csv(folder / ROUNDS, dtype={"method": str}) for folder in folders])
    for column in ("test_accuracy", "test_loss"):
        rounds[column] = rounds[column].astype(float) if column in rounds else float("nan")
    return Runs(
        rounds=rounds,
        ledger=pd.concat([pd.read_csv(folder / LEDGER, dtype={"method": str}) for folder in folders]),
        summaries=[summary for about in abouts for summary in about["summaries"]],
        label_counts=pd.DataFrame(),
        settings=[about["shared_settings"] | own for about in abouts for own in about["settings"]],
    )


def _without_places(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in PLACES and not _is_of_a_machine(key)}
    named = {key: Path(value).name for key, value in kept.items() if key.endswith(FILES) and isinstance(value, str)}
    return kept | named


def _is_of_a_machine(key: str) -> bool:
    return key.startswith("runtime.") and key != "runtime.name"


def _rounded(value: float) -> float:
    return value if math.isnan(value) else float(f"{value:.{DIGITS}g}")


def _has(settings: dict[str, Any], key: str, value: object) -> bool:
    return key in settings and bool(settings[key] == value)
