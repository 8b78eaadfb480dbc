"""Tests of fedraclora.link."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedraclora import sketch
from fedraclora.link import Dense, Factor, Link, LowRank, Set, Term, Zero, describe, materialize, restore, shapes
from fedraclora.sketch import SketchKey

finite = st.floats(-10, 10, width=32)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    size = int(torch.Size(shape).numel())
    numbers = draw(st.lists(finite, min_size=size, max_size=size))
    return torch.tensor(numbers, dtype=torch.float32).reshape(shape)


@st.composite
def factors(draw: st.DrawFn, shape: tuple[int, int], side: str, layer: str) -> Factor:
    form = draw(st.sampled_from(["seed", "zero", "sent"]))
    if form == "zero":
        return Zero(shape)
    if form == "sent":
        return draw(tensors(shape))
    rank, dim = shape if side == "b" else shape[::-1]
    return SketchKey(draw(st.sampled_from(sketch.LAWS)), draw(st.integers(0, 2**63 - 1)), 4, layer, side, rank, dim)


@st.composite
def terms(draw: st.DrawFn) -> Term:
    name = draw(st.sampled_from(["fc1", "encoder.0.query", "head"]))
    kind = draw(st.sampled_from(["low_rank", "dense", "set"]))
    if kind != "low_rank":
        value = draw(tensors(tuple(draw(st.lists(st.integers(0, 3), max_size=3)))))
        return Dense(f"{name}.bias", value) if kind == "dense" else Set(f"{name}.bias", value)
    rank = draw(st.integers(1, 2))
    lora_a = draw(factors((rank, rank + draw(st.integers(0, 2))), "b", name))
    lora_b = draw(factors((rank + draw(st.integers(0, 2)), rank), "a", name))
    return LowRank(name, draw(st.floats(0.01, 100)), lora_a, lora_b)


links = st.builds(Link, index=st.integers(0, 10**6), terms=st.lists(terms(), max_size=4).map(tuple))


def _plain(term: Term) -> object:
    """Return a term with its tensors as comparable values."""
    values = [getattr(term, name) for name in term.__dataclass_fields__]
    return type(term), [(value.shape, value.tolist()) if isinstance(value, Tensor) else value for value in values]


@given(link=links)
def test_a_link_is_restored_from_its_description_and_its_numbers(link: Link) -> None:
    description = json.loads(json.dumps(describe(link)))
    restored = restore(description, link.tensors)
    assert restored.index == link.index
    assert [_plain(term) for term in restored.terms] == [_plain(term) for term in link.terms]
    assert restored.digest == link.digest
    assert describe(restored) == describe(link)


@given(link=links)
def test_shapes_are_those_of_the_explicit_numbers(link: Link) -> None:
    assert shapes(json.loads(json.dumps(describe(link)))) == [tuple(tensor.shape) for tensor in link.tensors]


@given(link=links)
def test_seeds_and_zeros_hold_no_explicit_numbers(link: Link) -> None:
    sent = [
        value
        for term in link.terms
        for value in (getattr(term, name) for name in term.__dataclass_fields__)
        if isinstance(value, Tensor)
    ]
    assert len(sent) == len(link.tensors)
    assert all(found is expected for found, expected in zip(link.tensors, sent, strict=True))


KEY = SketchKey("gaussian", 5, 2, "fc1", "b", 2, 3)


def _link() -> Link:
    low_rank = LowRank("fc1", 0.5, KEY, torch.arange(8.0).reshape(4, 2))
    return Link(2, (low_rank, Dense("fc2.weight", torch.ones(2, 2)), Set("fc1.bias", torch.zeros(4))))


def _with_term(place: int, term: Term) -> Link:
    changed = list(_link().terms)
    changed[place] = term
    return Link(2, tuple(changed))


def _flip_lowest_bit(tensor: Tensor, place: int) -> Tensor:
    integers = tensor.clone().view(torch.int32).reshape(-1)
    integers[place] ^= 1
    return integers.view(torch.float32).reshape(tensor.shape)


B = torch.arange(8.0).reshape(4, 2)
CHANGES: dict[str, Callable[[], Link]] = {
    "index": lambda: replace(_link(), index=3),
    "scale": lambda: _with_term(0, LowRank("fc1", 0.5000000000000001, KEY, B)),
    "layer": lambda: _with_term(0, LowRank("fc2", 0.5, KEY, B)),
    "seed": lambda: _with_term(0, LowRank("fc1", 0.5, replace(KEY, seed=6), B)),
    "law": lambda: _with_term(0, LowRank("fc1", 0.5, replace(KEY, law="raw"), B)),
    "sketch link": lambda: _with_term(0, LowRank("fc1", 0.5, replace(KEY, link=3), B)),
    "a bit": lambda: _with_term(0, LowRank("fc1", 0.5, KEY, _flip_lowest_bit(B, 5))),
    "the sign of zero": lambda: _with_term(2, Set("fc1.bias", torch.tensor([0.0, -0.0, 0.0, 0.0]))),
    "zero for numbers": lambda: _with_term(0, LowRank("fc1", 0.5, KEY, Zero((4, 2)))),
    "dense for set": lambda: _with_term(2, Dense("fc1.bias", torch.zeros(4))),
    "shape": lambda: _with_term(2, Set("fc1.bias", torch.zeros(2, 2))),
    "dtype": lambda: _with_term(2, Set("fc1.bias", torch.zeros(4).double())),
    "order": lambda: Link(2, _link().terms[::-1]),
    "a term less": lambda: Link(2, _link().terms[:-1]),
    "factors exchanged": lambda: _with_term(0, LowRank("fc1", 0.5, B, KEY)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_changes_with(change: str) -> None:
    assert CHANGES[change]().digest != _link().digest


def test_equal_links_have_equal_digests() -> None:
    assert _link().digest == _link().digest


def test_a_factor_materializes_in_the_dtype_asked_for() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    assert torch.equal(materialize(KEY, like), sketch.draw(KEY).double())
    assert torch.equal(materialize(Zero((2, 5)), like), torch.zeros(2, 5, dtype=torch.float64))
    assert torch.equal(materialize(B, like), B.double())
    assert all(materialize(factor, like).dtype == torch.float64 for factor in (KEY, Zero((2, 5)), B))


def test_a_skeleton_keeps_seeds_and_shapes_and_no_numbers() -> None:
    skeleton = _link().skeleton()
    assert skeleton == Link(2, (LowRank("fc1", 0.5, KEY, Zero((4, 2))),))
    assert skeleton.tensors == []


def test_low_rank_terms_are_found_by_layer() -> None:
    assert list(_link().low_rank_terms()) == ["fc1"]
    assert _link().low_rank_terms()["fc1"].target == "fc1.weight"


def test_an_unknown_term_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown term 'sparse'.*low_rank, dense and set"):
        restore([0, [["sparse", "fc1", [2]]]], [torch.zeros(2)])
