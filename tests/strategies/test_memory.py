"""What the server remembers comes back as it was, and in the basis of the link that asks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.files import read_tensors, write_tensors
from fedraclora.link import Link, LowRank, Zero, draw
from fedraclora.sketch import SketchKey
from strategies.memory import SLOTS, VARIATES, Memory, estimate_of


def link(index, side="b", rank=2):
    key = SketchKey("orthonormal", 1, index, "fc1", side, rank, 9 if side == "b" else 6)
    if side == "a":
        return Link(index, (LowRank("fc1", 1.5, lora_a=Zero((rank, 9)), lora_b=key),))
    return Link(index, (LowRank("fc1", 1.5, lora_a=key, lora_b=Zero((6, rank))),))


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@given(st.dictionaries(st.sampled_from([SLOTS, VARIATES, *map(estimate_of, range(12))]), st.integers(0, 5), max_size=5))
def test_a_trip_through_a_file_changes_nothing(tmp_path_factory, purposes):
    memory = Memory()
    for purpose, index in purposes.items():
        memory.remember(purpose, {"fc1.lora_b": random(6, 2) + index, "fc1.bias": random(6)}, link(index))
    path = tmp_path_factory.mktemp("memory") / "server.safetensors"
    write_tensors(path, *memory.to_file())
    again = Memory.from_file(*read_tensors(path))
    assert again.links == memory.links
    assert again.tensors.keys() == memory.tensors.keys()
    for purpose, named in memory.tensors.items():
        assert all(torch.equal(again.tensors[purpose][key], tensor) for key, tensor in named.items())


def test_nothing_is_recalled_of_what_was_never_remembered_or_is_forgotten():
    memory = Memory()
    assert memory.recall(VARIATES, link(0), mode="carry") == {}
    memory.remember(VARIATES, {"fc1.lora_b": random(6, 2)}, link(0))
    memory.forget(VARIATES)
    memory.forget(VARIATES)
    assert memory.recall(VARIATES, link(0), mode="carry") == {}
    assert memory.to_file()[0] == {}


@pytest.mark.parametrize("mode", ["drop", "carry", "transport"])
def test_in_the_same_basis_it_is_what_it_was(mode):
    memory, tensor = Memory(), random(6, 2)
    memory.remember(VARIATES, {"fc1.lora_b": tensor, "fc1.bias": random(6)}, link(4))
    recalled = memory.recall(VARIATES, link(4), mode=mode)
    assert torch.equal(recalled["fc1.lora_b"], tensor)
    assert torch.equal(recalled["fc1.bias"], random(6))


def test_in_another_basis_it_is_the_nearest_direction_in_weight_space():
    """The new tensor is m A_old A_new^T (A_new A_new^T)^-1, and the mirror image for side a."""
    for side, shape in (("b", (6, 2)), ("a", (2, 9))):
        memory, tensor, key = Memory(), random(*shape), f"fc1.lora_{side}"
        memory.remember(VARIATES, {key: tensor}, link(0, side))
        (new,) = memory.recall(VARIATES, link(1, side), mode="transport").values()
        old_basis, basis = (draw(link(index, side).drawn[0]).double() for index in (0, 1))
        if side == "b":
            expected = torch.linalg.lstsq(basis.T, (tensor.double() @ old_basis).T).solution.T
        else:
            expected = torch.linalg.lstsq(basis, old_basis @ tensor.double()).solution
        torch.testing.assert_close(new.double(), expected, rtol=1e-5, atol=1e-6)
        assert not memory.recall(VARIATES, link(1, side), mode="drop")[key].any()
        assert torch.equal(memory.recall(VARIATES, link(1, side), mode="carry")[key], tensor)
