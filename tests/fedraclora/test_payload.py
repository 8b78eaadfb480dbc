"""Tests of fedraclora.payload."""

from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.payload import digest_arrays, flatten, unflatten

shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5)


@given(shapes=shapes, dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_tensors_survive_the_trip_bit_for_bit(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    flat = flatten(tensors)
    assert flat.shape == (sum(prod(shape) for shape in shapes),)
    assert flat.nbytes == sum(tensor.nbytes for tensor in tensors)
    found = unflatten(flat, shapes)
    assert [tuple(tensor.shape) for tensor in found] == shapes
    assert all(
        torch.equal(tensor, again) and tensor.dtype == again.dtype for tensor, again in zip(tensors, found, strict=True)
    )


def test_numbers_lie_one_tensor_after_the_other_in_row_order() -> None:
    first, second = torch.arange(6.0).reshape(2, 3), torch.tensor([[7.0], [8.0]])
    assert flatten([first.T, second]).tolist() == [0, 3, 1, 4, 2, 5, 7, 8]


def test_special_values_survive() -> None:
    (found,) = unflatten(flatten([torch.tensor([-0.0, float("inf"), float("nan")])]), [(3,)])
    assert np.array_equal(np.signbit(found.numpy()[:2]), [True, False])
    assert found[1] == float("inf")
    assert found[2].isnan()


def test_gradients_and_memory_are_left_behind() -> None:
    tensor = torch.ones(3, requires_grad=True)
    flat = flatten([tensor])
    (found,) = unflatten(flat, [(3,)])
    flat[:] = 5
    assert not found.requires_grad
    assert found.tolist() == tensor.tolist() == [1, 1, 1]


def test_nothing_is_an_empty_float32_array() -> None:
    assert flatten([]).shape == (0,)
    assert flatten([]).dtype == np.float32
    assert unflatten(flatten([]), []) == []


@pytest.mark.parametrize("flat", [np.zeros(5, np.float32), np.zeros(7, np.float32), np.zeros((2, 3), np.float32)])
def test_another_number_of_values_is_refused(flat: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"does not hold the 6 numbers of shapes \[\(2, 2\), \(2,\)\]"):
        unflatten(flat, [(2, 2), (2,)])


# ---- digests of what was sent

ARRAYS = {"update": {"flat": np.arange(4, dtype=np.float32), "uint8": np.arange(3, dtype=np.uint8)}, "dense": {}}


def test_the_digest_of_arrays_does_not_depend_on_their_order_layout_or_byte_order() -> None:
    other = {
        "dense": {},
        "update": {"uint8": np.arange(6, dtype=np.uint8)[::2] // 2, "flat": np.arange(4, dtype=">f4")},
    }
    assert digest_arrays(other) == digest_arrays(ARRAYS)


@pytest.mark.parametrize(
    "change",
    [
        {"flat": np.arange(4, dtype=np.float64)},
        {"flat": np.arange(4, dtype=np.float32).view(np.int32)},
        {"flat": np.array([0, 1, 2, -3], dtype=np.float32)},
        {"flat": np.array([-0.0, 1, 2, 3], dtype=np.float32)},
        {"flat": np.arange(5, dtype=np.float32)},
        {"uint8": np.array([0, 1, 3], dtype=np.uint8)},
        {"more": np.zeros(0, dtype=np.float32)},
    ],
)
def test_the_digest_of_arrays_changes_with_names_types_sizes_and_bits(change: dict[str, np.ndarray]) -> None:
    assert digest_arrays({**ARRAYS, "update": {**ARRAYS["update"], **change}}) != digest_arrays(ARRAYS)


def test_the_digest_of_arrays_changes_with_the_kind() -> None:
    assert digest_arrays({"dense": ARRAYS["update"]}) != digest_arrays(ARRAYS)
