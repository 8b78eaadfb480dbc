"""Links: what one entry of the model's log holds, and how it is written down.

A link is a list of terms. `LowRank` adds `scale * lora_b @ lora_a` to a layer's weight, `Dense` adds a full
difference and `Set` replaces a tensor. A factor is drawn from seeds (`SketchKey`, `Stack`), zero, or explicit numbers;
only explicit numbers are sent or stored, but to a machine that draws other bits (`Given`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedraclora import sketch
from fedraclora.payload import Packed, Shape
from fedraclora.seeding import derive_seed
from fedraclora.server_rule import ServerRule
from fedraclora.sketch import SketchKey

Json = list[Any]
FACTORS = ("lora_a", "lora_b", "core")


@dataclass(frozen=True)
class Zero:
    """A factor of zeros, which costs nothing to send."""

    shape: Shape


@dataclass(frozen=True)
class Stack:
    """Several draws of one layer and side side by side along the rank: one factor of the sum of their ranks."""

    keys: tuple[SketchKey, ...]

    @property
    def shape(self) -> Shape:
        """Return the shape of the whole factor."""
        ranks = sum(key.rows or key.rank for key in self.keys)
        return (self.keys[0].dim, ranks) if self.keys[0].side == "a" else (ranks, self.keys[0].dim)


@dataclass(frozen=True)
class Private:
    """A factor that each client draws for itself, from a seed of its own under the key's."""

    key: SketchKey

    @property
    def shape(self) -> Shape:
        """Return the shape of each client's factor."""
        return self.key.shape

    def of(self, client: int) -> SketchKey:
        """Return the key of one client's draw."""
        return replace(self.key, seed=derive_seed(self.key.seed, "client", client))


Drawn = SketchKey | Stack


@dataclass(frozen=True)
class Given:
    """A drawn factor whose numbers were sent, for a machine that draws other bits than its server."""

    key: Drawn
    value: Tensor

    @property
    def shape(self) -> Shape:
        """Return the factor's shape."""
        return self.key.shape


Factor = Drawn | Private | Given | Zero | Tensor


