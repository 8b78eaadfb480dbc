"""Shares of each class drawn from a Dirichlet distribution: the usual model of unequal label balance.

Yurochkin et al., Bayesian Nonparametric Federated Learning of Neural Networks, 2019, arXiv 1905.12022. Their balancing
of client sizes is left out.
"""

from dataclasses import dataclass

from fedraclora.data import Dataset, Split
from fedraclora.partitions._flower import KEY, class_labels, partitioner_seed, split_by


@dataclass
class Config:
    """Settings of the Dirichlet split.

    alpha: concentration; near 0 a class belongs to few clients, at 100 all clients look alike.
    min_partition_size: fewest examples a client may own; the shares are drawn again, ten times at most, until it holds.
    """

    alpha: float = 0.3
    min_partition_size: int = 1


def build(config: Config, *, dataset: Dataset, num_clients: int, seed: int) -> Split:
    """Return a split of all training examples in which each class is shared out by its own Dirichlet draw.

    Raises ValueError for settings that cannot hold, for regression data, and when no draw met the minimum size.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    labels = class_labels(dataset, "dirichlet")
    _check(config, num_examples=len(labels), num_clients=num_clients)
    partitioner = DirichletPartitioner(
        num_partitions=num_clients,
        partition_by=KEY,
        alpha=float(config.alpha),
        min_partition_size=config.min_partition_size,
        seed=partitioner_seed(seed),
    )
    try:
        return split_by(partitioner, labels, num_clients=num_clients, seed=seed)
    except ValueError as error:
        raise ValueError(
            f"partition.alpha={config.alpha} gives some client fewer than partition.min_partition_size="
            f"{config.min_partition_size} examples in every draw; use a larger alpha, fewer clients or a smaller "
            "minimum"
        ) from error


def _check(config: Config, *, num_examples: int, num_clients: int) -> None:
    if not config.alpha > 0:
        raise ValueError(f"partition.alpha={config.alpha} has to be positive")
    if config.min_partition_size * num_clients > num_examples:
        raise ValueError(
            f"partition.min_partition_size={config.min_partition_size} for {num_clients} clients needs "
            f"{config.min_partition_size * num_clients} examples; {num_examples} are there"
        )
