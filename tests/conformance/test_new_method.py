"""One new file is a new method, model or data set: in the folder by its name, anywhere else by its dotted path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli import main
from fedraclora.files import read_json

ROOT = Path(__file__).resolve().parents[2]
TINY = ["dataset=digits", "model.hidden=[12]", "num_clients=4", "fraction=0.5", "rank=2", "rounds=3", "out=run"]

METHOD = '''
"""Takes the factor of one client a round, that with the most examples, and throws the others away."""

from dataclasses import dataclass

from fedraclora.plan import Training
from strategies.method import Step, Traits, replace_trained


@dataclass
class Config:
    lr: float = 0.5
    share: float = 1.0


class Toy:
    traits = Traits(is_mean=False)

    def __init__(self, config, adapter):
        self.config, self.adapter = config, adapter

    def open_link(self, index, weights):
        return self.adapter.open_link(index, self.adapter.everywhere("b"))

    def trains(self, round, start):
        return Training(self.adapter.everywhere("b"))

    def aggregate(self, weights, start, updates):
        largest = max(updates.values(), key=lambda update: update.weight)
        trained = {key: self.config.share * tensor for key, tensor in largest.tensors.items()}
        return Step(replace_trained(start, trained))

    def closes(self, updates_in_link):
        return True


def build(config, adapter):
    return Toy(config, adapter)
'''

MODEL = """
from dataclasses import dataclass
from math import prod

from torch import nn


@dataclass
class Config:
    width: int = 8


def build(config, *, input_shape, num_outputs):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(prod(input_shape), config.width), nn.Tanh(), nn.Linear(config.width, num_outputs)
    )
"""

DATASET = """
from dataclasses import dataclass

import torch

from fedraclora.data import Dataset, Examples


@dataclass
class Config:
    num: int = 60


def build(config, *, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(config.num) % 3
    inputs = torch.randn(config.num, 5, generator=generator) + 3 * torch.nn.functional.one_hot(labels, 5)
    examples = Examples(inputs, labels)
    return Dataset(name="blobs", train=examples, test=examples, task="classification", num_outputs=3)
"""


@pytest.fixture
def toy_package(tmp_path, monkeypatch):
    """Write a package beside nothing of this project, and work in its folder."""
    folder = tmp_path / "toy_package"
    folder.mkdir()
    for name, text in (("__init__", ""), ("toy", METHOD), ("net", MODEL), ("blobs", DATASET)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_package"]:
        del sys.modules[name]


def test_a_method_from_outside_runs_by_its_dotted_path(toy_package):
    assert main(["run", "method=toy_package.toy", *TINY]) == 0
    summary = read_json(toy_package / "run" / "summary.json")
    assert summary["method"] == "toy_package.toy"
    assert summary["num_rounds"] == 3
    assert main(["replay", "run"]) == 0


def test_its_own_settings_are_settings_of_the_command(toy_package, capsys):
    assert main(["run", "method=toy_package.toy", "method.share=0.5", *TINY]) == 0
    assert main(["run", "method=toy_package.toy", "method.shaer=0.5", *TINY[:-1], "out=other"]) == 2
    assert "did you mean 'share'" in capsys.readouterr().err


def test_what_it_does_not_go_with_is_refused_by_its_traits(toy_package, capsys):
    assert main(["run", "method=toy_package.toy", "robust.aggregate=median", *TINY]) == 2
    assert "method toy_package.toy is no mean of what clients send" in capsys.readouterr().err


def test_it_can_be_compared_with_the_others(toy_package):
    methods = "methods=[rac_lora,toy_package.toy]"
    settings = "method_settings={toy_package.toy: {share: 0.9}}"
    assert main(["compare", methods, settings, "seeds=1", *TINY]) == 0
    assert (toy_package / "run" / "toy_package.toy" / "seed_0" / "summary.json").exists()


def test_a_model_and_a_data_set_from_outside_run_by_their_dotted_paths(toy_package):
    changes = ["dataset=toy_package.blobs", "model=toy_package.net", "model.width=6", "dataset.num=90"]
    rest = ["num_clients=3", "rank=2", "rounds=3", "out=run", "partition=iid", "lr=0.5"]
    assert main(["run", *changes, *rest]) == 0
    assert read_json(toy_package / "run" / "model.json")["config"] == {"width": 6}
    assert main(["replay", "run"]) == 0


def test_a_method_that_lies_in_the_folder_is_found_by_its_name(tmp_path):
    """In a copy of the tree, by the real command: the file is all that is added."""
    tree = tmp_path / "tree"
    for name in ("fedraclora", "strategies", "clients", "experiments"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "strategies" / "toy.py").write_text(METHOD)
    program = "import sys; from experiments.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-c", program, "run", "method=toy", *TINY],
        cwd=tree, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert read_json(tree / "run" / "summary.json")["method"] == "toy"
