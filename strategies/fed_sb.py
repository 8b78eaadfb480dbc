"""Fed-SB: a small square matrix between two fixed factors is all that trains, and its mean is exact.

R. Singhal, K. Ponkshe, R. Vartak, L. R. Varshney, P. Vepakomma, "Fed-SB: A Silver Bullet for Extreme Communication
Efficiency and Performance in (Private) Federated LoRA Fine-Tuning", 2025, arXiv 2502.15436. The model is W + s B R A
with s = alpha / rank; clients train R `[rank, rank]`, the server averages it. B and A come from a first estimate of the
full update, D = U S V^T: B = U, A = V^T and R = S / s, cut to the rank.

Differs from the paper: the estimate D is the mean update of one whole round in which the clients train the target
weights in full, paid for like any other round, where the paper takes one step by gradients on a small part of the data;
clients are weighted by their examples unless the run has `weighting=uniform`, as the paper. With `init=random` B and A
are drawn instead and R starts at zero, which costs nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedraclora.aggregate import weighted_mean
from fedraclora.chain import Weights
from fedraclora.link import Link, LowRank, Zero
from fedraclora.plan import Training
from fedraclora.plugins import nearest
from strategies._factors import dense_terms, truncated_matrix
from strategies.method import Adapter, Step, Traits, Updates, mean_update, replace_trained

INITS = ("update", "random")


@dataclass
class Config:
    """Settings of Fed-SB.

    init: where the fixed factors come from: the first round's full `update`, or `random` draws.
    lr: the clients' learning rate where the run names none, also that of the first round on full weights.
    """

    init: str = "update"
    lr: float = 0.2


@dataclass(frozen=True)
class FedSb:
    """The method for one adapted model."""

    config: Config
    adapter: Adapter

    @property
    def traits(self) -> Traits:
        """Return what the method can be combined with."""
        return Traits(merges=False, is_steady=self.config.init == "random")

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return the one triple of factors, which changes nothing yet: zero, or drawn around a zero core."""
        return Link(index, tuple(self._start(index, layer) for layer in self.adapter.shapes))

    def _start(self, index: int, layer: str) -> LowRank:
        shape, rank, scale = self.adapter.shapes[layer], self.adapter.ranks[layer], self.adapter.scales[layer]
        core = Zero((rank, rank))
        if self.config.init == "random":
            drawn_a, drawn_b = self.adapter.key(index, layer, "b"), self.adapter.key(index, layer, "a")
            return LowRank(layer, scale, lora_a=drawn_a, lora_b=drawn_b, core=core)
        return LowRank(layer, scale, lora_a=Zero((rank, shape.in_)), lora_b=Zero((shape.out, rank)), core=core)

    def trains(self, round: int, start: Link) -> Training:
        """Return the target weights in full until there are factors, then the core between them."""
        return Training(self.adapter.everywhere("core" if has_factors(start) else "w"), self.adapter.dense)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return the triple with the mean core, or the first triple, from the mean of the full updates."""
        if has_factors(start):
            return Step(replace_trained(start, mean_update(updates)))
        terms = [self._factored(layer, weights[f"{layer}.weight"], updates) for layer in self.adapter.shapes]
        return Step([*terms, *dense_terms(self.adapter.dense, updates)])

    def _factored(self, layer: str, weight: Tensor, updates: Updates) -> LowRank:
        """Return the triple that is nearest to the clients' mean update of a layer's weight."""
        differences = {k: [u.tensors[f"{layer}.weight"].double() - weight.double()] for k, u in updates.items()}
        (mean,) = weighted_mean(differences, {k: u.weight for k, u in updates.items()})
        svd, scale = truncated_matrix(mean.flatten(1), self.adapter.ranks[layer]), self.adapter.scales[layer]
        core, lora_b, lora_a = (part.to(weight.dtype) for part in (torch.diag(svd.s / scale), svd.u, svd.vh))
        return LowRank(layer, scale, lora_a.contiguous(), lora_b.contiguous(), core)

    def closes(self, updates_in_link: int) -> bool:
        """Return False: the core goes on."""
        return False


def has_factors(start: Link) -> bool:
    """Return whether the fixed factors are there, drawn or found, so that the core can train."""
    return not any(isinstance(term.lora_a, Zero) for term in start.low_rank_terms().values())


def build(config: Config, adapter: Adapter) -> FedSb:
    """Return Fed-SB for an adapted model. Raises ValueError for an unknown start or a rank that is too large."""
    if config.init not in INITS:
        raise ValueError(f"method.init={config.init!r} is unknown; {nearest(config.init, INITS)}")
    for layer in adapter.shapes:
        adapter.check_rank(layer)
    return FedSb(config, adapter)
