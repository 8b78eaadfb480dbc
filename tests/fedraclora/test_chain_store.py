"""Tests of fedraclora.chain_store."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedraclora.chain import Chain, equal_weights
from fedraclora.chain_store import ChainStore
from fedraclora.codec import codec_text
from fedraclora.link import Dense, Link, LowRank, Set, Term, Zero
from fedraclora.server_rule import ServerRule
from fedraclora.sketch import SketchKey
from fedraclora.travel import encode_link

OUT, IN, RANK = 4, 3, 2
ROUNDS = 6
ROUNDS_PER_LINK = 2  # links close at versions 2, 4 and 6


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _terms(index: int, version: int) -> tuple[Term, ...]:
    key = SketchKey("orthonormal", 3, index, "fc1", "b", RANK, IN)
    return (
        LowRank("fc1", 0.5, key, _numbers(version, OUT, RANK) if version else Zero((OUT, RANK))),
        Set("fc1.bias", _numbers(version + 50, OUT)),
        Dense("fc2.weight", _numbers(version + 80, 2, 2)),
    )


def _start() -> Chain:
    return Chain.start(
        {"fc1.weight": _numbers(1, OUT, IN), "fc1.bias": _numbers(2, OUT), "fc2.weight": _numbers(3, 2, 2)}
    )


def _advance(chain: Chain, *, shift: int = 0) -> None:
    if chain.open is None:
        chain.open_link(Link(chain.num_links, _terms(chain.num_links, 0)[:1]))
    version = chain.version + 1
    link = Link(chain.num_links, _terms(chain.num_links, version + shift))
    chain.update(link, close=version % ROUNDS_PER_LINK == 0)


RICH_ROUNDS = 9
BESIDE = (2, 5, 8)  # versions of the rich history that merge a link beside the open one; it closes at 4 and 8


def _advance_richly(chain: Chain) -> None:
    """Take a round whose links have rules, encoded numbers, one factor twice, and others merged beside them."""
    if chain.open is None:
        chain.open_link(Link(chain.num_links, _terms(chain.num_links, 0)[:1]))
    version, rule, merged = chain.version + 1, ServerRule("adam", lr=0.5), None
    lora_a, lora_b = _numbers(version, RANK, IN), _numbers(version + 20, OUT, RANK)
    pair = LowRank("fc1", -0.5, lora_a, lora_b), LowRank("fc1", 0.5, lora_a, lora_b, _numbers(version, RANK, RANK))
    if version in BESIDE:
        delta = _numbers(version + 40, 2, 2)
        merged = Link(chain.num_links, (Dense("fc2.weight", delta), *pair, Dense("fc2.weight", delta)), rule)
    terms = (*pair, Set("fc1.bias", _numbers(version + 50, OUT)))
    closes = version % 4 == 0
    link = Link(chain.num_links + int(merged is not None), terms, rule if closes else None)
    link = encode_link(link, codec_text("int8", {"stochastic": True}), version, ["fc1.lora_b", "set fc1.bias"])
    chain.update(link, close=closes, merged=merged)


def _histories(rounds: int = ROUNDS, *, advance: Callable[[Chain], None] = _advance) -> list[Chain]:
    """Return the chain as it is at each version, grown anew each time."""
    chains = []
    for version in range(rounds + 1):
        chain = _start()
        for _ in range(version):
            advance(chain)
        chains.append(chain)
    return chains


def _written(
    folder: Path,
    *,
    rounds: int = ROUNDS,
    snapshots: tuple[int, ...] = (),
    advance: Callable[[Chain], None] = _advance,
) -> ChainStore:
    """Write a history of `rounds` versions, with snapshots after the given versions."""
    store, chain = ChainStore(folder), _start()
    store.create(chain)
    for version in range(1, rounds + 1):
        advance(chain)
        store.append(chain)
        if version in snapshots:
            store.snapshot(chain)
    return store


def _assert_same(found: Chain, expected: Chain) -> None:
    assert found.digest == expected.digest
    assert found.hash == expected.hash
    assert equal_weights(found.weights(), expected.weights())
    assert equal_weights(found.merged, expected.merged)
    for name in ("num_links", "num_links_before", "version", "updates_in_link"):
        assert getattr(found, name) == getattr(expected, name), name
    assert [link.digest for link in found.links] == [link.digest for link in expected.links]
    assert (found.open is None) == (expected.open is None)
    assert equal_weights(found.slots, expected.slots)
    for one, other in zip(_all_links(found), _all_links(expected), strict=True):
        _assert_travels_alike(one, other)


def _all_links(chain: Chain) -> list[Link]:
    return [*chain.links, *([] if chain.open is None else [chain.open])]


def _assert_travels_alike(found: Link, expected: Link) -> None:
    assert found.packed.keys() == expected.packed.keys()
    for name, packed in expected.packed.items():
        assert (found.packed[name].codec, found.packed[name].seed) == (packed.codec, packed.seed)
        assert list(found.packed[name].arrays) == list(packed.arrays)
        for array, values in packed.arrays.items():
            assert found.packed[name].arrays[array].dtype == values.dtype
            assert np.array_equal(found.packed[name].arrays[array], values)


@pytest.mark.parametrize("snapshots", [(), (2,), (2, 4), (3, 5), (6,)], ids=str)
def test_every_version_is_read_as_it_was_written(tmp_path: Path, snapshots: tuple[int, ...]) -> None:
    _written(tmp_path, snapshots=snapshots)
    store = ChainStore(tmp_path)
    assert store.versions() == list(range(ROUNDS + 1))
    for version, expected in enumerate(_histories()):
        _assert_same(store.load(version), expected)
    _assert_same(store.load(), _histories()[-1])


def test_a_chain_goes_on_after_any_version_that_is_loaded(tmp_path: Path) -> None:
    for version in range(ROUNDS + 1):
        store = _written(tmp_path / str(version), snapshots=(2,))
        chain = store.load(version)
        while chain.version < ROUNDS:
            _advance(chain)
            store.append(chain)
        _assert_same(ChainStore(tmp_path / str(version)).load(), _histories()[-1])


def test_going_on_from_an_early_version_replaces_the_later_ones(tmp_path: Path) -> None:
    store = _written(tmp_path, snapshots=(4, 6))
    chain = store.load(3)
    _advance(chain, shift=1000)
    store.append(chain)
    again = ChainStore(tmp_path)
    assert again.versions() == [0, 1, 2, 3, 4]
    _assert_same(again.load(), chain)
    assert chain.digest != _histories()[4].digest


def test_creating_a_chain_replaces_what_the_folder_held(tmp_path: Path) -> None:
    _written(tmp_path, snapshots=(2,))
    ChainStore(tmp_path).create(_start())
    assert ChainStore(tmp_path).versions() == [0]
    _assert_same(ChainStore(tmp_path).load(), _start())


@pytest.mark.parametrize("rounds", range(1, ROUNDS + 1))
def test_forgetting_replaced_versions_keeps_the_newest_of_each_link(tmp_path: Path, rounds: int) -> None:
    store = _written(tmp_path, rounds=rounds, snapshots=(2,))
    store.forget_replaced()
    kept = [0, *(version for version in range(1, rounds + 1) if version % ROUNDS_PER_LINK == 0 or version == rounds)]
    again = ChainStore(tmp_path)
    assert again.versions() == kept
    assert len(list(tmp_path.glob("version_*"))) == len(kept) - 1
    for version in kept:
        _assert_same(again.load(version), _histories()[version])


def test_explicit_numbers_are_all_that_a_version_stores(tmp_path: Path) -> None:
    """Seeds, zeros and unchanged weights take no room: 4 bytes for each explicit number, and a header."""
    _written(tmp_path, rounds=1)
    content = (tmp_path / "version_000001.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - header == 4 * (OUT * RANK + OUT + 2 * 2)


# ---- links merged beside the open one, rules, encoded numbers ----


@pytest.mark.parametrize("snapshots", [(), (2,), (5,), (4, 8), (3, 6, 9)], ids=str)
def test_every_version_of_a_rich_history_is_read_as_it_was_written(tmp_path: Path, snapshots: tuple[int, ...]) -> None:
    _written(tmp_path, rounds=RICH_ROUNDS, snapshots=snapshots, advance=_advance_richly)
    for version, expected in enumerate(_histories(RICH_ROUNDS, advance=_advance_richly)):
        _assert_same(ChainStore(tmp_path).load(version), expected)


def test_a_rich_chain_goes_on_after_any_version_that_is_loaded(tmp_path: Path) -> None:
    expected = _histories(RICH_ROUNDS, advance=_advance_richly)[-1]
    for version in range(RICH_ROUNDS):
        store = _written(tmp_path / str(version), rounds=version, snapshots=(3,), advance=_advance_richly)
        chain = store.load()
        while chain.version < RICH_ROUNDS:
            _advance_richly(chain)
            store.append(chain)
        _assert_same(ChainStore(tmp_path / str(version)).load(), expected)


@pytest.mark.parametrize("rounds", range(1, RICH_ROUNDS + 1))
@pytest.mark.parametrize("snapshots", [(), (5,)], ids=str)
def test_forgetting_keeps_the_versions_that_merged_a_link_for_good(
    tmp_path: Path, rounds: int, snapshots: tuple[int, ...]
) -> None:
    """Version 2 merges link 0 and opens link 1, which version 3 replaces: link 0 is in version 2's file only."""
    store = _written(tmp_path, rounds=rounds, snapshots=snapshots, advance=_advance_richly)
    store.forget_replaced()
    again, expected = ChainStore(tmp_path), _histories(rounds, advance=_advance_richly)
    closing = {*BESIDE, 4, 8}
    kept = [0, *(version for version in range(1, rounds + 1) if version in closing or version == rounds)]
    assert again.versions() == kept
    assert len(list(tmp_path.glob("version_*"))) == len(kept) - 1
    for version in kept:
        _assert_same(again.load(version), expected[version])


