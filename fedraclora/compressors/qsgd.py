"""QSGD: random rounding to an even grid up to the Euclidean norm of each tensor.

Alistarh et al., QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding, 2017, arXiv 1610.02132. With
s levels and n numbers in a tensor, E||Q(x) - x||^2 <= min(n / s^2, sqrt(n) / s) ||x||^2 (Lemma 3.1).

Differs from the paper: its Elias code, short where most numbers are zero, is not used; each number takes the fewest
whole bits that tell 2 s + 1 steps apart. In place of the norm, norm / s is sent.
"""

from dataclasses import dataclass

from fedraclora.compressors import Compressor
from fedraclora.compressors._grid import Grid, euclidean_norm

_MOST_LEVELS = 2**15 - 1


@dataclass
class Config:
    """Settings of QSGD.

    levels: steps from zero to the norm, 1 to 32767; 1 takes 2 bits a number, 3 take 3, 7 take 4, 127 take 8.
    """

    levels: int = 7


def build(config: Config) -> Compressor:
    """Return the compressor; raises ValueError for a number of levels outside 1 to 32767."""
    if not 1 <= config.levels <= _MOST_LEVELS:
        raise ValueError(f"compressor.levels={config.levels} has to lie between 1 and {_MOST_LEVELS}")
    return Grid(config.levels, measure=euclidean_norm)
