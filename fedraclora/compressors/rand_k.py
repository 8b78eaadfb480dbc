"""Rand-k: numbers of each tensor that are drawn from the seed, so that their places are not sent; others become zero.

Sent times n / k the numbers are right on average, with E||C(x) - x||^2 = (n / k - 1) ||x||^2. Sent as they are, they
make a contraction with E||C(x) - x||^2 = (1 - k / n) ||x||^2 (Stich et al., Sparsified SGD with Memory, 2018,
arXiv 1809.07599).
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
from fedraclora.compressors._arrays import checked, flat_numbers, num_numbers, numpy_dtype, shapes_of, to_tensors
from fedraclora.compressors._selection import Places, check_share, largest_places, num_kept, starts_of
from fedraclora.payload import Shape
from fedraclora.seeding import generator


@dataclass
class Config:
    """Settings of rand-k.

    share: share of each tensor's numbers that is sent, in (0, 1]; at least one number is.
    scale: multiply what is sent by n / k, so that it is right on average.
    """

    share: float = 0.1
    scale: bool = True


def build(config: Config) -> Compressor:
    """Return the compressor; raises ValueError for a share outside (0, 1]."""
    check_share(config.share)
    return RandK(config.share, config.scale)


@dataclass(frozen=True)
class RandK:
    """Send a share of the numbers, multiplied by n / k where that is to be unbiased."""

    share: float
    is_unbiased: bool
    is_sparse = True
    is_fixed_size = True

    def encode(self, tensors: Sequence[Tensor], seed: int) -> Arrays:
        """Return the drawn numbers in the tensors' dtype; raises ValueError where n / k times one is not finite."""
        shapes = shapes_of(tensors)
        flat = flat_numbers(tensors)
        drawn = flat[self._draw(shapes, seed)]
        factors = self._factors(shapes)
        is_too_large = np.abs(drawn) > np.finfo(drawn.dtype).max / factors
        if is_too_large.any():
            number, factor = drawn[is_too_large][0], factors[is_too_large][0]
            raise ValueError(f"{number:.6g} times n / k = {factor:.6g} is too large for {drawn.dtype}")
        return {"values": (drawn * factors).astype(drawn.dtype)}

    def decode(
        self, arrays: Mapping[str, npt.NDArray[Any]], shapes: Sequence[Shape], dtype: torch.dtype, seed: int
    ) -> list[Tensor]:
        """Return the sent numbers among zeros; raises ValueError for other arrays and numbers that are not finite."""
        target = numpy_dtype(dtype)
        (values,) = checked(arrays, {"values": (target, sum(num_kept(shapes, self.share)))})
        numbers = np.zeros(num_numbers(shapes), dtype=target)
        numbers[self._draw(shapes, seed)] = values
        return to_tensors(numbers, shapes, dtype)

    def max_bytes(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Return the exact bytes: those of the numbers that are sent."""
        return sum(num_kept(shapes, self.share)) * numpy_dtype(dtype).itemsize

    def _draw(self, shapes: Sequence[Shape], seed: int) -> Places:
        """Return the drawn places among the numbers of all tensors, the same on every machine.

        Where the largest of as many independent raw integers lie, any set of places is as likely as any other.
        """
        counts = num_kept(shapes, self.share)
        words = generator(seed).bit_generator.random_raw
        drawn = [largest_places(words(prod(shape)), count) for shape, count in zip(shapes, counts, strict=True)]
        return np.concatenate([*drawn, np.zeros(0, dtype=np.int64)]) + np.repeat(starts_of(shapes), counts)

    def _factors(self, shapes: Sequence[Shape]) -> npt.NDArray[np.float64]:
        counts = num_kept(shapes, self.share)
        factors = [prod(shape) / max(count, 1) for shape, count in zip(shapes, counts, strict=True)]
        return np.repeat(factors, counts) if self.is_unbiased else np.ones(sum(counts))
