"""The server's side of a run, whatever the runtime: its folder, its rounds, their evaluation and the summary."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from filelock import FileLock, Timeout
from flwr.serverapp import Grid
from omegaconf import OmegaConf

from experiments.accountant import client_epsilon, example_epsilon
from experiments.devices import Timeline, device_table
from experiments.folders import check_same_run
from experiments.groups import plain_values
from experiments.outcomes import AT_BUDGET, FAILED, FINISHED, INTERRUPTED, Diverged, NothingTrained, status_of
from experiments.plots import label_distribution_figure, save_png
from experiments.problem import Problem
from experiments.recorder import Recorder, round_row
from experiments.settings import Settings, name_of
from experiments.summary import write_summary
from fedraclora.chain_store import ChainStore
from fedraclora.files import write_atomically
from fedraclora.partitions import label_counts
from fedraclora.tasks import evaluate
from strategies.base import ChainStrategy
from strategies.rounds import RoundReport, RoundSettings
from strategies.state import BudgetTooSmall, ServerState

log = logging.getLogger("fedraclora")

MakeGrid = Callable[[Problem, Recorder], Grid]

# The device of each client, in a run's folder.
DEVICES_FILE = "devices.csv"


class Watcher(Protocol):
    """Is told of every round."""

    def on_round(self, row: dict[str, Any], num_rounds: int) -> None:
        """Show one round's row of `rounds.csv`."""
        ...


def serve(  # noqa: PLR0913 - the run, and how its clients are reached
    settings: Settings,
    problem: Problem,
    folder: Path,
    watcher: Watcher,
    *,
    make_grid: MakeGrid,
    timeline: Timeline | None = None,
) -> dict[str, Any]:
    """Run, or continue, the run in `folder` over a grid, and return the summary that is written to `summary.json`.

    `timeline` is the grid's clock, where it simulates time.
    Raises ValueError before anything is written where the folder holds another run, and Diverged where training does
    not stay finite. Whatever ends a run, its summary is written.
    """
    with _threads(settings), _alone(folder):
        recorder = Recorder(folder, keep_versions=settings.keep_versions, snapshot_every=settings.snapshot_every)
        if settings.resume and recorder.can_resume:
            check_same_run(folder, settings)
            _check_devices(timeline, folder)
            chain, state = recorder.resume()
            _check_base(problem, folder)
            _write_settings(settings, folder)
        else:
            chain, state = problem.new_chain(), None
            _write_description(problem, settings, folder)
            if timeline is not None:
                write_atomically(folder / DEVICES_FILE, _device_csv(timeline))
            recorder.start(chain)
        setup = problem.setup.to_json()
        reaches = None if timeline is None else timeline.reaches
        strategy = ChainStrategy(problem.method, chain, problem.rounds, setup=setup, state=state, reaches=reaches)
        return _run_rounds(_Run(settings, problem, recorder, strategy, timeline), make_grid, watcher)


class _Run:
    """The parts of a run in progress."""

    def __init__(
        self,
        settings: Settings,
        problem: Problem,
        recorder: Recorder,
        strategy: ChainStrategy,
        timeline: Timeline | None,
    ) -> None:
        self.settings, self.problem, self.recorder, self.strategy = settings, problem, recorder, strategy
        self.timeline = timeline

    def row(self, report: RoundReport) -> dict[str, Any]:
        """Return a round's row of `rounds.csv`, evaluated where it is due."""
        name = name_of(self.settings)
        row = round_row(report, self.strategy.state.traffic, method=name, seed=self.settings.seed)
        row["epsilon"] = spent_epsilon(self.strategy.settings, self.strategy.state)
        if self.timeline is not None:
            seconds = self.timeline.seconds(report.round)
            row |= {"simulated_s": seconds, "cum_simulated_s": self.recorder.simulated_s + seconds}
        if report.round % self.settings.eval_every == 0 or report.round == self.settings.rounds:
            model, dataset = self.problem.model, self.problem.dataset
            model.load_state_dict(self.strategy.chain.weights())
            row["test_loss"], row["test_accuracy"] = evaluate(model, dataset.test, dataset.task)
        return row

    def summary(self, status: str, error: str | None) -> dict[str, Any]:
        """Write `summary.json` from the rounds on disk, and return it."""
        known = _known(self.problem, self.recorder)
        reason = {} if error is None else {"error": error}
        return write_summary(self.recorder, self.settings, {"status": status, **reason, **known})


def _known(problem: Problem, recorder: Recorder) -> dict[str, Any]:
    """Return what a summary says of the problem and the chain."""
    return {
        "chain_digest": recorder.digest,
        "split_digest": problem.split.digest,
        "is_global": problem.method.traits.is_global,
    }


