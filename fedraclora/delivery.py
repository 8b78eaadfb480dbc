"""Bringing a replica to the server's version: what it lacks, as flat arrays by kind, and how it takes them in.

A delivery holds the closed links that the replica lacks, or one snapshot of the changed weights, and the open link.
What a client that took part in the last update lacks is an `update` (factors) or `dense` (whole tensors); what was
missed before is `catch_up` or `snapshot`. Drawn factors, sent only to a machine that draws other bits, are `control`.
Both halves of the project use this file, so they cannot disagree about the order.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedraclora import link as links
from fedraclora import sketch
from fedraclora.chain import Chain, drop_superseded, extend_hash, set_targets
from fedraclora.compressors import Arrays
from fedraclora.link import Link
from fedraclora.payload import Shape
from fedraclora.travel import (
    CONTROL,
    KEPT,
    SNAPSHOT,
    Kept,
    NotKept,
    Parcel,
    Unloading,
    Ways,
    packed_kinds,
    plain_shapes,
    repeats,
    repeats_within,
    unload,
)

CATCH_UPS = ("cheapest", "replay", "snapshot")
NOTHING = -1


@dataclass(frozen=True)
class Needs:
    """What a replica holds and lacks, by its own account or its server's memory.

    `num_held` counts its closed links. `snapshot` says that replaying links would not do, because its merged weights
    drifted; `base` that it has not even the base, so that the snapshot must hold every tensor; `factors` that it draws
    other bits than its server and must be sent them. `open_version` is the version whose open link it still has, or
    NOTHING.
    """

    num_held: int = 0
    snapshot: bool = False
    base: bool = False
    factors: bool = False
    open_version: int = NOTHING


class VersionMismatch(ValueError):
    """A replica is not where a delivery expects it, or would end elsewhere than its sender.

    `needs` is what would mend it. `has_diverged` says that its own links are not the sender's, so that it has to begin
    again from its base.
    """

    def __init__(self, reason: str, needs: Needs, *, has_diverged: bool = False) -> None:
        super().__init__(reason)
        self.needs, self.has_diverged = needs, has_diverged


@dataclass(frozen=True)
class Delivery:
    """A header of plain values as JSON, and arrays by kind: `flat` for plain numbers, encoded ones by their type."""

    header: str
    arrays: Mapping[str, Arrays]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the arrays."""
        return sum(array.nbytes for group in self.arrays.values() for array in group.values())


@dataclass(frozen=True)
class OpenLink:
    """The open link as one client is to have it, and the version since which each of its explicit tensors has stood.

    `since` is by the names of `Link.named_tensors`; what is not in it is new.
    """

    link: Link
    since: Mapping[str, int]


@dataclass(frozen=True)
class NewLink:
    """A closed link as it was sent, the digest of the whole link, and the chain's hash once it is merged."""

    link: Link
    digest: str
    hash: str


@dataclass(frozen=True)
class Received:
    """What a delivery brought that the replica lacked: closed links, after a snapshot where there was one.

    `version` is that of the chain that the delivery comes from.
    """

    links: tuple[NewLink, ...]
    is_snapshot: bool
    version: int = 0


# ---- the sender


def deliver(chain: Chain, needs: Needs, *, policy: str = "cheapest", opened: OpenLink | None = None) -> Delivery:
    """Return what a replica lacks: the missed links (`replay`), a `snapshot`, or whichever is fewer bytes (`cheapest`).

    The policy is for those who missed more than the last update. `opened` is the open link, as far as the replica is to
    have it; without it the delivery serves a client that does not train now.
    """
    load = _load(chain, needs, policy, opened)
    return Delivery(json.dumps(_header(chain, load), separators=(",", ":")), load.parcel.arrays())


def weigh(chain: Chain, needs: Needs, *, policy: str = "cheapest", opened: OpenLink | None = None) -> dict[str, int]:
    """Return the bytes, by kind, of the arrays that `deliver` would make; shapes are enough for it (meta tensors)."""
    return _load(chain, needs, policy, opened).parcel.num_bytes()


