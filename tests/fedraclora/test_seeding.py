"""Tests of fedraclora.seeding."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.seeding import STREAMS, derive_seed, generator, stream

LABELS = st.lists(st.text(max_size=6) | st.integers(-(10**20), 10**20), max_size=4).map(tuple)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((0,), 7552799593083971110),
        ((0, "a"), 157797759681822459),
        ((0, "a", "b"), 4490653647396047185),
        ((0, 1), 7841110751031542477),
        ((0, "1"), 2222597598736439458),
        ((-5, "x", 2**70), 9147790137397727852),
    ],
)
def test_seeds_never_change(parts: tuple[int | str, ...], expected: int) -> None:
    assert derive_seed(*parts) == expected  # type: ignore[arg-type]  # the first part is an int


def test_seed_is_the_hash_of_the_tagged_and_measured_labels() -> None:
    message = b"i\x02\0\0\0\0\0\0\0-3" + b"s\x01\0\0\0\0\0\0\0a" + b"i\x02\0\0\0\0\0\0\x0012"
    word = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
    assert derive_seed(-3, "a", 12) == word // 2


def test_streams_never_change() -> None:
    assert {name: stream(0, name) for name in STREAMS} == {
        "partition": 3141618645868914796,
        "init": 9066165233851832729,
        "sketch": 442017742609312025,
        "cohort": 6811002602455221361,
        "batches": 505990628508743036,
        "noise": 3395100310811385299,
    }


@given(st.integers(), LABELS, st.integers(), LABELS)
def test_different_names_give_different_seeds(
    root: int, labels: tuple[str | int, ...], other_root: int, others: tuple[str | int, ...]
) -> None:
    same_name = (root, labels) == (other_root, others)
    assert (derive_seed(root, *labels) == derive_seed(other_root, *others)) is same_name


@pytest.mark.parametrize(
    ("labels", "others"),
    [(("a", "b"), ("ab",)), ((1,), ("1",)), (("a", ""), ("a",)), ((1, 2), (12,)), (("a", "b"), ("b", "a"))],
)
def test_type_order_and_grouping_of_labels_matter(labels: tuple[str | int, ...], others: tuple[str | int, ...]) -> None:
    assert derive_seed(0, *labels) != derive_seed(0, *others)


@given(st.integers(), LABELS)
def test_seeds_fit_a_signed_64_bit_integer(root: int, labels: tuple[str | int, ...]) -> None:
    assert 0 <= derive_seed(root, *labels) < 2**63


def test_all_63_bits_of_a_seed_vary() -> None:
    seeds = [derive_seed(root) for root in range(200)]
    assert all(0 < sum(seed >> bit & 1 for seed in seeds) < 200 for bit in range(63))


@pytest.mark.parametrize("label", [True, 1.0, None, b"a", np.int64(3)])
def test_other_labels_are_refused(label: object) -> None:
    with pytest.raises(TypeError, match=f"str and int labels; found .* of type {type(label).__name__}"):
        derive_seed(0, label)  # type: ignore[arg-type]  # the point of the test


def test_unknown_stream_is_answered_with_the_streams() -> None:
    with pytest.raises(ValueError, match="'chort'; the streams are partition, init, sketch, cohort, batches, noise"):
        stream(0, "chort")


def test_every_root_has_its_own_cohort_sequence() -> None:
    cohorts = {tuple(generator(stream(root, "cohort")).permutation(50)[:10].tolist()) for root in range(100)}
    assert len(cohorts) == 100


def test_generators_of_one_seed_agree_and_are_independent_objects() -> None:
    first, second = generator(5), generator(5)
    first_draws = first.integers(2**40, size=8)
    np.testing.assert_array_equal(first_draws, second.integers(2**40, size=8))
    assert not np.array_equal(first_draws, generator(6).integers(2**40, size=8))


def test_generator_is_philox_keyed_by_the_seed() -> None:
    state = generator(2**63 - 1).bit_generator.state
    assert state["bit_generator"] == "Philox"
    assert state["state"]["key"].tolist() == [2**63 - 1, 0]
