"""Whole numbers of a few bits each, packed into bytes without gaps.

The bits of a number lie one after the other, the highest first, and fill each byte from its highest bit; the bits that
are left over in the last byte are zero. With four bits, the first number of a byte is its upper half.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


def packed_bytes(count: int, width: int) -> int:
    """Return the bytes that `count` numbers of `width` bits take."""
    return -(-count * width // 8)


def pack(numbers: npt.NDArray[Any], width: int) -> Bytes:
    """Return the packed bytes of one-dimensional `numbers`, whole or boolean and below 2^width; `width` is 1 to 16."""
    octets = numbers.astype(">u2").view(np.uint8).reshape(-1, 2)
    return np.packbits(np.unpackbits(octets, axis=1)[:, 16 - width :])


def unpack(packed: Bytes, count: int, width: int) -> Integers:
    """Return the first `count` numbers of `width` bits, 1 to 16, that `packed` holds."""
    bits = np.zeros((count, 16), dtype=np.uint8)
    bits[:, 16 - width :] = np.unpackbits(packed, count=count * width).reshape(count, width)
    return np.packbits(bits, axis=1).view(">u2").reshape(count).astype(np.int64)


def signed_width(largest: int) -> int:
    """Return the fewest bits that tell the whole numbers from -largest to largest apart."""
    return (2 * largest).bit_length()


def pack_signed(numbers: npt.NDArray[Any], largest: int) -> Bytes:
    """Return one-dimensional `numbers`, whole and in [-largest, largest], packed as number + largest."""
    return pack(numbers + largest, signed_width(largest))


def unpack_signed(packed: Bytes, count: int, largest: int) -> Integers:
    """Return the first `count` numbers; raises ValueError for one that lies outside [-largest, largest]."""
    numbers = unpack(packed, count, signed_width(largest)) - largest
    if numbers.max(initial=0) > largest:
        raise ValueError(f"an encoded number is {numbers.max()}; expected whole numbers from {-largest} to {largest}")
    return numbers
