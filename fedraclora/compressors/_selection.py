"""A share of the numbers of each tensor: how many that are, and where the largest of them lie."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fedraclora.payload import Shape

Places = npt.NDArray[np.int64]


def check_share(share: float) -> None:
    """Raise ValueError for a share that is not in (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"compressor.share={share} has to be above 0 and at most 1")


def num_kept(shapes: Sequence[Shape], share: float) -> list[int]:
    """Return how many numbers of each tensor are kept: the nearest whole number, but at least one of any there are."""
    sizes = [prod(shape) for shape in shapes]
    return [min(size, max(1, round(share * size))) for size in sizes]


def largest_places(numbers: npt.NDArray[Any], count: int) -> Places:
    """Return the places of the `count` largest of one-dimensional `numbers` in rising order; of equals, the first."""
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    threshold = np.partition(numbers, numbers.size - count)[numbers.size - count]
    above = np.flatnonzero(numbers > threshold)
    equal = np.flatnonzero(numbers == threshold)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def starts_of(shapes: Sequence[Shape]) -> Places:
    """Return the place, among the numbers of all tensors, of each tensor's first one."""
    sizes = np.array([prod(shape) for shape in shapes], dtype=np.int64)
    return np.cumsum(sizes) - sizes
