"""The chain: a model as a log of closed links and one open link over fixed base weights.

The server appends to it and every client is a replica that replays it. `W = base + sum of the closed links` is kept
merged; the open link (whose factors a round replaces) is added on demand. A hash chain over the links tells whether
two machines hold the same model. The paper's loop (Algorithm 1 of RAC-LoRA, arXiv 2410.08305) closes a link after
each solve; FFA-LoRA never closes one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedraclora import sketch
from fedraclora.link import Dense, Link, LowRank, Set, Term, is_zero, materialize
from fedraclora.server_rule import step_

Weights = dict[str, Tensor]
# Marks the moments of a server rule among the tensors of a snapshot.
SLOT = "moment of "


def merge_(weights: Weights, terms: Sequence[Term]) -> None:
    """Apply the terms of a link to `weights`, in place."""
    for term in terms:
        if term.target not in weights:
            raise ValueError(f"a link changes {term.target!r}, which the model lacks; it has {sorted(weights)}")
        if isinstance(term, LowRank):
            _add_low_rank_(weights[term.target], term)
        elif isinstance(term, Dense):
            weights[term.target].add_(term.delta.to(weights[term.target]))
        elif isinstance(term, Set):
            weights[term.target].copy_(term.value)


def _add_low_rank_(weight: Tensor, term: LowRank) -> None:
    """Add `scale * lora_b @ lora_a` to `weight` (a kernel is flattened to `[out, in]`), rank by rank.

    One rounded product and one rounded sum an element: unlike a matrix product, that gives the same bits on every
    machine.
    """
    if is_zero(term):
        return
    matrix = weight.view(weight.shape[0], -1)
    lora_a, lora_b = materialize(term.lora_a, weight), materialize(term.lora_b, weight) * term.scale
    if term.core is not None:
        lora_b = _multiply(lora_b, materialize(term.core, weight))
    for column, row in zip(lora_b.unbind(1), lora_a.unbind(0), strict=True):
        matrix.add_(column.unsqueeze(1) * row)


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return a matrix product with one rounded product and one rounded sum a step, for the same reason."""
    total = torch.zeros(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    for column, row in zip(left.unbind(1), right.unbind(0), strict=True):
        total.add_(column.unsqueeze(1) * row)
    return total


def merge_link_(weights: Weights, slots: Weights, link: Link) -> None:
    """Apply a link to `weights`, by way of its server rule where it has one, whose moments are in `slots`; in place.

    The rule sees what the link adds to each tensor; what the link sets is set.
    """
    if link.rule is None:
        merge_(weights, link.terms)
        return
    added = [term for term in link.terms if not isinstance(term, Set)]
    merge_(weights, [term for term in link.terms if isinstance(term, Set)])
    updates = {target: torch.zeros_like(weights[target]) for target in dict.fromkeys(term.target for term in added)}
    merge_(updates, added)
    for target, update in updates.items():
        weights[target].add_(step_(link.rule, slots, target, update))


@dataclass
class Chain:
    """A model's log with the merged weights of its closed links.

    `merged` is the master copy (float32, or float64 for tests of equality). `links` holds the closed links still kept
    in memory, the newest last; `num_links` counts all that were ever closed. `version` counts the updates, one a round
    that changed the model. `num_links_before` is `num_links` as it was before the last update: what a client that took
    part in it already holds. `updates_in_link` counts the updates of the open link. `slots` are the moments of the
    server rules of the closed links.
    """

    merged: Weights
    hash: str
    num_links: int = 0
    num_links_before: int = 0
    version: int = 0
    updates_in_link: int = 0
    links: list[Link] = field(default_factory=list)
    open: Link | None = None
    slots: Weights = field(default_factory=dict)
    _weights_digest: tuple[str, frozenset[str], str] = ("", frozenset(), "")

    @staticmethod
    def start(base: Mapping[str, Tensor]) -> "Chain":
        """Return an empty chain over `base` (copied), the named weights that every client has."""
        merged = {name: tensor.detach().clone() for name, tensor in base.items()}
        return Chain(merged, hash=sketch.digest_all(merged))

    @property
    def digest(self) -> str:
        """Return the digest of this version: of the base, every closed link and the open one."""
        return extend_hash(self.hash, "" if self.open is None else self.open.digest)

    def weights_digest(self) -> str:
        """Return the digest of the merged float numbers themselves, which tells whether two machines merged alike.

        Tensors that the open link sets are left out: replicas are not sent the values that it replaces.
        """
        replaced = frozenset(set_targets([] if self.open is None else [self.open]))
        if self._weights_digest[:2] != (self.hash, replaced):
            kept = {name: tensor for name, tensor in self.merged.items() if name not in replaced}
            self._weights_digest = self.hash, replaced, sketch.digest_all(kept)
        return self._weights_digest[2]

    def open_link(self, link: Link) -> None:
        """Open a new link. Raises ValueError where one is open or the position is wrong."""
        if self.open is not None or link.index != self.num_links:
            state = "open" if self.open is not None else "closed"
            raise ValueError(
                f"cannot open link {link.index}: {self.num_links} links are closed and the last one is {state}"
            )
        self.open, self.updates_in_link = link, 0

    def update(self, link: Link, *, close: bool, merged: Link | None = None) -> None:
        """Replace the open link by `link`, then merge it for good where `close` says so.

        `merged` is a link that is closed before it, in its place; `link` then moves up by one. Raises ValueError where
        no link is open, where positions are wrong, or where `link` no longer sets a tensor that the open link sets:
        replicas were sent its newest value only, and could not go back to an older one.
        """
        if self.open is None:
            raise ValueError("no link is open; open one before updating it")
        forgotten = set_targets([self.open]) - set_targets([link])
        if forgotten:
            raise ValueError(f"the open link sets {sorted(forgotten)}; its next terms must set them too")
        found = [item.index for item in (merged, link) if item is not None]
        right = list(range(self.num_links, self.num_links + len(found)))
        if found != right:
            raise ValueError(f"an update brings links {found}; after {self.num_links} closed ones {right} are right")
        self.num_links_before = self.num_links
        if merged is not None:
            self.open = merged
            self.close()
        self.open = link
        self.version += 1
        self.updates_in_link += 1
        if close:
            self.close()

    def close(self, *, digest: str | None = None, merge: bool = True) -> None:
        """Merge the open link into the weights and count it as closed.

        `digest` stands for the link's own where superseded terms were left out of it; `merge=False` says that
        weights which already contain the link follow (a snapshot).
        """
        if self.open is None:
            raise ValueError("no link is open")
        if merge:
            merge_link_(self.merged, self.slots, self.open)
        self.hash = extend_hash(self.hash, digest or self.open.digest)
        self.links.append(self.open)
        self.num_links += 1
        self.open = None

    def weights(self) -> Weights:
        """Return the weights of this version, the open link included; unchanged tensors are shared, not copied."""
        if self.open is None:
            return dict(self.merged)
        changed = {term.target for term in self.open.terms if not is_zero(term)}
        result = {name: tensor.clone() if name in changed else tensor for name, tensor in self.merged.items()}
        merge_(result, [term for term in self.open.terms if term.target in changed])
        return result

    def missing_links(self, num_held: int) -> list[Link]:
        """Return the closed links that a replica with `num_held` of them lacks.

        Raises LookupError where they are no longer kept: then only a snapshot can bring the replica up to date.
        """
        num_missing = self.num_links - num_held
        if not 0 <= num_missing <= len(self.links):
            raise LookupError(
                f"links {num_held} to {self.num_links - 1} are asked for, the last {len(self.links)} are kept"
            )
        return self.links[len(self.links) - num_missing :]

    def everything(self) -> Weights:
        """Return the merged weights and the moments of the server rules, as a snapshot names them."""
        return self.merged | {f"{SLOT}{name}": tensor for name, tensor in self.slots.items()}

    def restore(self, snapshot: Mapping[str, Tensor], *, num_links: int, hash: str) -> None:
        """Jump to `num_links` closed links by replacing the tensors that changed since the base."""
        self.take(snapshot)
        self.num_links, self.hash, self.links, self.open = num_links, hash, [], None

    def take(self, snapshot: Mapping[str, Tensor]) -> None:
        """Replace the tensors, and the moments, that a snapshot holds."""
        self.slots = {name.removeprefix(SLOT): t.clone() for name, t in snapshot.items() if name.startswith(SLOT)}
        for name, tensor in snapshot.items():
            if not name.startswith(SLOT):
                self.merged[name].copy_(tensor)
        # The same hash may stand for other numbers now: a snapshot is what mends a chain that drifted.
        self._weights_digest = "", frozenset(), ""


def extend_hash(previous: str, link_digest: str) -> str:
    """Return the chain's hash after one more link (`""` for a version without an open one)."""
    return hashlib.sha256(f"{previous}{link_digest}".encode()).hexdigest()


def set_targets(links: Sequence[Link]) -> set[str]:
    """Return the tensors that the links set."""
    return {term.target for link in links for term in link.terms if isinstance(term, Set)}


def drop_superseded(links: Sequence[Link]) -> list[Link]:
    """Return the links without `Set` terms that a later link sets again: only the latest value is ever sent."""
    seen: set[str] = set()
    kept: list[Link] = []
    for link in reversed(links):
        terms = tuple(term for term in link.terms if not (isinstance(term, Set) and term.target in seen))
        seen |= set_targets([link])
        kept.append(replace(link, terms=terms) if len(terms) < len(link.terms) else link)
    return kept[::-1]


def equal_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Return whether two sets of named weights agree in every bit."""
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
