"""One run: settings in, a folder with results out; it can be interrupted at any moment and resumed."""

import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from omegaconf import OmegaConf

from clients.state_store import ClientStore
from experiments.groups import plain_values
from experiments.plots import label_distribution_figure, save_png
from experiments.problem import Problem, prepare
from experiments.recorder import Recorder, round_row
from experiments.runtimes.in_process import InProcessGrid
from experiments.settings import Settings
from fedraclora.chain import Chain
from fedraclora.files import read_json, write_atomically, write_json
from fedraclora.partitions import label_counts
from fedraclora.tasks import evaluate
from strategies.base import ChainStrategy, RoundReport

log = logging.getLogger("fedraclora")

# What may differ between a run and its continuation: everything else would make another run of it.
MAY_CHANGE = {
    *("resume", "out", "name", "rounds", "budget_mib", "uplink_mib", "per_client_mib"),
    *("target_accuracies", "threads", "chunk_mib", "keep_versions", "snapshot_every"),
}
PACKAGES = ("fedraclora", "flwr", "numpy", "torch")
DIVERGED, FINISHED, AT_BUDGET, INTERRUPTED = "diverged", "finished", "stopped at the budget", "interrupted"


class Diverged(RuntimeError):
    """Training produced NaN or infinity; what was computed before is kept."""


class Watcher(Protocol):
    """Is told of every round."""

    def on_round(self, row: dict[str, Any], num_rounds: int) -> None:
        """Show one round's row of `rounds.csv`."""
        ...


def run(settings: Settings, watcher: Watcher) -> dict[str, Any]:
    """Run, or continue, what the settings describe, and return the summary that is written to `summary.json`.

    Raises ValueError before anything is written where the settings cannot be run, Diverged where training does not stay
    finite, and KeyboardInterrupt where it is interrupted; the summary is written in these two cases as well.
    """
    with _threads(settings):
        problem = prepare(settings)
        folder = find_folder(settings)
        recorder = Recorder(folder, keep_versions=settings.keep_versions, snapshot_every=settings.snapshot_every)
        if settings.resume and recorder.can_resume:
            check_same_run(folder, settings)
            chain, state, spent_s = recorder.resume()
            _check_base(problem, chain, folder)
            strategy = ChainStrategy(problem.method, chain, problem.rounds, state=state)
        else:
            chain, spent_s = problem.new_chain(), 0.0
            _write_description(problem, settings, folder)
            recorder.start(chain)
            strategy = ChainStrategy(problem.method, chain, problem.rounds)
        return _run_rounds(_Run(settings, problem, recorder, strategy, spent_s), watcher)


class _Run:
    """The parts of a run in progress."""

    def __init__(  # noqa: PLR0913
        self, settings: Settings, problem: Problem, recorder: Recorder, strategy: ChainStrategy, spent_s: float
    ) -> None:
        self.settings, self.problem, self.recorder, self.strategy = settings, problem, recorder, strategy
        self._began = time.perf_counter() - spent_s
        self.model = problem.model

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._began

    def grid(self) -> InProcessGrid:
        store = ClientStore(self.recorder.folder / "clients")
        return InProcessGrid(self.problem.replica(self.settings, store), self.settings.num_clients)

    def row(self, report: RoundReport) -> dict[str, Any]:
        """Return a round's row of `rounds.csv`, evaluated where it is due."""
        name = self.settings.method.name
        row = round_row(report, self.strategy.state.traffic, method=name, seed=self.settings.seed)
        if report.round % self.settings.eval_every == 0 or report.round == self.settings.rounds:
            self.model.load_state_dict(self.strategy.chain.weights())
            row["test_loss"], row["test_accuracy"] = evaluate(
                self.model, self.problem.dataset.test, self.problem.dataset.task
            )
        return row


def _run_rounds(parts: _Run, watcher: Watcher) -> dict[str, Any]:
    status, settings, strategy = FINISHED, parts.settings, parts.strategy
    try:
        for report in strategy.rounds(parts.grid(), settings.rounds):
            row = parts.row(report)
            parts.recorder.commit(row, report, strategy.chain, strategy.state, parts.wall_s)
            watcher.on_round(row, settings.rounds)
            if report.has_diverged or not isfinite(row.get("test_loss", 0.0)):
                raise Diverged(
                    f"training diverged in round {report.round}: no finite update came back (lr is "
                    f"{strategy.settings.local.lr}); try a smaller one. All rounds so far are in {parts.recorder.folder}"
                )
        status = FINISHED if strategy.stop_reason is None else AT_BUDGET
    except Diverged:
        status = DIVERGED
        raise
    except KeyboardInterrupt:
        status = INTERRUPTED
        raise
    finally:
        if parts.recorder.can_resume:
            summary = summarize(parts.recorder.folder, settings, strategy.chain.digest, status, parts)
    if strategy.stop_reason is not None:
        log.info("stopped after round %d: %s", strategy.state.round, strategy.stop_reason)
    return summary


