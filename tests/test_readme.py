"""What the README shows is run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def readme_files() -> dict[str, str]:
    return dict(re.findall(r"`(mine/\w+\.py)`[^\n]*:\n\n```python\n(.*?)```", README, re.DOTALL))


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for name, text in readme_files().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def python(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_own_model_data_and_method_run_and_load_as_the_readme_says(own_folder):
    assert set(readme_files()) == {"mine/model.py", "mine/data.py", "mine/method.py"}
    (command,) = re.findall(r"^fedraclora (run method=mine.*)$", README, re.MULTILINE)
    run = python("import sys; from experiments.cli import main; sys.exit(main())", own_folder, *command.split())
    assert run.returncode == 0, run.stderr
    assert {path.name for path in (own_folder / "runs" / "mine").iterdir()} >= {
        *("settings.yaml", "rounds.csv", "ledger.csv", "summary.json", "chain"),
    }
    (code,) = re.findall(r"```python\n(import torch\n\nfrom fedraclora.finished.*?)```", README, re.DOTALL)
    check = (
        "\nassert labels.shape == (5,)\nassert before_training.state_dict().keys() == run.model().state_dict().keys()"
    )
    loaded = python(code + check, own_folder)
    assert loaded.returncode == 0, loaded.stderr


def test_every_make_target_and_preset_that_the_readme_names_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for preset in re.findall(r"experiment=([\w/]+)", README):
        assert (ROOT / "experiments" / "conf" / "experiment" / f"{preset}.yaml").is_file(), preset


def test_every_method_is_in_the_readme():
    from fedraclora.plugins import names

    assert set(re.findall(r"^\| `(\w+)`", README, re.MULTILINE)) == set(names("strategies"))
