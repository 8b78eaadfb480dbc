"""Bringing a replica to the server's version: what it lacks, as flat arrays by kind, and how it takes them in.

A delivery holds the closed links that the replica lacks, or one snapshot of the changed weights, and the open link.
What a client that took part in the last update lacks is an `update` (factors) or `dense` (whole tensors); what was
missed before is `catch_up` or `snapshot`. Drawn factors, sent only to a machine that draws other bits, are `control`.
Both halves of the project use this file, so they cannot disagree about the order.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedraclora import link as links
from fedraclora import sketch
from fedraclora.chain import Chain, drop_superseded, extend_hash, set_targets
from fedraclora.link import Json, Link
from fedraclora.payload import FlatArray, Shape, flatten, unflatten

CATCH_UPS = ("cheapest", "replay", "snapshot")
UPDATE, DENSE, CATCH_UP, SNAPSHOT, CONTROL = "update", "dense", "catch_up", "snapshot", "control"


@dataclass(frozen=True)
class Needs:
    """What a replica holds and lacks, by its own account or its server's memory.

    `num_held` counts its closed links. `snapshot` says that replaying links would not do, because its merged weights
    drifted; `base` that it has not even the base, so that the snapshot must hold every tensor; `factors` that it draws
    other bits than its server and must be sent them.
    """

    num_held: int = 0
    snapshot: bool = False
    base: bool = False
    factors: bool = False


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
    """A header of plain values as JSON, and one flat array a kind."""

    header: str
    arrays: Mapping[str, FlatArray]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True)
class NewLink:
    """A closed link as it was sent, the digest of the whole link, and the chain's hash once it is merged."""

    link: Link
    digest: str
    hash: str


@dataclass(frozen=True)
class Received:
    """What a delivery brought that the replica lacked: closed links, after a snapshot where there was one."""

    links: tuple[NewLink, ...]
    is_snapshot: bool


# ---- the sender


def deliver(chain: Chain, needs: Needs, *, policy: str = "cheapest", with_open: bool = True) -> Delivery:
    """Return what a replica lacks: the missed links (`replay`), a `snapshot`, or whichever is fewer bytes (`cheapest`).

    The policy is for those who missed more than the last update. Without the open link the delivery serves a client
    that does not train now.
    """
    if needs.snapshot or needs.base:
        return _snapshot(chain, needs, with_open=with_open)
    if policy == "replay" or needs.num_held >= chain.num_links_before:
        return _replay(chain, needs, with_open=with_open)
    snapshot = _snapshot(chain, needs, with_open=with_open)
    if policy == "snapshot":
        return snapshot
    replay = _replay(chain, needs, with_open=with_open)
    return snapshot if snapshot.num_bytes < replay.num_bytes else replay


def _open_links(chain: Chain, *, with_open: bool) -> list[Link]:
    return [chain.open] if with_open and chain.open is not None else []


def _replay(chain: Chain, needs: Needs, *, with_open: bool) -> Delivery:
    missing, opened = chain.missing_links(needs.num_held), _open_links(chain, with_open=with_open)
    kept = drop_superseded([*missing, *opened])[: len(missing)]
    described = [[link.digest, sent.digest, links.describe(sent)] for link, sent in zip(missing, kept, strict=True)]
    header = {"links": described, "explicit": needs.factors}
    return _pack(chain, header, [*kept, *opened], with_open=with_open)


def _snapshot(chain: Chain, needs: Needs, *, with_open: bool) -> Delivery:
    opened = _open_links(chain, with_open=with_open)
    changed = chain.merged if needs.base else {term.target for link in chain.links for term in link.terms}
    # What the open link sets comes with it.
    tensors = {name: chain.merged[name] for name in sorted(changed) if name not in set_targets(opened)}
    described = {
        "num_links": chain.num_links,
        "hash": chain.hash,
        "weights": sketch.digest_all(tensors),
        "tensors": [[name, list(tensor.shape)] for name, tensor in tensors.items()],
        "forced": needs.snapshot or needs.base,
    }
    header = {"links": [], "explicit": needs.factors, "snapshot": described}
    return _pack(chain, header, opened, with_open=with_open, snapshot=list(tensors.values()))


