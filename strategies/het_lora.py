"""HetLoRA: clients of different ranks, whose factors are padded with zeros and weighted by the size of their product.

Y. J. Cho, L. Liu, Z. Xu, A. Fahrezi, G. Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
Models", 2024, arXiv 2401.06432. A client of rank r_k gets the first r_k components of the pair and trains both factors;
the server averages the padded factors separately, in each layer with weights that are in proportion to ||s_k B_k A_k||
in the Frobenius norm, s_k = alpha / r_k ("sparsity-weighted aggregation").

Left out: the clients' pruning of their own ranks. Differs from the paper: weights and norms are those of one layer,
with the weights of the run where no product of a layer has changed from zero; other tensors keep the run's weights; the
start of A follows the run's sketch law.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedraclora.aggregate import normalized
from fedraclora.chain import Weights
from fedraclora.link import Link
from fedraclora.plan import Training
from strategies._factors import Product, client_products, dense_terms, product_of_means
from strategies.method import Adapter, Step, Traits, Updates, shares


@dataclass
class Config:
    """Settings of HetLoRA; `lr` is the clients' learning rate where the run names none."""

    lr: float = 0.1


@dataclass(frozen=True)
class HetLora:
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
        """Return the pair of the means of the padded factors, weighted by the norms of their products."""
        p = shares(updates)
        means = {
            layer: product_of_means(products, norm_shares(products, p))
            for layer, products in client_products(updates).items()
        }
        terms = [
            mean.low_rank(layer, self.adapter.scales[layer], weights[f"{layer}.weight"])
            for layer, mean in means.items()
        ]
        return Step([*terms, *dense_terms(self.adapter.dense, updates)])

    def closes(self, updates_in_link: int) -> bool:
        """Return False: the pair goes on."""
        return False


def norm_shares(products: dict[int, Product], p: dict[int, float]) -> dict[int, float]:
    """Return the norms of the clients' products divided by their sum, or `p` where all are zero."""
    # The padded factors carry s_k relative to the one scale of the link, which drops out.
    norms = {client: product.norm() for client, product in products.items()}
    return normalized(norms) if any(norms.values()) else p


def build(config: Config, adapter: Adapter) -> HetLora:
    """Return HetLoRA for an adapted model."""
    return HetLora(config, adapter)
