"""One client for each natural owner of the data: a writer, a site, a domain."""

from dataclasses import dataclass

import numpy as np

from fedraclora.data import Dataset, Split
from fedraclora.partitions._flower import KEY, split_by


@dataclass
class Config:
    """The natural split has no settings."""


def build(config: Config, *, dataset: Dataset, num_clients: int, seed: int) -> Split:
    """Return the split by `dataset.groups`, clients in the order of the sorted group numbers; the seed changes nothing.

    Raises ValueError for a data set without groups, and when `num_clients` is not the number of groups.
    """
    del config
    from flwr_datasets.partitioner import NaturalIdPartitioner

    if dataset.groups is None:
        raise ValueError(
            f"partition=natural needs a data set that knows who owns each example, and {dataset.name} does not; "
            "use partition=iid or partition=dirichlet"
        )
    num_groups = len(np.unique(dataset.groups))
    if num_clients != num_groups:
        raise ValueError(f"{dataset.name} has {num_groups} natural owners; found num_clients={num_clients}")
    return split_by(NaturalIdPartitioner(KEY), dataset.groups, num_clients=num_clients, seed=seed)
