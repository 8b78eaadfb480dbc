"""What all compressors share: taking tensors apart, checking the arrays that came, and making tensors again."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedraclora.payload import FlatArray, Shape, flatten, unflatten

_NUMPY_DTYPES: Mapping[torch.dtype, np.dtype[np.floating]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


def numpy_dtype(dtype: torch.dtype) -> np.dtype[np.floating]:
    """Return NumPy's name of `dtype`; raises ValueError where that is neither float32 nor float64."""
    if dtype not in _NUMPY_DTYPES:
        raise ValueError(f"{dtype} tensors cannot be compressed; they have to be torch.float32 or torch.float64")
    return _NUMPY_DTYPES[dtype]


def shapes_of(tensors: Sequence[Tensor]) -> list[Shape]:
    """Return the tensors' shapes as plain tuples."""
    return [tuple(tensor.shape) for tensor in tensors]


def num_numbers(shapes: Sequence[Shape]) -> int:
    """Return how many numbers tensors of `shapes` hold together."""
    return sum(prod(shape) for shape in shapes)


def flat_numbers(tensors: Sequence[Tensor]) -> FlatArray:
    """Return the tensors' numbers, one after the other; float32 where there are no tensors.

    Raises ValueError for numbers that are not finite, for dtypes other than float32 and float64, and for both at once.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        raise ValueError(f"the tensors to compress have the dtypes {sorted(map(str, dtypes))}; give all of them one")
    for dtype in dtypes:
        numpy_dtype(dtype)
    flat = flatten(tensors)
    num_strange = flat.size - np.count_nonzero(np.isfinite(flat))
    if num_strange:
        raise ValueError(f"{num_strange} of {flat.size} numbers to compress are not finite; all of them have to be")
    return flat


def split(flat: FlatArray, shapes: Sequence[Shape]) -> list[FlatArray]:
    """Return views of `flat`, one after the other, in the given shapes."""
    ends = np.cumsum([prod(shape) for shape in shapes], dtype=np.int64)
    pieces = np.split(flat, ends)  # the last piece is what lies behind the last end: nothing
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=False)]


def checked(
    arrays: Mapping[str, npt.NDArray[Any]], expected: Mapping[str, tuple[npt.DTypeLike, int]]
) -> list[npt.NDArray[Any]]:
    """Return the arrays in the order of `expected`, which gives the dtype and length of each.

    Raises ValueError for missing and unknown names, and for arrays of another dtype, shape or length.
    """
    if arrays.keys() != expected.keys():
        raise ValueError(f"the encoded arrays are called {sorted(arrays)}; expected {sorted(expected)}")
    return [_checked(arrays[name], name, np.dtype(dtype), length) for name, (dtype, length) in expected.items()]


def _checked(array: npt.NDArray[Any], name: str, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    # Whoever encodes no numbers need not know the dtype of those that are not there.
    if array.shape != (length,) or (length > 0 and array.dtype != dtype):
        raise ValueError(
            f"the encoded array {name!r} is {array.dtype} {list(array.shape)}; expected {dtype} [{length}]"
        )
    return array if length > 0 else np.zeros(0, dtype)


def to_tensors(numbers: FlatArray, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
    """Return the numbers as tensors of `shapes` and `dtype`, in memory of their own.

    Raises ValueError where one of them is not finite in `dtype`.
    """
    target = numpy_dtype(dtype)
    largest = np.finfo(target).max
    with np.errstate(invalid="ignore"):  # NumPy warns of some sorts of NaN when it compares them in another dtype
        num_strange = numbers.size - np.count_nonzero(np.abs(numbers) <= largest)
    if num_strange:
        raise ValueError(
            f"{num_strange} of {numbers.size} decoded numbers are not finite in {dtype}; expected magnitudes up to "
            f"{largest:.8g}"
        )
    return unflatten(numbers.astype(target, copy=False), shapes)
