"""Scaled sign: one bit a number, and the mean magnitude of each tensor.

Karimireddy et al., Error Feedback Fixes SignSGD and other Gradient Compression Schemes, 2019, arXiv 1901.09847. Biased:
a contraction with ||C(x) - x||^2 = (1 - ||x||_1^2 / (n ||x||_2^2)) ||x||_2^2, meant for use with error feedback. Zeros
count as positive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedraclora.compressors import Arrays, Compressor
from fedraclora.compressors._arrays import checked, flat_numbers, num_numbers, shapes_of, split, to_tensors
from fedraclora.compressors._bits import pack, packed_bytes, unpack
from fedraclora.compressors._scales import checked_scales, to_scales
from fedraclora.payload import Shape


@dataclass
class Config:
    """The scaled sign has no settings."""


def build(config: Config) -> Compressor:
    """Return the compressor to signs."""
    del config
    return Sign()


class Sign:
    """Send one bit a number, set for negative ones, and one float32 scale a tensor."""

    is_unbiased = False
    is_sparse = False
    is_fixed_size = True

    def encode(self, tensors: Sequence[Tensor], seed: int) -> Arrays:
        """Return packed sign bits and mean magnitudes; raises ValueError for a mean magnitude above 2^127."""
        flat = flat_numbers(tensors).astype(np.float64)
        means = [np.abs(piece).sum() / max(piece.size, 1) for piece in split(flat, shapes_of(tensors))]
        return {"signs": pack(flat < 0, 1), "scales": to_scales(np.array(means, dtype=np.float64))}

    def decode(
        self, arrays: Mapping[str, npt.NDArray[Any]], shapes: Sequence[Shape], dtype: torch.dtype, seed: int
    ) -> list[Tensor]:
        """Return plus or minus the scales; raises ValueError for other arrays and scales that are none."""
        count = num_numbers(shapes)
        signs, scales = checked(
            arrays, {"signs": (np.uint8, packed_bytes(count, 1)), "scales": (np.float32, len(shapes))}
        )
        repeated = np.repeat(checked_scales(scales), [prod(shape) for shape in shapes])
        return to_tensors(np.where(unpack(signs, count, 1), -repeated, repeated), shapes, dtype)

    def max_bytes(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Return the exact bytes: one bit a number, rounded up to whole bytes, and four bytes a tensor."""
        return packed_bytes(num_numbers(shapes), 1) + 4 * len(shapes)
