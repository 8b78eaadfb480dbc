"""A finished run from Python: its model at any version, and predictions with it.

run = load_run("runs/demo/rac_lora/seed_0")
labels = run.predict(images).argmax(1)
before = run.model(version=0)
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fedraclora.chain import Chain, Weights
from fedraclora.chain_store import ChainStore
from fedraclora.files import read_json, read_tensors, write_json
from fedraclora.models import initial_model
from fedraclora.plugins import find

MODELS = "fedraclora.models"
# So many tensors are named in a message.
MAX_NAMED = 8


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


def read_weights(path: str | Path) -> Weights:
    """Return the weights that a finished run ended with, or those of a `.safetensors` file.

    Raises ValueError where the path is neither, or what it holds is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return load_run(path).chain().weights()
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    raise ValueError(f"{path} is neither the folder of a finished run nor a .safetensors file")


def take_weights_(model: nn.Module, weights: Weights, where: str) -> None:
    """Replace all weights of a model; `where` says in messages where they come from.

    Raises ValueError unless `weights` has exactly the model's tensors, in their shapes, all of them finite.
    """
    check_weights_fit(model, weights, where)
    spoilt = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if spoilt:
        raise ValueError(f"{where} holds NaN or infinity in {_listed(spoilt)}; start from a run that did not diverge")
    model.load_state_dict(weights)


def check_weights_fit(model: nn.Module, weights: Weights, where: str) -> None:
    """Raise ValueError unless `weights` has exactly the model's tensors in their shapes."""
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    right = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [name for name in right if name in found and found[name] != right[name]]
    differences = {
        "it lacks": [f"{name} {right[name]}" for name in right if name not in found],
        "the model does not have": [f"{name} {found[name]}" for name in found if name not in right],
        "of another shape are": [f"{name} {found[name]}, where the model has {right[name]}" for name in wrong],
    }
    said = [f"{what} {_listed(items)}" for what, items in differences.items() if items]
    if said:
        raise ValueError(
            f"the weights of {where} do not fit the model: {'; '.join(said)}; right are exactly the model's own "
            "tensors: train them with the same model, model.* settings, input shape and number of classes"
        )


def _listed(items: Iterable[str]) -> str:
    named = list(items)
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return ", ".join(named[:MAX_NAMED]) + more
