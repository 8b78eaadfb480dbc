"""What a method is: which factors start where, what the clients train, and how their replies become the next version.

A method is a file that exports `Config`, a plain dataclass whose `lr` is the method's own default learning rate, and
`build(config, adapter) -> Method`. It sees no message, no client code and no byte count: `base.py` speaks Flower for
all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fedraclora.aggregate import weighted_mean
from fedraclora.chain import Weights
from fedraclora.link import Link, LowRank, Set, Term, Zero, materialize
from fedraclora.sketch import SketchKey
from fedraclora.targets import MatrixShape


@dataclass(frozen=True)
class Trained:
    """What the clients train: factors by layer (`a`, `b` or `ab`), whole tensors, and the fate of their moments."""

    factors: Mapping[str, str] = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    moments: str = "reset"


@dataclass(frozen=True)
class ClientUpdate:
    """One usable reply: the trained tensors by key (`fc1.lora_b`, `fc1.bias`) and the client's weight in the mean."""

    tensors: Mapping[str, Tensor]
    weight: float


Updates = Mapping[int, ClientUpdate]


class Method(Protocol):
    """The rule of one federated method."""

    def open_link(self, index: int) -> Link:
        """Return the link that a round starts from when none is open."""
        ...

    def trains(self, round: int) -> Trained:
        """Return what the clients train in `round` (1 is the first)."""
        ...

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> list[Term]:
        """Return the open link's new terms from the closed weights, the link the clients started from, and updates.

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
    beside the factors, `parameters` all of the model. `law` and `seed` are those of the sketches.
    """

    shapes: Mapping[str, MatrixShape]
    ranks: Mapping[str, int]
    scales: Mapping[str, float]
    dense: tuple[str, ...]
    parameters: tuple[str, ...]
    law: str
    seed: int

    def open_link(self, index: int, sides: Mapping[str, str]) -> Link:
        """Return a link that changes nothing yet: per layer one factor drawn from the seed, the other zero.

        `sides` are the trained factors: for `b` and `ab` lora_a is drawn, for `a` lora_b is. Raises ValueError for a
        rank that a layer cannot have.
        """
        return Link(index, tuple(self._term(index, layer, side) for layer, side in sides.items()))

    def _term(self, index: int, layer: str, side: str) -> LowRank:
        shape, rank = self.shapes[layer], self.ranks[layer]
        if side == "ab" and rank > min(shape.out, shape.in_):
            raise ValueError(
                f"rank {rank} exceeds min(in, out) = {min(shape.out, shape.in_)} of layer {layer!r}, "
                "whose two factors train"
            )
        dim = shape.out if side == "a" else shape.in_
        drawn = SketchKey(law=self.law, seed=self.seed, link=index, layer=layer, side=side, rank=rank, dim=dim)
        if side == "a":
            return LowRank(layer, self.scales[layer], lora_a=Zero((rank, shape.in_)), lora_b=drawn)
        return LowRank(layer, self.scales[layer], lora_a=drawn, lora_b=Zero((shape.out, rank)))


def mean_update(updates: Updates) -> dict[str, Tensor]:
    """Return the weighted mean over the clients of every trained tensor, by key."""
    keys = list(next(iter(updates.values())).tensors)
    tensors = {client: [update.tensors[key] for key in keys] for client, update in updates.items()}
    means = weighted_mean(tensors, {client: update.weight for client, update in updates.items()})
    return dict(zip(keys, means, strict=True))


def replace_trained(start: Link, trained: Mapping[str, Tensor]) -> list[Term]:
    """Return the link's terms with the trained factors replaced, and a `Set` term for each tensor trained in full."""
    terms: list[Term] = []
    for term in start.low_rank_terms().values():
        lora_a = trained.get(f"{term.layer}.lora_a", term.lora_a)
        lora_b = trained.get(f"{term.layer}.lora_b", term.lora_b)
        terms.append(LowRank(term.layer, term.scale, lora_a, lora_b))
    factors = {f"{layer}.lora_{side}" for layer in start.low_rank_terms() for side in "ab"}
    return terms + [Set(key, value) for key, value in trained.items() if key not in factors]


def move_from_start(weights: Weights, start: Link, mean: Mapping[str, Tensor], server_lr: float) -> dict[str, Tensor]:
    """Return `start + server_lr * (mean - start)` for every trained tensor: the server's step to the clients' mean."""
    if server_lr == 1.0:
        return dict(mean)
    values = {term.target: term.value for term in start.terms if isinstance(term, Set)}
    moved: dict[str, Tensor] = {}
    for key, tensor in mean.items():
        owner, _, name = key.rpartition(".")
        if name in ("lora_a", "lora_b"):
            begin = materialize(getattr(start.low_rank_terms()[owner], name), tensor)
        else:
            begin = values.get(key, weights.get(key, tensor))
        moved[key] = begin + server_lr * (tensor - begin)
    return moved
