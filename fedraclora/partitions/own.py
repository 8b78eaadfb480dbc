"""Nothing to share out: every client brings its own data, on its own machine.

For real deployments. The server's data set is then its held-out test set; what its clients hold it never sees.
"""

from dataclasses import dataclass

import numpy as np

from fedraclora.data import Dataset, Split

# The clients' examples are not among the server's.
IS_ELSEWHERE = True


@dataclass
class Config:
    """The partition has no settings."""


def build(config: Config, *, dataset: Dataset, num_clients: int, seed: int) -> Split:
    """Return a split in which no client owns any example of the server's."""
    del config, dataset, seed
    return Split(tuple(np.zeros(0, dtype=np.int64) for _ in range(num_clients)))
