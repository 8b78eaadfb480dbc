"""Tensors as one flat array a message kind, and back; and what a compressor made of one tensor.

Every tensor of a record costs Flower about 650 bytes of headers, so a message carries one flat array per kind; the
shapes are known to the receiver from the plan and the links. Nothing here is encoded: a compressor comes before, not
inside.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FlatArray = npt.NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """One tensor as a compressor encoded it: the compressor (as text), the seed it was given, and the arrays."""

    codec: str
    seed: int
    arrays: Mapping[str, FlatArray]


def digest_arrays(arrays: Mapping[str, Mapping[str, FlatArray]]) -> str:
    """Return a digest of named arrays by kind, whatever the order of the mappings."""
    hasher = hashlib.sha256()
    for kind, name in sorted((kind, name) for kind, group in arrays.items() for name in group):
        array = np.ascontiguousarray(arrays[kind][name])
        hasher.update(json.dumps([kind, name, array.dtype.name, array.size]).encode())
        hasher.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return hasher.hexdigest()


def flatten(tensors: Sequence[Tensor]) -> FlatArray:
    """Return the tensors' numbers, one after the other, as a new one-dimensional array on the CPU."""
    if not tensors:
        return np.zeros(0, dtype=np.float32)
    flat: FlatArray = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).cpu().numpy()
    return flat


def unflatten(flat: FlatArray, shapes: Sequence[Shape]) -> list[Tensor]:
    """Return tensors of the given shapes, in memory of their own and not the message's.

    Raises ValueError where the number of values differs.
    """
    sizes = [prod(shape) for shape in shapes]
    if flat.ndim != 1 or flat.size != sum(sizes):
        raise ValueError(
            f"payload of shape {flat.shape} does not hold the {sum(sizes)} numbers of shapes {list(shapes)}"
        )
    pieces = torch.from_numpy(flat.copy()).split(sizes)
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]
