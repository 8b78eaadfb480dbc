"""Compressors, one plug-in a file: `build(config)` returns a Compressor, which makes the sent numbers cost fewer bytes.

Every byte that the receiver needs is in the encoded arrays: scales and indices too, but nothing that the seed gives.
Error feedback is left out; it belongs to whoever keeps what was not sent.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from fedraclora.payload import Shape

COMPRESSORS = "fedraclora.compressors"

Arrays = dict[str, npt.NDArray[Any]]


class Compressor(Protocol):
    """A codec of lists of float32 or float64 tensors, all of one dtype and of any shapes, empty ones too."""

    @property
    def is_unbiased(self) -> bool:
        """Whether the mean of decode(encode(x)) over the seeds is x, but for the rounding of the results to `dtype`."""
        ...

    @property
    def is_sparse(self) -> bool:
        """Whether few of the numbers are kept and the rest become zero: only right for differences around zero."""
        ...

    @property
    def is_fixed_size(self) -> bool:
        """Whether `max_bytes` is what every encoding takes, and not a bound."""
        ...

    def encode(self, tensors: Sequence[Tensor], seed: int) -> Arrays:
        """Return the one-dimensional arrays that stand for `tensors`, which may lie on any device, in any layout.

        Raises ValueError for numbers that are not finite or too large for the code, and for other or mixed dtypes.
        """
        ...

    def decode(
        self, arrays: Mapping[str, npt.NDArray[Any]], shapes: Sequence[Shape], dtype: torch.dtype, seed: int
    ) -> list[Tensor]:
        """Return CPU tensors of `shapes` and `dtype`, all finite, given what `encode` made with the same seed.

        Nothing is trusted but shapes, dtype and seed: raises ValueError for arrays that no `encode` of such tensors
        returns, as far as that can make a difference, and for a dtype other than float32 and float64.
        """
        ...

    def max_bytes(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Return the bytes of the arrays for tensors of `shapes` and `dtype`, or an upper bound where they vary."""
        ...
