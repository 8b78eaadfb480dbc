"""Links: what one entry of the model's log holds, and how it is written down.

A link is a list of terms. `LowRank` adds `scale * lora_b @ lora_a` to a layer's weight, `Dense` adds a full
difference and `Set` replaces a tensor. A factor is drawn from a seed (`SketchKey`), zero, or explicit numbers; only
explicit numbers are ever sent or stored.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fedraclora import sketch
from fedraclora.payload import Shape
from fedraclora.sketch import SketchKey

Json = list[Any]


@dataclass(frozen=True)
class Zero:
    """A factor of zeros, which costs nothing to send."""

    shape: Shape


Factor = SketchKey | Zero | Tensor


@dataclass(frozen=True)
class LowRank:
    """Adds `scale * lora_b @ lora_a` to the weight of `layer`; `lora_a` is `[rank, in]`, `lora_b` `[out, rank]`."""

    layer: str
    scale: float
    lora_a: Factor
    lora_b: Factor

    @property
    def target(self) -> str:
        """Return the name of the weight that the term changes."""
        return f"{self.layer}.weight"


@dataclass(frozen=True)
class Dense:
    """Adds `delta`, of the tensor's own shape, to the tensor `target`."""

    target: str
    delta: Tensor


@dataclass(frozen=True)
class Set:
    """Replaces the tensor `target` by `value`; of several such terms only the latest counts."""

    target: str
    value: Tensor


Term = LowRank | Dense | Set


@dataclass(frozen=True)
class Link:
    """One entry of the log: its position in the chain and its terms."""

    index: int
    terms: tuple[Term, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """Return the explicit numbers of the link, in the order of its terms."""
        return [tensor for term in self.terms for tensor in _explicit(term)]

    @property
    def digest(self) -> str:
        """Return the SHA-256 of everything the link says: terms, seeds and the bits of its explicit numbers."""
        hasher = hashlib.sha256(json.dumps(describe(self)).encode())
        for tensor in self.tensors:
            hasher.update(sketch.digest(tensor).encode())
        return hasher.hexdigest()

    def low_rank_terms(self) -> dict[str, LowRank]:
        """Return the low-rank term of each layer (one a layer)."""
        return {term.layer: term for term in self.terms if isinstance(term, LowRank)}

    def skeleton(self) -> "Link":
        """Return the link's drawn factors alone: explicit numbers become zeros, other terms are left out."""
        return Link(self.index, tuple(_drawn_only(term) for term in self.terms if isinstance(term, LowRank)))


def _drawn_only(term: LowRank) -> LowRank:
    lora_a, lora_b = (
        Zero(tuple(factor.shape)) if isinstance(factor, Tensor) else factor for factor in (term.lora_a, term.lora_b)
    )
    return LowRank(term.layer, term.scale, lora_a, lora_b)


def shape_of(factor: Factor) -> Shape:
    """Return a factor's shape without drawing it."""
    if isinstance(factor, SketchKey):
        return (factor.dim, factor.rank) if factor.side == "a" else (factor.rank, factor.dim)
    return tuple(factor.shape)


def materialize(factor: Factor, like: Tensor) -> Tensor:
    """Return the factor as a tensor with the dtype and device of `like`."""
    if isinstance(factor, SketchKey):
        return sketch.draw(factor).to(like)
    if isinstance(factor, Zero):
        return torch.zeros(factor.shape, dtype=like.dtype, device=like.device)
    return factor.to(like)


def _explicit(term: Term) -> list[Tensor]:
    if isinstance(term, LowRank):
        return [factor for factor in (term.lora_a, term.lora_b) if isinstance(factor, Tensor)]
    return [term.delta if isinstance(term, Dense) else term.value]


def describe(link: Link) -> Json:
    """Return a link without its explicit numbers, as plain values that JSON can carry."""
    return [link.index, [_describe_term(term) for term in link.terms]]


def _describe_term(term: Term) -> Json:
    if isinstance(term, LowRank):
        return ["low_rank", term.layer, term.scale, _describe_factor(term.lora_a), _describe_factor(term.lora_b)]
    if isinstance(term, Dense):
        return ["dense", term.target, list(term.delta.shape)]
    return ["set", term.target, list(term.value.shape)]


def _describe_factor(factor: Factor) -> Json:
    if isinstance(factor, SketchKey):
        return ["seed", *asdict(factor).values()]
    return ["zero", list(factor.shape)] if isinstance(factor, Zero) else ["sent", list(factor.shape)]


def shapes(description: Json) -> list[Shape]:
    """Return the shapes of the explicit numbers that belong to a description, in their order."""
    found: list[Shape] = []
    for kind, *fields in description[1]:
        entries = fields[2:] if kind == "low_rank" else [["sent", fields[1]]]
        found += [tuple(shape) for source, *rest in entries if source == "sent" for shape in rest]
    return found


def restore(description: Json, tensors: Sequence[Tensor]) -> Link:
    """Return the link that `describe` described, with its explicit numbers put back."""
    index, terms = description
    waiting = list(tensors)
    return Link(index, tuple(_restore_term(term, waiting) for term in terms))


def _restore_term(description: Json, waiting: list[Tensor]) -> Term:
    kind, target, *fields = description
    if kind == "low_rank":
        scale, lora_a, lora_b = fields
        return LowRank(target, scale, _restore_factor(lora_a, waiting), _restore_factor(lora_b, waiting))
    if kind not in ("dense", "set"):
        raise ValueError(f"unknown term {kind!r} in a link; known are low_rank, dense and set")
    return Dense(target, waiting.pop(0)) if kind == "dense" else Set(target, waiting.pop(0))


def _restore_factor(description: Json, waiting: list[Tensor]) -> Factor:
    source, *fields = description
    if source == "seed":
        return SketchKey(*fields)
    return Zero(tuple(fields[0])) if source == "zero" else waiting.pop(0)
