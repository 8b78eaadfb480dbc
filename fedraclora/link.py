"""Links: what one entry of the model's log holds, and how it is written down.

A link is a list of terms. `LowRank` adds `scale * lora_b @ lora_a` to a layer's weight, `Dense` adds a full
difference and `Set` replaces a tensor. A factor is drawn from a seed (`SketchKey`), zero, or explicit numbers; only
explicit numbers are sent or stored, but to a machine that draws other bits (`Given`).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
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


@dataclass(frozen=True)
class Given:
    """A drawn factor whose numbers were sent, for a machine that draws other bits than its server."""

    key: SketchKey
    value: Tensor


Factor = SketchKey | Given | Zero | Tensor


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

    @property
    def drawn(self) -> list[SketchKey]:
        """Return the keys of the drawn factors, in the order of the terms."""
        return [key for _, key, _ in self._drawn()]

    @property
    def drawn_factors(self) -> dict[str, Tensor]:
        """Return the drawn factors by name (`fc1.lora_a`), float32 on the CPU: as given, else as drawn here."""
        return {name: sketch.draw(key) if value is None else value for name, key, value in self._drawn()}

    @property
    def has_given(self) -> bool:
        """Return whether a drawn factor came as numbers."""
        return any(value is not None for _, _, value in self._drawn())

    @cached_property
    def drawn_digest(self) -> str:
        """Return one digest over all drawn factors."""
        return sketch.digest_all(self.drawn_factors)

    def _drawn(self) -> Iterator[tuple[str, SketchKey, Tensor | None]]:
        for term in self.terms:
            if isinstance(term, LowRank):
                for side, factor in (("a", term.lora_a), ("b", term.lora_b)):
                    if isinstance(factor, Given):
                        yield f"{term.layer}.lora_{side}", factor.key, factor.value
                    elif isinstance(factor, SketchKey):
                        yield f"{term.layer}.lora_{side}", factor, None

    def with_given(self, values: Sequence[Tensor]) -> "Link":
        """Return the link with `values` in place of what would be drawn, in the order of `drawn`."""
        waiting = list(values)

        def given(factor: Factor) -> Factor:
            return Given(factor, waiting.pop(0)) if isinstance(factor, SketchKey) else factor

        terms = [
            LowRank(term.layer, term.scale, given(term.lora_a), given(term.lora_b))
            if isinstance(term, LowRank)
            else term
            for term in self.terms
        ]
        return Link(self.index, tuple(terms))

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
    key = factor.key if isinstance(factor, Given) else factor
    if isinstance(key, SketchKey):
        return (key.dim, key.rank) if key.side == "a" else (key.rank, key.dim)
    return tuple(key.shape)


def materialize(factor: Factor, like: Tensor) -> Tensor:
    """Return the factor as a tensor with the dtype and device of `like`."""
    if isinstance(factor, SketchKey):
        return sketch.draw(factor).to(like)
    if isinstance(factor, Given):
        return factor.value.to(like)
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
    key = factor.key if isinstance(factor, Given) else factor
    if isinstance(key, SketchKey):
        return ["seed", *asdict(key).values()]
    return ["zero", list(key.shape)] if isinstance(key, Zero) else ["sent", list(key.shape)]


def shapes(description: Json) -> list[Shape]:
    """Return the shapes of the explicit numbers that belong to a description, in their order."""
    found: list[Shape] = []
    for kind, *fields in description[1]:
        entries = fields[2:] if kind == "low_rank" else [["sent", fields[1]]]
        found += [tuple(shape) for source, *rest in entries if source == "sent" for shape in rest]
    return found


def drawn_keys(description: Json) -> list[SketchKey]:
    """Return the keys of the drawn factors of a description, in their order."""
    factors = [factor for kind, *fields in description[1] if kind == "low_rank" for factor in fields[2:]]
    return [SketchKey(*fields) for source, *fields in factors if source == "seed"]


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