def spent_epsilon(settings: RoundSettings, state: ServerState) -> float | None:
    """Return the epsilon that the rounds so far have cost, for the worst client where examples are hidden."""
    privacy = settings.privacy
    if privacy is None or state.round < 1:
        return None
    if privacy.level == "client":
        size = settings.cohort_size
        return client_epsilon(settings.num_clients, size, privacy.noise, state.round, privacy.delta)
    # Of clients that took as many steps the one with the fewest examples is the worst off.
    fewest: dict[int, int] = {}
    for partition, num in state.num_examples.items():
        steps = state.num_steps.get(partition, 0)
        fewest[steps] = min(num, fewest.get(steps, num))
    width = settings.local.batch_size
    spent = [example_epsilon(num, min(width, num), privacy.noise, n, privacy.delta) for n, num in fewest.items()]
    return max(spent, default=0.0)


@contextmanager
def interrupted(settings: Settings, problem: Problem, folder: Path) -> Iterator[None]:
    """Write the summary of a run whose server, another process, is ended by an interruption here."""
    try:
        yield
    except KeyboardInterrupt:
        recorder = Recorder(folder, keep_versions=settings.keep_versions, snapshot_every=settings.snapshot_every)
        if recorder.can_resume:
            # A server that still writes will write its own summary.
            with suppress(ValueError), _alone(folder):
                recorder.resume()
                write_summary(recorder, settings, {"status": INTERRUPTED, **_known(problem, recorder)})
        raise


def _run_rounds(parts: _Run, make_grid: MakeGrid, watcher: Watcher) -> dict[str, Any]:
    status, reason = FAILED, None
    try:
        _loop(parts, make_grid, watcher)
        status = FINISHED if parts.strategy.stop_reason is None else AT_BUDGET
    except BaseException as error:
        status, reason = status_of(error), str(error) or None
        raise
    finally:
        # Whatever ends the rounds, what was computed gets its summary.
        summary = parts.summary(status, reason) if parts.recorder.can_resume else {}
    if parts.strategy.stop_reason is not None:
        log.info("stopped after round %d: %s", parts.strategy.state.round, parts.strategy.stop_reason)
    return summary


def _loop(parts: _Run, make_grid: MakeGrid, watcher: Watcher) -> None:
    settings, strategy, recorder = parts.settings, parts.strategy, parts.recorder
    if recorder.has_diverged:
        raise Diverged(f"this run diverged in round {strategy.state.round}; nothing can be added to it")
    try:
        for report in strategy.rounds(make_grid(parts.problem, recorder), settings.rounds):
            row = parts.row(report)
            has_diverged = report.has_diverged or not isfinite(row.get("test_loss", 0.0))
            recorder.commit(row, report, strategy.chain, strategy.state, has_diverged=has_diverged)
            watcher.on_round(row, settings.rounds)
            if has_diverged:
                raise Diverged(
                    f"training diverged in round {report.round}: NaN or infinity with lr={strategy.settings.local.lr}; "
                    f"try a smaller one. All rounds so far are in {recorder.folder}"
                )
            if report.round == 1 and report.failures and not report.num_ok:
                client, reason = next(iter(report.failures.items()))
                raise NothingTrained(f"all clients of the first round failed; client {client}: {reason}")
    except BudgetTooSmall as error:
        raise BudgetTooSmall(f"{error}; with resume=true and a larger one the run goes on") from error


def _check_base(problem: Problem, folder: Path) -> None:
    if ChainStore(folder / "chain").base_hash() != problem.new_chain().hash:
        raise ValueError(f"the initial weights made here differ from those of {folder}: is this another PyTorch?")


def _check_devices(timeline: Timeline | None, folder: Path) -> None:
    """Raise ValueError where a run would go on with other devices than those it began with."""
    if timeline is not None and (folder / DEVICES_FILE).read_bytes() != _device_csv(timeline):
        raise ValueError(f"resume=true, but the devices are no longer those of {folder / DEVICES_FILE}; use that file")


def _device_csv(timeline: Timeline) -> bytes:
    return device_table(timeline.devices).to_csv(index=False).encode()


def _write_settings(settings: Settings, folder: Path) -> None:
    write_atomically(folder / "settings.yaml", OmegaConf.to_yaml(OmegaConf.create(plain_values(settings))).encode())


def _write_description(problem: Problem, settings: Settings, folder: Path) -> None:
    """Write all that is known before the first round."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_settings(settings, folder)
    problem.card.save(folder / "model.json")
    problem.split.save(folder / "split.npz")
    if problem.dataset.task == "classification" and any(len(rows) for rows in problem.split.indices):
        counts = pd.DataFrame(label_counts(problem.split, problem.dataset))
        counts.insert(0, "partition", range(len(counts)))
        counts.to_csv(folder / "label_counts.csv", index=False)
        save_png(label_distribution_figure(counts), folder / "label_counts.png")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other servers out of a run's folder: one whose SuperLink was killed may still be alive."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"another process is writing {folder}; wait until it has ended, or end it") from error


@contextmanager
def _threads(settings: Settings) -> Iterator[None]:
    """Use the asked number of threads for the time of a run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if settings.exact else settings.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
