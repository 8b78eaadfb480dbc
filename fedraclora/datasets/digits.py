"""The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn ships: small enough for tests."""

from dataclasses import dataclass

import numpy as np
import torch

from fedraclora.data import Dataset, Examples, choose_stratified


@dataclass
class Config:
    """Settings of the digits.

    test_fraction: share of each class that is held out for testing, the same images for every seed.
    """

    test_fraction: float = 0.2


def build(config: Config, *, seed: int) -> Dataset:
    """Return the digits as float32 images `[num, 1, 8, 8]` in [0, 1]; the seed changes nothing."""
    del seed
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = np.asarray(bunch.target, dtype=np.int64)
    inputs = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32) / 16).unsqueeze(1)
    every = np.arange(len(labels))
    test = choose_stratified(labels, fraction=config.test_fraction, order=every)
    examples = Examples(inputs, torch.from_numpy(labels))
    return Dataset(
        name="digits",
        train=examples.select(np.setdiff1d(every, test)),
        test=examples.select(test),
        task="classification",
        num_outputs=10,
    )
