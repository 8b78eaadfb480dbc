"""The package as a user gets it: one version, layers that hold, and a wheel that works in a clean environment."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import fedraclora

ROOT = Path(__file__).resolve().parent.parent
BUNDLED_FOLDERS = ("strategies", "clients", "experiments")


def _run(*command: str | Path, cwd: Path) -> str:
    """Return what the command printed; the test fails with its output if it does."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _files(folder: str) -> set[str]:
    paths = [path for pattern in ("*.py", "*.yaml") for path in (ROOT / folder).rglob(pattern)]
    return {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    dist = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", dist, cwd=ROOT)
    (built,) = dist.glob("*.whl")
    return built


def test_package_and_project_file_state_the_same_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert fedraclora.__version__ == project["version"]


def test_layers_hold():
    _run(Path(sys.executable).parent / "lint-imports", "--no-cache", cwd=ROOT)


def test_wheel_installs_fedraclora_and_no_other_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fedraclora", f"fedraclora-{fedraclora.__version__}.dist-info"}


def test_wheel_carries_every_source_and_setting_and_the_licence(wheel):
    bundled = {f"fedraclora/_app/{name}" for folder in BUNDLED_FOLDERS for name in _files(folder)}
    licence = f"fedraclora-{fedraclora.__version__}.dist-info/licenses/LICENSE"
    app = "fedraclora/_app/pyproject.toml"
    assert _files("fedraclora") | bundled | {licence, app} <= set(zipfile.ZipFile(wheel).namelist())


def test_wheel_in_a_clean_environment_runs_here_and_over_real_nodes_from_another_directory(wheel, tmp_path):
    clean = tmp_path / "clean"
    _run(sys.executable, "-m", "venv", "--without-pip", clean, cwd=tmp_path)
    # Bytecode is made for the modules that run imports, not for all of torch.
    install = (sys.executable, "-m", "pip", "--python", clean / "bin" / "python", "install", "-qq", "--no-compile")
    _run(*install, f"torch=={torch.__version__.split('+')[0]}", cwd=tmp_path)
    _run(*install, wheel, cwd=tmp_path)

    command = clean / "bin" / "fedraclora"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "run" in _run(command, "--help", cwd=elsewhere)
    _run(command, "run", "dataset=digits", "rounds=2", "num_clients=4", "out=result", cwd=elsewhere)
    assert _summary(elsewhere / "result")["method"] == "rac_lora"
    # Flower's programs get an app that is put together from the installed files.
    _run(command, "run", "runtime=deployment", "dataset=digits", "rounds=1", "num_clients=2", "out=real", cwd=elsewhere)
    assert _summary(elsewhere / "real")["num_rounds"] == 1


def _summary(folder: Path) -> dict[str, object]:
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary
