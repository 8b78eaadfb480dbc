"""Tests of fedraclora.chain_store."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedraclora.chain import Chain, equal_weights
from fedraclora.chain_store import ChainStore
from fedraclora.link import Dense, Link, LowRank, Set, Term, Zero
from fedraclora.sketch import SketchKey

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
    chain.update(_terms(chain.num_links, version + shift), close=version % ROUNDS_PER_LINK == 0)


def _histories(rounds: int = ROUNDS) -> list[Chain]:
    """Return the chain as it is at each version, grown anew each time."""
    chains = []
    for version in range(rounds + 1):
        chain = _start()
        for _ in range(version):
            _advance(chain)
        chains.append(chain)
    return chains


def _written(folder: Path, *, rounds: int = ROUNDS, snapshots: tuple[int, ...] = ()) -> ChainStore:
    """Write a history of `rounds` versions, with snapshots after the given versions."""
    store, chain = ChainStore(folder), _start()
    store.create(chain)
    for version in range(1, rounds + 1):
        _advance(chain)
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
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(ValueError, match=r"index\.json has format 2; this program reads 1"):
        ChainStore(tmp_path).load()


@pytest.mark.parametrize(
    "content", [None, "", "[", "[]", '{"format": 1}', '{"format": 1, "versions": [{}], "snapshots": []}']
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
