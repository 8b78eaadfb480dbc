"""Labelled examples, data sets and the split of the training examples over clients."""

import hashlib
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedraclora.seeding import derive_seed, generator

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Inputs `[num, *input_shape]` (float) and targets (`[num]` int64 classes, or `[num, outputs]` floats)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.targets)

    def select(self, indices: IndexArray) -> "Examples":
        """Return the examples at `indices`, in that order."""
        rows = torch.from_numpy(indices)
        return Examples(self.inputs[rows], self.targets[rows])

    def to(self, *, device: str, dtype: torch.dtype) -> "Examples":
        """Return the examples on a device, their floats in `dtype`; class labels stay whole numbers."""
        targets = self.targets.to(device)
        if targets.is_floating_point():
            targets = targets.to(dtype)
        return Examples(self.inputs.to(device=device, dtype=dtype), targets)


@dataclass(frozen=True)
class Dataset:
    """Training and test examples, with what a model and a partitioner need to know of them.

    `task` is `classification` or `regression`; `num_outputs` is the number of classes, or of regression targets.
    `groups` names the natural owner of each training example (`[num]` int64), where the data have one.
    """

    name: str
    train: Examples
    test: Examples
    task: str
    num_outputs: int
    groups: IndexArray | None = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of one input."""
        return tuple(self.train.inputs.shape[1:])


def check_dataset(dataset: Dataset, *, has_train: bool = True) -> None:
    """Raise ValueError for a data set whose examples do not fit its own description.

    `has_train=False` says that the training examples are the clients' own, on their machines.
    """
    parts = (("train", dataset.train), ("test", dataset.test))
    for part, examples in parts if has_train else parts[1:]:
        check_examples(examples, f"{dataset.name}: the {part} targets", dataset.task, dataset.num_outputs)
    if dataset.groups is not None and len(dataset.groups) != len(dataset.train):
        raise ValueError(f"{dataset.name}: {len(dataset.groups)} groups for {len(dataset.train)} training examples")


def check_examples(examples: Examples, what: str, task: str, num_outputs: int) -> None:
    """Raise ValueError for examples that do not fit a task; `what` names their targets in the message."""
    found = f"{what} are {tuple(examples.targets.shape)} {examples.targets.dtype}"
    if len(examples.inputs) != len(examples.targets) or not len(examples):
        raise ValueError(f"{found} for {len(examples.inputs)} inputs; each input needs one, and there must be some")
    if task == "regression" and examples.targets.shape != (len(examples), num_outputs):
        raise ValueError(f"{found}; regression with num_outputs={num_outputs} needs [num, num_outputs]")
    if task == "classification":
        _check_labels(examples.targets, num_outputs, found)


def _check_labels(targets: Tensor, num_classes: int, found: str) -> None:
    if targets.dtype != torch.int64 or targets.ndim != 1:
        raise ValueError(f"{found}; classification needs [num] int64 labels")
    if int(targets.min()) < 0 or int(targets.max()) >= num_classes:
        span = f"{int(targets.min())} to {int(targets.max())}"
        raise ValueError(f"{found}, from {span}; num_outputs={num_classes} needs labels from 0 to {num_classes - 1}")


@dataclass(frozen=True)
class Split:
    """Which training examples each client owns: one sorted index array a client."""

    indices: tuple[IndexArray, ...]

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the split: equal digests mean equal clients."""
        hasher = hashlib.sha256()
        for owned in self.indices:
            hasher.update(len(owned).to_bytes(8, "little"))
            hasher.update(np.ascontiguousarray(owned, dtype="<i8").tobytes())
        return hasher.hexdigest()

    def save(self, path: Path) -> None:
        """Write the split to an `.npz` file."""
        offsets = np.cumsum([0, *(len(owned) for owned in self.indices)])
        flat = np.concatenate([*self.indices, np.zeros(0, dtype=np.int64)])
        np.savez_compressed(path, flat=flat, offsets=offsets)

    @staticmethod
    def load(path: Path) -> "Split":
        """Read a split that `save` wrote."""
        with np.load(path) as arrays:
            flat, offsets = arrays["flat"], arrays["offsets"]
        return Split(tuple(flat[a:b] for a, b in pairwise(offsets)))


def holdout(dataset: Dataset, *, fraction: float, seed: int) -> Dataset:
    """Return `dataset` with a fraction of its training examples as test examples, for tuning without the real test.

    The seed draws the held-out examples; for classification each class loses the same fraction, to the nearest example.
    Groups follow the training examples that stay.
    Raises ValueError when the fraction is not between 0 and 1 or would leave nothing on either side.
    """
    targets = dataset.train.targets
    num = len(targets)
    strata = targets.numpy() if dataset.task == "classification" else np.zeros(num, dtype=np.int64)
    order = generator(derive_seed(seed, "holdout")).permutation(num)
    held_out = choose_stratified(strata, fraction=fraction, order=order)
    kept = np.setdiff1d(np.arange(num), held_out)
    return replace(
        dataset,
        train=dataset.train.select(kept),
        test=dataset.train.select(held_out),
        groups=None if dataset.groups is None else dataset.groups[kept],
    )


def choose_stratified(strata: IndexArray, *, fraction: float, order: IndexArray) -> IndexArray:
    """Return the sorted indices of `fraction` of each stratum, evenly spaced along `order`.

    `strata` names the stratum of each example `[num]`; `order` is a permutation of the indices: `arange` for a choice
    that every seed shares. A stratum of n examples gives the integer nearest to `fraction * n` (halves to even).
    Raises ValueError when the fraction is not between 0 and 1, or chooses no example, or all of them.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction has to lie between 0 and 1; found {fraction}")
    chosen = [_evenly_spaced(order[strata[order] == stratum], fraction) for stratum in np.unique(strata)]
    result = np.sort(np.concatenate([*chosen, np.zeros(0, dtype=np.int64)]))
    if not 0 < len(result) < len(strata):
        raise ValueError(
            f"holding out {fraction} of {len(strata)} examples takes {len(result)}; both sides need at least one"
        )
    return result


def _evenly_spaced(members: IndexArray, fraction: float) -> IndexArray:
    num_chosen = round(fraction * len(members))
    if num_chosen == 0:
        return members[:0]
    # Integer arithmetic: with 1/5 it is every fifth member, whatever the rounding of the fraction.
    return members[np.arange(1, num_chosen + 1) * len(members) // num_chosen - 1]
