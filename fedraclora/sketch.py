"""The sketch: the random factor of a link that nobody trains or sends, drawn from a seed by everyone who needs it.

In RAC-LoRA (Malinovsky et al., "Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for
Low-Rank Adaptation", 2024, arXiv 2410.08305) a link is a gradient step projected by H = A^T (A A^T)^+ A, and converges
at a rate set by the smallest eigenvalue of E[H]. For every law here E[H] = (E[rank of A] / dim) I, the best there is;
A has full rank, always or almost always. All laws but `raw` are scaled so that E[A A^T] = I.

Everything is made from raw Philox integers on the CPU, so a draw is the same whatever the device, the threads, the
order of the calls and the other layers. All laws but `orthonormal` use integers and single correctly rounded
operations, equal on every machine. The QR of `orthonormal` could differ in the last bit: compare digests.

The generator is keyed by (seed, link, layer, side), neither by rank nor by law. Hence
- `gaussian`, `raw`, `rademacher` and `selector` nest: the first rows of a larger rank are the draw of the smaller one.
  `orthonormal` nests up to rounding; `selector_without_replacement` and `sparse_sign` do not nest;
- `gaussian`, `raw` and `orthonormal` of one key span the same subspace, so that laws are compared on paired draws.

Differs from the paper: the released code draws `raw`; with `orthonormal` rows a plain gradient step on the trained
factor is exactly the projected step of the theory.
"""

import functools
import hashlib
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedraclora.seeding import derive_seed

LAWS: tuple[str, ...] = (
    "orthonormal",
    "gaussian",
    "rademacher",
    "selector",
    "selector_without_replacement",
    "sparse_sign",
    "raw",
)

_DRAWN_AXIS = {"b": "inputs", "a": "outputs", "ab": "inputs"}
_TABLE_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"
_SAME_SIZE_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_Rows = npt.NDArray[np.float32]
_Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class SketchKey:
    """Name one sketch completely: two equal keys mean the same numbers, on any machine.

    `seed` is the run's sketch-stream seed. `side` is the factor that is trained: with "b" the drawn factor is lora_a
    and `dim` the layer's inputs; with "a" it is lora_b and `dim` the outputs; with "ab", where both are trained, the
    draw is a start for lora_a. Raises ValueError for an unknown law or side, a negative link, or a rank that is
    not in [1, dim]. `rows` keeps only that many of the draw's first rows (columns for side a), for a client of a
    smaller rank; 0 keeps all.
    """

    law: str
    seed: int
    link: int
    layer: str
    side: str
    rank: int
    dim: int
    rows: int = 0

    def __post_init__(self) -> None:
        """Refuse a key that names no sketch."""
        if self.law not in LAWS:
            raise ValueError(f"unknown sketch law {self.law!r}; the laws are {', '.join(LAWS)}")
        if self.side not in _DRAWN_AXIS:
            raise ValueError(f"unknown side {self.side!r} of layer {self.layer!r}; it is one of 'b', 'a', 'ab'")
        if self.link < 0:
            raise ValueError(f"link {self.link} of layer {self.layer!r} is negative; links count from 0")
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} of layer {self.layer!r} is too small; it is at least 1")
        if self.rank > self.dim:
            raise ValueError(self._rank_message())
        if not 0 <= self.rows <= self.rank:
            raise ValueError(f"rows {self.rows} of layer {self.layer!r} must lie between 0 and its rank {self.rank}")

    @property
    def shape(self) -> tuple[int, int]:
        """Return the factor's shape: `[rank, dim]`, `[dim, rank]` for side a; `rows` counts in place of rank."""
        rank = self.rows or self.rank
        return (self.dim, rank) if self.side == "a" else (rank, self.dim)

    def _rank_message(self) -> str:
        axis = _DRAWN_AXIS[self.side]
        drawn = "lora_b" if self.side == "a" else "lora_a"
        return (
            f"rank {self.rank} exceeds the {self.dim} {axis} of layer {self.layer!r} "
            f"(side {self.side}: {drawn} is drawn, its rank is at most the layer's {axis})"
        )


def draw(key: SketchKey) -> Tensor:
    """Return the factor that `key` names: float32 on the CPU, [rank, dim] for sides b and ab, [dim, rank] for side a.

    The draw of side a is the transpose of a [rank, dim] draw A, so that A A^T is the rank x rank matrix for each side.
    Raises RuntimeError when this machine makes other normal quantiles than the one the laws are defined by.
    """
    rows = _LAW_ROWS[key.law](key)[: key.rows or None]
    return torch.from_numpy(np.ascontiguousarray(rows.T if key.side == "a" else rows))


def digest(tensor: Tensor) -> str:
    """Return the SHA-256, in hexadecimal, of a tensor's dtype name, shape and little-endian bytes.

    The device and the memory layout do not enter. The tensor is real: no complex dtypes. A tensor on the meta device,
    which has a shape and no numbers, is told from others by its storage.
    """
    if tensor.is_meta:
        place = [tensor.untyped_storage()._cdata, tensor.storage_offset(), list(tensor.shape), tensor.stride()]  # noqa: SLF001
        return hashlib.sha256(str(place).encode()).hexdigest()
    sha = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}".encode())
    integers = tensor.detach().cpu().contiguous().reshape(-1).view(_SAME_SIZE_INTEGERS[tensor.element_size()]).numpy()
    sha.update(integers.astype(integers.dtype.newbyteorder("<"), copy=False).data)
    return sha.hexdigest()


