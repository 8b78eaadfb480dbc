"""Formats of two bytes a number, rounded to the nearest, whose largest number stands for all that are larger."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedraclora.compressors import Arrays
from fedraclora.compressors._arrays import checked, flat_numbers, num_numbers, to_tensors
from fedraclora.payload import FlatArray, Shape


@dataclass(frozen=True)
class Halves:
    """Send each number in a format of two bytes.

    sent_dtype: the NumPy dtype of the sent array.
    largest: the largest finite number of the format; larger ones are sent as this one, with their sign.
    narrow, widen: the way into the format, for numbers up to `largest`, and the exact way back to float32.
    """

    sent_dtype: npt.DTypeLike
    largest: float
    narrow: Callable[[FlatArray], npt.NDArray[Any]]
    widen: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]
    is_unbiased = False
    is_sparse = False
    is_fixed_size = True

    def encode(self, tensors: Sequence[Tensor], seed: int) -> Arrays:
        """Return the rounded numbers."""
        return {"numbers": self.narrow(flat_numbers(tensors).clip(-self.largest, self.largest))}

    def decode(
        self, arrays: Mapping[str, npt.NDArray[Any]], shapes: Sequence[Shape], dtype: torch.dtype, seed: int
    ) -> list[Tensor]:
        """Return the rounded numbers in `dtype`; raises ValueError for other arrays and numbers that are not finite."""
        (numbers,) = checked(arrays, {"numbers": (self.sent_dtype, num_numbers(shapes))})
        return to_tensors(self.widen(numbers), shapes, dtype)

    def max_bytes(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Return the exact bytes: two a number."""
        return 2 * num_numbers(shapes)
