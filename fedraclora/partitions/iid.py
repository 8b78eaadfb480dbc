"""Equal shares of shuffled examples: every client sees the same distribution."""

from dataclasses import dataclass

import numpy as np

from fedraclora.data import Dataset, Split
from fedraclora.partitions._flower import split_by


@dataclass
class Config:
    """The even split has no settings."""


def build(config: Config, *, dataset: Dataset, num_clients: int, seed: int) -> Split:
    """Return a random split of all training examples into shares whose sizes differ by at most one."""
    del config
    from flwr_datasets.partitioner import IidPartitioner

    keys = np.zeros(len(dataset.train), dtype=np.int64)
    return split_by(IidPartitioner(num_clients), keys, num_clients=num_clients, seed=seed)
