"""Tests of fedraclora.travel: what is put into a parcel comes out bit for bit, and costs what was put in."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora.codec import codec_of, codec_text
from fedraclora.link import Dense, Json, Link, LowRank, Set, Slot, Term, Zero, describe, slots
from fedraclora.seeding import derive_seed
from fedraclora.sketch import SketchKey
from fedraclora.travel import (
    CATCH_UP,
    DENSE,
    FLAT,
    KEPT,
    OPEN,
    PACKED,
    PLAIN,
    UPDATE,
    Kept,
    NotKept,
    Parcel,
    Unloading,
    encode_link,
    kept_of,
    kind_of,
    packed_kinds,
    plain_shapes,
    repeats,
    repeats_within,
    unload,
)

OUT, IN, RANK = 4, 6, 2
INT8 = codec_text("int8", {"stochastic": True, "scale_per": "column"})
TOP_K = codec_text("top_k", {"share": 0.3})
KEY = SketchKey("gaussian", 1, 0, "fc1", "b", RANK, IN)


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


A, B = _numbers(0, RANK, IN), _numbers(1, OUT, RANK)


def _pair(lora_a: Tensor = A, lora_b: Tensor = B, scale: float = 1.0) -> LowRank:
    return LowRank("fc1", scale, lora_a, lora_b)


def _carry(
    links: Mapping[str, tuple[Link, Mapping[str, Json]]], current: int, kept: Kept | None = None
) -> tuple[dict[str, Link], Parcel]:
    """Send links, each with the ways of what is known, and take them out again; the one named `open` comes first."""
    parcel, ways = Parcel(), {}
    for name, (link, known) in links.items():
        ways[name] = parcel.add_link(link, current, known=known)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name, (link, _) in links.items():
        for kind, shape in plain_shapes(describe(link), ways[name], current):
            shapes.setdefault(kind, []).append(shape)
    unloading = unload(shapes, parcel.arrays(), kept or {})
    found: dict[str, Link] = {}
    for name, (link, _) in links.items():
        opened = None if name == "open" else found.get("open")
        found[name] = unloading.take_link(describe(link), ways[name], current, opened=opened)
    return found, parcel


def _num_bytes(parcel: Parcel) -> int:
    return sum(array.nbytes for group in parcel.arrays().values() for array in group.values())


# ---- the whole way


@st.composite
def any_link(draw: st.DrawFn, index: int) -> Link:
    """Several terms, whose tensors are of few kinds, so that some are there twice, and some encoded."""
    terms: list[Term] = []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["pair", "drawn", "dense", "set"]))
        a, b = (_numbers(draw(st.integers(0, 2)), *shape) for shape in ((RANK, IN), (OUT, RANK)))
        core = draw(st.sampled_from([None, torch.eye(RANK)]))
        layer = draw(st.sampled_from(["fc1", "fc2"]))
        terms += {
            "pair": [LowRank(layer, 0.5, a, b, core)],
            "drawn": [LowRank(layer, 0.5, KEY, draw(st.sampled_from([b, Zero((OUT, RANK))])))],
            "dense": [Dense("fc1.bias", _numbers(7, OUT))],
            "set": [Set("fc1.bias", _numbers(8, OUT))],
        }[kind]
    link = Link(index, tuple(terms))
    names = draw(st.lists(st.sampled_from(sorted(link.named_tensors)), unique=True)) if link.tensors else []
    codec = draw(st.sampled_from([INT8, TOP_K, ""]))
    return encode_link(link, codec, draw(st.integers(0, 9)), names) if names else link


@settings(max_examples=80)
@given(data=st.data())
def test_links_arrive_bit_for_bit_and_what_is_there_already_costs_nothing(data: st.DataObject) -> None:
    opened, closed = data.draw(any_link(5)), data.draw(any_link(3))
    explicit = sorted(opened.explicit_factors)
    names = data.draw(st.lists(st.sampled_from(explicit), unique=True)) if explicit else []
    kept = {(name, tuple(opened.named_tensors[name].shape)): opened.named_tensors[name] for name in names}
    known = {"open": repeats_within(opened) | {name: [KEPT] for name in names}, "closed": repeats(closed, opened)}
    links = {"open": (opened, known["open"]), "closed": (closed, known["closed"])}
    found, parcel = _carry(links, current=4, kept=kept)
    expected = 0
    for name, (link, _) in links.items():
        assert found[name].digest == link.digest
        for key, tensor in link.named_tensors.items():
            assert torch.equal(found[name].named_tensors[key], tensor)
            if key in known[name]:
                continue
            packed = link.packed.get(key)
            expected += tensor.nbytes if packed is None else sum(array.nbytes for array in packed.arrays.values())
    assert _num_bytes(parcel) == expected


def test_a_link_without_numbers_costs_nothing() -> None:
    link = Link(0, (LowRank("fc1", 1.0, KEY, Zero((OUT, RANK))),))
    found, parcel = _carry({"open": (link, {})}, current=0)
    assert parcel.arrays() == {}
    assert found["open"] == link


# ---- kinds


@pytest.mark.parametrize(
    ("index", "term", "expected"),
    [(3, "low_rank", CATCH_UP), (3, "set", CATCH_UP), (4, "low_rank", UPDATE), (4, "set", DENSE), (9, "dense", DENSE)],
)
def test_what_was_missed_before_is_catch_up_and_else_factors_are_the_update(
    index: int, term: str, expected: str
) -> None:
    assert kind_of(index, Slot(term, "fc1.lora_b", (2, 2)), current=4) == expected


def test_kinds_have_arrays_of_their_own() -> None:
    link = Link(4, (_pair(), Set("fc1.bias", _numbers(2, OUT)), Set("head.bias", _numbers(3, 3))))
    encoded = encode_link(link, INT8, 0, ["fc1.lora_b", "set fc1.bias"])
    parcel = Parcel()
    ways = parcel.add_link(encoded, 4, known={})
    packed = encoded.packed
    expected = {
        UPDATE: A.nbytes + sum(array.nbytes for array in packed["fc1.lora_b"].arrays.values()),
        DENSE: 3 * 4 + sum(array.nbytes for array in packed["set fc1.bias"].arrays.values()),
    }
    found = {kind: sum(array.nbytes for array in group.values()) for kind, group in parcel.arrays().items()}
    assert found == expected
    assert [way[0] for way in ways] == [PLAIN, PACKED, PACKED, PLAIN]
    assert packed_kinds(describe(encoded), ways, 4) == {UPDATE, DENSE}
    assert plain_shapes(describe(encoded), ways, 4) == [(UPDATE, (RANK, IN)), (DENSE, (3,))]
    assert set(parcel.arrays()[UPDATE]) == {FLAT, "uint8", "float32"}


# ---- what is there already


def test_whoever_has_an_open_link_keeps_its_factors_and_no_whole_tensors() -> None:
    link = Link(2, (_pair(), LowRank("fc2", 1.0, KEY, Zero((OUT, RANK))), Set("fc1.bias", _numbers(2, OUT))))
    assert kept_of(link).keys() == {("fc1.lora_a", (RANK, IN)), ("fc1.lora_b", (OUT, RANK))}
    assert kept_of(link)["fc1.lora_a", (RANK, IN)] is A


def test_factors_of_a_closed_link_that_the_open_one_has_are_found_by_their_bits() -> None:
    opened, closed = Link(1, (_pair(),)), Link(0, (_pair(A.clone(), B + 1), _pair(A, B.clone(), -1.0)))
    assert repeats(closed, opened) == {
        "fc1.lora_a #2": [OPEN, "fc1.lora_a"],
        "fc1.lora_a": [OPEN, "fc1.lora_a"],
        "fc1.lora_b": [OPEN, "fc1.lora_b"],
    }
    assert repeats(closed, None) == {}
    assert repeats(closed, Link(1, ())) == {}


@pytest.mark.parametrize(
    "other", [A.double(), A.reshape(IN, RANK), -A, A + 1e-7], ids=["dtype", "shape", "sign", "last bits"]
)
def test_numbers_that_differ_in_type_shape_or_a_bit_are_no_repeat(other: Tensor) -> None:
    opened = Link(1, (LowRank("fc1", 1.0, A, Zero((OUT, RANK))),))
    assert repeats(Link(0, (LowRank("fc1", 1.0, other, Zero((OUT, RANK))),)), opened) == {}


def test_zero_and_minus_zero_are_no_repeat() -> None:
    plus, minus = torch.zeros(RANK, IN), -torch.zeros(RANK, IN)
    link = Link(1, (_pair(plus), _pair(minus, _numbers(9, OUT, RANK))))
    assert repeats_within(link) == {}


def test_a_factor_that_a_link_has_twice_refers_to_the_first_of_them() -> None:
    link = Link(1, (_pair(scale=-1.0), _pair(), _pair(A, B + 1)))
    assert repeats_within(link) == {
        "fc1.lora_a #2": [OPEN, "fc1.lora_a #3"],
        "fc1.lora_b #2": [OPEN, "fc1.lora_b #3"],
        "fc1.lora_a": [OPEN, "fc1.lora_a #3"],
    }
    found, parcel = _carry({"open": (link, repeats_within(link))}, current=1)
    assert found["open"].digest == link.digest
    assert _num_bytes(parcel) == A.nbytes + 2 * B.nbytes


@pytest.mark.parametrize(
    "kept",
    [{}, {("fc1.lora_b", (RANK, IN)): A}, {("fc1.lora_a", (RANK, IN + 1)): A}],
    ids=["nothing", "another name", "another shape"],
)
def test_a_tensor_that_is_not_kept_any_more_is_named(kept: Kept) -> None:
    link = Link(1, (_pair(),))
    with pytest.raises(NotKept, match=r"the numbers of 'fc1\.lora_a' \[2, 6\] are not here any more"):
        _carry({"open": (link, {"fc1.lora_a": [KEPT]})}, current=1, kept=kept)


def test_a_reference_to_a_factor_that_the_open_link_lacks_is_not_kept() -> None:
    link = Link(1, (_pair(),))
    with pytest.raises(NotKept, match=r"fc1\.lora_a"):
        _carry({"open": (link, {"fc1.lora_a": [OPEN, "fc9.lora_a"]})}, current=1)


# ---- encoded numbers


@pytest.mark.parametrize("codec", [INT8, TOP_K, ""])
def test_an_encoded_link_holds_what_its_receivers_decode(codec: str) -> None:
    link = Link(1, (_pair(), Set("fc1.bias", _numbers(2, OUT))))
    encoded = encode_link(link, codec, 9, ["fc1.lora_b", "set fc1.bias"])
    assert describe(encoded) == describe(link)
    assert encoded.named_tensors["fc1.lora_a"] is A
    for name, packed in encoded.packed.items():
        tensor = link.named_tensors[name]
        assert (packed.codec, packed.seed) == (codec, derive_seed(9, name))
        (expected,) = codec_of(codec).decode(packed.arrays, [tuple(tensor.shape)], tensor.dtype, packed.seed)
        assert torch.equal(encoded.named_tensors[name], expected)
    assert torch.equal(encoded.named_tensors["fc1.lora_b"], B) == (codec == "")


def test_tensors_of_one_link_are_encoded_with_seeds_of_their_own() -> None:
    """The same numbers under two names are rounded independently."""
    tall = _numbers(1, 50, RANK)
    link = Link(1, (_pair(A, tall), LowRank("fc2", 1.0, A, tall)))
    encoded = encode_link(link, INT8, 9, ["fc1.lora_b", "fc2.lora_b"])
    assert not torch.equal(encoded.named_tensors["fc1.lora_b"], encoded.named_tensors["fc2.lora_b"])


def test_a_double_precision_tensor_is_decoded_in_double_precision() -> None:
    link = encode_link(Link(1, (_pair(A.double(), B.double()),)), INT8, 9, ["fc1.lora_b"])
    found, _ = _carry({"open": (link, {})}, current=1)
    assert found["open"].named_tensors["fc1.lora_b"].dtype == torch.float64
    assert found["open"].digest == link.digest


def test_what_was_taken_out_is_gone_so_that_nothing_is_used_twice() -> None:
    unloading = Unloading({UPDATE: [A, B]}, {}, {})
    assert unloading.take(UPDATE, 1)[0] is A
    assert unloading.take(UPDATE, 1)[0] is B
    with pytest.raises(IndexError):
        unloading.take(UPDATE, 1)


def _edit(change: Callable[[Json], None]) -> Callable[[list[Json]], None]:
    return lambda ways: change(ways[1])


SPOILT: dict[str, Callable[[list[Json]], None]] = {
    "codec": _edit(lambda way: way.__setitem__(1, '["top_q",{}]')),
    "type": _edit(lambda way: way.__setitem__(3, "complex64")),
    "no type": _edit(lambda way: way.__setitem__(3, "float33")),
    "short": _edit(lambda way: way[4][0].__setitem__(2, 1)),
    "name": _edit(lambda way: way[4][0].__setitem__(0, "other")),
    "place": _edit(lambda way: way[4][0].__setitem__(1, "int64")),
    "way": lambda ways: ways.__setitem__(1, ["somehow"]),
    "one less": lambda ways: ways.pop(),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_description_that_does_not_fit_the_arrays_is_refused(spoil: str) -> None:
    link = encode_link(Link(1, (_pair(),)), INT8, 9, ["fc1.lora_b"])
    parcel = Parcel()
    ways = parcel.add_link(link, 1, known={})
    SPOILT[spoil](ways)
    unloading = unload({UPDATE: [(RANK, IN)]}, parcel.arrays(), {})
    with pytest.raises((ValueError, KeyError, AttributeError, IndexError)):
        unloading.take_link(describe(link), ways, 1)


def test_arrays_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="does not hold the 12 numbers"):
        unload({UPDATE: [(RANK, IN)]}, {UPDATE: {FLAT: np.zeros(13, np.float32)}}, {})


def test_slots_tell_factors_from_whole_tensors() -> None:
    link = Link(1, (_pair(), Dense("fc1.bias", _numbers(1, OUT))))
    assert [slot.term for slot in slots(describe(link))] == ["low_rank", "low_rank", "dense"]