def test_a_link_that_has_one_factor_twice_is_written_and_read(tmp_path: Path) -> None:
    """The file format refuses tensors that share memory."""
    lora_a, lora_b = _numbers(1, RANK, IN), _numbers(2, OUT, RANK)
    chain, store = _start(), ChainStore(tmp_path)
    store.create(chain)
    chain.open_link(Link(0, ()))
    chain.update(Link(0, tuple(LowRank("fc1", scale, lora_a, lora_b) for scale in (-1.0, 1.0))), close=False)
    store.append(chain)
    _assert_same(ChainStore(tmp_path).load(), chain)


# ---- damage ----


def _same_or_refused(folder: Path, path: Path, expected: Chain) -> None:
    """Damage that changes no meaning (a space in a header) may pass; anything else is refused by the file's name."""
    try:
        found = ChainStore(folder).load()
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        _assert_same(found, expected)


@pytest.mark.parametrize("name", ["base", "version_000002", "version_000003", "snapshot_000001"])
@pytest.mark.parametrize("mask", [1, 0x80])
def test_no_damaged_byte_gives_another_model(tmp_path: Path, name: str, mask: int) -> None:
    _written(tmp_path, rounds=3, snapshots=(2,))
    path, expected = tmp_path / f"{name}.safetensors", _histories()[3]
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
        _same_or_refused(tmp_path, path, expected)


