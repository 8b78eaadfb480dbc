"""A link as a client of a smaller rank has it: the first components of the same factors, in a scale of its own.

All ranks use the first rows of one drawn A, so the mean of what such clients train, padded with zeros, is exact.
Differs from the paper (G. Malinovsky et al., 2024, arXiv 2410.08305), where all clients have one rank.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedraclora.link import Factor, Given, Link, LowRank, Private, Stack, Zero, shape_of
from fedraclora.sketch import SketchKey


def narrow(link: Link, ranks: Mapping[str, int], scales: Mapping[str, float]) -> Link:
    """Return the link with the first `ranks[layer]` rank components of each layer, scaled by `scales[layer]`.

    What the factors lose or gain by the other scale is folded into lora_b, or into the next factor where lora_b is
    drawn, so that the product is the first components of the whole one. Nothing is drawn otherwise: a key keeps its
    rank and counts its rows. A tensor that changes travels as it is, however the whole one was encoded.
    """
    terms = [
        _narrow(term, ranks[term.layer], scales[term.layer]) if isinstance(term, LowRank) else term
        for term in link.terms
    ]
    cut, whole = Link(link.index, tuple(terms), link.rule), link.named_tensors
    packed = {name: item for name, item in link.packed.items() if cut.named_tensors[name] is whole[name]}
    return replace(cut, packed=packed)


def _narrow(term: LowRank, rank: int, scale: float) -> LowRank:
    core = None if term.core is None else _first(_first(term.core, rank, axis=0), rank, axis=1)
    cut = LowRank(term.layer, scale, _first(term.lora_a, rank, axis=0), _first(term.lora_b, rank, axis=1), core)
    return cut if scale == term.scale else _multiply(cut, term.scale / scale)


def _multiply(term: LowRank, ratio: float) -> LowRank:
    """Return the term with the first of its factors that is not drawn, lora_b before the others, times `ratio`."""
    for name in ("lora_b", "lora_a", "core"):
        factor = term.factors.get(f"{term.layer}.{name}")
        if isinstance(factor, Zero):
            return term
        if isinstance(factor, Tensor):
            return term.with_factors({f"{term.layer}.{name}": factor * ratio})
    return term


def _first(factor: Factor, rank: int, *, axis: int) -> Factor:
    if rank >= shape_of(factor)[axis]:
        return factor
    if isinstance(factor, SketchKey):
        return replace(factor, rows=rank)
    if isinstance(factor, Private):
        return Private(replace(factor.key, rows=rank))
    if isinstance(factor, Zero):
        shape = list(factor.shape)
        shape[axis] = rank
        return Zero(tuple(shape))
    if isinstance(factor, Given):
        # What was given stays given: a machine that draws other bits is sent the rows that it needs.
        key = _first(factor.key, rank, axis=axis)
        assert isinstance(key, SketchKey | Stack)
        return Given(key, factor.value.narrow(axis, 0, rank))
    if isinstance(factor, Stack):
        raise ValueError(f"a stack of draws of layer {factor.keys[0].layer!r} cannot be cut to rank {rank}")
    return factor.narrow(axis, 0, rank).contiguous()
