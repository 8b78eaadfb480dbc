"""Four bits a number, two a byte: an even grid of 7 steps each way up to the largest magnitude of tensor or column.

The scale, largest magnitude / 7 in float32, is sent beside the steps.
"""

from fedraclora.compressors import Compressor
from fedraclora.compressors.int8 import Config, grid


def build(config: Config) -> Compressor:
    """Return the compressor to 15 steps; raises ValueError for an unknown `scale_per`."""
    return grid(config, levels=7)
