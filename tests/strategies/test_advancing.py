"""Since when a factor of the open link has stood as it is."""

import torch

from fedraclora.link import Link, LowRank
from fedraclora.sketch import SketchKey
from strategies.advancing import unchanged_since

KEY = SketchKey("orthonormal", 1, 0, "fc1", "b", 2, 9)


def link(**factors):
    return Link(0, tuple(LowRank(layer, 1.0, KEY, tensor) for layer, tensor in factors.items()))


def test_what_is_the_same_bit_for_bit_keeps_its_version_and_the_rest_is_new():
    one, two = torch.ones(6, 2), torch.full((6, 2), 2.0)
    before, after = link(fc1=one, fc2=one), link(fc1=one.clone(), fc2=two, fc3=one)
    since = {"fc1.lora_b": 3, "fc2.lora_b": 4}
    assert unchanged_since(before, after, since, 9) == {"fc1.lora_b": 3, "fc2.lora_b": 9, "fc3.lora_b": 9}


def test_a_closed_link_has_nothing_that_stands():
    assert unchanged_since(link(fc1=torch.ones(6, 2)), None, {"fc1.lora_b": 3}, 9) == {}
