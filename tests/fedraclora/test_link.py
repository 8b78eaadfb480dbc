"""Tests of fedraclora.link."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora import link as links
from fedraclora import sketch
from fedraclora.codec import codec_of, codec_text
from fedraclora.link import (
    Dense,
    Factor,
    Given,
    Link,
    LowRank,
    Private,
    Set,
    Stack,
    Term,
    Zero,
    describe,
    drawn_shapes,
    is_zero,
    materialize,
    product,
    replace_tensors,
    restore,
    slots,
)
from fedraclora.narrowing import narrow
from fedraclora.payload import Packed
from fedraclora.server_rule import RULES, ServerRule
from fedraclora.sketch import SketchKey
from fedraclora.travel import encode_link

finite = st.floats(-10, 10, width=32)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    size = int(torch.Size(shape).numel())
    numbers = draw(st.lists(finite, min_size=size, max_size=size))
    return torch.tensor(numbers, dtype=torch.float32).reshape(shape)


@st.composite
def keys(draw: st.DrawFn, shape: tuple[int, int], side: str, layer: str) -> SketchKey:
    """A draw of the shape, be it the first rows of a larger one."""
    rank, dim = shape if side == "b" else shape[::-1]
    whole = draw(st.integers(rank, dim))
    law, seed = draw(st.sampled_from(sketch.LAWS)), draw(st.integers(0, 2**63 - 1))
    return SketchKey(law, seed, 4, layer, side, whole, dim, 0 if whole == rank else rank)


FORMS = ("seed", "stack", "private", "given", "zero", "sent")


@st.composite
def factors(draw: st.DrawFn, shape: tuple[int, int], side: str, layer: str, forms: tuple[str, ...] = FORMS) -> Factor:
    form = draw(st.sampled_from(forms))
    if form == "zero":
        return Zero(shape)
    if form == "sent":
        return draw(tensors(shape))
    if form == "stack":
        rank = shape[0 if side == "b" else 1]
        cut = draw(st.integers(1, rank))
        ranks = [cut, rank - cut] if cut < rank else [rank]
        shapes = [(part, shape[1]) if side == "b" else (shape[0], part) for part in ranks]
        return Stack(tuple(draw(keys(part, side, layer)) for part in shapes))
    key = draw(keys(shape, side, layer))
    return Given(key, draw(tensors(shape))) if form == "given" else Private(key) if form == "private" else key


@st.composite
def low_rank(draw: st.DrawFn, name: str, forms: tuple[str, ...] = FORMS, max_rank: int = 2) -> LowRank:
    rank = draw(st.integers(1, max_rank))
    lora_a = draw(factors((rank, rank + draw(st.integers(0, 2))), "b", name, forms))
    lora_b = draw(factors((rank + draw(st.integers(0, 2)), rank), "a", name, forms))
    core = draw(st.sampled_from([None, Zero((rank, rank)), draw(tensors((rank, rank)))]))
    return LowRank(name, draw(st.floats(0.01, 100)), lora_a, lora_b, core)


@st.composite
def terms(draw: st.DrawFn) -> Term:
    name = draw(st.sampled_from(["fc1", "encoder.0.query", "head"]))
    kind = draw(st.sampled_from(["low_rank", "dense", "set"]))
    if kind != "low_rank":
        value = draw(tensors(tuple(draw(st.lists(st.integers(0, 3), max_size=3)))))
        return Dense(f"{name}.bias", value) if kind == "dense" else Set(f"{name}.bias", value)
    return draw(low_rank(name))


rules = st.builds(
    ServerRule, st.sampled_from(RULES), st.floats(0.01, 10), st.floats(0, 0.99), st.floats(0, 0.99), st.floats(1e-6, 1)
)
any_link = st.builds(
    Link,
    index=st.integers(0, 10**6),
    terms=st.lists(terms(), max_size=5).map(tuple),
    rule=st.none() | rules,
)


def _plain(term: Term) -> object:
    """Return a term with its tensors as comparable values; what was given is written down as the draw it stands for."""
    values = [getattr(term, name) for name in term.__dataclass_fields__]
    values = [value.key if isinstance(value, Given) else value for value in values]
    return type(term), [(value.shape, value.tolist()) if isinstance(value, Tensor) else value for value in values]


def _through_json(link: Link) -> links.Json:
    return json.loads(json.dumps(describe(link)))


@settings(max_examples=50)
@given(link=any_link)
def test_a_link_is_restored_from_its_description_and_its_numbers(link: Link) -> None:
    restored = restore(_through_json(link), link.tensors)
    assert (restored.index, restored.rule) == (link.index, link.rule)
    assert [_plain(term) for term in restored.terms] == [_plain(term) for term in link.terms]
    assert restored.digest == link.digest
    assert describe(restored) == describe(link)


@settings(max_examples=50)
@given(link=any_link)
def test_slots_are_the_names_and_shapes_of_the_explicit_numbers(link: Link) -> None:
    found = [(slot.name, slot.shape) for slot in slots(_through_json(link))]
    assert found == [(name, tuple(tensor.shape)) for name, tensor in link.named_tensors.items()]


@settings(max_examples=50)
@given(link=any_link)
def test_drawn_shapes_are_those_of_the_factors_that_all_draw(link: Link) -> None:
    shapes = [tuple(tensor.shape) for tensor in link.drawn_factors.values()]
    assert drawn_shapes(_through_json(link)) == shapes == [key.shape for key in link.drawn]


def _numbers_of(link: Link) -> Iterator[Tensor]:
    for term in link.terms:
        for name in term.__dataclass_fields__:
            if isinstance(value := getattr(term, name), Tensor):
                yield value


@settings(max_examples=50)
@given(link=any_link)
def test_only_explicit_numbers_are_tensors_of_a_link_in_the_order_of_its_terms(link: Link) -> None:
    sent = list(_numbers_of(link))
    assert len(sent) == len(link.tensors)
    assert all(found is expected for found, expected in zip(link.tensors, sent, strict=True))


@settings(max_examples=50)
@given(link=any_link)
def test_names_of_factors_and_of_numbers_agree(link: Link) -> None:
    explicit = {name: factor for name, factor in link.factors.items() if isinstance(factor, Tensor)}
    assert list(link.explicit_factors) == list(explicit)
    assert all(link.explicit_factors[name] is tensor for name, tensor in explicit.items())


def test_of_several_terms_of_a_target_the_last_has_the_plain_name() -> None:
    a, b = torch.ones(1, 2), torch.ones(3, 1)
    pairs = [LowRank("fc1", 1.0, a * place, b * place) for place in (1, 2, 3)]
    others = [LowRank("fc2", 1.0, a * 4, Zero((3, 1))), Set("fc1.bias", b), Dense("fc1.bias", b), Dense("fc1.bias", a)]
    link = Link(0, (*pairs, *others))
    assert list(link.named_tensors) == [
        *("fc1.lora_a #3", "fc1.lora_b #3", "fc1.lora_a #2", "fc1.lora_b #2", "fc1.lora_a", "fc1.lora_b"),
        *("fc2.lora_a", "set fc1.bias", "add fc1.bias #2", "add fc1.bias"),
    ]
    assert link.named_tensors["fc1.lora_a"] is pairs[2].lora_a
    assert link.low_rank_terms()["fc1"] is pairs[2]


def test_replacing_a_factor_by_its_counted_name_leaves_the_other_terms_of_the_layer_alone() -> None:
    a, b = torch.ones(1, 2), torch.ones(3, 1)
    link = Link(0, (LowRank("fc1", -1.0, a, b), LowRank("fc1", 1.0, a, b)))
    changed = link.with_factors({"fc1.lora_b #2": b * 5, "fc1.lora_a": a * 7})
    assert changed.factors["fc1.lora_b #2"].tolist() == (b * 5).tolist()
    assert changed.factors["fc1.lora_a"].tolist() == (a * 7).tolist()
    assert changed.factors["fc1.lora_a #2"] is a
    assert changed.factors["fc1.lora_b"] is b


# ---- drawn factors


@settings(max_examples=30)
@given(data=st.data(), side=st.sampled_from(["a", "b"]))
def test_a_stack_is_its_draws_side_by_side_along_the_rank(data: st.DataObject, side: str) -> None:
    ranks = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    parts = [data.draw(keys((rank, 4) if side == "b" else (4, rank), side, "fc1")) for rank in ranks]
    stack = Stack(tuple(parts))
    whole = links.draw(stack)
    assert tuple(whole.shape) == stack.shape == ((sum(ranks), 4) if side == "b" else (4, sum(ranks)))
    pieces = whole.split(ranks, dim=0 if side == "b" else 1)
    assert all(torch.equal(piece, sketch.draw(key)) for piece, key in zip(pieces, parts, strict=True))


KEY = SketchKey("gaussian", 5, 2, "fc1", "b", 2, 3)


def test_each_client_has_a_private_factor_of_its_own_and_always_the_same() -> None:
    link = Link(2, (LowRank("fc1", 1.0, Private(KEY), Zero((4, 2))), Set("fc1.bias", torch.ones(4))))
    assert link.has_private
    own = [link.of_client(client).factors["fc1.lora_a"] for client in (0, 1, 0)]
    assert own[0] == own[2] != own[1]
    assert all(isinstance(key, SketchKey) and replace(key, seed=5) == KEY for key in own)
    assert not torch.equal(links.draw(own[0]), links.draw(own[1]))
    assert not link.of_client(0).has_private
    assert link.of_client(0).terms[1] is link.terms[1]


def test_a_private_factor_has_a_shape_but_no_numbers_for_all() -> None:
    link = Link(2, (LowRank("fc1", 1.0, Private(KEY), Zero((4, 2))),))
    assert (link.drawn_names, link.drawn, link.drawn_factors) == (["fc1.lora_a"], [], {})
    assert links.shape_of(Private(KEY)) == (2, 3)
    with pytest.raises(ValueError, match="the factor of layer 'fc1' is each client's own; name the client"):
        materialize(Private(KEY), torch.zeros(1))


def test_a_link_without_private_factors_is_the_same_for_all() -> None:
    assert _link().of_client(3) is not None
    link = _link()
    assert link.of_client(3) is link


@settings(max_examples=30)
@given(link=any_link)
def test_what_is_given_stands_in_for_the_draw_and_changes_no_digest(link: Link) -> None:
    values = [torch.full(key.shape, float(place)) for place, key in enumerate(link.drawn)]
    told = link.with_given(values)
    assert all(found is value for found, value in zip(told.drawn_factors.values(), values, strict=True))
    assert told.has_given == bool(values)
    assert (told.digest, told.drawn) == (link.digest, link.drawn)
    assert all(found is value for found, value in zip(told.tensors, link.tensors, strict=True))


# ---- products


@settings(max_examples=50)
@given(data=st.data(), client=st.integers(0, 9))
def test_a_term_stands_for_scale_times_b_core_a(data: st.DataObject, client: int) -> None:
    term = data.draw(low_rank("fc1"))
    like = torch.zeros(1, dtype=torch.float64)
    own = Link(0, (term,)).of_client(client).terms[0]
    assert isinstance(own, LowRank)
    a, b = (materialize(factor, like).numpy() for factor in (own.lora_a, own.lora_b))
    middle = b if own.core is None else b @ materialize(own.core, like).numpy()
    torch.testing.assert_close(product(own, like), torch.from_numpy(term.scale * middle @ a), rtol=1e-12, atol=1e-12)


@settings(max_examples=50)
@given(data=st.data())
def test_a_term_that_is_known_to_be_zero_is_zero(data: st.DataObject) -> None:
    term = data.draw(low_rank("fc1", ("seed", "zero", "sent")))
    if is_zero(term):
        assert not product(term, torch.zeros(1)).any()
    else:
        assert not any(isinstance(factor, Zero) for factor in (term.lora_a, term.lora_b, term.core))


# ---- the link of a smaller rank


CAN_BE_CUT = ("seed", "private", "given", "zero", "sent")


@settings(max_examples=100)
@given(data=st.data())
def test_a_narrowed_link_has_the_first_components_of_the_product_whatever_its_scale(data: st.DataObject) -> None:
    term = data.draw(low_rank("fc1", CAN_BE_CUT, max_rank=4))
    whole = links.shape_of(term.lora_a)[0]
    rank, scale = data.draw(st.integers(1, whole)), data.draw(st.sampled_from([term.scale, 0.5, 4.0]))
    narrowed = narrow(Link(3, (term,)), {"fc1": rank}, {"fc1": scale}).of_client(6)
    own = Link(3, (term,)).of_client(6).terms[0]
    assert isinstance(own, LowRank)
    (cut,) = narrowed.terms
    assert isinstance(cut, LowRank)
    assert cut.scale == scale
    like = torch.zeros(1, dtype=torch.float64)
    a, b = materialize(own.lora_a, like)[:rank], materialize(own.lora_b, like)[:, :rank]
    middle = b if own.core is None else b @ materialize(own.core, like)[:rank, :rank]
    can_carry = any(isinstance(factor, Zero | Tensor) for factor in term.factors.values())
    expected = (term.scale if can_carry else scale) * middle @ a
    torch.testing.assert_close(product(cut, like), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=50)
@given(data=st.data(), side=st.sampled_from(["a", "b"]))
def test_a_narrowed_draw_is_the_first_rows_of_the_whole_draw(data: st.DataObject, side: str) -> None:
    """Also where a law does not nest: a client of a smaller rank draws the whole factor and keeps its rows."""
    key = data.draw(keys((3, 5) if side == "b" else (5, 3), side, "fc1"))
    rank = data.draw(st.integers(1, 3))
    pair = (key, Zero((2, 3))) if side == "b" else (Zero((3, 2)), key)
    for form in (key, Private(key)):
        term = LowRank("fc1", 1.0, *(form if factor is key else factor for factor in pair))
        narrowed = narrow(Link(0, (term,)), {"fc1": rank}, {"fc1": 1.0}).of_client(2)
        whole = Link(0, (term,)).of_client(2)
        (name,) = whole.drawn_factors
        found, full = narrowed.drawn_factors[name], whole.drawn_factors[name]
        assert torch.equal(found, full[:rank] if side == "b" else full[:, :rank])
        assert links.shape_of(narrowed.factors[name]) == tuple(found.shape)


def test_a_link_narrowed_to_its_own_rank_and_scale_is_the_same_link() -> None:
    same = narrow(_link(), {"fc1": 2}, {"fc1": 0.5})
    wider = narrow(same, {"fc1": 9}, {"fc1": 0.5})
    assert same.digest == _link().digest
    assert all(found is expected for found, expected in zip(wider.tensors, same.tensors, strict=True))


def test_narrowing_leaves_whole_tensors_and_the_rule_alone() -> None:
    link = replace(_link(), rule=ServerRule("adam"))
    narrowed = narrow(link, {"fc1": 1}, {"fc1": 0.5})
    assert narrowed.terms[1:] == link.terms[1:]
    assert (narrowed.index, narrowed.rule) == (link.index, link.rule)


def test_where_lora_b_starts_at_zero_the_other_factor_is_not_scaled_in_its_place() -> None:
    """It is lora_b that trains then, and its values are scaled when they come back."""
    link = Link(0, (LowRank("fc1", 1.0, torch.ones(2, 3), Zero((4, 2))),))
    narrowed = narrow(link, {"fc1": 1}, {"fc1": 4.0})
    assert torch.equal(narrowed.named_tensors["fc1.lora_a"], torch.ones(1, 3))


def test_a_stack_cannot_be_cut() -> None:
    stack = Stack((replace(KEY, rank=1), replace(KEY, rank=1, seed=6)))
    link = Link(0, (LowRank("fc1", 1.0, stack, Zero((4, 2))),))
    with pytest.raises(ValueError, match="a stack of draws of layer 'fc1' cannot be cut to rank 1"):
        narrow(link, {"fc1": 1}, {"fc1": 1.0})
    assert narrow(link, {"fc1": 2}, {"fc1": 1.0}).factors["fc1.lora_a"] is stack


def test_a_tensor_that_was_cut_travels_as_it_is_and_an_uncut_one_as_it_was_encoded() -> None:
    link = encode_link(_link(), codec_text("int8", {}), 3, list(_link().named_tensors))
    assert list(narrow(link, {"fc1": 2}, {"fc1": 0.5}).packed) == ["fc1.lora_b", "add fc2.weight", "set fc1.bias"]
    assert list(narrow(link, {"fc1": 1}, {"fc1": 0.5}).packed) == ["add fc2.weight", "set fc1.bias"]
    assert list(narrow(link, {"fc1": 2}, {"fc1": 1.0}).packed) == ["add fc2.weight", "set fc1.bias"]


# ---- other numbers


@settings(max_examples=50)
@given(link=any_link, data=st.data())
def test_replacing_tensors_changes_those_alone_and_says_how_they_travel(link: Link, data: st.DataObject) -> None:
    link = replace(link, packed={"older": Packed("", 1, {})})
    chosen = data.draw(st.lists(st.sampled_from(sorted(link.named_tensors)), unique=True)) if link.tensors else []
    new = {name: torch.full_like(link.named_tensors[name], 77.0) for name in chosen}
    sent = {name: Packed("", 2, {}) for name in chosen}
    changed = replace_tensors(link, new, sent)
    assert list(changed.named_tensors) == list(link.named_tensors)
    for name, tensor in changed.named_tensors.items():
        assert tensor is new.get(name, link.named_tensors[name])
    assert describe(changed) == describe(link)
    assert changed.packed == {"older": link.packed["older"], **sent}


def test_how_numbers_travel_does_not_change_what_a_link_says() -> None:
    link = encode_link(_link(), "", 3, ["fc1.lora_b"])
    assert link.packed["fc1.lora_b"].arrays.keys() == codec_of("").encode([], 0).keys()
    assert link.digest == _link().digest


# ---- digests


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
    "rows": lambda: _with_term(0, LowRank("fc1", 0.5, replace(KEY, rank=3, rows=2), B)),
    "private": lambda: _with_term(0, LowRank("fc1", 0.5, Private(KEY), B)),
    "stack": lambda: _with_term(0, LowRank("fc1", 0.5, Stack((KEY,)), B)),
    "core": lambda: _with_term(0, LowRank("fc1", 0.5, KEY, B, torch.eye(2))),
    "zero core": lambda: _with_term(0, LowRank("fc1", 0.5, KEY, B, Zero((2, 2)))),
    "rule": lambda: replace(_link(), rule=ServerRule("adam")),
    "rule's number": lambda: replace(_link(), rule=ServerRule("adam", beta1=0.8)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_changes_with(change: str) -> None:
    assert CHANGES[change]().digest != _link().digest


def test_no_two_changes_give_one_digest() -> None:
    assert len({change().digest for change in CHANGES.values()}) == len(CHANGES)


def test_equal_links_have_equal_digests() -> None:
    assert _link().digest == _link().digest


def test_a_factor_materializes_in_the_dtype_asked_for() -> None:
    like = torch.zeros(1, dtype=torch.float64)
    assert torch.equal(materialize(KEY, like), sketch.draw(KEY).double())
    assert torch.equal(materialize(Zero((2, 5)), like), torch.zeros(2, 5, dtype=torch.float64))
    assert torch.equal(materialize(B, like), B.double())
    assert torch.equal(materialize(Given(KEY, B), like), B.double())
    forms = (KEY, Stack((KEY, KEY)), Zero((2, 5)), B, Given(KEY, B))
    assert all(materialize(factor, like).dtype == torch.float64 for factor in forms)


def test_a_skeleton_keeps_seeds_and_shapes_and_no_numbers() -> None:
    skeleton = _link().skeleton()
    assert skeleton == Link(2, (LowRank("fc1", 0.5, KEY, Zero((4, 2))),))
    assert skeleton.tensors == []


def test_low_rank_terms_are_found_by_layer() -> None:
    assert list(_link().low_rank_terms()) == ["fc1"]
    assert _link().low_rank_terms()["fc1"].target == "fc1.weight"


def test_an_unknown_term_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown term 'sparse'.*low_rank, dense and set"):
        restore([0, [["sparse", "fc1", [2]]], []], [torch.zeros(2)])
