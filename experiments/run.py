"""One run: settings in, a folder with results out; it can be interrupted at any moment and resumed."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
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
from experiments.summary import write_summary
from fedraclora.chain_store import ChainStore
from fedraclora.files import write_atomically
from fedraclora.partitions import label_counts
from fedraclora.tasks import evaluate
from strategies.base import ChainStrategy
from strategies.rounds import RoundReport
from strategies.state import BudgetTooSmall

log = logging.getLogger("fedraclora")

# What may differ between a run and its continuation: everything else would make another run of it.
MAY_CHANGE = {
    *("resume", "out", "name", "rounds", "budget_mib", "uplink_mib", "per_client_mib"),
    *("target_accuracies", "keep_versions", "snapshot_every"),
}
FINISHED, AT_BUDGET, INTERRUPTED = "finished", "stopped at the budget", "interrupted"
DIVERGED, FAILED = "diverged", "failed"


class Diverged(RuntimeError):
    """Training produced NaN or infinity; what was computed before is kept."""


class NothingTrained(RuntimeError):
    """Every client of the first round failed; what was computed before is kept."""


class Watcher(Protocol):
    """Is told of every round."""

    def on_round(self, row: dict[str, Any], num_rounds: int) -> None:
        """Show one round's row of `rounds.csv`."""
        ...


def run(settings: Settings, watcher: Watcher) -> dict[str, Any]:
    """Run, or continue, what the settings describe, and return the summary that is written to `summary.json`.

    Raises ValueError before anything is written where the settings cannot be run, and Diverged where training does not
    stay finite. Whatever ends a run, its summary is written.
    """
    with _threads(settings):
        problem = prepare(settings)
        folder = find_folder(settings)
        recorder = Recorder(folder, keep_versions=settings.keep_versions, snapshot_every=settings.snapshot_every)
        if settings.resume and recorder.can_resume:
            check_same_run(folder, settings)
            chain, state = recorder.resume()
            _check_base(problem, folder)
            _write_settings(settings, folder)
            strategy = ChainStrategy(problem.method, chain, problem.rounds, state=state)
        else:
            chain = problem.new_chain()
            _write_description(problem, settings, folder)
            recorder.start(chain)
            strategy = ChainStrategy(problem.method, chain, problem.rounds)
        return _run_rounds(_Run(settings, problem, recorder, strategy), watcher)


class _Run:
    """The parts of a run in progress."""

    def __init__(self, settings: Settings, problem: Problem, recorder: Recorder, strategy: ChainStrategy) -> None:
        self.settings, self.problem, self.recorder, self.strategy = settings, problem, recorder, strategy

    def grid(self) -> InProcessGrid:
        """Return the runtime, whose clients keep their own states beside the chain."""
        store = ClientStore(self.recorder.folder / "clients")
        replica = self.problem.replica(self.settings, self.recorder.replica(), store)
        return InProcessGrid(replica, self.settings.num_clients)

    def row(self, report: RoundReport) -> dict[str, Any]:
        """Return a round's row of `rounds.csv`, evaluated where it is due."""
        name = self.settings.method.name
        row = round_row(report, self.strategy.state.traffic, method=name, seed=self.settings.seed)
        if report.round % self.settings.eval_every == 0 or report.round == self.settings.rounds:
            model, dataset = self.problem.model, self.problem.dataset
            model.load_state_dict(self.strategy.chain.weights())
            row["test_loss"], row["test_accuracy"] = evaluate(model, dataset.test, dataset.task)
        return row

    def summary(self, status: str) -> dict[str, Any]:
        """Write `summary.json` from the rounds on disk, and return it."""
        digests = {"chain_digest": self.recorder.digest, "split_digest": self.problem.split.digest}
        return write_summary(self.recorder, self.settings, {"status": status, **digests})


def _run_rounds(parts: _Run, watcher: Watcher) -> dict[str, Any]:
    settings, strategy, recorder = parts.settings, parts.strategy, parts.recorder
    status = FAILED
    try:
        if recorder.has_diverged:
            status = DIVERGED
            raise Diverged(f"this run diverged in round {strategy.state.round}; nothing can be added to it")
        for report in strategy.rounds(parts.grid(), settings.rounds):
            row = parts.row(report)
            has_diverged = report.has_diverged or not isfinite(row.get("test_loss", 0.0))
            recorder.commit(row, report, strategy.chain, strategy.state, has_diverged=has_diverged)
            watcher.on_round(row, settings.rounds)
            if has_diverged:
                status = DIVERGED
                raise Diverged(
                    f"training diverged in round {report.round}: NaN or infinity with lr={strategy.settings.local.lr}; "
                    f"try a smaller one. All rounds so far are in {recorder.folder}"
                )
            if report.round == 1 and report.failures and not report.num_ok:
                client, reason = next(iter(report.failures.items()))
                raise NothingTrained(f"all clients of the first round failed; client {client}: {reason}")
        status = FINISHED if strategy.stop_reason is None else AT_BUDGET
    except KeyboardInterrupt:
        status = INTERRUPTED
        raise
    except BudgetTooSmall as error:
        status = AT_BUDGET
        raise BudgetTooSmall(f"{error}; with resume=true and a larger one the run goes on") from error
    finally:
        # Whatever ends the rounds, what was computed gets its summary.
        summary = parts.summary(status) if recorder.can_resume else {}
    if strategy.stop_reason is not None:
        log.info("stopped after round %d: %s", strategy.state.round, strategy.stop_reason)
    return summary


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
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    for key in sorted((before.keys() | after.keys()) - MAY_CHANGE, key=str):
        if before.get(key) != after.get(key):
            raise ValueError(
                f"resume=true, but {key} was {before.get(key)} in {folder} and is {after.get(key)} now; "
                "give the same settings, or start a new run in another folder"
            )


def _check_base(problem: Problem, folder: Path) -> None:
    if ChainStore(folder / "chain").base_hash() != problem.new_chain().hash:
        raise ValueError(f"the initial weights made here differ from those of {folder}: is this another PyTorch?")


def _write_settings(settings: Settings, folder: Path) -> None:
    write_atomically(folder / "settings.yaml", OmegaConf.to_yaml(OmegaConf.create(plain_values(settings))).encode())


def _write_description(problem: Problem, settings: Settings, folder: Path) -> None:
    """Write all that is known before the first round."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_settings(settings, folder)
    problem.card.save(folder / "model.json")
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
