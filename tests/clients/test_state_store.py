"""A client's state is a candidate until the server names it."""

import pytest
import torch

from clients.state_store import FEEDBACK, MOMENTS, ClientState, ClientStore, LostState

LINK = [3, [["low_rank", "fc1", 1.0, ["zero", [2, 5]], ["zero", [4, 2]]]]]


def state(value):
    return ClientState(
        {MOMENTS: {"fc1.lora_b": torch.full((4, 2), float(value))}, FEEDBACK: {"b": torch.ones(2)}}, value, LINK
    )


def value_of(found):
    return float(found.tensors[MOMENTS]["fc1.lora_b"][0, 0]), found.num_steps, found.link


@pytest.fixture(params=["memory", "disk"])
def make_store(request, tmp_path):
    """Return a function that opens the store: the same one again, or on a disk a new one with nothing in memory."""
    if request.param == "disk":
        return lambda: ClientStore(tmp_path / "clients")
    store = ClientStore()
    return lambda: store


def test_a_candidate_comes_back_as_it_was_saved(make_store):
    make_store().save(7, 3, state(3))
    assert value_of(make_store().load(7, 3)) == (3.0, 3, LINK)


def test_what_is_kept_for_one_purpose_is_not_mixed_with_another(make_store):
    make_store().save(7, 3, state(3))
    found = make_store().load(7, 3).tensors
    assert {purpose: list(tensors) for purpose, tensors in found.items()} == {MOMENTS: ["fc1.lora_b"], FEEDBACK: ["b"]}
    assert torch.equal(found[FEEDBACK]["b"], torch.ones(2))


def test_a_named_round_is_loaded_and_not_the_newest(make_store):
    """The reply of round 4 was not used, so the plan still names round 3."""
    make_store().save(7, 3, state(3))
    make_store().save(7, 4, state(4))
    assert value_of(make_store().load(7, 3))[0] == 3.0


def test_loading_one_candidate_forgets_the_others_of_that_client_only(make_store):
    make_store().save(7, 3, state(3))
    make_store().save(7, 4, state(4))
    make_store().save(70, 4, state(40))
    make_store().load(7, 4)
    with pytest.raises(LostState, match="client 7 has no state of round 3"):
        make_store().load(7, 3)
    assert value_of(make_store().load(70, 4))[0] == 40.0


def test_a_candidate_survives_being_loaded(make_store):
    """A round that is run again after a crash starts from the same state."""
    make_store().save(1, 2, state(2))
    assert value_of(make_store().load(1, 2)) == value_of(make_store().load(1, 2))


def test_state_that_is_not_there_is_reported(make_store):
    with pytest.raises(LostState, match="client 5 has no state of round 9"):
        make_store().load(5, 9)
