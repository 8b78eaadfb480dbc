"""How the numbers of links travel: plain in one flat array a kind, encoded, or not at all where they are there already.

A factor of the open link that a client still holds from its last round is not sent again, and neither is one of a
closed link that the open link holds too. A tensor that a compressor encoded travels as its encoded arrays, which both
ends decode to the same bits.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedraclora import link as links
from fedraclora import sketch
from fedraclora.codec import codec_of
from fedraclora.compressors import Arrays, Compressor
from fedraclora.link import Json, Link, Slot
from fedraclora.payload import FlatArray, Packed, Shape, flatten, unflatten
from fedraclora.seeding import derive_seed

UPDATE, DENSE, CATCH_UP, SNAPSHOT, CONTROL = "update", "dense", "catch_up", "snapshot", "control"
FLAT = "flat"

# How one explicit tensor travels: plainly, kept from an earlier open link, as a factor of this open link, or packed.
PLAIN, KEPT, OPEN, PACKED = "plain", "kept", "open", "packed"
Ways = list[Json]
Kept = Mapping[tuple[str, Shape], Tensor]


class NotKept(ValueError):
    """A delivery counts on a tensor that is not here any more."""


def kind_of(index: int, slot: Slot, current: int) -> str:
    """Return the kind of a tensor in link `index`: what was missed before the last update is catch-up."""
    return CATCH_UP if index < current else UPDATE if slot.term == "low_rank" else DENSE


def kept_of(link: Link) -> Kept:
    """Return the tensors of an open link that whoever has it can be counted on to keep: its factors."""
    return {(name, tuple(tensor.shape)): tensor for name, tensor in link.explicit_factors.items()}


def repeats(link: Link, opened: Link | None) -> dict[str, Json]:
    """Return the factors of a closed link that are factors of the open one, bit for bit, and the ways they travel."""
    known = {} if opened is None else {sketch.digest(t): name for name, t in opened.explicit_factors.items()}
    if not known:
        return {}
    digests = {name: sketch.digest(tensor) for name, tensor in link.explicit_factors.items()}
    return {name: [OPEN, known[digest]] for name, digest in digests.items() if digest in known}


def repeats_within(link: Link) -> dict[str, Json]:
    """Return the factors of a link that are earlier ones of the same link, bit for bit, and the ways they travel."""
    first: dict[str, str] = {}
    found: dict[str, Json] = {}
    for name, tensor in link.explicit_factors.items():
        earlier = first.setdefault(sketch.digest(tensor), name)
        if earlier != name:
            found[name] = [OPEN, earlier]
    return found


# ---- the sender


@dataclass
class Parcel:
    """Arrays in the making, by kind: plain tensors, and encoded numbers by the name of their type."""

    plain: dict[str, list[Tensor]] = field(default_factory=dict)
    encoded: dict[str, dict[str, list[FlatArray]]] = field(default_factory=dict)

    def add(self, kind: str, tensors: Sequence[Tensor]) -> None:
        """Add tensors as they are."""
        self.plain.setdefault(kind, []).extend(tensors)

    def add_link(self, link: Link, current: int, *, known: Mapping[str, Json]) -> Ways:
        """Add a link's numbers, but for those of `known`, and return how each travels."""
        ways: Ways = []
        for slot, tensor in zip(link.slots, link.tensors, strict=True):
            kind = kind_of(link.index, slot, current)
            if slot.name in known:
                ways.append(known[slot.name])
            elif slot.name in link.packed:
                ways.append(self._add_packed(kind, link.packed[slot.name], tensor))
            else:
                self.add(kind, [tensor])
                ways.append([PLAIN])
        return ways

    def _add_packed(self, kind: str, packed: Packed, tensor: Tensor) -> Json:
        for array in packed.arrays.values():
            self.encoded.setdefault(kind, {}).setdefault(array.dtype.name, []).append(array.reshape(-1))
        sizes = [[name, array.dtype.name, array.size] for name, array in packed.arrays.items()]
        return [PACKED, packed.codec, packed.seed, str(tensor.dtype).removeprefix("torch."), sizes]

    def num_bytes(self) -> dict[str, int]:
        """Return the bytes of each kind's arrays, without making them."""
        found = {kind: _flat_bytes(tensors) for kind, tensors in self.plain.items() if tensors}
        for kind, by_type in self.encoded.items():
            found[kind] = found.get(kind, 0) + sum(part.nbytes for parts in by_type.values() for part in parts)
        return found

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all arrays."""
        return sum(self.num_bytes().values())

    def arrays(self) -> dict[str, Arrays]:
        """Return the arrays of each kind that has any: `flat` for the plain numbers, encoded ones by their type."""
        found: dict[str, Arrays] = {kind: {FLAT: flatten(tensors)} for kind, tensors in self.plain.items() if tensors}
        for kind, by_type in self.encoded.items():
            found.setdefault(kind, {}).update({name: np.concatenate(parts) for name, parts in by_type.items()})
        return found


def _flat_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of one flat array of all the tensors' numbers."""
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return sum(tensor.numel() for tensor in tensors) * dtype.itemsize