@dataclass(frozen=True)
class _Load:
    """What is sent: the numbers, and what they are.

    `closed` holds each closed link whole, as it is sent, and how its numbers travel; `ways` is that of the open link.
    `snapshot` is None where links are replayed.
    """

    needs: Needs
    parcel: Parcel
    snapshot: Mapping[str, Tensor] | None
    opened: OpenLink | None
    ways: Ways
    closed: Sequence[tuple[Link, Link, Ways]]

    @property
    def link(self) -> Link | None:
        """Return the open link."""
        return None if self.opened is None else self.opened.link


def _load(chain: Chain, needs: Needs, policy: str, opened: OpenLink | None) -> _Load:
    if needs.snapshot or needs.base:
        return _snapshot(chain, needs, opened)
    if policy == "replay" or needs.num_held >= chain.num_links_before:
        return _replay(chain, needs, opened)
    snapshot = _snapshot(chain, needs, opened)
    if policy == "snapshot":
        return snapshot
    replay = _replay(chain, needs, opened)
    return snapshot if snapshot.parcel.total_bytes < replay.parcel.total_bytes else replay


def _replay(chain: Chain, needs: Needs, opened: OpenLink | None) -> _Load:
    missing = chain.missing_links(needs.num_held)
    last = [] if opened is None else [opened.link]
    kept = drop_superseded([*missing, *last])[: len(missing)]
    return _gather(chain, needs, None, list(zip(missing, kept, strict=True)), opened)


def _snapshot(chain: Chain, needs: Needs, opened: OpenLink | None) -> _Load:
    everything = chain.everything()
    changed = set(everything) if needs.base else {term.target for link in chain.links for term in link.terms}
    changed |= everything.keys() - chain.merged.keys()
    # What the open link sets comes with it.
    replaced = set_targets([] if opened is None else [opened.link])
    tensors = {name: everything[name] for name in sorted(changed) if name not in replaced}
    return _gather(chain, needs, tensors, [], opened)


def _gather(
    chain: Chain,
    needs: Needs,
    snapshot: Mapping[str, Tensor] | None,
    closed: Sequence[tuple[Link, Link]],
    opened: OpenLink | None,
) -> _Load:
    """Return closed links (each whole and as it is sent), a snapshot's tensors and the open link as one load."""
    current, parcel, link = chain.num_links_before, Parcel(), None if opened is None else opened.link
    parcel.add(SNAPSHOT, list((snapshot or {}).values()))
    # The open link comes first: closed ones may refer to its factors.
    open_ways: Ways = []
    if opened is not None:
        kept = {name: [KEPT] for name in opened.link.explicit_factors if _is_kept(name, opened, needs)}
        open_ways = parcel.add_link(opened.link, current, known=repeats_within(opened.link) | kept)
        _add_drawn(parcel, opened.link, needs)
    rows = []
    for whole, sent in closed:
        rows.append((whole, sent, parcel.add_link(sent, current, known=repeats(sent, link))))
        _add_drawn(parcel, sent, needs)
    return _Load(needs, parcel, snapshot, opened, open_ways, rows)


def _header(chain: Chain, load: _Load) -> dict[str, Any]:
    """Return all that a delivery says beside its numbers."""
    link = load.link
    snapshot = {} if load.snapshot is None else {"snapshot": _described(chain, load.needs, load.snapshot)}
    return snapshot | {
        "links": [[whole.digest, sent.digest, links.describe(sent), ways] for whole, sent, ways in load.closed],
        "explicit": load.needs.factors,
        "current": chain.num_links_before,
        "version": chain.version,
        "open": None if link is None else [links.describe(link), load.ways],
        "digest": extend_hash(chain.hash, "" if link is None else link.digest),
        "sketches": sketch_digest(link),
        # Without the open link the tensors that it sets may be old at the replica, so there is nothing to compare.
        "weights": chain.weights_digest() if link is not None or chain.open is None else "",
    }


