"""Scales that are sent as float32, and the random rounding that goes with them."""

import numpy as np
import numpy.typing as npt

LARGEST = 2.0**127

Scales = npt.NDArray[np.float32]


def to_scales(limits: npt.NDArray[np.float64], *, steps: int = 1) -> Scales:
    """Return the smallest float32 scales of which `steps` reach the non-negative `limits`.

    Raises ValueError for limits above 2^127, which leaves room in float32 for what is rounded up.
    """
    largest = limits.max(initial=0)
    if largest > LARGEST:
        raise ValueError(f"{largest:.6g} is too large for a scale; expected 2^127 = {LARGEST:.6g} at most")
    nearest = (limits / steps).astype(np.float32)
    is_short = nearest.astype(np.float64) * steps < limits
    return np.where(is_short, np.nextafter(nearest, np.float32(np.inf)), nearest)


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