@dataclass(frozen=True)
class LowRank:
    """Adds `scale * lora_b @ lora_a` to the weight of `layer`; `lora_a` is `[rank, in]`, `lora_b` `[out, rank]`.

    With a `core` `[rank, rank]` it adds `scale * lora_b @ core @ lora_a`.
    """

    layer: str
    scale: float
    lora_a: Factor
    lora_b: Factor
    core: Factor | None = None

    @property
    def target(self) -> str:
        """Return the name of the weight that the term changes."""
        return f"{self.layer}.weight"

    @property
    def factors(self) -> dict[str, Factor]:
        """Return the factors by name (`fc1.lora_a`), in the order in which they are written down."""
        named = zip(FACTORS, (self.lora_a, self.lora_b, self.core), strict=True)
        return {f"{self.layer}.{name}": factor for name, factor in named if factor is not None}

    def with_factors(self, factors: Mapping[str, Factor]) -> "LowRank":
        """Return the term with some of its factors, named as in `factors`, replaced."""
        known = self.factors
        chosen = [factors.get(f"{self.layer}.{name}", known.get(f"{self.layer}.{name}")) for name in FACTORS]
        lora_a, lora_b, core = chosen
        assert lora_a is not None
        assert lora_b is not None
        return replace(self, lora_a=lora_a, lora_b=lora_b, core=core)


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
    """One entry of the log: its position in the chain and its terms.

    `rule` is what a server's optimiser makes of the whole update when the link is merged; replicas replay it. `packed`
    is how explicit tensors travel that a compressor encoded, by their names in `named_tensors`.
    """

    index: int
    terms: tuple[Term, ...]
    rule: ServerRule | None = None
    packed: Mapping[str, Packed] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Return the explicit numbers of the link, in the order of its terms."""
        return list(self.named_tensors.values())

    @cached_property
    def named_tensors(self) -> dict[str, Tensor]:
        """Return the explicit numbers by name: `fc1.lora_b` of a factor, `set fc1.bias` or `add fc1.bias`.

        Of several terms of one kind and target the last has the plain name, the others are counted: `fc1.lora_b #2`.
        """
        return {
            name + suffix: tensor
            for term, suffix in zip(self.terms, self._suffixes, strict=True)
            for name, tensor in _explicit(term)
        }

    @cached_property
    def _suffixes(self) -> list[str]:
        return _suffixes([(type(term).__name__, term.target) for term in self.terms])

    @cached_property
    def explicit_factors(self) -> dict[str, Tensor]:
        """Return the factors that are explicit numbers, by name."""
        return {name: tensor for name, tensor in self.named_tensors.items() if not name.startswith(("set ", "add "))}

    @cached_property
    def slots(self) -> "list[Slot]":
        """Return what each of `tensors` is."""
        return slots(describe(self))

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 of everything the link says: terms, seeds and the bits of its explicit numbers."""
        hasher = hashlib.sha256(json.dumps(describe(self)).encode())
        for tensor in self.tensors:
            hasher.update(sketch.digest(tensor).encode())
        return hasher.hexdigest()

    @property
    def drawn_names(self) -> list[str]:
        """Return the names of the factors that are drawn, by everyone or by each client."""
        return [name for name, factor in self.factors.items() if isinstance(factor, Drawn | Given | Private)]

    @property
    def drawn(self) -> list[Drawn]:
        """Return the keys of the drawn factors, in the order of the terms; private ones are left out."""
        return [key for _, key, _ in self._drawn()]

    @cached_property
    def drawn_factors(self) -> dict[str, Tensor]:
        """Return the drawn factors by name (`fc1.lora_a`), float32 on the CPU: as given, else as drawn here."""
        return {name: draw(key) if value is None else value for name, key, value in self._drawn()}

    @property
    def has_given(self) -> bool:
        """Return whether a drawn factor came as numbers."""
        return any(value is not None for _, _, value in self._drawn())

    @property
    def has_private(self) -> bool:
        """Return whether clients draw factors of their own."""
        return any(isinstance(factor, Private) for factor in self.factors.values())

    @cached_property
    def drawn_digest(self) -> str:
        """Return one digest over all drawn factors."""
        return sketch.digest_all(self.drawn_factors)

    def _drawn(self) -> Iterator[tuple[str, Drawn, Tensor | None]]:
        for name, factor in self.factors.items():
            if isinstance(factor, Given):
                yield name, factor.key, factor.value
            elif isinstance(factor, SketchKey | Stack):
                yield name, factor, None

    @cached_property
    def factors(self) -> dict[str, Factor]:
        """Return all factors by name (`fc1.lora_a`), counted as in `named_tensors`; a layer's last term trains."""
        return {
            name + suffix: factor
            for term, suffix in zip(self.terms, self._suffixes, strict=True)
            if isinstance(term, LowRank)
            for name, factor in term.factors.items()
        }

    def with_factors(self, factors: Mapping[str, Factor]) -> "Link":
        """Return the link with some of its factors replaced, named as in `factors`."""
        terms = [
            _replace_factors(term, factors, suffix) if isinstance(term, LowRank) else term
            for term, suffix in zip(self.terms, self._suffixes, strict=True)
        ]
        return replace(self, terms=tuple(terms))

    def with_given(self, values: Sequence[Tensor]) -> "Link":
        """Return the link with `values` in place of what would be drawn, in the order of `drawn`."""
        named = zip(self._drawn(), values, strict=True)
        return self.with_factors({name: Given(key, value) for (name, key, _), value in named})

    def of_client(self, client: int) -> "Link":
        """Return the link as one client has it: with its own draws for those that are private."""
        private = {name: factor for name, factor in self.factors.items() if isinstance(factor, Private)}
        return self.with_factors({name: factor.of(client) for name, factor in private.items()}) if private else self

    def low_rank_terms(self) -> dict[str, LowRank]:
        """Return the low-rank term of each layer, the last where it has several: the one that trains."""
        return {term.layer: term for term in self.terms if isinstance(term, LowRank)}

    def skeleton(self) -> "Link":
        """Return the link's drawn factors alone: explicit numbers become zeros, other terms are left out."""
        zeros = {name: Zero(tuple(f.shape)) for name, f in self.factors.items() if isinstance(f, Tensor)}
        return Link(self.index, tuple(term for term in self.with_factors(zeros).terms if isinstance(term, LowRank)))


def _replace_factors(term: LowRank, factors: Mapping[str, Factor], suffix: str) -> LowRank:
    return term.with_factors({name: factors[name + suffix] for name in term.factors if name + suffix in factors})


def _suffixes(owners: Sequence[object]) -> list[str]:
    """Return what tells equal owners apart: nothing for the last, ` #2` for the one before it, and so on."""
    later = [list(owners[place + 1 :]).count(owner) for place, owner in enumerate(owners)]
    return [f" #{count + 1}" if count else "" for count in later]


def draw(key: Drawn) -> Tensor:
    """Return the factor that a key names, float32 on the CPU."""
    if isinstance(key, SketchKey):
        return sketch.draw(key)
    return torch.cat([sketch.draw(part) for part in key.keys], dim=1 if key.keys[0].side == "a" else 0)


def shape_of(factor: Factor) -> Shape:
    """Return a factor's shape without drawing it."""
    return tuple(factor.shape)


def materialize(factor: Factor, like: Tensor) -> Tensor:
    """Return the factor as a tensor with the dtype and device of `like`. Raises ValueError for a private one."""
    if isinstance(factor, SketchKey | Stack):
        return draw(factor).to(like)
    if isinstance(factor, Private):
        raise ValueError(f"the factor of layer {factor.key.layer!r} is each client's own; name the client")
    if isinstance(factor, Given):
        return factor.value.to(like)
    if isinstance(factor, Zero):
        return torch.zeros(factor.shape, dtype=like.dtype, device=like.device)
    return factor.to(like)


def product(term: LowRank, like: Tensor) -> Tensor:
    """Return `scale * lora_b @ core @ lora_a` `[out, in]` with the dtype and device of `like`; zeros where one is."""
    lora_a, lora_b = materialize(term.lora_a, like), materialize(term.lora_b, like)
    return term.scale * (lora_b if term.core is None else lora_b @ materialize(term.core, like)) @ lora_a


