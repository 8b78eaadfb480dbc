"""What a method is: which factors start where, what the clients train, and how their replies become the next version.

A method is a file that exports `Config`, a plain dataclass whose `lr` is the method's own default learning rate, and
`build(config, adapter) -> Method`. It sees no message, no client code and no byte count: `base.py` speaks Flower for
all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fedraclora.aggregate import normalized, weighted_mean
from fedraclora.chain import Weights
from fedraclora.link import Link, LowRank, Private, Set, Term, Zero
from fedraclora.plan import Training
from fedraclora.sketch import SketchKey
from fedraclora.targets import MatrixShape


@dataclass(frozen=True)
class ClientUpdate:
    """One usable reply: what was sent by key (`fc1.lora_b`, `fc1.bias`), and the client's weight in the mean.

    `link` is the open link with this client's own draws. A client of a smaller rank is padded: its factors have the
    link's rank and scale, with zeros beyond `ranks[layer]` (empty: it has the link's ranks).
    """

    tensors: Mapping[str, Tensor]
    weight: float
    link: Link
    ranks: Mapping[str, int] = field(default_factory=dict)


Updates = Mapping[int, ClientUpdate]


@dataclass(frozen=True)
class Step:
    """What a round makes of the log: the open link's next terms, and terms merged for good beside it."""

    open: Sequence[Term]
    merged: Sequence[Term] = ()


@dataclass(frozen=True)
class Traits:
    """What a method can be combined with.

    `is_mean`: the next version depends on the replies through their mean only, so that another aggregate (a median, a
    noisy mean) can take its place. `merges`: links are merged for good, so that a server's optimiser works on the
    merged update and is replayed by the replicas; else it works on the open link's factors. `has_ranks`: clients may
    have ranks of their own. `has_private_draws`: `sketch.shared=false` means something to it. `is_global`: there is one
    model for all (else a client's own tensors complete it, and its accuracy is that of the clients). `is_steady`: in
    every round all clients train the same tensors, in one basis, and send them as they are, so that control variates
    mean the same to all.
    """

    is_mean: bool = True
    merges: bool = True
    has_ranks: bool = False
    has_private_draws: bool = False
    is_global: bool = True
    is_steady: bool = True


class Method(Protocol):
    """The rule of one federated method."""

    @property
    def traits(self) -> Traits:
        """Return what the method can be combined with."""
        ...

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return the link that a round starts from when none is open; `weights` are those of the closed links."""
        ...

    def trains(self, round: int, start: Link) -> Training:
        """Return what the clients train in `round` (1 is the first), given the open link."""
        ...

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return what becomes of the log, from the closed weights, the link the clients started from, and updates.

        A tensor that the open link sets must be set by its next terms too: only the latest value is ever sent.
        """
        ...

    def closes(self, updates_in_link: int) -> bool:
        """Return whether the open link is merged for good after that many updates."""
        ...


@dataclass(frozen=True)
class Adapter:
    """The adapted model as a method sees it.

    `shapes`, `ranks` and `scales` (`alpha / rank`) are by target layer; `dense` names the tensors trained in full
    beside the factors, `parameters` all of the model. `law` and `seed` are those of the sketches; `is_shared` tells
    whether all clients draw the same ones. `seed` must not be used for anything but sketches and `coins`.
    """

    shapes: Mapping[str, MatrixShape]
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    dense: tuple[str, ...]
    parameters: tuple[str, ...]
    law: str
    seed: int
    is_shared: bool = True

    def open_link(self, index: int, sides: Mapping[str, str], *, is_private: bool = False) -> Link:
        """Return a link that changes nothing yet: per layer one factor drawn from the seed, the other zero.

        `sides` are the trained factors: for `b` and `ab` lora_a is drawn, for `a` lora_b is; where `is_private`, by
        each client for itself. Raises ValueError for a rank that a layer cannot have.
        """
        return Link(index, tuple(self._term(index, layer, side, is_private) for layer, side in sides.items()))

    def key(self, index: int, layer: str, side: str) -> SketchKey:
        """Return the key of a layer's draw in link `index` where `side` is trained."""
        shape, rank = self.shapes[layer], self.ranks[layer]
        dim = shape.out if side == "a" else shape.in_
        return SketchKey(law=self.law, seed=self.seed, link=index, layer=layer, side=side, rank=rank, dim=dim)

    def check_rank(self, layer: str) -> None:
        """Raise ValueError where a layer's rank is too large for two factors that train."""
        shape, rank = self.shapes[layer], self.ranks[layer]
        if rank > min(shape.out, shape.in_):
            raise ValueError(
                f"rank {rank} exceeds min(in, out) = {min(shape.out, shape.in_)} of layer {layer!r}, "
                "whose two factors train"
            )

    def _term(self, index: int, layer: str, side: str, is_private: bool) -> LowRank:
        shape, rank = self.shapes[layer], self.ranks[layer]
        if side == "ab":
            self.check_rank(layer)
        key = self.key(index, layer, side)
        drawn = Private(key) if is_private else key
        if side == "a":
            return LowRank(layer, self.scales[layer], lora_a=Zero((rank, shape.in_)), lora_b=drawn)
        return LowRank(layer, self.scales[layer], lora_a=drawn, lora_b=Zero((shape.out, rank)))

    def everywhere(self, part: str) -> dict[str, str]:
        """Return the same part for every layer."""
        return dict.fromkeys(self.shapes, part)


def shares(updates: Updates) -> dict[int, float]:
    """Return the clients' weights divided by their sum, in the order of the clients."""
    return normalized({client: update.weight for client, update in updates.items()})


def mean_update(updates: Updates) -> dict[str, Tensor]:
    """Return the weighted mean over the clients of every tensor that was sent, by key."""
    keys = list(next(iter(updates.values())).tensors)
    tensors = {client: [update.tensors[key] for key in keys] for client, update in updates.items()}
    means = weighted_mean(tensors, {client: update.weight for client, update in updates.items()})
    return dict(zip(keys, means, strict=True))


def replace_trained(start: Link, trained: Mapping[str, Tensor]) -> list[Term]:
    """Return the link's terms with the trained factors replaced, and a `Set` term for each tensor trained in full."""
    factors = {name: tensor for name, tensor in trained.items() if name in start.factors}
    terms: list[Term] = list(start.with_factors(factors).low_rank_terms().values())
    return terms + [Set(name, value) for name, value in trained.items() if name not in factors]


def client_terms(update: ClientUpdate) -> dict[str, LowRank]:
    """Return the low-rank term that a client ended its round with, by layer; what it did not send is as it started."""
    factors = {name: tensor for name, tensor in update.tensors.items() if name in update.link.factors}
    return update.link.with_factors(factors).low_rank_terms()