def _described(chain: Chain, needs: Needs, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "num_links": chain.num_links,
        "hash": chain.hash,
        "weights": sketch.digest_all(tensors),
        "tensors": [[name, list(tensor.shape)] for name, tensor in tensors.items()],
        "forced": needs.snapshot or needs.base,
    }


def _add_drawn(parcel: Parcel, link: Link, needs: Needs) -> None:
    if needs.factors:
        parcel.add(CONTROL, list(link.drawn_factors.values()))


def _is_kept(name: str, opened: OpenLink, needs: Needs) -> bool:
    return needs.open_version != NOTHING and opened.since.get(name, needs.open_version + 1) <= needs.open_version


def sketch_digest(link: Link | None) -> str:
    """Return one digest over all drawn factors of a link, so that two machines can compare what they drew."""
    return sketch.digest_all({}) if link is None else link.drawn_digest


# ---- the receiver


@dataclass(frozen=True)
class _Contents:
    """A delivery taken apart; a closed link comes with the digest of the whole link and that of what was sent of it."""

    header: dict[str, Any]
    closed: list[tuple[str, str, Link]]
    opened: Link | None
    snapshot: dict[str, Tensor]

    @property
    def state(self) -> Mapping[str, Any]:
        """Return what the header says of the snapshot; empty where there is none."""
        return self.header.get("snapshot") or {}


def receive(replica: Chain, delivery: Delivery, *, kept: Kept | None = None) -> Received:
    """Bring `replica` to the version of a delivery, and return what was new; links that it holds are skipped.

    `kept` are the tensors of earlier open links that are still here. A replica of -1 links has no base, and takes a
    snapshot of everything only. Raises VersionMismatch where links are missing in between, a link is not what its
    digest says, this machine draws other factors, or the digest at the end differs from the sender's; the replica is
    then as it was, but for its open link. Raises it, too, where the merged numbers differ from the sender's; the
    replica is then spoilt.
    """
    contents = _keep_drawn(_unpack(delivery, replica.num_links, kept or {}), replica.open)
    replica.open = None
    is_snapshot = _takes_snapshot(replica, contents)
    num_links, hash = replica.num_links, replica.hash
    if is_snapshot:
        num_links, hash = contents.state["num_links"], contents.state["hash"]
    new = _new_links(contents, num_links, hash)
    # All is checked before anything is merged: what is merged cannot be taken back.
    _check_before(contents, new, Needs(num_held=num_links), hash)
    if is_snapshot:
        replica.restore(contents.snapshot, num_links=num_links, hash=hash)
    for item in new:
        replica.open_link(item.link)
        replica.close(digest=item.digest)
    # A replica never hands links on, so it keeps the merged weights only.
    replica.links.clear()
    replica.open = contents.opened
    _check_after(replica, contents)
    return Received(tuple(new), is_snapshot, contents.header["version"])


def _takes_snapshot(replica: Chain, contents: _Contents) -> bool:
    is_forced = bool(contents.state) and bool(contents.state["forced"])
    if replica.num_links < 0 and not is_forced:
        raise VersionMismatch("the base that was built here is not its server's", Needs(base=True))
    return is_forced or (bool(contents.state) and replica.num_links < contents.state["num_links"])


def _new_links(contents: _Contents, num_links: int, hash: str) -> list[NewLink]:
    new: list[NewLink] = []
    for digest, _, link in contents.closed:
        if link.index >= num_links:
            hash = extend_hash(hash, digest)
            new.append(NewLink(link, digest, hash))
    return new


def _keep_drawn(contents: _Contents, previous: Link | None) -> _Contents:
    """Return the contents with the replica's own link where that is the same, so that nothing is drawn twice."""
    opened = contents.opened
    is_same = previous is not None and opened is not None and previous.digest == opened.digest
    return replace(contents, opened=previous) if is_same and not contents.header["explicit"] else contents


