"""Sums of the clients' products of factors: stacked, truncated, or added up, whichever a method sends.

A sum of products `p_k B_k A_k` is itself one product of the factors side by side, of the sum of their ranks, so that it
need not be multiplied out to be sent, averaged or decomposed. Everything here is computed in float64 on the CPU, client
by client in their order, and given back in the number type of the weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import fsum

import torch
from torch import Tensor

from fedraclora.link import Dense, Factor, Link, LowRank, Set, Stack, Term, materialize, shape_of
from fedraclora.sketch import SketchKey
from strategies.method import ClientUpdate, Updates, client_terms, mean_update, shares

_LIKE = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Product:
    """The matrix `lora_b @ lora_a`, not multiplied out: `lora_b` is `[out, rank]`, `lora_a` `[rank, in]`, float64."""

    lora_b: Tensor
    lora_a: Tensor

    def first(self, rank: int) -> "Product":
        """Return the product of the first `rank` components."""
        return Product(self.lora_b[:, :rank], self.lora_a[:rank])

    def norm(self) -> float:
        """Return the Frobenius norm of the product."""
        # The orthonormal part of lora_b changes no norm, and what is left is small.
        return float(torch.linalg.matrix_norm(torch.linalg.qr(self.lora_b).R @ self.lora_a))

    def low_rank(self, layer: str, scale: float, weight: Tensor) -> LowRank:
        """Return the term that adds `scale` times the product, as its two factors in the number type of `weight`."""
        lora_a, lora_b = (factor.to(weight.dtype).contiguous() for factor in (self.lora_a, self.lora_b))
        return LowRank(layer, scale, lora_a=lora_a, lora_b=lora_b)

    def dense(self, layer: str, scale: float, weight: Tensor) -> Dense:
        """Return the term that adds `scale` times the product, multiplied out to the shape of `weight`."""
        delta = (scale * self.lora_b @ self.lora_a).to(weight.dtype)
        return Dense(f"{layer}.weight", delta.reshape(weight.shape))

    def cheapest(self, layer: str, scale: float, weight: Tensor) -> Term:
        """Return the two factors, or the product multiplied out where that is fewer numbers."""
        is_fewer = self.lora_a.numel() + self.lora_b.numel() <= weight.numel()
        return self.low_rank(layer, scale, weight) if is_fewer else self.dense(layer, scale, weight)


@dataclass(frozen=True)
class Svd:
    """The leading part of a singular value decomposition: columns `u`, values `s` (largest first), rows `vh`."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def balanced(self) -> Product:
        """Return the product of two factors that share the singular values equally: `u sqrt(s)` and `sqrt(s) vh`."""
        root = self.s.sqrt()
        return Product(self.u * root, root.unsqueeze(1) * self.vh)


def truncated(product: Product, rank: int) -> Svd:
    """Return the first `rank` singular triplets (fewer where the product has fewer): by Eckart-Young its best part.

    Only the small matrix between the orthonormal parts of the two factors is decomposed.
    """
    left, right = torch.linalg.qr(product.lora_b), torch.linalg.qr(product.lora_a.T)
    inner = truncated_matrix(left.R @ right.R.T, rank)
    return Svd(left.Q @ inner.u, inner.s, inner.vh @ right.Q.T)


def truncated_matrix(matrix: Tensor, rank: int) -> Svd:
    """Return the first `rank` singular triplets of a matrix (fewer where it is smaller)."""
    u, s, vh = torch.linalg.svd(matrix.to(_LIKE), full_matrices=False)
    return Svd(u[:, :rank], s[:rank], vh[:rank])


def client_products(updates: Updates) -> dict[str, dict[int, Product]]:
    """Return the factors with which each client ended its round, by layer and client, without the link's scale."""
    found: dict[str, dict[int, Product]] = {}
    for client in sorted(updates):
        for layer, term in client_terms(updates[client]).items():
            product = Product(materialize(term.lora_b, _LIKE), materialize(term.lora_a, _LIKE))
            found.setdefault(layer, {})[client] = product
    return found


