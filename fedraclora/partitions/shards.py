"""Shards of examples sorted by class, a few for each client: most clients see few classes.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017, arXiv 1602.05629.
"""

from dataclasses import dataclass

from fedraclora.data import Dataset, Split
from fedraclora.partitions._flower import KEY, class_labels, partitioner_seed, split_by


@dataclass
class Config:
    """Settings of the shard split.

    shards_per_client: number of shards that each client owns.
    """

    shards_per_client: int = 2


def build(config: Config, *, dataset: Dataset, num_clients: int, seed: int) -> Split:
    """Return a split in which each client owns `shards_per_client` random shards, all of one size.

    The examples that do not fill a shard, fewer than there are shards, are owned by nobody.
    Raises ValueError when there are more shards than examples, and for regression data.
    """
    from flwr_datasets.partitioner import ShardPartitioner

    labels = class_labels(dataset, "shards")
    num_shards = config.shards_per_client * num_clients
    if config.shards_per_client < 1 or num_shards > len(labels):
        raise ValueError(
            f"partition.shards_per_client={config.shards_per_client} for {num_clients} clients makes {num_shards} "
            f"shards of {len(labels)} examples; give at least one a client, and no more shards than examples"
        )
    partitioner = ShardPartitioner(
        num_partitions=num_clients,
        partition_by=KEY,
        num_shards_per_partition=config.shards_per_client,
        seed=partitioner_seed(seed),
    )
    return split_by(partitioner, labels, num_clients=num_clients, seed=seed)