def test_no_damaged_byte_gives_other_encoded_numbers(tmp_path: Path) -> None:
    """What the clients are sent is checked as well as what the model is made of."""
    _written(tmp_path, rounds=2, advance=_advance_richly)
    path, expected = tmp_path / "version_000002.safetensors", _histories(2, advance=_advance_richly)[2]
    content = path.read_bytes()
    for place in range(0, len(content), 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        _same_or_refused(tmp_path, path, expected)


@pytest.mark.parametrize("name", ["base", "version_000002", "version_000003", "snapshot_000001"])
def test_a_damaged_number_is_refused_by_the_files_name(tmp_path: Path, name: str) -> None:
    _written(tmp_path, rounds=3, snapshots=(2,))
    path = tmp_path / f"{name}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=path.name):
        ChainStore(tmp_path).load()


@pytest.mark.parametrize("name", ["base", "version_000002", "version_000003", "snapshot_000001"])
@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-3])], ids=["missing", "cut"]
)
def test_a_missing_or_cut_file_is_refused_by_its_name(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    _written(tmp_path, rounds=3, snapshots=(2,))
    path = tmp_path / f"{name}.safetensors"
    damage(path)
    with pytest.raises(ValueError, match=path.name):
        ChainStore(tmp_path).load()


def test_a_file_of_another_chain_is_refused(tmp_path: Path) -> None:
    _written(tmp_path / "one", rounds=2)
    other, chain = ChainStore(tmp_path / "two"), _start()
    other.create(chain)
    _advance(chain, shift=1000)
    other.append(chain)
    name = "version_000001.safetensors"
    (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    with pytest.raises(ValueError, match=rf"{name} is damaged: version 1 has another digest"):
        ChainStore(tmp_path / "one").load(1)


def test_links_that_changed_places_are_refused(tmp_path: Path) -> None:
    _written(tmp_path, rounds=4)
    first, second = (tmp_path / f"version_00000{version}.safetensors" for version in (2, 4))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(ValueError, match=first.name):
        ChainStore(tmp_path).load()


def test_an_index_of_another_format_is_refused(tmp_path: Path) -> None:
    _written(tmp_path, rounds=1)
    path = tmp_path / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(ValueError, match=r"index\.json has format 3; this program reads 2"):
        ChainStore(tmp_path).load()


@pytest.mark.parametrize(
    "content", [None, "", "[", "[]", '{"format": 2}', '{"format": 2, "versions": [{}], "snapshots": []}']
)
def test_a_missing_or_damaged_index_is_refused_by_its_name(tmp_path: Path, content: str | None) -> None:
    _written(tmp_path, rounds=1)
    path = tmp_path / "index.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        ChainStore(tmp_path).load()


def test_a_version_that_is_not_kept_is_answered_with_those_that_are(tmp_path: Path) -> None:
    store = _written(tmp_path)
    store.forget_replaced()
    with pytest.raises(ValueError, match=r"version 3 is not in .*; it holds \[0, 2, 4, 6\]"):
        store.load(3)


def test_a_crash_before_the_index_is_written_leaves_the_former_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _written(tmp_path, rounds=3)
    chain = store.load()
    _advance(chain)

    def crash() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_write_index", crash)
    with pytest.raises(KeyboardInterrupt):
        store.append(chain)
    _assert_same(ChainStore(tmp_path).load(), _histories()[3])
