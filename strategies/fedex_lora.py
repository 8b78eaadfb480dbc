"""FedEx-LoRA: the two factors are averaged separately, and what that misses is merged into the frozen weights.

R. Singhal, K. Ponkshe, P. Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Foundation Models", 2024, arXiv 2410.09432. Clients train both factors from (Abar, Bbar), the means of the last round;
the residual (alpha / rank) * (sum p_k B_k A_k - Bbar Abar) is merged for good, so that the round is the exact mean of
the products.

The residual has rank at most (K - 1) * rank for K clients: it is the sum over all clients but the last of p_k (B_k -
Bbar)(A_k - A_last). Differs from the paper: these factors are sent where they are fewer numbers than the residual
multiplied out; clients are weighted by their examples unless the run has `weighting=uniform`, as the paper; the start
of A follows the run's sketch law.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedraclora.chain import Weights
from fedraclora.link import Link, Term
from fedraclora.plan import Training
from fedraclora.plugins import nearest
from strategies._factors import Product, client_products, product_of_means, side_by_side, truncated
from strategies.method import Adapter, Step, Traits, Updates, mean_update, replace_trained, shares

RESIDUALS = ("auto", "factors", "dense", "truncated")


@dataclass
class Config:
    """Settings of FedEx-LoRA.

    residual: how the residual is sent: as `factors`, multiplied out (`dense`), as whichever is fewer numbers (`auto`),
    or `truncated` to its best approximation of rank `residual_rank`, which is no longer exact.
    residual_rank: the rank of the truncated residual, at least 1; it means nothing to the others.
    lr: the clients' learning rate where the run names none.
    """

    residual: str = "auto"
    residual_rank: int = 8
    lr: float = 0.1


@dataclass(frozen=True)
class FedExLora:
    """The method for one adapted model."""

    config: Config
    adapter: Adapter
    traits: ClassVar[Traits] = Traits(is_mean=False, merges=False)

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return the one pair: a drawn start for A, zero for B."""
        return self.adapter.open_link(index, self.adapter.everywhere("ab"))

    def trains(self, round: int, start: Link) -> Training:
        """Return both factors of every layer."""
        return Training(self.adapter.everywhere("ab"), self.adapter.dense)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return the pair of the means of the factors, and the residual to be merged beside it."""
        opened = replace_trained(start, mean_update(updates))
        if len(updates) == 1:
            return Step(opened)
        p = shares(updates)
        residuals = {layer: residual(products, p) for layer, products in client_products(updates).items()}
        merged = [self._term(layer, total, weights[f"{layer}.weight"]) for layer, total in residuals.items()]
        return Step(opened, merged)

    def _term(self, layer: str, total: Product, weight: Tensor) -> Term:
        scale = self.adapter.scales[layer]
        if self.config.residual == "truncated":
            return truncated(total, self.config.residual_rank).balanced().low_rank(layer, scale, weight)
        if self.config.residual == "auto":
            return total.cheapest(layer, scale, weight)
        return (total.low_rank if self.config.residual == "factors" else total.dense)(layer, scale, weight)

    def closes(self, updates_in_link: int) -> bool:
        """Return False: the pair goes on."""
        return False


def residual(products: dict[int, Product], p: dict[int, float]) -> Product:
    """Return `sum p_k B_k A_k - Bbar Abar` of at least two clients as one product, of one client's rank less."""
    mean_b = product_of_means(products, p).lora_b
    *others, last = products
    return side_by_side(
        Product(p[k] * (products[k].lora_b - mean_b), products[k].lora_a - products[last].lora_a) for k in others
    )


def build(config: Config, adapter: Adapter) -> FedExLora:
    """Return FedEx-LoRA for an adapted model. Raises ValueError for settings that make no sense."""
    if config.residual not in RESIDUALS:
        raise ValueError(f"method.residual={config.residual!r} is unknown; {nearest(config.residual, RESIDUALS)}")
    if config.residual_rank < 1:
        raise ValueError(f"method.residual_rank={config.residual_rank} must be at least 1")
    return FedExLora(config, adapter)
