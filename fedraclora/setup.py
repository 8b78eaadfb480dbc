"""What a server tells a client's machine once, so that it can build the model and find its data.

It goes with the handshake as JSON and is kept on the machine's disk. The base itself is never in it: the machine
builds it from the model's name, settings and seed, and compares digests. Seeds are those of single streams, never the
run's root.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedraclora.data import Dataset, Examples, IndexArray, Split, choose_stratified, holdout
from fedraclora.finished import ModelCard
from fedraclora.partitions import make_split
from fedraclora.plugins import find
from fedraclora.seeding import derive_seed, generator

DATASETS, PARTITIONS = "fedraclora.datasets", "fedraclora.partitions"


@dataclass(frozen=True)
class Plugin:
    """A plug-in with its settings, and the seed that it is given."""

    name: str
    config: dict[str, Any]
    seed: int

    def settings(self) -> Any:  # noqa: ANN401
        """Return the settings as an object with attributes, as `build` expects them."""
        return SimpleNamespace(**self.config)


@dataclass(frozen=True)
class Setup:
    """The model (`base` is the digest of its initial weights), the data, and how a machine computes.

    `validation` is the share of the training examples that nobody trains on, 0 where the server evaluates on a test
    set of its own. `num_clients` partitions are made of the data set where a machine has no data of its own. Each
    client holds out the share `personal` of its examples to score its own model on, drawn from `personal_seed`.
    """

    base: str
    model: ModelCard
    model_seed: int
    task: str
    dataset: Plugin
    validation: float
    partition: Plugin
    num_clients: int
    device: str
    threads: int
    chunk_bytes: int
    chunk_clients: int
    personal: float = 0.0
    personal_seed: int = 0

    def to_json(self) -> str:
        """Return the setup as text."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "Setup":
        """Return the setup that `to_json` wrote. Raises ValueError for anything else."""
        try:
            values = json.loads(text)
            values["model"]["input_shape"] = tuple(values["model"]["input_shape"])
            model = ModelCard(**values.pop("model"))
            dataset, partition = Plugin(**values.pop("dataset")), Plugin(**values.pop("partition"))
            return Setup(model=model, dataset=dataset, partition=partition, **values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is not the setup of a run: {error!r}") from error

    def initial_model(self) -> nn.Module:
        """Return the model with its initial weights, on the machine's device."""
        return self.model.build(self.model_seed).to(self.device)


def build_dataset(plugin: Plugin) -> Dataset:
    """Return the data set that a plug-in makes."""
    dataset: Dataset = find(DATASETS, plugin.name).build(plugin.settings(), seed=plugin.seed)
    return dataset


def hold_out(dataset: Dataset, plugin: Plugin, *, validation: float) -> Dataset:
    """Return the data set whose test examples are that share of the training examples; 0 changes nothing."""
    if not validation:
        return dataset
    return holdout(dataset, fraction=validation, seed=derive_seed(plugin.seed, "validation"))


def split_dataset(plugin: Plugin, dataset: Dataset, *, num_clients: int) -> Split:
    """Return the split of the training examples over the clients."""
    module = find(PARTITIONS, plugin.name)
    return make_split(module, plugin.settings(), dataset=dataset, num_clients=num_clients, seed=plugin.seed)


def hold_out_own(
    examples: Examples, partitions: Mapping[int, IndexArray], setup: Setup
) -> tuple[dict[int, IndexArray], dict[int, IndexArray]]:
    """Return the rows that each partition trains on, and those on which it scores its own model.

    Each class loses its share where labels are classes; a client too small to spare an example holds out none.
    """
    if not setup.personal:
        return dict(partitions), {}
    trained, held_out = {}, {}
    for partition, rows in partitions.items():
        order = generator(derive_seed(setup.personal_seed, "client", partition)).permutation(len(rows))
        is_classes = not examples.targets.is_floating_point()
        labels = examples.targets[torch.from_numpy(rows)].cpu().numpy() if is_classes else np.zeros(len(rows), np.int64)
        try:
            chosen = choose_stratified(labels, fraction=setup.personal, order=order)
        except ValueError:
            chosen = order[:0]
        trained[partition], held_out[partition] = np.delete(rows, chosen), rows[chosen]
    return trained, held_out


def base_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the weights of a freshly built model on the CPU, where chains live."""
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def set_threads(setup: Setup) -> None:
    """Use the threads that the run asks for (0: PyTorch's own choice)."""
    if setup.threads:
        torch.set_num_threads(setup.threads)
