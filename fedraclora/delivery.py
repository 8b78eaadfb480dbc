"""Bringing a replica to the server's version: what it lacks, as flat arrays by kind, and how it takes them in.

A delivery holds the closed links that the replica lacks, or one snapshot of the changed weights where that is fewer
bytes, and the open link. What a client that took part in the last update lacks is an `update` (factors) or `dense`
(whole tensors); what was missed before is `catch_up` or `snapshot`. Both halves of the project use this file, so they
cannot disagree about the order.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedraclora import link as links
from fedraclora import sketch
from fedraclora.chain import Chain, drop_superseded, extend_hash, set_targets
from fedraclora.link import Json, Link, LowRank
from fedraclora.payload import FlatArray, Shape, flatten, unflatten

UPDATE, DENSE, CATCH_UP, SNAPSHOT = "update", "dense", "catch_up", "snapshot"


class VersionMismatch(ValueError):
    """A replica is not where a delivery expects it, or ends somewhere else than its sender."""


@dataclass(frozen=True)
class Delivery:
    """A header of plain values as JSON, and one flat array a kind."""

    header: str
    arrays: Mapping[str, FlatArray]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def deliver(chain: Chain, num_held: int) -> Delivery:
    """Return what a replica with `num_held` closed links lacks: by replay or by snapshot, whichever is fewer bytes."""
    replay = _replay(chain, num_held)
    if num_held >= chain.num_links_before:
        return replay
    snapshot = _snapshot(chain)
    return snapshot if snapshot.num_bytes < replay.num_bytes else replay


def _replay(chain: Chain, num_held: int) -> Delivery:
    missing = chain.missing_links(num_held)
    opened = [] if chain.open is None else [chain.open]
    kept = drop_superseded([*missing, *opened])[: len(missing)]
    described = [[link.digest, sent.digest, links.describe(sent)] for link, sent in zip(missing, kept, strict=True)]
    return _pack(chain, {"links": described, "current": chain.num_links_before}, kept, {})


def _snapshot(chain: Chain) -> Delivery:
    # What the open link sets comes with it.
    opened = [] if chain.open is None else [chain.open]
    names = sorted({term.target for link in chain.links for term in link.terms} - set_targets(opened))
    tensors = {name: chain.merged[name] for name in names}
    described = {
        "num_links": chain.num_links,
        "hash": chain.hash,
        "weights": sketch.digest_all(tensors),
        "tensors": [[name, list(tensor.shape)] for name, tensor in tensors.items()],
    }
    return _pack(chain, {"links": [], "current": chain.num_links_before, "snapshot": described}, [], tensors)


def _pack(chain: Chain, header: dict[str, Any], closed: list[Link], snapshot: Mapping[str, Tensor]) -> Delivery:
    waiting: dict[str, list[Tensor]] = {SNAPSHOT: list(snapshot.values())}
    for link in [*closed, *([] if chain.open is None else [chain.open])]:
        tensors = iter(link.tensors)
        for kind, _ in _slots(links.describe(link), header["current"]):
            waiting.setdefault(kind, []).append(next(tensors))
    header |= {
        "open": None if chain.open is None else links.describe(chain.open),
        "digest": chain.digest,
    }
    arrays = {kind: flatten(tensors) for kind, tensors in waiting.items() if tensors}
    return Delivery(json.dumps(header, separators=(",", ":")), arrays)


def _slots(description: Json, current: int) -> Iterator[tuple[str, Shape]]:
    """Yield the kind and shape of each explicit tensor of a described link, in order."""
    index, terms = description
    for term in terms:
        kind = CATCH_UP if index < current else UPDATE if term[0] == "low_rank" else DENSE
        for shape in links.shapes([index, [term]]):
            yield kind, shape


def sketch_digest(link: Link | None) -> str:
    """Return one digest over all drawn factors of a link, so that two machines can compare what they drew."""
    drawn: dict[str, Tensor] = {}
    for term in () if link is None else link.terms:
        if isinstance(term, LowRank):
            for side, factor in (("a", term.lora_a), ("b", term.lora_b)):
                if isinstance(factor, sketch.SketchKey):
                    drawn[f"{term.layer}.lora_{side}"] = sketch.draw(factor)
    return sketch.digest_all(drawn)


def receive(replica: Chain, delivery: Delivery) -> None:
    """Bring `replica` to the version of a delivery; links that it already holds are skipped.

    Raises VersionMismatch where links are missing in between, a link is not what its digest says, or the digest at the
    end differs from the sender's; the replica is then as it was, but for its open link.
    """
    header = json.loads(delivery.header)
    tensors = _unpack(header, delivery.arrays)
    replica.open = None
    snapshot = header.get("snapshot")
    is_behind = bool(snapshot) and replica.num_links < snapshot["num_links"]
    num_links, hash = (snapshot["num_links"], snapshot["hash"]) if is_behind else (replica.num_links, replica.hash)
    closed = [(row[0], row[1], _restore(row[2], tensors, header["current"])) for row in header["links"]]
    new = [(digest, link) for digest, _, link in closed if link.index >= num_links]
    opened = None if header["open"] is None else _restore(header["open"], tensors, header["current"])
    _check_order([link for _, link in new], num_links)
    snapshot_weights = (
        dict(zip([name for name, _ in snapshot["tensors"]], tensors[SNAPSHOT], strict=True)) if snapshot else {}
    )
    _check_contents(closed, snapshot, snapshot_weights)
    # All is checked before anything is merged: what is merged cannot be taken back.
    for digest, _ in new:
        hash = extend_hash(hash, digest)
    found = extend_hash(hash, "" if opened is None else opened.digest)
    if found != header["digest"]:
        raise VersionMismatch(f"replica would end at {found[:12]}, its server is at {header['digest'][:12]}")
    if is_behind:
        replica.restore(snapshot_weights, num_links=num_links, hash=snapshot["hash"])
    for digest, link in new:
        replica.open_link(link)
        replica.close(digest=digest)
    # A replica never hands links on, so it keeps the merged weights only.
    replica.links.clear()
    replica.open = opened


def _check_order(new: Sequence[Link], num_links: int) -> None:
    found = [link.index for link in new]
    if found != list(range(num_links, num_links + len(new))):
        raise VersionMismatch(f"replica holds {num_links} links, those delivered are {found}")


def _check_contents(closed: Sequence[tuple[str, str, Link]], snapshot: Any, weights: Mapping[str, Tensor]) -> None:  # noqa: ANN401
    """Compare what came with the digests of what was sent (a link's own digest covers the terms left out, too)."""
    for _, sent, link in closed:
        if link.digest != sent:
            raise VersionMismatch(f"link {link.index} is not what its digest {sent[:12]} says")
    if snapshot and sketch.digest_all(weights) != snapshot["weights"]:
        raise VersionMismatch("the snapshot is not what its digest says")


def _unpack(header: dict[str, Any], arrays: Mapping[str, FlatArray]) -> dict[str, list[Tensor]]:
    described = [row[-1] for row in header["links"]]
    described += [] if header["open"] is None else [header["open"]]
    shapes: dict[str, list[Shape]] = {}
    for description in described:
        for kind, shape in _slots(description, header["current"]):
            shapes.setdefault(kind, []).append(shape)
    if "snapshot" in header:
        shapes[SNAPSHOT] = [tuple(shape) for _, shape in header["snapshot"]["tensors"]]
    missing = sorted(shapes.keys() - arrays.keys())
    if missing:
        raise VersionMismatch(f"a delivery lacks its arrays {missing}; it holds {sorted(arrays)}")
    return {kind: unflatten(arrays[kind], wanted) for kind, wanted in shapes.items()}


def _restore(description: Json, tensors: dict[str, list[Tensor]], current: int) -> Link:
    return links.restore(description, [tensors[kind].pop(0) for kind, _ in _slots(description, current)])
