"""A finished run from Python: its model at any version, and predictions with it.

run = load_run("runs/demo/rac_lora/seed_0")
labels = run.predict(images).argmax(1)
before = run.model(version=0)
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fedraclora.chain import Chain
from fedraclora.chain_store import ChainStore
from fedraclora.files import read_json, write_json
from fedraclora.models import initial_model
from fedraclora.plugins import find

MODELS = "fedraclora.models"


@dataclass(frozen=True)
class ModelCard:
    """What it takes to build a run's model again: the plug-in, its settings, and the shapes of the data."""

    name: str
    config: dict[str, Any]
    input_shape: tuple[int, ...]
    num_outputs: int
    dtype: str

    def build(self, seed: int = 0) -> nn.Module:
        """Return the model with the initial weights that `seed` draws.

        Raises ValueError where the plug-in is not there any more.
        """
        module, config = find(MODELS, self.name), SimpleNamespace(**self.config)
        model = initial_model(module, config, input_shape=self.input_shape, num_outputs=self.num_outputs, seed=seed)
        return model.to(self.torch_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the type of the model's numbers."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def save(self, path: Path) -> None:
        """Write the card as JSON."""
        write_json(path, vars(self))

    @staticmethod
    def load(path: Path) -> "ModelCard":
        """Read a card that `save` wrote. Raises ValueError where it is missing or damaged."""
        values = read_json(path)
        return ModelCard(**{**values, "input_shape": tuple(values["input_shape"])})


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder: `summary` as written, `versions` that can be read (0 is the base)."""

    folder: Path
    summary: dict[str, Any]
    card: ModelCard
    versions: tuple[int, ...]

    def chain(self, version: int | None = None) -> Chain:
        """Return the chain at a version (default: the newest), rebuilt from the log with its digest checked."""
        return ChainStore(self.folder / "chain").load(version)

    def model(self, version: int | None = None) -> nn.Module:
        """Return the model with the merged weights of a version, in evaluation mode."""
        model = self.card.build()
        model.load_state_dict(self.chain(version).weights())
        return model.eval()

    @torch.no_grad()
    def predict(self, inputs: Tensor, *, version: int | None = None) -> Tensor:
        """Return the model's outputs for `inputs` `[num, *input_shape]`, prepared as the data set prepares them."""
        outputs: Tensor = self.model(version)(inputs.to(self.card.torch_dtype))
        return outputs


def load_run(folder: str | Path) -> FinishedRun:
    """Return the run in `folder`. Raises ValueError where the folder holds no finished run or a damaged one."""
    path = Path(folder)
    for name in ("summary.json", "model.json", "chain/index.json"):
        if not (path / name).exists():
            raise ValueError(f"{path} is not a finished run: {name} is missing")
    versions = tuple(ChainStore(path / "chain").versions())
    return FinishedRun(path, read_json(path / "summary.json"), ModelCard.load(path / "model.json"), versions)
