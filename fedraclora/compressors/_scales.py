"""Scales that are sent as float32, and the random rounding that goes with them."""

from typing import Any

import numpy as np
import numpy.typing as npt

LARGEST = 2.0**127

Scales = npt.NDArray[np.float32]


def to_scales(numbers: npt.NDArray[Any]) -> Scales:
    """Return non-negative numbers rounded up to float32, so that what is divided by them does not outgrow its limit.

    Raises ValueError above 2^127, which leaves room in float32 for what is rounded up.
    """
    largest = numbers.max(initial=0)
    if largest > LARGEST:
        raise ValueError(f"a scale of {largest:.6g} is too large to be sent; expected 2^127 = {LARGEST:.6g} at most")
    rounded = numbers.astype(np.float32)
    return np.where(rounded < numbers, np.nextafter(rounded, np.float32(np.inf)), rounded)


def checked_scales(scales: Scales) -> Scales:
    """Return the scales; raises ValueError for one that is negative or not finite."""
    is_valid = np.isfinite(scales) & (scales >= 0)
    if not is_valid.all():
        raise ValueError(f"an encoded scale is {scales[~is_valid][0]}; expected finite numbers, at least 0")
    return scales


def round_at_random(numbers: npt.NDArray[np.float64], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return each number rounded down or up to a whole one, up with the probability that makes the mean right."""
    lower = np.floor(numbers)
    # Not floor(number + draw), whose sum can be rounded up to the next whole number.
    return lower + (generator.random(numbers.shape) < numbers - lower)
