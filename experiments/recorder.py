"""A run's folder, written so that a run killed at any moment can go on from its last whole round.

A round's rows and its link are written first and `state.json` last: what lies beyond the round that `state.json`
names is cut off when the run is resumed.
"""

import csv
import io
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

import pandas as pd

from fedraclora.chain import Chain
from fedraclora.chain_store import ChainStore
from fedraclora.files import read_json, read_tensors, write_atomically, write_json, write_tensors
from fedraclora.ledger import LedgerRow, Traffic
from strategies.memory import Memory
from strategies.rounds import RoundReport
from strategies.state import ServerState

BYTE_COLUMNS = (
    "uplink_bytes",
    "downlink_bytes",
    "catchup_bytes",
    "total_bytes",
    "uplink_record_bytes",
    "downlink_record_bytes",
)
# The columns that are fields of a RoundReport.
REPORT_COLUMNS = (
    *("round", "link", "num_clients", "num_ok", "num_failed", "num_missing", "num_retried", "is_updated", "train_loss"),
)
COLUMNS = (
    *("method", "seed"),
    *REPORT_COLUMNS,
    *("test_loss", "test_accuracy", "personal_accuracy", "aggregation_gap", "epsilon", "clip"),
    *("lost_moments", "lost_feedback", "lost_variates"),
    *BYTE_COLUMNS,
    *(f"cum_{name}" for name in BYTE_COLUMNS),
    *("round_s", "simulated_s", "cum_simulated_s"),
)


class Recorder:
    """Writes one run's folder: `rounds.csv`, `ledger.csv`, `chain/` and `state.json`.

    `digest` is that of the newest version written, which a link opened since then does not change; `has_diverged` says
    that the run read back had come to its end by NaN or infinity. `simulated_s` is the simulated time of all rounds.
    """

    def __init__(self, folder: Path, *, keep_versions: str, snapshot_every: int) -> None:
        self.folder = folder
        self.store = ChainStore(folder / "chain")
        self._keeps_all = keep_versions == "all"
        self._snapshot_every = snapshot_every
        self._written_version = 0
        self.digest, self.has_diverged = "", False
        self.simulated_s = 0.0
        self._began = time.perf_counter()

    @property
    def wall_s(self) -> float:
        """Return the seconds spent on this run, those before a resume included."""
        return time.perf_counter() - self._began

    @property
    def can_resume(self) -> bool:
        """Return whether the folder holds at least one whole round (the handshake counts as round 0)."""
        return (self.folder / "state.json").exists()

    def start(self, chain: Chain) -> None:
        """Begin a fresh run."""
        self._delete_drafts()
        self.store.create(chain)
        self.digest = chain.digest
        for name, columns in (("rounds.csv", COLUMNS), ("ledger.csv", [item.name for item in fields(LedgerRow)])):
            write_atomically(self.folder / name, (",".join(columns) + "\n").encode())

    def resume(self) -> tuple[Chain, ServerState]:
        """Return the chain and the server's state as of the last whole round, and cut off the rest."""
        self._delete_drafts()
        saved = read_json(self.folder / "state.json")
        state = ServerState.from_json(saved["server"])
        for name, column in (("rounds.csv", COLUMNS.index("round")), ("ledger.csv", 0)):
            _keep_rounds(self.folder / name, column, state.round)
        self._written_version, self.has_diverged = saved["version"], saved["has_diverged"]
        self._began -= saved["wall_s"]
        self.simulated_s = saved["simulated_s"]
        chain = self.store.load(saved["version"])
        self.digest = chain.digest
        memory = self._memory_of(state.round)
        if memory.exists():
            state.memory = Memory.from_file(*read_tensors(memory))
        return chain, state

    def _memory_of(self, round: int) -> Path:
        return self.folder / f"server_{round:06d}.safetensors"

    def _delete_drafts(self) -> None:
        """Delete the files that a killed process had begun to write."""
        for draft in self.folder.rglob(".*.tmp"):
            draft.unlink()

    def replica(self) -> Chain:
        """Return a copy of the chain as a client's disk would hold it: the closed links, merged, and the open one."""
        chain = self.store.load(self._written_version)
        chain.links.clear()
        return chain

    def commit(
        self, row: Mapping[str, Any], report: RoundReport, chain: Chain, state: ServerState, *, has_diverged: bool
    ) -> None:
        """Write a round: its link, its rows, and last the state that makes it count."""
        if chain.version > self._written_version:
            self.store.append(chain)
            self._written_version, self.digest = chain.version, chain.digest
            if self._snapshot_every and chain.open is None and chain.num_links % self._snapshot_every == 0:
                self.store.snapshot(chain)
        _append(self.folder / "ledger.csv", pd.DataFrame([astuple(item) for item in report.rows]))
        _append(self.folder / "rounds.csv", pd.DataFrame([row], columns=list(COLUMNS)))
        self.simulated_s += row.get("simulated_s", 0.0)
        if state.memory.tensors:
            write_tensors(self._memory_of(report.round), *state.memory.to_file())
        saved = {
            "version": chain.version,
            "wall_s": self.wall_s,
            "simulated_s": self.simulated_s,
            "has_diverged": has_diverged,
            "server": state.to_json(),
        }
        write_json(self.folder / "state.json", saved)
        for path in self.folder.glob("server_*.safetensors"):
            if path != self._memory_of(report.round):
                path.unlink()
        if not self._keeps_all:
            self.store.forget_replaced()


def round_row(report: RoundReport, total: Traffic, *, method: str, seed: int) -> dict[str, Any]:
    """Return a round's row of `rounds.csv` without its evaluation and its simulated time."""
    own = asdict(report.traffic) | {"total_bytes": report.traffic.total_bytes}
    cumulative = asdict(total) | {"total_bytes": total.total_bytes}
    counts = {name: getattr(report, name) for name in REPORT_COLUMNS}
    return {
        "method": method,
        "seed": seed,
        **counts,
        "personal_accuracy": report.personal_accuracy,
        "aggregation_gap": report.aggregation_gap,
        "clip": report.clip,
        **{f"lost_{purpose}": share for purpose, share in report.lost.items()},
        **{name: own[name] for name in BYTE_COLUMNS},
        **{f"cum_{name}": cumulative[name] for name in BYTE_COLUMNS},
        "round_s": round(report.round_s, 6),
    }


def _append(path: Path, frame: pd.DataFrame) -> None:
    if len(frame):
        frame.to_csv(path, mode="a", header=False, index=False)


def _keep_rounds(path: Path, column: int, last: int) -> None:
    """Keep the whole lines of a table whose round is not beyond `last`."""
    header, *lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if int(next(csv.reader(io.StringIO(line)))[column]) <= last]
    write_atomically(path, "".join([header, *kept]).encode())
