"""A fixed number of classes for each client, and each class shared evenly by the clients that hold it.

Li et al., Federated Learning on Non-IID Data Silos: An Experimental Study, 2021, arXiv 2102.02079.
"""

from dataclasses import dataclass

from fedraclora.data import Dataset, Split
from fedraclora.partitions._flower import KEY, class_labels, partitioner_seed, split_by


@dataclass
class Config:
    """Settings of the split by classes.

    classes_per_client: number of classes that each client holds.
    """

    classes_per_client: int = 2


def build(config: Config, *, dataset: Dataset, num_clients: int, seed: int) -> Split:
    """Return a split in which client i holds class i (modulo the classes) and others at random, as in the paper.

    With fewer clients than classes, the examples of a class that no client holds are owned by nobody.
    Raises ValueError when a class has fewer examples than holders, for an impossible number of classes, and for
    regression data.
    """
    from flwr_datasets.partitioner import PathologicalPartitioner

    labels = class_labels(dataset, "pathological")
    if not 1 <= config.classes_per_client <= dataset.num_outputs:
        raise ValueError(
            f"partition.classes_per_client={config.classes_per_client} has to lie between 1 and the "
            f"{dataset.num_outputs} classes of {dataset.name}"
        )
    partitioner = PathologicalPartitioner(
        num_partitions=num_clients,
        partition_by=KEY,
        num_classes_per_partition=config.classes_per_client,
        class_assignment_mode="first-deterministic",
        seed=partitioner_seed(seed),
    )
    return split_by(partitioner, labels, num_clients=num_clients, seed=seed)
