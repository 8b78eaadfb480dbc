"""Flower's own simulation runtime ends where the in-process one does, and leaves nothing running."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.run import run
from experiments.runtimes.processes import MARK
from experiments.runtimes.simulation import Config, build
from fedraclora.files import read_json
from tests.helpers import Silent, settings


def alike(**changes):
    return settings(num_clients=2, fraction=1.0, rounds=2, exact=True, connect_s=60.0, **changes)


def left_running():
    """Return the processes that some run of ours started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if any(item.startswith(MARK.encode()) for item in path.read_bytes().split(b"\0")):
                found.append((path.parent / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def listening():
    """Return the commands of our processes, and the local addresses, as /proc writes them, on which they listen."""
    commands, sockets = set(), set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if MARK.encode() in (path / "environ").read_bytes():
                commands.add((path / "cmdline").read_bytes())
                sockets |= {str(entry.readlink()) for entry in (path / "fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return commands, {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


@contextmanager
def watched():
    """Look at what our processes listen on, again and again while the block runs."""
    commands, addresses, is_over = set(), set(), threading.Event()

    def look():
        while not is_over.wait(0.2):
            found = listening()
            commands.update(found[0])
            addresses.update(found[1])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield commands, addresses
    finally:
        is_over.set()
        thread.join()


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_a_small_run_ends_with_the_simulators_digest_and_leaves_nothing_behind(tmp_path):
    watcher = Silent()
    with watched() as (commands, addresses):
        found = run(replace(alike(runtime="simulation"), out=str(tmp_path / "ray")), watcher)
    expected = run(alike(out=str(tmp_path / "here")), Silent())
    assert found["chain_digest"] == expected["chain_digest"]
    assert found["total_bytes"] == expected["total_bytes"]
    assert [row["round"] for row in watcher.rows] == [0, 1, 2]
    assert read_json(tmp_path / "ray" / "flower" / "run.json")["status"] == "finished:completed"
    assert any(b"raylet" in command for command in commands)
    assert addresses <= LOOPBACK, "Ray has no passwords: nobody else may reach it"
    assert left_running() == []


@pytest.mark.parametrize("config", [Config(num_cpus=0), Config(num_gpus=-0.5)])
def test_settings_that_make_no_sense_are_refused(config):
    with pytest.raises(ValueError, match="num_cpus"):
        build(config)


@pytest.mark.slow
def test_an_error_of_the_run_is_the_error_that_is_raised(tmp_path):
    from experiments.outcomes import Diverged

    chosen = replace(alike(runtime="simulation"), lr=1e30, rounds=6, out=str(tmp_path / "run"))
    with pytest.raises(Diverged, match="smaller"):
        run(chosen, Silent())
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "diverged"
    assert left_running() == []


@pytest.mark.slow
def test_a_run_whose_command_is_killed_takes_everything_with_it_and_can_be_resumed(tmp_path):
    out = tmp_path / "run"
    arguments = ["dataset=digits", "num_clients=2", "fraction=1", "rounds=300", "exact=true", f"out={out}"]
    command = [sys.executable, "-m", "fedraclora._console", "run", "runtime=simulation", *arguments]
    process = subprocess.Popen([sys.executable, "-c", START, *command[3:]], start_new_session=True)
    end = time.monotonic() + 120
    while not (out / "state.json").exists() and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while left_running() and time.monotonic() < end:
        time.sleep(0.2)
    assert left_running() == []
    last = read_json(out / "state.json")["server"]["round"]
    assert last < 300
    code = subprocess.run([sys.executable, "-c", START, *command[3:], "resume=true", f"rounds={last + 2}"], check=False)
    assert code.returncode == 0
    assert read_json(out / "summary.json")["num_rounds"] == last + 2


START = "import sys; from fedraclora._console import main; sys.exit(main())"
