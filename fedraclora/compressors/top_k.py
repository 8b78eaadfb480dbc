"""Top-k: the numbers of largest magnitude of each tensor, and where they lie; the others become zero.

Biased: a contraction with ||C(x) - x||^2 <= (1 - k / n) ||x||^2 (Stich et al., Sparsified SGD with Memory, 2018,
arXiv 1809.07599), meant for use with error feedback. Of equal magnitudes the first ones are kept.
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
from fedraclora.compressors._arrays import checked, flat_numbers, num_numbers, numpy_dtype, shapes_of, split, to_tensors
from fedraclora.compressors._selection import Places, check_share, largest_places, num_kept, starts_of
from fedraclora.payload import Shape


@dataclass
class Config:
    """Settings of top-k.

    share: share of each tensor's numbers that is sent, in (0, 1]; at least one number is.
    """

    share: float = 0.1


def build(config: Config) -> Compressor:
    """Return the compressor; raises ValueError for a share outside (0, 1]."""
    check_share(config.share)
    return TopK(config.share)


@dataclass(frozen=True)
class TopK:
    """Send a share of the numbers as they are, and their places in their tensors in rising order.

    Places are uint16 where no tensor has more than 65536 numbers, and int32 otherwise.
    """

    share: float
    is_unbiased = False
    is_sparse = True
    is_fixed_size = True

    def encode(self, tensors: Sequence[Tensor], seed: int) -> Arrays:
        """Return the kept numbers in the tensors' dtype, and their places."""
        shapes = shapes_of(tensors)
        flat = flat_numbers(tensors)
        counts = num_kept(shapes, self.share)
        pieces = split(np.abs(flat), [(prod(shape),) for shape in shapes])
        chosen = [largest_places(piece, count) for piece, count in zip(pieces, counts, strict=True)]
        places = np.concatenate([*chosen, np.zeros(0, dtype=np.int64)])
        return {
            "values": flat[places + np.repeat(starts_of(shapes), counts)],
            "places": places.astype(_place_dtype(shapes)),
        }

    def decode(
        self, arrays: Mapping[str, npt.NDArray[Any]], shapes: Sequence[Shape], dtype: torch.dtype, seed: int
    ) -> list[Tensor]:
        """Return the kept numbers among zeros.

        Raises ValueError for other arrays, numbers that are not finite, and places that are outside or do not rise.
        """
        counts = num_kept(shapes, self.share)
        values, places = checked(
            arrays, {"values": (numpy_dtype(dtype), sum(counts)), "places": (_place_dtype(shapes), sum(counts))}
        )
        numbers = np.zeros(num_numbers(shapes), dtype=numpy_dtype(dtype))
        numbers[_places_among_all(places.astype(np.int64), shapes, counts)] = values
        return to_tensors(numbers, shapes, dtype)

    def max_bytes(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Return the exact bytes: a number and a place for each that is kept."""
        return sum(num_kept(shapes, self.share)) * (numpy_dtype(dtype).itemsize + _place_dtype(shapes).itemsize)


def _place_dtype(shapes: Sequence[Shape]) -> np.dtype[Any]:
    largest = max(map(prod, shapes), default=0)
    if largest > 2**31:
        raise ValueError(f"a tensor of {largest} numbers is too large for top_k; it sends places up to 2^31 - 1")
    return np.dtype(np.uint16 if largest <= 2**16 else np.int32)


def _places_among_all(places: Places, shapes: Sequence[Shape], counts: Sequence[int]) -> Places:
    sizes = np.repeat([prod(shape) for shape in shapes], counts).astype(np.int64)
    is_outside = (places < 0) | (places >= sizes)
    if is_outside.any():
        place, size = places[is_outside][0], sizes[is_outside][0]
        raise ValueError(f"an encoded place is {place}; expected 0 to {size - 1} in a tensor of {size} numbers")
    among_all = places + np.repeat(starts_of(shapes), counts)
    num_falls = np.count_nonzero(np.diff(among_all) <= 0)
    if num_falls:
        raise ValueError(f"{num_falls} encoded places do not exceed the one before; expected them to rise in a tensor")
    return among_all