def weighted_sum(products: Mapping[int, Product], weights: Mapping[int, float]) -> Product:
    """Return the sum of the clients' products, each times its weight, as one product of the factors side by side."""
    return side_by_side(
        Product(weights[client] * product.lora_b, product.lora_a) for client, product in products.items()
    )


def side_by_side(products: Iterable[Product]) -> Product:
    """Return the sum of products as one product."""
    parts = list(products)
    return Product(torch.cat([part.lora_b for part in parts], 1), torch.cat([part.lora_a for part in parts], 0))


def product_of_means(products: Mapping[int, Product], weights: Mapping[int, float]) -> Product:
    """Return the product of the clients' mean factors."""
    lora_b = sum((weights[k] * product.lora_b for k, product in products.items()), start=_LIKE)
    lora_a = sum((weights[k] * product.lora_a for k, product in products.items()), start=_LIKE)
    return Product(lora_b, lora_a)


def dense_terms(names: Iterable[str], updates: Updates) -> list[Term]:
    """Return a term for each tensor that is trained in full beside the factors, which sets it to the clients' mean."""
    wanted = tuple(names)
    kept = {
        client: replace(update, tensors={name: update.tensors[name] for name in wanted})
        for client, update in updates.items()
    }
    return [Set(name, value) for name, value in mean_update(kept).items()]


# ---- one drawn factor, the other one trained


def relay(start: Link, updates: Updates, sides: Mapping[str, str]) -> list[Term]:
    """Return a term a layer that adds `scale * sum p_k B_k A_k` where each client drew its own A_k.

    The drawn factors are named by their seeds, the trained ones lie side by side with `p_k` in them; what is padding
    for a client of a smaller rank is left out. `sides` are the trained factors; for side a it is the mirror image.
    """
    p = shares(updates)
    terms: list[Term] = []
    for layer, term in start.low_rank_terms().items():
        drawn, trained, axis = ("lora_b", "lora_a", 0) if sides[layer] == "a" else ("lora_a", "lora_b", 1)
        keys: list[SketchKey] = []
        parts: list[Tensor] = []
        for client, share in p.items():
            update = updates[client]
            rank = _rank(update, term)
            keys.append(_first(update.link.factors[f"{layer}.{drawn}"], rank))
            parts.append(share * update.tensors[f"{layer}.{trained}"].to(_LIKE).narrow(axis, 0, rank))
        stacked = torch.cat(parts, axis).to(update.tensors[f"{layer}.{trained}"].dtype)
        terms.append(term.with_factors({f"{layer}.{drawn}": Stack(tuple(keys)), f"{layer}.{trained}": stacked}))
    return terms


def mean_of_contributors(start: Link, updates: Updates, sides: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the mean update with each rank component averaged over those clients only that train it.

    A component that no client of the round trains stays where it started.
    """
    mean = mean_update(updates)
    for layer, term in start.low_rank_terms().items():
        key, axis = f"{layer}.lora_{sides[layer]}", 0 if sides[layer] == "a" else 1
        # Who does not train a component is padded with zeros there, so that only the weights are left to divide by.
        share = _trained_shares(updates, term).to(mean[key]).unsqueeze(1 - axis)
        started = materialize(start.factors[key], mean[key])
        mean[key] = torch.where(share > 0, mean[key] / torch.where(share > 0, share, 1), started)
    return mean


def _trained_shares(updates: Updates, term: LowRank) -> Tensor:
    """Return, by rank component, the share of the weights that is with clients which train it."""
    weights = [(_rank(update, term), update.weight) for update in updates.values()]
    total = fsum(weight for _, weight in weights)
    rows = range(shape_of(term.lora_a)[0])
    shares_of_rows = [fsum(weight for rank, weight in weights if rank > row) / total for row in rows]
    return torch.tensor(shares_of_rows, dtype=torch.float64)


def _rank(update: ClientUpdate, term: LowRank) -> int:
    """Return the rank at which a client trained a layer of the open link."""
    return update.ranks.get(term.layer, shape_of(term.lora_a)[0])


def _first(key: Factor, rank: int) -> SketchKey:
    assert isinstance(key, SketchKey)
    return replace(key, rows=rank) if rank < key.rank else key
