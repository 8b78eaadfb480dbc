"""The upper half of a float32: two bytes a number, 8 significant bits, the magnitudes of float32.

Rounds to the nearest, to the even one of two; float64 numbers are rounded to float32 first. Magnitudes above the
largest finite bfloat16, 3.39e38, are sent as that and do not become infinite. Sent as uint16, as NumPy has no bfloat16.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedraclora.compressors import Compressor
from fedraclora.compressors._halves import Halves
from fedraclora.payload import FlatArray

_LARGEST = (2 - 2.0**-7) * 2.0**127


@dataclass
class Config:
    """Rounding to bfloat16 has no settings."""


def build(config: Config) -> Compressor:
    """Return the compressor to bfloat16."""
    del config
    return Halves(np.uint16, _LARGEST, _upper_half, _with_lower_half)


def _upper_half(numbers: FlatArray) -> npt.NDArray[np.uint16]:
    bits = numbers.astype(np.float32).view(np.uint32)
    # Adding just under half of the last kept bit, and one more where that bit is odd, sends ties to the even one.
    is_odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + is_odd) >> np.uint32(16)).astype(np.uint16)


def _with_lower_half(halves: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