def digest_all(tensors: Mapping[str, Tensor]) -> str:
    """Return one SHA-256, in hexadecimal, of all names and tensors, whatever the order of the mapping."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        encoded = name.encode()
        sha.update(len(encoded).to_bytes(8, "little") + encoded + bytes.fromhex(digest(tensors[name])))
    return sha.hexdigest()


def _orthonormal(key: SketchKey) -> _Rows:
    """Orthonormal rows, uniform up to the normal table; a float32 QR would differ between machines."""
    q, r = np.linalg.qr(_raw(key).astype(np.float64).T)
    # LAPACK's choice of signs is not specified; with R's diagonal positive the factorisation is unique.
    signs = np.where(np.diagonal(r) < 0, -1.0, 1.0)
    rows: _Rows = (q * signs).T.astype(np.float32)
    return rows


def _gaussian(key: SketchKey) -> _Rows:
    """N(0, 1/dim), up to the table: its variance is 2e-5 below 1 and its largest number 4.32."""
    return _raw(key) * np.float32(1 / math.sqrt(key.dim))


def _raw(key: SketchKey) -> _Rows:
    """N(0, 1), unscaled as in the paper's released code."""
    count = key.rank * key.dim
    pieces = _random_words(_link_seed(key), -(-count // 4)).view("<u2")[:count]
    numbers: _Rows = _normal_quantiles()[pieces]
    return numbers.reshape(key.rank, key.dim)


def _rademacher(key: SketchKey) -> _Rows:
    """Random signs over sqrt(dim)."""
    count = key.rank * key.dim
    octets = _random_words(_link_seed(key), -(-count // 64)).view("u1")
    is_positive = np.unpackbits(octets, count=count, bitorder="little").reshape(key.rank, key.dim)
    scale = np.float32(1 / math.sqrt(key.dim))
    return np.where(is_positive, scale, -scale)


def _selector(key: SketchKey) -> _Rows:
    """Rows of the identity, drawn without repeats within the link and independently of other links."""
    return _identity_rows(_permutation(_random_words(_link_seed(key), key.dim))[: key.rank], key.dim)


def _selector_without_replacement(key: SketchKey) -> _Rows:
    """Rows of the identity that take every coordinate once in each cycle of ceil(dim / rank) links."""
    cycle, position = divmod(key.link, -(-key.dim // key.rank))
    seed = derive_seed(key.seed, "sketch", "cycle", cycle, key.layer, key.side)
    permutation = _permutation(_random_words(seed, key.dim))
    # The last link of a cycle may be short; it wraps to the permutation's beginning, so its rows stay distinct.
    places = np.arange(position * key.rank, (position + 1) * key.rank) % key.dim
    return _identity_rows(permutation[places], key.dim)


def _sparse_sign(key: SketchKey) -> _Rows:
    """Signs on random disjoint blocks, one a row, that hold each coordinate once and differ in size by at most 1.

    Rows are orthonormal because their supports are disjoint, and E[A^T A] = (rank / dim) I holds exactly.
    """
    words = _random_words(_link_seed(key), key.dim)
    # The words' order is that of their upper 63 bits, so the lowest is free to be the sign.
    signs = np.where(words & np.uint64(1), np.float32(1), np.float32(-1))
    rows = np.zeros((key.rank, key.dim), dtype=np.float32)
    for row, block in zip(rows, np.array_split(_permutation(words), key.rank), strict=True):
        row[block] = signs[block] * np.float32(1 / math.sqrt(len(block)))
    return rows


_LAW_ROWS: Mapping[str, Callable[[SketchKey], _Rows]] = {
    "orthonormal": _orthonormal,
    "gaussian": _gaussian,
    "rademacher": _rademacher,
    "selector": _selector,
    "selector_without_replacement": _selector_without_replacement,
    "sparse_sign": _sparse_sign,
    "raw": _raw,
}


def _link_seed(key: SketchKey) -> int:
    return derive_seed(key.seed, "sketch", key.link, key.layer, key.side)


def _random_words(seed: int, count: int) -> _Words:
    """Return Philox's first integers, stored little-endian so that views of smaller pieces agree on all machines."""
    return np.asarray(np.random.Philox(key=seed).random_raw(count)).astype("<u8", copy=False)


def _permutation(words: _Words) -> npt.NDArray[np.intp]:
    return np.argsort(words, kind="stable")


def _identity_rows(coordinates: npt.NDArray[np.intp], dim: int) -> _Rows:
    rows = np.zeros((len(coordinates), dim), dtype=np.float32)
    rows[np.arange(len(coordinates)), coordinates] = 1
    return rows


@functools.cache
def _normal_quantiles() -> _Rows:
    """Return the normal quantiles at (i + 1/2) / 65536: with uniform 16-bit i, this is a draw from N(0, 1)."""
    normal = statistics.NormalDist()
    table = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], dtype=np.float32)
    found = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    if found != _TABLE_SHA256:
        raise RuntimeError(
            f"this machine's table of normal quantiles has SHA-256 {found}, expected {_TABLE_SHA256}: its mathematics "
            "library rounds differently, so its gaussian, raw and orthonormal sketches would not be those of the other "
            "machines; use another Python build, or a law made of integers (rademacher, selector, sparse_sign)"
        )
    table.setflags(write=False)
    return table
