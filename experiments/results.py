"""Finished runs read back from their folders; nothing here trains or sends."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from experiments.outcomes import AT_BUDGET, DIVERGED, FINISHED

NEEDED_FILES = ("settings.yaml", "rounds.csv", "ledger.csv", "summary.json")
LEDGER_KEYS = ["method", "seed", "direction", "kind"]


@dataclass(frozen=True)
class Runs:
    """Hold several finished runs, in the order in which they were given.

    `rounds` is every `rounds.csv` one below the other. `ledger` holds the sums of `parameters`, `tensor_bytes` and
    `record_bytes` by method, seed, direction and kind. `label_counts` is that of the first run. `settings` holds one
    flat mapping a run, with dotted keys. `label_counts` is empty for regression data.
    """

    rounds: pd.DataFrame
    ledger: pd.DataFrame
    summaries: list[dict[str, Any]]
    label_counts: pd.DataFrame
    settings: list[dict[str, Any]]

    @property
    def methods(self) -> list[str]:
        """Return the methods in the order of their first run."""
        return list(dict.fromkeys(str(summary["method"]) for summary in self.summaries))

    @property
    def metric(self) -> str:
        """Return the column that the report compares: `test_accuracy`, or `test_loss` where no run has an accuracy."""
        return "test_accuracy" if bool(self.rounds["test_accuracy"].notna().any()) else "test_loss"

    def of(self, method: str) -> list[pd.DataFrame]:
        """Return the rounds of a method, one frame a seed, sorted by round."""
        rows = self.rounds[self.rounds["method"] == method]
        return [rows[rows["seed"] == seed].sort_values("round") for seed in rows["seed"].unique()]

    def evaluated(self, method: str) -> list[pd.DataFrame]:
        """Return the rounds of a method in which the metric was measured, one frame a seed, sorted by round."""
        return [rows[rows[self.metric].notna()] for rows in self.of(method)]

    def summary_values(self, method: str, key: str) -> list[float]:
        """Return what the summaries of a method's runs hold under `key`, of those that hold anything."""
        values = [summary.get(key) for summary in self.summaries if summary["method"] == method]
        return [float(value) for value in values if value is not None]

    def num_unfinished(self, method: str) -> int:
        """Return how many runs of a method ended before their last round, and not at their budget."""
        ends = [summary["status"] for summary in self.summaries if summary["method"] == method]
        return sum(end not in (FINISHED, AT_BUDGET) for end in ends)

    def has_diverged(self, method: str, seed: int) -> bool:
        """Return whether a method's run with that seed ended by NaN or infinity."""
        return any(
            summary["status"] == DIVERGED
            for summary in self.summaries
            if (str(summary["method"]), int(summary["seed"])) == (method, seed)
        )

    def is_global(self, method: str) -> bool:
        """Return whether a method makes one model for all clients, which is what the test metric is of."""
        return all(summary.get("is_global", True) for summary in self.summaries if summary["method"] == method)

    def measured(self, method: str, column: str) -> list[pd.DataFrame]:
        """Return the rounds of a method in which a column has a value, a frame for each seed with any, by round."""
        if column not in self.rounds:
            return []
        frames = [rows[rows[column].notna()] for rows in self.of(method)]
        return [rows for rows in frames if len(rows)]


def load_runs(folders: Sequence[Path]) -> Runs:
    """Return the finished runs in `folders`.

    Raises FileNotFoundError for a folder that lacks a file of the output contract, and ValueError for no folder, for
    two runs with the same method and seed, and for a run that was never evaluated.
    """
    if not folders:
        raise ValueError("no run folder was given; a report needs at least one finished run")
    for folder in folders:
        _check_files(folder)
    summaries = [json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in folders]
    _check_distinct(folders, summaries)
    runs = Runs(
        rounds=pd.concat([_read_rounds(folder, of) for folder, of in zip(folders, summaries, strict=True)]),
        ledger=pd.concat([_read_ledger(folder, of) for folder, of in zip(folders, summaries, strict=True)]),
        summaries=summaries,
        label_counts=_read_label_counts(folders[0]),
        settings=[_read_settings(folder) for folder in folders],
    )
    _check_evaluated(runs)
    return runs


def _read_label_counts(folder: Path) -> pd.DataFrame:
    path = folder / "label_counts.csv"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


def _check_files(folder: Path) -> None:
    missing = [name for name in NEEDED_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is no finished run: {', '.join(missing)} is missing; "
            f"a finished run holds {', '.join(NEEDED_FILES)}"
        )


def _check_distinct(folders: Sequence[Path], summaries: Sequence[dict[str, Any]]) -> None:
    seen: dict[tuple[str, int], Path] = {}
    for folder, summary in zip(folders, summaries, strict=True):
        key = (str(summary["method"]), int(summary["seed"]))
        if key in seen:
            raise ValueError(
                f"{seen[key]} and {folder} both hold method {key[0]} with seed {key[1]}; "
                "a report takes one run for each method and seed"
            )
        seen[key] = folder


def _check_evaluated(runs: Runs) -> None:
    for method in runs.methods:
        for every, rows in zip(runs.of(method), runs.evaluated(method), strict=True):
            if rows.empty:
                seed = every["seed"].iloc[0]
                raise ValueError(
                    f"method {method}, seed {seed}: rounds.csv has no {runs.metric}, which the report compares; "
                    "at least one evaluated round is needed"
                )


def _read_rounds(folder: Path, summary: dict[str, Any]) -> pd.DataFrame:
    # The summary names the method as text; a method called 1 must not turn into a number in one file only.
    rows = pd.read_csv(folder / "rounds.csv", dtype={"method": str})
    return rows.assign(
        method=str(summary["method"]),
        seed=int(summary["seed"]),
        test_accuracy=rows["test_accuracy"].astype(float),
        test_loss=rows["test_loss"].astype(float),
    )


def _read_ledger(folder: Path, summary: dict[str, Any]) -> pd.DataFrame:
    rows = pd.read_csv(folder / "ledger.csv").assign(method=str(summary["method"]), seed=int(summary["seed"]))
    sums = rows.groupby(LEDGER_KEYS, as_index=False)[["parameters", "tensor_bytes", "record_bytes"]]
    return sums.sum()


def _read_settings(folder: Path) -> dict[str, Any]:
    tree = OmegaConf.to_container(OmegaConf.load(folder / "settings.yaml"))
    return _flatten(tree, "")


def _flatten(tree: object, prefix: str) -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
