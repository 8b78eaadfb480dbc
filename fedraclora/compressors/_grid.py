"""Numbers on an even grid around zero: whole multiples of a scale, from -levels to levels, packed into few bits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedraclora.compressors import Arrays
from fedraclora.compressors._arrays import checked, flat_numbers, num_numbers, shapes_of, split, to_tensors
from fedraclora.compressors._bits import pack_signed, packed_bytes, signed_width, unpack_signed
from fedraclora.compressors._scales import Scales, checked_scales, round_at_random, to_scales
from fedraclora.payload import Shape
from fedraclora.seeding import generator

_Numbers = npt.NDArray[np.float64]
Measure = Callable[[_Numbers, tuple[int, ...]], _Numbers]


def peak(numbers: _Numbers, axes: tuple[int, ...]) -> _Numbers:
    """Return the largest magnitude along `axes`, which are kept with length 1; 0 where there are no numbers."""
    peaks: _Numbers = np.abs(numbers).max(axis=axes, initial=0, keepdims=True)
    return peaks


def euclidean_norm(numbers: _Numbers, axes: tuple[int, ...]) -> _Numbers:
    """Return the Euclidean norm along `axes`, which are kept with length 1; infinite where a square is."""
    with np.errstate(over="ignore"):  # an infinite norm is refused as a scale
        norms: _Numbers = np.sqrt(np.square(numbers).sum(axis=axes, keepdims=True))
    return norms


@dataclass(frozen=True)
class Grid:
    """Send `levels` steps each way from zero up to what `measure` finds, an upper limit of the numbers' magnitudes.

    is_unbiased: round at random, right on average; otherwise to the nearest step, to the even one of two.
    is_per_column: one scale a column of a matrix, see `_scale_shape`, and not one a tensor.
    """

    levels: int
    measure: Measure = peak
    is_unbiased: bool = True
    is_per_column: bool = False
    is_sparse = False
    is_fixed_size = True

    def encode(self, tensors: Sequence[Tensor], seed: int) -> Arrays:
        """Return the packed steps of all numbers, and one float32 scale a tensor or column."""
        shapes, rng = shapes_of(tensors), generator(seed)
        steps, scales = np.zeros(num_numbers(shapes)), np.zeros(self._num_scales(shapes), np.float32)
        pieces = split(flat_numbers(tensors).astype(np.float64), shapes)
        targets = zip(split(steps, shapes), split(scales, self._scale_shapes(shapes)), strict=True)
        for piece, (piece_steps, piece_scales) in zip(pieces, targets, strict=True):
            shared_axes = tuple(axis for axis, length in enumerate(piece_scales.shape) if length == 1)
            piece_scales[...] = to_scales(self.measure(piece, shared_axes), steps=self.levels)
            piece_steps[...] = self._rounded(piece, piece_scales, rng)
        return {"steps": pack_signed(steps, self.levels), "scales": scales}

    def decode(
        self, arrays: Mapping[str, npt.NDArray[Any]], shapes: Sequence[Shape], dtype: torch.dtype, seed: int
    ) -> list[Tensor]:
        """Return steps times scales; raises ValueError for other arrays, scales below 0 and steps beyond the grid."""
        count = num_numbers(shapes)
        num_bytes = packed_bytes(count, signed_width(self.levels))
        packed, scales = checked(
            arrays, {"steps": (np.uint8, num_bytes), "scales": (np.float32, self._num_scales(shapes))}
        )
        numbers = unpack_signed(packed, count, self.levels).astype(np.float64)
        pieces_of_scales = split(checked_scales(scales), self._scale_shapes(shapes))
        for piece, piece_scales in zip(split(numbers, shapes), pieces_of_scales, strict=True):
            np.multiply(piece, piece_scales, out=piece)
        return to_tensors(numbers, shapes, dtype)

    def max_bytes(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Return the exact bytes: the packed steps, and four a scale."""
        return packed_bytes(num_numbers(shapes), signed_width(self.levels)) + 4 * self._num_scales(shapes)

    def _rounded(self, numbers: _Numbers, scales: Scales, rng: np.random.Generator) -> _Numbers:
        divisors = np.where(scales > 0, scales, np.float32(1)).astype(np.float64)  # a scale of zero belongs to zeros
        return round_at_random(numbers / divisors, rng) if self.is_unbiased else np.rint(numbers / divisors)

    def _scale_shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [_scale_shape(shape) if self.is_per_column else (1,) * len(shape) for shape in shapes]

    def _num_scales(self, shapes: Sequence[Shape]) -> int:
        return sum(map(prod, self._scale_shapes(shapes)))


def _scale_shape(shape: Shape) -> Shape:
    """Return the shape of the scales of a tensor whose columns have their own, with ones where a scale is shared.

    A matrix has as many scales as its shorter axis is long, its last one if both are equal: the rank of a factor,
    whichever side it stands on.
    """
    if len(shape) != 2:
        return (1,) * len(shape)
    return (shape[0], 1) if shape[0] < shape[1] else (1, shape[1])
