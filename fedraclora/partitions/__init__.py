"""Partitions, one plug-in a file: `build(config, *, dataset, num_clients, seed)` splits the training examples."""

from types import ModuleType

import numpy as np

from fedraclora.data import Dataset, IndexArray, Split


def make_split(module: ModuleType, config: object, *, dataset: Dataset, num_clients: int, seed: int) -> Split:
    """Return the split of the plug-in `module`, checked: one sorted, non-empty index array for each of `num_clients`.

    No training example is owned twice. Some may be owned by nobody, where the plug-in says so, and where it says
    `IS_ELSEWHERE` the clients own other examples than these, so that the arrays are empty.
    Raises ValueError when there are more clients than examples, and when clients stay without examples.
    """
    num_examples = len(dataset.train)
    if getattr(module, "IS_ELSEWHERE", False):
        elsewhere: Split = module.build(config, dataset=dataset, num_clients=num_clients, seed=seed)
        return elsewhere
    if not 1 <= num_clients <= num_examples:
        raise ValueError(
            f"num_clients={num_clients} has to lie between 1 and the {num_examples} training examples of {dataset.name}"
        )
    split = module.build(config, dataset=dataset, num_clients=num_clients, seed=seed)
    name = module.__name__.rpartition(".")[2]
    if not isinstance(split, Split) or len(split.indices) != num_clients:
        raise ValueError(
            f"partition={name} did not return a Split of {num_clients} clients; found {type(split).__name__}"
        )
    _check_empty(split, name)
    _check_owned_once(split, num_examples, name)
    return Split(tuple(np.sort(owned) for owned in split.indices))


def label_counts(split: Split, dataset: Dataset) -> IndexArray:
    """Return how many training examples of each class each client owns: int64 `[num_clients, num_classes]`.

    Raises ValueError for a regression data set.
    """
    if dataset.task != "classification":
        raise ValueError(f"{dataset.name} is a {dataset.task} data set: it has no classes to count")
    labels = dataset.train.targets.cpu().numpy()
    return np.stack([np.bincount(labels[owned], minlength=dataset.num_outputs) for owned in split.indices])


def _check_empty(split: Split, name: str) -> None:
    empty = [client for client, owned in enumerate(split.indices) if len(owned) == 0]
    if not empty:
        return
    shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
    raise ValueError(
        f"partition={name} leaves {len(empty)} of {len(split.indices)} clients without examples ({shown}); use fewer "
        "clients, or for dirichlet a larger partition.alpha or partition.min_partition_size=1"
    )


def _check_owned_once(split: Split, num_examples: int, name: str) -> None:
    flat = np.concatenate(split.indices)
    if flat.min() < 0 or flat.max() >= num_examples:
        raise ValueError(
            f"partition={name} names examples outside 0 to {num_examples - 1}: {flat.min()} to {flat.max()}"
        )
    num_twice = len(flat) - len(np.unique(flat))
    if num_twice:
        raise ValueError(
            f"partition={name} gives {num_twice} examples to more than one client, or twice to the same one"
        )
