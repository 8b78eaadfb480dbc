"""Natural compression: random rounding of each number to one of the two nearest powers of two; nine bits a number.

Horvath et al., Natural Compression for Distributed Deep Learning, 2019, arXiv 1905.10988. Unbiased, with
E||C(x) - x||^2 <= ||x||^2 / 8.

A sign bit and the biased exponent of float32, 0 for zero, are sent: the powers go from 2^-126 to 2^127. A magnitude
below 2^-126 becomes zero or 2^-126, right on average too, but with a larger relative variance; one above 2^127 is
refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedraclora.compressors import Arrays, Compressor
from fedraclora.compressors._arrays import checked, flat_numbers, num_numbers, to_tensors
from fedraclora.compressors._bits import pack, packed_bytes, unpack
from fedraclora.payload import Shape
from fedraclora.seeding import generator

_BIAS = 127
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127
_LARGEST_CODE = 127 + _BIAS


@dataclass
class Config:
    """Natural compression has no settings."""


def build(config: Config) -> Compressor:
    """Return the compressor to powers of two."""
    del config
    return Natural()


class Natural:
    """Send a sign bit and an exponent of eight bits a number."""

    is_unbiased = True
    is_sparse = False
    is_fixed_size = True

    def encode(self, tensors: Sequence[Tensor], seed: int) -> Arrays:
        """Return packed sign bits and biased exponents; raises ValueError for magnitudes above 2^127."""
        numbers = flat_numbers(tensors).astype(np.float64)
        magnitudes = np.abs(numbers)
        if magnitudes.max(initial=0) > _LARGEST:
            raise ValueError(f"a magnitude of {magnitudes.max():.6g} is too large; natural sends up to 2^127")
        halves, exponents = np.frexp(magnitudes)  # halves in [0.5, 1)
        is_small = magnitudes < _SMALLEST
        lower = np.where(is_small, 0, exponents - 1 + _BIAS)
        share_up = np.where(is_small, magnitudes / _SMALLEST, 2 * halves - 1)
        codes = lower + (generator(seed).random(numbers.shape) < share_up)
        return {"signs": pack(numbers < 0, 1), "exponents": codes.astype(np.uint8)}

    def decode(
        self, arrays: Mapping[str, npt.NDArray[Any]], shapes: Sequence[Shape], dtype: torch.dtype, seed: int
    ) -> list[Tensor]:
        """Return signed powers of two and zeros; raises ValueError for other arrays and the exponent of infinity."""
        count = num_numbers(shapes)
        signs, codes = checked(arrays, {"signs": (np.uint8, packed_bytes(count, 1)), "exponents": (np.uint8, count)})
        if codes.max(initial=0) > _LARGEST_CODE:
            raise ValueError(f"an encoded exponent is {codes.max()}; expected {_LARGEST_CODE} at most")
        powers = np.where(codes > 0, np.ldexp(1.0, codes.astype(np.int32) - _BIAS), 0.0)
        return to_tensors(np.where(unpack(signs, count, 1), -powers, powers), shapes, dtype)

    def max_bytes(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Return the exact bytes: nine bits a number, the sign bits rounded up to whole bytes."""
        count = num_numbers(shapes)
        return packed_bytes(count, 1) + count