def is_zero(term: Term) -> bool:
    """Return whether a term is known to change nothing."""
    return isinstance(term, LowRank) and any(isinstance(factor, Zero) for factor in term.factors.values())


def _explicit(term: Term) -> list[tuple[str, Tensor]]:
    if isinstance(term, LowRank):
        return [(name, factor) for name, factor in term.factors.items() if isinstance(factor, Tensor)]
    if isinstance(term, Dense):
        return [(_whole("dense", term.target), term.delta)]
    return [(_whole("set", term.target), term.value)]


def replace_tensors(link: Link, tensors: Mapping[str, Tensor], packed: Mapping[str, Packed]) -> Link:
    """Return the link with some explicit tensors, by the names of `named_tensors`, replaced, and how they travel."""
    numbers = [tensors.get(name, tensor) for name, tensor in link.named_tensors.items()]
    return replace(restore(describe(link), numbers), packed={**link.packed, **packed})


def describe(link: Link) -> Json:
    """Return a link without its explicit numbers, as plain values that JSON can carry."""
    rule = [] if link.rule is None else list(asdict(link.rule).values())
    return [link.index, [_describe_term(term) for term in link.terms], rule]


def _describe_term(term: Term) -> Json:
    if isinstance(term, LowRank):
        return ["low_rank", term.layer, term.scale, *map(_describe_factor, term.factors.values())]
    if isinstance(term, Dense):
        return ["dense", term.target, list(term.delta.shape)]
    return ["set", term.target, list(term.value.shape)]


def _describe_factor(factor: Factor) -> Json:
    drawn = factor.key if isinstance(factor, Given) else factor
    if isinstance(drawn, SketchKey):
        return ["seed", *_key_values(drawn)]
    if isinstance(drawn, Stack):
        return ["stack", *map(_key_values, drawn.keys)]
    if isinstance(drawn, Private):
        return ["private", *_key_values(drawn.key)]
    return ["zero", list(drawn.shape)] if isinstance(drawn, Zero) else ["sent", list(drawn.shape)]


def _key_values(key: SketchKey) -> Json:
    # asdict would copy each value deeply, which is most of the time that a link of many layers takes.
    return [getattr(key, name) for name in _KEY_FIELDS]


_KEY_FIELDS = tuple(SketchKey.__dataclass_fields__)


class Slot(NamedTuple):
    """One explicit tensor of a described link: its term's kind (`low_rank`, `dense`, `set`), name and shape."""

    term: str
    name: str
    shape: Shape


def slots(description: Json) -> list[Slot]:
    """Return the explicit tensors of a description, in the order and by the names of `named_tensors`."""
    found: list[Slot] = []
    suffixes = _suffixes([(kind, target) for kind, target, *_ in description[1]])
    for (kind, target, *fields), suffix in zip(description[1], suffixes, strict=True):
        if kind == "low_rank":
            entries = [(f"{target}.{name}", factor) for name, factor in zip(FACTORS, fields[1:], strict=False)]
        else:
            entries = [(_whole(kind, target), ["sent", fields[0]])]
        found += [Slot(kind, name + suffix, tuple(rest[0])) for name, (source, *rest) in entries if source == "sent"]
    return found


def _whole(kind: str, target: str) -> str:
    return f"{'add' if kind == 'dense' else 'set'} {target}"


def drawn_shapes(description: Json) -> list[Shape]:
    """Return the shapes of the drawn factors of a description, in their order; private ones are left out."""
    factors = [factor for kind, *fields in description[1] if kind == "low_rank" for factor in fields[2:]]
    keys = [_restore_factor(factor, []) for factor in factors if factor[0] in ("seed", "stack")]
    return [shape_of(key) for key in keys]


def restore(description: Json, tensors: Sequence[Tensor]) -> Link:
    """Return the link that `describe` described, with its explicit numbers put back."""
    index, terms, rule = description
    waiting = list(tensors)
    restored = tuple(_restore_term(term, waiting) for term in terms)
    return Link(index, restored, ServerRule(*rule) if rule else None)


def _restore_term(description: Json, waiting: list[Tensor]) -> Term:
    kind, target, *fields = description
    if kind == "low_rank":
        scale, *factors = fields
        return LowRank(target, scale, *(_restore_factor(factor, waiting) for factor in factors))
    if kind not in ("dense", "set"):
        raise ValueError(f"unknown term {kind!r} in a link; known are low_rank, dense and set")
    return Dense(target, waiting.pop(0)) if kind == "dense" else Set(target, waiting.pop(0))


def _restore_factor(description: Json, waiting: list[Tensor]) -> Factor:
    source, *fields = description
    if source == "seed":
        return SketchKey(*fields)
    if source == "stack":
        return Stack(tuple(SketchKey(*key) for key in fields))
    if source == "private":
        return Private(SketchKey(*fields))
    return Zero(tuple(fields[0])) if source == "zero" else waiting.pop(0)
