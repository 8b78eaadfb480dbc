"""Run a partitioner of flwr-datasets on one integer key a training example."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fedraclora.data import Dataset, IndexArray, Split
from fedraclora.seeding import derive_seed, generator

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from flwr_datasets.partitioner import Partitioner

KEY = "key"


def class_labels(dataset: Dataset, name: str) -> IndexArray:
    """Return the class of each training example, for the partition called `name`.

    Raises ValueError for a regression data set, which has no classes.
    """
    if dataset.task != "classification":
        raise ValueError(
            f"partition={name} divides examples by class, and {dataset.name} is a {dataset.task} data set; "
            "use partition=iid"
        )
    return np.asarray(dataset.train.targets.numpy(), dtype=np.int64)


def partitioner_seed(seed: int) -> int:
    """Return the seed for a partitioner's own draws, apart from the seed of the order it sees the examples in."""
    return derive_seed(seed, "partitioner")


def split_by(partitioner: "Partitioner", keys: IndexArray, *, num_clients: int, seed: int) -> Split:
    """Return the split that `partitioner`, told to divide by the column `KEY`, makes of examples with these `keys`.

    The examples are shown in an order that the seed draws, so that who owns which image of a class does not depend on
    the order of the file. Nothing is printed and no network is used.
    Raises ValueError with the partitioner's own reason when it cannot divide the examples.
    """
    from datasets import Dataset as Table

    order = generator(derive_seed(seed, "order")).permutation(len(keys))
    try:
        with _silence():
            partitioner.dataset = Table.from_dict({"index": order, KEY: keys[order]})
            owned = [_indices(partitioner.load_partition(client)) for client in range(num_clients)]
    except ValueError as error:
        raise ValueError(
            f"{type(partitioner).__name__} cannot divide {len(keys)} examples over {num_clients} clients: {error}"
        ) from error
    return Split(tuple(owned))


def _indices(partition: "Table") -> IndexArray:
    return np.sort(np.asarray(partition.with_format("numpy")[:]["index"], dtype=np.int64))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    # A partitioner warns at every new draw and shows a progress bar; neither says what a user could act on.
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
