"""Every bit as it was: the first bytes of all numbers, then all second ones and so on, compressed with zlib.

Bytes of one significance lie together because those with sign and exponent repeat, and those of the lowest digits do
not. Numbers that zlib does not make smaller are sent as they are, so this never takes more bytes than no compressor.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedraclora.compressors import Arrays, Compressor
from fedraclora.compressors._arrays import checked, flat_numbers, num_numbers, numpy_dtype, to_tensors
from fedraclora.payload import FlatArray, Shape


@dataclass
class Config:
    """Lossless compression has no settings."""


def build(config: Config) -> Compressor:
    """Return the lossless compressor."""
    del config
    return Lossless()


class Lossless:
    """Send one array of bytes, `zlib` or, where that is not shorter, the `planes` that it would have held."""

    is_unbiased = True
    is_sparse = False
    is_fixed_size = False

    def encode(self, tensors: Sequence[Tensor], seed: int) -> Arrays:
        """Return the bytes of the numbers in the tensors' dtype."""
        planes = _to_planes(flat_numbers(tensors))
        compressed = zlib.compress(planes)
        if len(compressed) < len(planes):
            return {"zlib": np.frombuffer(compressed, dtype=np.uint8).copy()}
        return {"planes": np.frombuffer(planes, dtype=np.uint8).copy()}

    def decode(
        self, arrays: Mapping[str, npt.NDArray[Any]], shapes: Sequence[Shape], dtype: torch.dtype, seed: int
    ) -> list[Tensor]:
        """Return the numbers bit for bit; `dtype` is that of the encoded tensors.

        Raises ValueError for other arrays, numbers that are not finite, and what is not the zlib stream of just as many
        bytes; no more than those are ever made.
        """
        num_bytes = self.max_bytes(shapes, dtype)
        if "zlib" in arrays:
            (compressed,) = checked(arrays, {"zlib": (np.uint8, arrays["zlib"].size)})
            planes = _decompress(compressed.tobytes(), num_bytes)
        else:
            (sent,) = checked(arrays, {"planes": (np.uint8, num_bytes)})
            planes = sent.tobytes()
        return to_tensors(_from_planes(planes, numpy_dtype(dtype)), shapes, dtype)

    def max_bytes(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Return an upper bound, the bytes of the numbers themselves."""
        return num_numbers(shapes) * numpy_dtype(dtype).itemsize


def _to_planes(numbers: FlatArray) -> bytes:
    little = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False)
    return little.view(np.uint8).reshape(numbers.size, numbers.itemsize).T.tobytes()


def _from_planes(planes: bytes, dtype: np.dtype[np.floating]) -> FlatArray:
    columns = np.frombuffer(planes, dtype=np.uint8).reshape(dtype.itemsize, -1)
    little: FlatArray = np.ascontiguousarray(columns.T).reshape(-1).view(dtype.newbyteorder("<"))
    return little


def _decompress(compressed: bytes, num_bytes: int) -> bytes:
    if len(compressed) >= num_bytes:
        raise ValueError(f"{len(compressed)} compressed bytes came; expected fewer than the {num_bytes} that they hold")
    stream = zlib.decompressobj()
    try:
        # One byte more than expected shows that there are more; zlib would take a limit of 0 for none.
        found = stream.decompress(compressed, num_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"the encoded array 'zlib' is not a zlib stream: {error}") from error
    if len(found) != num_bytes or not stream.eof or stream.unused_data:
        kind = "a whole stream" if stream.eof else "an unfinished stream"
        raise ValueError(
            f"the encoded array 'zlib' is {kind} of {len(found)} bytes or more, and {len(stream.unused_data)} bytes "
            f"behind it; expected a whole stream of {num_bytes} bytes, and nothing behind it"
        )
    return found
