"""FRLoRA: each round starts from the same principal factors, and what the means of the factors add is merged.

Y. Yan, C.-M. Feng, W. Zuo, L. Zhu, R. S. M. Goh, Y. Liu, "Federated Residual Low-Rank Adaption of Large Language
Models", 2025, ICLR (no arXiv number is known). The leading singular triplets of the base weights, W^0 = U S V^T, give
B0 = U sqrt(S / s) and A0 = sqrt(S / s) V^T with s = alpha / rank. Clients train both factors from (A0, B0) on top of
W^t - s B0 A0, and W^{t+1} = W^t + s (Bbar Abar - B0 A0) with the means Abar and Bbar of the factors.

The open link holds -s B0 A0, frozen, and s B0 A0, which trains: together nothing, so that the closed weights are W^t.
Differs from the paper: the server computes the decomposition and sends A0 and B0 once to every client, because two
machines do not find the same bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedraclora.chain import Weights
from fedraclora.link import Link, LowRank
from fedraclora.plan import Training
from strategies._factors import dense_terms, truncated_matrix
from strategies.method import Adapter, Step, Traits, Updates, mean_update


@dataclass
class Config:
    """Settings of FRLoRA; `lr` is the clients' learning rate where the run names none."""

    lr: float = 0.1


@dataclass(frozen=True)
class FrLora:
    """The method for one adapted model."""

    config: Config
    adapter: Adapter
    traits: ClassVar[Traits] = Traits()

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return the link of the principal factors of the base weights, twice: taken away, and there to train.

        Raises ValueError where a weight has a smaller rank than its layer's factors.
        """
        trained = [self._principal(layer, weights[f"{layer}.weight"]) for layer in self.adapter.shapes]
        # The term that trains is the last of its layer.
        return Link(index, tuple(replace(term, scale=-term.scale) for term in trained) + tuple(trained))

    def _principal(self, layer: str, weight: Tensor) -> LowRank:
        rank, scale = self.adapter.ranks[layer], self.adapter.scales[layer]
        svd = truncated_matrix(weight.flatten(1).double() / scale, rank)
        if float(svd.s[-1]) == 0:
            raise ValueError(
                f"the weight of layer {layer!r} has a smaller rank than {rank}: factors that start at its principal "
                "part would hold zeros that never train; use a smaller rank, or pretrained weights"
            )
        return svd.balanced().low_rank(layer, scale, weight)

    def trains(self, round: int, start: Link) -> Training:
        """Return both factors of every layer."""
        return Training(self.adapter.everywhere("ab"), self.adapter.dense)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return the link as it was, and the product of the mean factors less that of the first ones to be merged."""
        mean = mean_update(updates)
        merged = [part for term in start.low_rank_terms().values() for part in _change(term, mean)]
        kept = [term for term in start.terms if isinstance(term, LowRank)]
        return Step([*kept, *dense_terms(self.adapter.dense, updates)], merged)

    def closes(self, updates_in_link: int) -> bool:
        """Return False: every round starts from the same factors."""
        return False


def _change(start: LowRank, mean: Mapping[str, Tensor]) -> tuple[LowRank, LowRank]:
    """Return the terms that add the product of the mean factors and take away that of the start's very tensors."""
    return start.with_factors({name: mean[name] for name in start.factors}), replace(start, scale=-start.scale)


def build(config: Config, adapter: Adapter) -> FrLora:
    """Return FRLoRA for an adapted model. Raises ValueError for a rank that a layer cannot have."""
    for layer in adapter.shapes:
        adapter.check_rank(layer)
    return FrLora(config, adapter)
