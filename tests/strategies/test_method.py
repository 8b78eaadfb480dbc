"""The pieces that methods are made of."""

from dataclasses import replace

import pytest
import torch

from fedraclora.link import Link, LowRank, Private, Set, Zero
from fedraclora.sketch import SketchKey
from fedraclora.targets import MatrixShape
from strategies.method import Adapter, ClientUpdate, client_terms, mean_update, replace_trained, shares

SHAPES = {"fc1": MatrixShape(out=6, in_=9), "fc2": MatrixShape(out=4, in_=6)}
KEY = SketchKey("orthonormal", 1, 0, "fc1", "b", 2, 9)


def adapter(rank=2):
    ranks = dict.fromkeys(SHAPES, rank)
    return Adapter(SHAPES, ranks, {"fc1": 1.5, "fc2": 0.5}, (), ("fc1.weight", "fc1.bias"), "gaussian", 7)


@pytest.mark.parametrize(
    ("side", "drawn", "dims"), [("b", "lora_a", (9, 6)), ("ab", "lora_a", (9, 6)), ("a", "lora_b", (6, 4))]
)
def test_one_factor_is_drawn_and_the_other_is_zero(side, drawn, dims):
    terms = adapter().open_link(3, dict.fromkeys(SHAPES, side)).low_rank_terms()
    for (layer, shape), dim in zip(SHAPES.items(), dims, strict=True):
        key = getattr(terms[layer], drawn)
        assert (key.law, key.seed, key.link, key.layer, key.side, key.rank, key.dim) == (
            "gaussian",
            7,
            3,
            layer,
            side,
            2,
            dim,
        )
        other = getattr(terms[layer], "lora_b" if drawn == "lora_a" else "lora_a")
        assert other == Zero((shape.out, 2) if drawn == "lora_a" else (2, shape.in_))
        assert terms[layer].scale == {"fc1": 1.5, "fc2": 0.5}[layer]


def test_where_both_factors_train_the_rank_is_at_most_the_smaller_dimension():
    adapter(rank=4).open_link(0, dict.fromkeys(SHAPES, "ab"))
    with pytest.raises(ValueError, match=r"min\(in, out\) = 4"):
        adapter(rank=5).open_link(0, dict.fromkeys(SHAPES, "ab"))
    adapter(rank=5).open_link(0, dict.fromkeys(SHAPES, "b"))


def test_private_draws_are_each_clients_own_and_the_rest_of_the_link_is_common():
    link = adapter().open_link(3, {"fc1": "b", "fc2": "a"}, is_private=True)
    shared = adapter().open_link(3, {"fc1": "b", "fc2": "a"}).low_rank_terms()
    terms = link.low_rank_terms()
    assert terms["fc1"] == replace(shared["fc1"], lora_a=Private(shared["fc1"].lora_a))
    assert terms["fc2"] == replace(shared["fc2"], lora_b=Private(shared["fc2"].lora_b))
    keys = {link.of_client(client).factors["fc1.lora_a"] for client in range(5)}
    assert len(keys) == 5
    assert {replace(key, seed=7) for key in keys} == {shared["fc1"].lora_a}


LINK = Link(0, (LowRank("fc1", 1.5, KEY, Zero((6, 2))),))


def test_the_mean_is_weighted_and_by_key():
    updates = {
        4: ClientUpdate({"x": torch.tensor([1.0]), "y": torch.tensor([10.0])}, weight=3.0, link=LINK),
        1: ClientUpdate({"x": torch.tensor([5.0]), "y": torch.tensor([30.0])}, weight=1.0, link=LINK),
    }
    assert shares(updates) == {1: 0.25, 4: 0.75}
    assert mean_update(updates) == {"x": torch.tensor([2.0]), "y": torch.tensor([15.0])}


def test_a_client_ends_with_what_it_sent_in_the_place_of_what_it_started_from():
    (term,) = client_terms(
        ClientUpdate({"fc1.lora_b": torch.ones(6, 2), "fc1.bias": torch.ones(6)}, 1.0, LINK)
    ).values()
    assert term == LowRank("fc1", 1.5, KEY, term.lora_b)
    assert torch.equal(term.lora_b, torch.ones(6, 2))


def test_trained_factors_replace_their_own_and_whole_tensors_are_set():
    start = Link(0, (LowRank("fc1", 1.5, KEY, Zero((6, 2))),))
    trained = {"fc1.lora_b": torch.ones(6, 2), "fc1.bias": torch.arange(6.0)}
    low_rank, dense = replace_trained(start, trained)
    assert low_rank == LowRank("fc1", 1.5, KEY, trained["fc1.lora_b"])
    assert dense == Set("fc1.bias", trained["fc1.bias"])
