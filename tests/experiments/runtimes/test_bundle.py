"""The Flower App Bundle: code and configuration, and what a fresh clone runs."""

import json
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from experiments.runtimes.flower import environment
from experiments.runtimes.processes import Processes, free_port, program

ROOT = Path(__file__).parents[3]
KINDS = {".py", ".yaml", ".toml", ".md"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone") / "app"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Flower's programs with a home and a port of their own; the SuperLink that `flwr run` starts ends with them."""
    folder = tmp_path_factory.mktemp("flower")
    ports = {name: str(free_port()) for name in ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")}
    with Processes(folder / "logs", {**environment(folder / "home"), **ports}) as started:
        yield started


@pytest.mark.slow
def test_the_bundle_of_a_fresh_clone_holds_code_and_configuration_only(clone, processes):
    processes.run(["/usr/bin/env", "-C", str(clone), program("flwr"), "build"])
    (bundle,) = clone.glob("*.fab")
    with zipfile.ZipFile(bundle) as archive:
        names = archive.namelist()
    kinds = {Path(name).suffix for name in names if not name.startswith(".info/")}
    tops = {Path(name).parts[0] for name in names} - {".info"}
    assert kinds <= KINDS
    assert tops <= {"fedraclora", "strategies", "clients", "experiments", "pyproject.toml", "README.md", "LICENSE"}
    needed = {"experiments/server_app.py", "clients/app.py", "experiments/conf/run.yaml", "fedraclora/chain.py"}
    assert needed <= set(names)
    assert bundle.stat().st_size < 2_000_000


@pytest.mark.slow
def test_flwr_run_in_a_fresh_clone_completes(clone, processes):
    processes.run(["/usr/bin/env", "-C", str(clone), program("flwr"), "run", "."])
    end, status = time.monotonic() + 180, ""
    while not status.startswith("finished") and time.monotonic() < end:
        time.sleep(2)
        printed = processes.run([program("flwr"), "ls", "local", "--format", "json"])
        status = json.loads(printed[printed.index("{") :])["runs"][0]["status"]
    assert status == "finished:completed"
