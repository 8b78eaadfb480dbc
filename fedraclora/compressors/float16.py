"""IEEE 754 half precision: two bytes a number, 11 significant bits, magnitudes up to 65504.

Rounds to the nearest, to the even one of two. Larger magnitudes are sent as 65504 and do not become infinite; those up
to 2^-25 = 3e-8 become zero.
"""

from dataclasses import dataclass

import numpy as np

from fedraclora.compressors import Compressor
from fedraclora.compressors._halves import Halves


@dataclass
class Config:
    """Half precision has no settings."""


def build(config: Config) -> Compressor:
    """Return the compressor to half precision."""
    del config
    largest = float(np.finfo(np.float16).max)
    return Halves(np.float16, largest, lambda wide: wide.astype(np.float16), lambda sent: sent.astype(np.float32))