def _check_before(contents: _Contents, new: Sequence[NewLink], held: Needs, hash: str) -> None:
    found = [item.link.index for item in new]
    if found != list(range(held.num_held, held.num_held + len(new))):
        raise VersionMismatch(f"replica holds {held.num_held} links, those delivered are {found}", held)
    for _, sent, link in contents.closed:
        if link.digest != sent:
            raise VersionMismatch(f"link {link.index} is not what its digest {sent[:12]} says", held)
    if contents.state and sketch.digest_all(contents.snapshot) != contents.state["weights"]:
        raise VersionMismatch("the snapshot is not what its digest says", held)
    hash = new[-1].hash if new else hash
    end, wanted = (
        extend_hash(hash, "" if contents.opened is None else contents.opened.digest),
        contents.header["digest"],
    )
    if end != wanted:
        reason = f"replica would end at {end[:12]}, its server is at {wanted[:12]}"
        raise VersionMismatch(reason, Needs(), has_diverged=True)
    drawn = sketch_digest(contents.opened)
    if drawn != contents.header["sketches"]:
        reason = f"this machine draws factors {drawn[:12]}, its server {contents.header['sketches'][:12]}"
        raise VersionMismatch(reason, Needs(held.num_held, factors=True))


def _check_after(replica: Chain, contents: _Contents) -> None:
    wanted = contents.header["weights"]
    if wanted and replica.weights_digest() != wanted:
        reason = f"the merged weights are {replica.weights_digest()[:12]}, those of the server {wanted[:12]}"
        raise VersionMismatch(reason, Needs(snapshot=True))


def _unpack(delivery: Delivery, num_held: int, kept: Kept) -> _Contents:
    header, held = json.loads(delivery.header), Needs(num_held) if num_held >= 0 else Needs(base=True)
    shapes, kinds = _shapes(header)
    missing = sorted(
        {kind for kind in shapes if "flat" not in delivery.arrays.get(kind, {})} | (kinds - delivery.arrays.keys())
    )
    if missing:
        reason = f"a delivery lacks its arrays {missing}; it holds {sorted(delivery.arrays)}"
        raise VersionMismatch(reason, held)
    unloading, current = unload(shapes, delivery.arrays, kept), header["current"]
    try:
        opened = None
        if header["open"] is not None:
            description, ways = header["open"]
            opened = _given(unloading.take_link(description, ways, current), header, unloading)
        closed = [
            (whole, sent, _given(unloading.take_link(description, ways, current, opened=opened), header, unloading))
            for whole, sent, description, ways in header["links"]
        ]
    except NotKept as error:
        raise VersionMismatch(str(error), held) from error
    names = [name for name, _ in header["snapshot"]["tensors"]] if "snapshot" in header else []
    snapshot = dict(zip(names, unloading.plain.get(SNAPSHOT, []), strict=True))
    return _Contents(header=header, closed=closed, opened=opened, snapshot=snapshot)


def _given(link: Link, header: dict[str, Any], unloading: Unloading) -> Link:
    return link.with_given(unloading.take(CONTROL, len(link.drawn))) if header["explicit"] else link


def _shapes(header: dict[str, Any]) -> tuple[dict[str, list[Shape]], set[str]]:
    """Return the shapes of the plain tensors that a header announces, by kind, and the kinds of encoded ones."""
    rows = [] if header["open"] is None else [tuple(header["open"])]
    rows += [(description, ways) for *_, description, ways in header["links"]]
    shapes: dict[str, list[Shape]] = {}
    kinds: set[str] = set()
    for description, ways in rows:
        kinds |= packed_kinds(description, ways, header["current"])
        for kind, shape in plain_shapes(description, ways, header["current"]):
            shapes.setdefault(kind, []).append(shape)
        if header["explicit"]:
            shapes.setdefault(CONTROL, []).extend(links.drawn_shapes(description))
    if "snapshot" in header and header["snapshot"]["tensors"]:
        shapes[SNAPSHOT] = [tuple(shape) for _, shape in header["snapshot"]["tensors"]]
    return {kind: wanted for kind, wanted in shapes.items() if wanted}, kinds