def summarize(folder: Path, settings: Settings, digest: str, status: str, parts: _Run) -> dict[str, Any]:  # noqa: PLR0913
    """Write `summary.json` from the rounds on disk, and return it."""
    rounds = pd.read_csv(folder / "rounds.csv", float_precision="round_trip")
    evaluated = rounds.dropna(subset=["test_loss"])
    last = rounds.iloc[-1]
    names = ("uplink", "downlink", "catchup", "total", "uplink_record", "downlink_record")
    summary = {
        "method": settings.method.name,
        "seed": settings.seed,
        "status": status,
        "num_rounds": int(last["round"]),
        "final_test_accuracy": _number(evaluated, "test_accuracy"),
        "final_test_loss": _number(evaluated, "test_loss"),
        **{f"{name}_bytes": int(last[f"cum_{name}_bytes"]) for name in names},
        "targets": {str(target): first_crossing(rounds, target) for target in settings.target_accuracies},
        "chain_digest": digest,
        "split_digest": parts.problem.split.digest,
        "wall_s": round(parts.wall_s, 3),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    write_json(folder / "summary.json", summary)
    return summary


def _number(evaluated: pd.DataFrame, column: str) -> float | None:
    values = evaluated[column]
    return None if values.empty or pd.isna(values.iloc[-1]) else float(values.iloc[-1])


def first_crossing(rounds: pd.DataFrame, target: float) -> dict[str, int] | None:
    """Return the round that first reached a test accuracy and the bytes up to its end, or None."""
    reached = rounds[rounds["test_accuracy"] >= target]
    if reached.empty:
        return None
    first = reached.iloc[0]
    return {
        "round": int(first["round"]),
        "uplink_bytes": int(first["cum_uplink_bytes"]),
        "total_bytes": int(first["cum_total_bytes"]),
    }


def find_folder(settings: Settings) -> Path:
    """Return the folder to write to: `out`, or a new one below `runs/<name>`, or with `resume` the newest there.

    Raises ValueError where it already holds a run that is not to be resumed.
    """
    if settings.out is not None:
        folder = Path(settings.out)
        if not settings.resume and folder.exists() and any(folder.iterdir()):
            raise ValueError(f"out={folder} is not empty; continue that run with resume=true, or name another folder")
        return folder
    parent = Path("runs") / settings.name
    earlier = sorted(path.parent for path in parent.glob("*/settings.yaml"))
    if settings.resume:
        if not earlier:
            raise ValueError(f"resume=true found no run in {parent}; name its folder with out=PATH")
        return earlier[-1]
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    candidates = (parent / (stamp if not number else f"{stamp}_{number}") for number in range(1000))
    return next(path for path in candidates if not path.exists())


def check_same_run(folder: Path, settings: Settings) -> None:
    """Raise ValueError where the folder's settings differ from these in something that decides the result."""
    before = OmegaConf.to_container(OmegaConf.load(folder / "settings.yaml"))
    after = OmegaConf.to_container(OmegaConf.create(plain_values(settings)))
    assert isinstance(before, dict) and isinstance(after, dict)
    for key in sorted((before.keys() | after.keys()) - MAY_CHANGE, key=str):
        if before.get(key) != after.get(key):
            raise ValueError(
                f"resume=true, but {key} was {before.get(key)} in {folder} and is {after.get(key)} now; "
                "give the same settings, or start a new run in another folder"
            )


def _check_base(problem: Problem, chain: Chain, folder: Path) -> None:
    stored = read_json(folder / "model.json")
    if stored["base"] != problem.new_chain().hash:
        raise ValueError(f"the initial weights made here differ from those of {folder}: is this another PyTorch?")
    problem.model.load_state_dict(chain.weights())


def _write_description(problem: Problem, settings: Settings, folder: Path) -> None:
    """Write all that is known before the first round."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "settings.yaml", OmegaConf.to_yaml(OmegaConf.create(plain_values(settings))).encode())
    write_json(folder / "model.json", vars(problem.card) | {"base": problem.new_chain().hash})
    problem.split.save(folder / "split.npz")
    if problem.dataset.task == "classification":
        counts = pd.DataFrame(label_counts(problem.split, problem.dataset))
        counts.insert(0, "partition", range(len(counts)))
        counts.to_csv(folder / "label_counts.csv", index=False)
        save_png(label_distribution_figure(counts), folder / "label_counts.png")


@contextmanager
def _threads(settings: Settings) -> Iterator[None]:
    """Use the asked number of threads for the time of a run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if settings.exact else settings.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