def _pack(
    chain: Chain, header: dict[str, Any], sent: Sequence[Link], *, with_open: bool, snapshot: Sequence[Tensor] = ()
) -> Delivery:
    header["current"] = chain.num_links_before
    waiting: dict[str, list[Tensor]] = {SNAPSHOT: list(snapshot)}
    for link in sent:
        tensors = iter(link.tensors)
        for kind, _ in _slots(links.describe(link), header["current"]):
            waiting.setdefault(kind, []).append(next(tensors))
        if header["explicit"]:
            waiting.setdefault(CONTROL, []).extend(link.drawn_factors.values())
    opened = chain.open if with_open else None
    header |= {
        "open": None if opened is None else links.describe(opened),
        "digest": extend_hash(chain.hash, "" if opened is None else opened.digest),
        "sketches": sketch_digest(opened),
        # Without the open link the tensors that it sets may be old at the replica, so there is nothing to compare.
        "weights": chain.weights_digest() if with_open else "",
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


def receive(replica: Chain, delivery: Delivery) -> Received:
    """Bring `replica` to the version of a delivery, and return what was new; links that it holds are skipped.

    A replica of -1 links has no base, and takes a snapshot of everything only. Raises VersionMismatch where links are
    missing in between, a link is not what its digest says, this machine draws other factors, or the digest at the end
    differs from the sender's; the replica is then as it was, but for its open link. Raises it, too, where the merged
    numbers differ from the sender's; the replica is then spoilt.
    """
    contents = _keep_drawn(_unpack(delivery, replica.num_links), replica.open)
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
    return Received(tuple(new), is_snapshot)


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


def _unpack(delivery: Delivery, num_held: int) -> _Contents:
    header = json.loads(delivery.header)
    shapes = _shapes(header)
    missing = sorted(shapes.keys() - delivery.arrays.keys())
    if missing:
        reason = f"a delivery lacks its arrays {missing}; it holds {sorted(delivery.arrays)}"
        raise VersionMismatch(reason, Needs(num_held))
    tensors = {kind: unflatten(delivery.arrays[kind], wanted) for kind, wanted in shapes.items()}

    def restore(description: Json) -> Link:
        link = links.restore(description, [tensors[kind].pop(0) for kind, _ in _slots(description, header["current"])])
        return link.with_given([tensors[CONTROL].pop(0) for _ in link.drawn]) if header["explicit"] else link

    names = [name for name, _ in header["snapshot"]["tensors"]] if "snapshot" in header else []
    return _Contents(
        header=header,
        closed=[(whole, sent, restore(description)) for whole, sent, description in header["links"]],
        opened=None if header["open"] is None else restore(header["open"]),
        snapshot=dict(zip(names, tensors.get(SNAPSHOT, []), strict=True)),
    )


def _shapes(header: dict[str, Any]) -> dict[str, list[Shape]]:
    """Return the shapes of the arrays that a header announces, by kind."""
    described = [row[-1] for row in header["links"]] + ([] if header["open"] is None else [header["open"]])
    shapes: dict[str, list[Shape]] = {}
    for description in described:
        for kind, shape in _slots(description, header["current"]):
            shapes.setdefault(kind, []).append(shape)
        if header["explicit"]:
            drawn = [links.shape_of(key) for key in links.drawn_keys(description)]
            shapes.setdefault(CONTROL, []).extend(drawn)
    if "snapshot" in header and header["snapshot"]["tensors"]:
        shapes[SNAPSHOT] = [tuple(shape) for _, shape in header["snapshot"]["tensors"]]
    return {kind: wanted for kind, wanted in shapes.items() if wanted}
