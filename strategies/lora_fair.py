"""LoRA-FAIR: the two factors are averaged separately, and B is corrected so that the product comes near the true mean.

J. Bian, L. Wang, L. Zhang, J. Xu, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
Refinement", 2024, arXiv 2411.14961. With D = sum p_k B_k A_k and the means Abar, Bbar, the server looks for the dB that
brings (Bbar + dB) Abar near to D without being large; the next round starts from (Abar, Bbar + dB).

Differs from the paper: nearness is the squared Frobenius norm of the difference, not the cosine similarity, and the
penalty is `ridge` times the squared norm of dB (the paper's norm is not squared), so that the minimum has a closed
form, where the paper takes SGD steps; the start of A follows the run's sketch law.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedraclora.chain import Weights
from fedraclora.link import Link
from fedraclora.plan import Training
from strategies._factors import Product, client_products, dense_terms, product_of_means
from strategies.method import Adapter, Step, Traits, Updates, shares


@dataclass
class Config:
    """Settings of LoRA-FAIR.

    ridge: the weight of the squared norm of the correction; positive. A large one gives FedIT.
    lr: the clients' learning rate where the run names none.
    """

    ridge: float = 0.01
    lr: float = 0.1


@dataclass(frozen=True)
class LoraFair:
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
        """Return the pair of the means of the factors, with B corrected."""
        p = shares(updates)
        pairs = {layer: self._corrected(products, p) for layer, products in client_products(updates).items()}
        terms = [
            pair.low_rank(layer, self.adapter.scales[layer], weights[f"{layer}.weight"])
            for layer, pair in pairs.items()
        ]
        return Step([*terms, *dense_terms(self.adapter.dense, updates)])

    def _corrected(self, products: dict[int, Product], p: dict[int, float]) -> Product:
        mean = product_of_means(products, p)
        return Product(mean.lora_b + correction(products, p, mean, self.config.ridge), mean.lora_a)

    def closes(self, updates_in_link: int) -> bool:
        """Return False: the pair goes on."""
        return False


def correction(products: dict[int, Product], p: dict[int, float], mean: Product, ridge: float) -> Tensor:
    """Return the dB that minimises `||D - (Bbar + dB) Abar||^2 + ridge ||dB||^2`, Frobenius norms.

    It is `(D - Bbar Abar) Abar^T (Abar Abar^T + ridge I)^-1`, where D - Bbar Abar is the covariance of the factors.
    """
    a = mean.lora_a
    error = torch.zeros_like(mean.lora_b)
    for client, product in products.items():
        error += p[client] * (product.lora_b - mean.lora_b) @ ((product.lora_a - a) @ a.T)
    gram = a @ a.T + ridge * torch.eye(len(a), dtype=a.dtype)
    solved: Tensor = torch.linalg.solve(gram, error.T)
    return solved.T


def build(config: Config, adapter: Adapter) -> LoraFair:
    """Return LoRA-FAIR for an adapted model. Raises ValueError for a ridge that is not positive."""
    if not config.ridge > 0:
        raise ValueError(f"method.ridge={config.ridge} must be positive; the smaller it is, the larger the correction")
    return LoraFair(config, adapter)
