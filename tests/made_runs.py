"""Made-up runs, of which every byte and every accuracy is written here, to test what is read from finished runs."""

import json
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.results import load_runs

MIB = 2**20
WAYS = (("up", "uplink", ("update", "dense")), ("down", "downlink", ("update", "catch_up")))
VERSIONS = {"torch": "2.13.0", "flwr": "1.41.0"}


@dataclass
class Made:
    """A made-up run: accuracies by round (None: not evaluated), and the MiB each round after the first costs.

    `measured` has further columns of `rounds.csv`, a list each, and `summed` further entries of `summary.json`.
    """

    method: str
    accuracies: list[float | None]
    up: float = 1.0
    down: float = 2.0
    seed: int = 0
    status: str = "finished"
    settings: dict = field(default_factory=dict)
    losses: list[float] | None = None
    measured: dict[str, list[float | None]] = field(default_factory=dict)
    summed: dict = field(default_factory=dict)
    # Simulated seconds of each round, the first included; None: a folder from before time was simulated.
    seconds: float | None = None


def write_run(made: Made, folder: Path) -> Path:
    folder.mkdir(parents=True)
    num_rounds = len(made.losses or made.accuracies)
    rows = []
    for i in range(num_rounds):
        up, down = (int(made.up * MIB), int(made.down * MIB)) if i else (0, 0)
        row = {"method": made.method, "seed": made.seed, "round": i, "link": i, "num_clients": 4, "num_ok": 4}
        row |= {"num_failed": 0, "num_missing": 0, "is_updated": i > 0, "train_loss": 1.0}
        row["test_loss"] = made.losses[i] if made.losses else 1.0
        row["test_accuracy"] = None if made.losses else made.accuracies[i]
        row |= {"uplink_bytes": up, "downlink_bytes": down, "catchup_bytes": 0, "total_bytes": up + down}
        rows.append(row | {"uplink_record_bytes": up + 9 * (i > 0), "downlink_record_bytes": down + 9 * (i > 0)})
    rounds = pd.DataFrame(rows).assign(**made.measured)
    for name in [column for column in rounds if column.endswith("_bytes")]:
        rounds[f"cum_{name}"] = list(accumulate(rounds[name]))
    rounds = rounds.assign(round_s=0.5, simulated_s=made.seconds)
    if made.seconds is not None:
        rounds["cum_simulated_s"] = [made.seconds * (i + 1) for i in range(num_rounds)]
    rounds.to_csv(folder / "rounds.csv", index=False)
    write_ledger(rounds, folder)
    counts = pd.DataFrame({"partition": range(4), "0": [5, 1, 0, 2], "1": [0, 3, 4, 2], "<b>": [1, 1, 1, 1]})
    counts.to_csv(folder / "label_counts.csv", index=False)
    settings = {"method": {"name": made.method}, "seed": made.seed, "num_clients": 4, "optimizer": {"lr": 0.1}}
    (folder / "settings.yaml").write_text(json.dumps(settings | made.settings))
    write_summary(made, rounds, folder)
    return folder


def write_ledger(rounds: pd.DataFrame, folder: Path) -> None:
    rows = []
    for row in rounds.to_dict("records"):
        for direction, name, kinds in WAYS:
            share = row[f"{name}_bytes"] // 2
            rows += [
                {"round": row["round"], "direction": direction, "partition": 0, "kind": kind, "parameters": share // 4}
                | {"tensor_bytes": share, "record_bytes": share + 4}
                for kind in kinds
            ]
    pd.DataFrame(rows).to_csv(folder / "ledger.csv", index=False)


def write_summary(made: Made, rounds: pd.DataFrame, folder: Path) -> None:
    last = rounds.iloc[-1]
    summary = {"method": made.method, "seed": made.seed, "status": made.status, "num_rounds": len(rounds) - 1}
    summary |= {"final_test_accuracy": None if made.losses else made.accuracies[-1], "final_test_loss": 1.0}
    names = ("uplink", "downlink", "catchup", "total", "uplink_record", "downlink_record")
    summary |= {f"{name}_bytes": int(last[f"cum_{name}_bytes"]) for name in names}
    summary |= {"chain_digest": f"digest{made.seed}", "split_digest": f"split{made.seed}", "wall_s": 3.0}
    (folder / "summary.json").write_text(json.dumps(summary | {"versions": VERSIONS, "targets": {}} | made.summed))


def make_runs(root: Path, *mades: Made):
    return load_runs([write_run(made, root / f"run{i}") for i, made in enumerate(mades)])


def climb(top: float, rate: float, num_rounds: int, seed: int) -> list[float | None]:
    noise = np.random.default_rng([seed, num_rounds]).normal(0, 0.006, num_rounds + 1)
    curve = 0.1 + (top - 0.1) * (1 - np.exp(-rate * np.arange(num_rounds + 1))) + noise
    return [float(min(max(value, 0.05), 0.99)) for value in curve]
