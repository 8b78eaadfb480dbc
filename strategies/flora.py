"""FLoRA: both factors train from a fresh start each round, and the clients' products are merged side by side.

Z. Wang, Z. Shen, Y. He, G. Sun, H. Wang, L. Lyu, A. Li, "FLoRA: Federated Fine-Tuning Large Language Models with
Heterogeneous Low-Rank Adaptations", 2024, arXiv 2409.05976. Client k starts from an A_k drawn by itself and B = 0, and
W <- W + (alpha / rank) * sum p_k B_k A_k: the factors stacked, which is the mean of the products for any ranks. The
price is the downlink, which grows with the cohort.

Differs from the paper: p_k is folded into B_k, not into A_k; where the stacked factors are more numbers than the weight
the sum is sent multiplied out; the start of A follows the run's sketch law.
"""

from dataclasses import dataclass

from fedraclora.chain import Weights
from fedraclora.link import Link, Term
from fedraclora.plan import Training
from strategies._factors import client_products, dense_terms, weighted_sum
from strategies.method import Adapter, Step, Traits, Updates, shares


@dataclass
class Config:
    """Settings of FLoRA.

    private_start: whether each client draws its own start for A, as published; else all start from one.
    lr: the clients' learning rate where the run names none.
    """

    private_start: bool = True
    lr: float = 0.1


@dataclass(frozen=True)
class Flora:
    """The method for one adapted model."""

    config: Config
    adapter: Adapter

    @property
    def traits(self) -> Traits:
        """Return what the method can be combined with."""
        return Traits(is_mean=False, has_ranks=True, is_steady=not self.config.private_start)

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return link `index`: a drawn start for A, zero for B."""
        return self.adapter.open_link(index, self.adapter.everywhere("ab"), is_private=self.config.private_start)

    def trains(self, round: int, start: Link) -> Training:
        """Return both factors of every layer."""
        return Training(self.adapter.everywhere("ab"), self.adapter.dense)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return the sum of the clients' products, stacked or multiplied out."""
        p = shares(updates)
        terms: list[Term] = []
        for layer, products in client_products(updates).items():
            rank = self.adapter.ranks[layer]
            # A client's padding is left out, so that nobody pays for its zeros.
            own = {k: product.first(updates[k].ranks.get(layer, rank)) for k, product in products.items()}
            total = weighted_sum(own, p)
            terms.append(total.cheapest(layer, self.adapter.scales[layer], weights[f"{layer}.weight"]))
        return Step([*terms, *dense_terms(self.adapter.dense, updates)])

    def closes(self, updates_in_link: int) -> bool:
        """Return True: the factors start anew each round."""
        return True


def build(config: Config, adapter: Adapter) -> Flora:
    """Return FLoRA for an adapted model."""
    return Flora(config, adapter)
