"""Eight bits a number: an even grid of 127 steps each way up to the largest magnitude of the tensor or column.

The scale, largest magnitude / 127 in float32, is sent beside the steps.
"""

from dataclasses import dataclass

from fedraclora.compressors import Compressor
from fedraclora.compressors._grid import Grid

_SCALE_PER = ("tensor", "column")


@dataclass
class Config:
    """Settings of an even grid.

    stochastic: round up or down at random, right on average; otherwise to the nearest step.
    scale_per: what shares a scale: a whole "tensor"; or a "column" of a matrix, along whose shorter axis (the rank of a
        low-rank factor) the scales then differ, while tensors that are no matrices have one.
    """

    stochastic: bool = True
    scale_per: str = "tensor"


def build(config: Config) -> Compressor:
    """Return the compressor to 255 steps; raises ValueError for an unknown `scale_per`."""
    return grid(config, levels=127)


def grid(config: Config, *, levels: int) -> Compressor:
    """Return the compressor to a grid with `levels` steps each way; raises ValueError for an unknown `scale_per`."""
    if config.scale_per not in _SCALE_PER:
        raise ValueError(f"compressor.scale_per={config.scale_per} is unknown; it is one of {', '.join(_SCALE_PER)}")
    return Grid(levels, is_unbiased=config.stochastic, is_per_column=config.scale_per == "column")
