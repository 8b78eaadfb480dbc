"""No compression: the numbers as they are, one after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from fedraclora.compressors import Arrays
from fedraclora.payload import Shape, flatten, unflatten

FLAT = "flat"


@dataclass
class Config:
    """No compression has no settings."""


class Plain:
    """The identity; `encode` and `decode` neither check nor change a number."""

    is_unbiased = True
    is_sparse = False
    is_fixed_size = True

    def encode(self, tensors: Sequence[Tensor], seed: int) -> Arrays:
        """Return one flat array."""
        return {FLAT: flatten(tensors)}

    def decode(
        self, arrays: Mapping[str, npt.NDArray[Any]], shapes: Sequence[Shape], dtype: torch.dtype, seed: int
    ) -> list[Tensor]:
        """Return the tensors. Raises ValueError where the array is another one."""
        if list(arrays) != [FLAT]:
            raise ValueError(f"it holds the arrays {list(arrays)}, expected one named {FLAT!r}")
        tensors = unflatten(arrays[FLAT], shapes)
        if tensors and tensors[0].dtype != dtype:
            raise ValueError(f"its numbers are {tensors[0].dtype}, expected {dtype}")
        return tensors

    def max_bytes(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Return the bytes of the numbers."""
        return sum(prod(shape) for shape in shapes) * dtype.itemsize


def build(config: Config) -> Plain:
    """Return the identity."""
    del config
    return Plain()