def encode_link(link: Link, codec: str, seed: int, names: Sequence[str]) -> Link:
    """Return the link with the named tensors as a compressor's receivers decode them, packed to travel encoded."""
    compressor, decoded, packed = codec_of(codec), {}, {}
    for name in names:
        tensor, own = link.named_tensors[name], derive_seed(seed, name)
        if tensor.is_meta:
            arrays, decoded[name] = _room(compressor, tensor), torch.empty_like(tensor)
        else:
            arrays = compressor.encode([tensor], own)
            decoded[name] = compressor.decode(arrays, [tuple(tensor.shape)], tensor.dtype, own)[0]
        packed[name] = Packed(codec, own, arrays)
    return links.replace_tensors(link, decoded, packed)


def _room(compressor: Compressor, tensor: Tensor) -> Arrays:
    """Return an array of the bytes that an encoded tensor takes at most, for one that has a shape and no numbers."""
    num_bytes = compressor.max_bytes([tuple(tensor.shape)], tensor.dtype)
    return {"": np.broadcast_to(np.zeros((), dtype=np.uint8), (num_bytes,))}


# ---- the receiver


class Place(NamedTuple):
    """Where encoded numbers lie: the kind, and the name of their type."""

    kind: str
    dtype: str


@dataclass
class Unloading:
    """A delivery's arrays while links are taken out of them, in the order in which they were put in."""

    plain: dict[str, list[Tensor]]
    encoded: dict[Place, FlatArray]
    kept: Kept

    def take(self, kind: str, count: int) -> list[Tensor]:
        """Return the next plain tensors of a kind."""
        return [self.plain[kind].pop(0) for _ in range(count)]

    def take_link(self, description: Json, ways: Ways, current: int, *, opened: Link | None = None) -> Link:
        """Return a described link; `opened` is the open link, whose factors a closed one may share.

        Raises NotKept where a tensor is not here, and ValueError where encoded numbers cannot be decoded.
        """
        index, found = description[0], {} if opened is None else dict(opened.explicit_factors)
        tensors: list[Tensor] = []
        for slot, way in zip(links.slots(description), ways, strict=True):
            kind = kind_of(index, slot, current)
            if way[0] == PLAIN:
                tensors.append(self.plain[kind].pop(0))
            elif way[0] == PACKED:
                tensors.append(self._decoded(kind, slot.shape, way))
            else:
                tensors.append(self._known(slot, way, found))
            if opened is None:
                found[slot.name] = tensors[-1]
        return links.restore(description, tensors)

    def _known(self, slot: Slot, way: Json, opened: Mapping[str, Tensor]) -> Tensor:
        found = self.kept.get((slot.name, slot.shape)) if way[0] == KEPT else opened.get(way[1])
        if found is None:
            raise NotKept(f"the numbers of {slot.name!r} {list(slot.shape)} are not here any more")
        return found

    def _decoded(self, kind: str, shape: Shape, way: Json) -> Tensor:
        _, codec, seed, number, sizes = way
        arrays: Arrays = {}
        for name, dtype, size in sizes:
            place = Place(kind, dtype)
            arrays[name], self.encoded[place] = self.encoded[place][:size], self.encoded[place][size:]
        return codec_of(codec).decode(arrays, [shape], getattr(torch, number), seed)[0]


def plain_shapes(description: Json, ways: Ways, current: int) -> list[tuple[str, Shape]]:
    """Return the kind and shape of each tensor of a described link that travels plainly, in order."""
    slots = zip(links.slots(description), ways, strict=True)
    return [(kind_of(description[0], slot, current), slot.shape) for slot, way in slots if way[0] == PLAIN]


def packed_kinds(description: Json, ways: Ways, current: int) -> set[str]:
    """Return the kinds of the tensors of a described link that travel encoded."""
    slots = zip(links.slots(description), ways, strict=True)
    return {kind_of(description[0], slot, current) for slot, way in slots if way[0] == PACKED}


def unload(shapes: Mapping[str, Sequence[Shape]], arrays: Mapping[str, Arrays], kept: Kept) -> Unloading:
    """Return arrays taken apart into plain tensors of the given shapes, and encoded numbers by their type."""
    plain = {kind: unflatten(arrays[kind][FLAT], wanted) for kind, wanted in shapes.items() if wanted}
    encoded = {Place(kind, name): a for kind, group in arrays.items() for name, a in group.items() if name != FLAT}
    return Unloading(plain, encoded, kept)
