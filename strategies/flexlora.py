"""FlexLoRA: the mean of the clients' products is cut to the adapter's rank by a singular value decomposition.

J. Bai, D. Chen, B. Qian, L. Yao, Y. Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and
Client Resources", 2024, arXiv 2402.11505. Clients train both factors; the server forms D = sum p_k s_k B_k A_k with
s_k = alpha / rank_k, decomposes it, and the best approximation of the adapter's rank is the next pair. A client of a
smaller rank gets the first, that is the largest, components.

Differs from the paper: the two factors share the singular values equally, so that their gradients have the same size;
the start of A follows the run's sketch law. A round whose D has a smaller rank than the adapter leaves components that
are zero in both factors, and these can never train again.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedraclora.chain import Weights
from fedraclora.link import Link
from fedraclora.plan import Training
from strategies._factors import client_products, dense_terms, truncated, weighted_sum
from strategies.method import Adapter, Step, Traits, Updates, shares


@dataclass
class Config:
    """Settings of FlexLoRA; `lr` is the clients' learning rate where the run names none."""

    lr: float = 0.1


@dataclass(frozen=True)
class FlexLora:
    """The method for one adapted model."""

    config: Config
    adapter: Adapter
    traits: ClassVar[Traits] = Traits(is_mean=False, merges=False, has_ranks=True)

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return the one pair: a drawn start for A, zero for B."""
        return self.adapter.open_link(index, self.adapter.everywhere("ab"))

    def trains(self, round: int, start: Link) -> Training:
        """Return both factors of every layer."""
        return Training(self.adapter.everywhere("ab"), self.adapter.dense)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return the pair whose product is nearest to the mean of the clients' products."""
        p = shares(updates)
        # The padded factors carry s_k already, relative to the scale of the link, which drops out.
        pairs = {
            layer: truncated(weighted_sum(products, p), self.adapter.ranks[layer]).balanced()
            for layer, products in client_products(updates).items()
        }
        terms = [
            pair.low_rank(layer, self.adapter.scales[layer], weights[f"{layer}.weight"])
            for layer, pair in pairs.items()
        ]
        return Step([*terms, *dense_terms(self.adapter.dense, updates)])

    def closes(self, updates_in_link: int) -> bool:
        """Return False: the pair goes on."""
        return False


def build(config: Config, adapter: Adapter) -> FlexLora:
    """Return FlexLoRA for an adapted model."""
    return FlexLora(config, adapter)
