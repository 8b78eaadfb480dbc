"""A run killed at any moment and resumed is the run that was never killed."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from experiments.cli import main
from experiments.run import run
from fedraclora.files import read_json
from tests.conformance.cases import BY_METHOD, OPTIONS, REMEMBERED
from tests.helpers import Silent, settings, without_figures

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 20
RANKS = ("private draws of unlike ranks", "flexlora of unlike ranks")
RESUMED = BY_METHOD | REMEMBERED | {name: OPTIONS[name] for name in RANKS}
CASES = {"rac": {"method": "rac_lora"}, "carry": {"method": ("rac_lora", {"moments": "carry"}), "momentum": 0.9}}


def chosen(out, name, **more):
    return settings(**{**CASES[name], "rounds": ROUNDS, "out": str(out), "snapshot_every": 4, **more})


def run_in_child(out, name):
    """What the child process does; it is killed in the middle."""
    run(chosen(out, name, resume=True), Silent())


@pytest.fixture(scope="module")
def processes():
    """Children of a server that has imported everything already: they start in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.run", "tests.helpers"])
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return what gives the folder of a case's run that nobody disturbed."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("whole") / name
            run(chosen(folders[name], name), Silent())
        return folders[name]

    return get


def num_rows(folder):
    path = folder / "rounds.csv"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else -1


def kill_after(process, folder, rows, delay_s):
    """Wait for so many rounds and then a little, and kill; return whether the process was still at work."""
    while process.is_alive() and num_rows(folder) < rows:
        time.sleep(0.001)
    time.sleep(delay_s)
    was_alive = process.is_alive()
    process.kill()
    process.join()
    return was_alive


def assert_same_run(found, expected):
    ours, theirs = read_json(found / "summary.json"), read_json(expected / "summary.json")
    for volatile in ("wall_s",):
        ours.pop(volatile), theirs.pop(volatile)
    assert ours == theirs
    assert (found / "ledger.csv").read_bytes() == (expected / "ledger.csv").read_bytes()
    rounds = [pd.read_csv(folder / "rounds.csv", dtype=str).drop(columns="round_s") for folder in (found, expected)]
    pd.testing.assert_frame_equal(*rounds)
    assert read_json(found / "chain" / "index.json") == read_json(expected / "chain" / "index.json")
    assert not list(found.rglob("*.tmp")), "drafts of the killed process stay behind"


def interrupt_and_resume(processes, folder, name, moment):
    generator = random.Random(moment)
    process = processes.Process(target=run_in_child, args=(folder, name))
    process.start()
    was_alive = kill_after(process, folder, generator.randint(-1, ROUNDS - 2), generator.uniform(0, 0.04))
    run(chosen(folder, name, resume=True), Silent())
    return was_alive


@pytest.mark.parametrize(("name", "moment"), [("rac", 1), ("carry", 2)])
def test_a_run_that_is_killed_and_resumed_ends_as_if_nothing_had_happened(tmp_path, processes, whole, name, moment):
    assert interrupt_and_resume(processes, tmp_path / "run", name, moment), "it was over before the kill"
    assert_same_run(tmp_path / "run", whole(name))


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(100, 110))
@pytest.mark.parametrize("name", CASES)
def test_at_any_moment(tmp_path, processes, whole, name, moment):
    interrupt_and_resume(processes, tmp_path / "run", name, moment)
    assert_same_run(tmp_path / "run", whole(name))


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, processes, whole):
    folder = tmp_path / "run"
    for moment in range(200, 205):
        generator = random.Random(moment)
        process = processes.Process(target=run_in_child, args=(folder, "carry"))
        process.start()
        kill_after(process, folder, num_rows(folder) + generator.randint(1, 3), generator.uniform(0, 0.03))
    run(chosen(folder, "carry", resume=True), Silent())
    assert_same_run(folder, whole("carry"))


class Stop(Silent):
    """Interrupts after a round, as Ctrl-C would."""

    def __init__(self, after, error=KeyboardInterrupt):
        super().__init__()
        self.after, self.error = after, error

    def on_round(self, row, num_rounds):
        super().on_round(row, num_rounds)
        if row["round"] == self.after:
            raise self.error


@pytest.mark.parametrize("name", RESUMED)
def test_every_method_resumes_exactly(tmp_path, monkeypatch, name):
    """Stopped after the handshake, and again after a round; what server and clients remember is there again."""
    without_figures(monkeypatch)

    def go(out, watcher, **more):
        return run(settings(**RESUMED[name], rounds=4, out=str(tmp_path / out), **more), watcher)

    go("whole", Silent())
    for after in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            go("parts", Stop(after), resume=after > 0)
        stopped = read_json(tmp_path / "parts" / "summary.json")
        assert (stopped["status"], stopped["num_rounds"]) == ("interrupted", after)
    go("parts", Silent(), resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("keep", ["all", "last"])
def test_rounds_can_be_added_to_a_finished_run(tmp_path, keep):
    run(settings(rounds=5, out=str(tmp_path / "whole"), keep_versions=keep), Silent())
    run(settings(rounds=2, out=str(tmp_path / "parts"), keep_versions=keep), Silent())
    run(settings(rounds=5, out=str(tmp_path / "parts"), keep_versions=keep, resume=True), Silent())
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = run(settings(out=str(tmp_path / "run")), Silent())
    before = (tmp_path / "run" / "rounds.csv").read_bytes()
    watcher = Silent()
    again = run(settings(out=str(tmp_path / "run"), resume=True), watcher)
    assert watcher.rows == []
    assert again["chain_digest"] == first["chain_digest"]
    assert (tmp_path / "run" / "rounds.csv").read_bytes() == before


def test_ctrl_c_keeps_what_is_done_and_the_same_command_continues(tmp_path):
    """The real command, in a process of its own, stopped by the signal that Ctrl-C sends."""
    arguments = ["dataset=digits", "model.hidden=[12]", "num_clients=6", "fraction=0.5", f"out={tmp_path / 'run'}"]
    program = "import sys; from experiments.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, "run", *arguments, "rounds=100000"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and num_rows(tmp_path / "run") < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "resume=true" in errors
    assert "Traceback" not in errors
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["status"] == "interrupted"
    done = summary["num_rounds"]
    assert done >= 3
    assert main(["run", *arguments, f"rounds={done + 2}", "resume=true"]) == 0
    assert main(["run", *arguments[:-1], f"rounds={done + 2}", f"out={tmp_path / 'whole'}"]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
