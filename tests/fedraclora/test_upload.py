"""Tests of fedraclora.upload: what a client sends is what its server reads, whatever was left out on the way."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora import sketch
from fedraclora.codec import codec_of, codec_text
from fedraclora.link import Link, LowRank, Zero
from fedraclora.plan import FEEDBACKS, RoundPlan, Sending, Training
from fedraclora.sketch import SketchKey
from fedraclora.upload import (
    Manifest,
    as_factor,
    estimate,
    factor_sides,
    manifest,
    next_variates,
    pack,
    sent_values,
    unpack,
)

OUT, IN, RANK = 6, 9, 2
SHAPES = {"update": {"fc1.lora_b": (OUT, RANK), "fc1.lora_a": (RANK, IN)}, "dense": {"fc1.bias": (OUT,)}}
EXPECTED = Manifest(SHAPES, torch.float64)
TOP_K = codec_text("top_k", {"share": 0.3})
INT8 = codec_text("int8", {"stochastic": True, "scale_per": "tensor"})
codecs = st.sampled_from(
    ["", TOP_K, INT8, codec_text("float16", {}), codec_text("rand_k", {"share": 0.5, "scale": True})]
)


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _named(seed: int) -> dict[str, Tensor]:
    shapes = {key: shape for kind in SHAPES.values() for key, shape in kind.items()}
    return {key: _numbers(seed + place, *shape) for place, (key, shape) in enumerate(shapes.items())}


def _link(index: int = 0, side: str = "b", scale: float = 0.5) -> Link:
    key = SketchKey("gaussian", 5, index, "fc1", side, RANK, IN if side == "b" else OUT)
    zero = Zero((OUT, RANK) if side == "b" else (RANK, IN))
    return Link(index, (LowRank("fc1", scale, *((key, zero) if side == "b" else (zero, key))),))


def _send(sending: Sending, values, starts, memory, *, seed=3, whole=False):  # noqa: PLR0913
    """Return what the server reads of a reply, and the client's next memory."""
    out = pack(sending, values, starts, memory, seed=seed, expected=EXPECTED, is_whole=whole)
    return unpack(sending, out.arrays, EXPECTED, seed=seed, is_whole=whole), out


def _close(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=tolerance, atol=tolerance)


def _minus(first, second):
    return {key: tensor - second[key] for key, tensor in first.items()}


def _norm(named):
    return sum(float(tensor.square().sum()) for tensor in named.values()) ** 0.5


def test_plain_values_arrive_bit_for_bit() -> None:
    values = _named(0)
    found, out = _send(Sending(), values, _named(50), {})
    assert all(torch.equal(found[key], tensor) for key, tensor in values.items())
    assert out.memory == {}
    assert {kind: list(arrays) for kind, arrays in out.arrays.items()} == {"update": ["flat"], "dense": ["flat"]}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), codec=codecs)
def test_error_feedback_loses_nothing_but_postpones_it(seed: int, codec: str) -> None:
    """What is read plus what is remembered is the difference plus what was remembered before."""
    sending = Sending(codec=codec, feedback="ef")
    values, starts, memory = _named(seed), _named(seed + 100), _named(seed + 200)
    found, out = _send(sending, values, starts, memory, seed=seed)
    total = {key: found[key] + out.memory[key] for key in found}
    _close(total, {key: values[key] - starts[key] + memory[key] for key in values})


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), codec=codecs)
def test_both_ends_of_ef21_hold_the_same_estimate_in_every_round(seed: int, codec: str) -> None:
    sending = Sending(codec=codec, feedback="ef21")
    client: dict[str, Tensor] = {}
    server: dict[str, Tensor] = {}
    for round in range(4):
        sent, out = _send(sending, _named(seed + 7 * round), _named(seed + 500), client, seed=round)
        client, server = out.memory, estimate("ef21", sent, server, is_whole=False)
        _close(server, client)


def test_the_estimate_of_ef21_comes_close_to_a_difference_that_stays() -> None:
    """Each round a contraction leaves at most sqrt(1 - delta) of the gap; for top-k with share 0.3, delta >= 0.27."""
    sending, values, starts = Sending(codec=TOP_K, feedback="ef21"), _named(0), _named(100)
    memory: dict[str, Tensor] = {}
    gaps = []
    for round in range(8):
        _, out = _send(sending, values, starts, memory, seed=round)
        memory = out.memory
        gaps.append(_norm(_minus(_minus(values, starts), memory)))
    assert all(after <= (1 - 0.27) ** 0.5 * before + 1e-12 for before, after in pairwise(gaps))
    assert gaps[-1] < 0.05 * gaps[0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), codec=codecs)
def test_marina_is_exact_in_whole_rounds_and_moves_by_the_encoded_change_in_others(seed: int, codec: str) -> None:
    sending = Sending(codec=codec, feedback="marina")
    starts, first, second = _named(seed + 500), _named(seed), _named(seed + 50)
    sent, out = _send(sending, first, starts, {}, whole=True)
    known = estimate("marina", sent, {}, is_whole=True)
    _close(known, _minus(first, starts))
    _close(out.memory, _minus(first, starts))
    sent, out = _send(sending, second, starts, out.memory, seed=9)
    found = estimate("marina", sent, known, is_whole=False)
    assert out.memory.keys() == found.keys()
    _close({key: found[key] - known[key] for key in found}, sent)
    if codec == "":
        _close(found, _minus(second, starts), 1e-10)


def test_a_client_whose_server_knows_nothing_of_it_starts_both_ends_at_zero() -> None:
    sending = Sending(codec=INT8, feedback="marina")
    sent, _ = _send(sending, _named(0), _named(10), {})
    _close(estimate("marina", sent, {}, is_whole=False), sent)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), clip=st.floats(0.01, 20))
def test_no_difference_is_longer_than_the_clip(seed: int, clip: float) -> None:
    values, starts = _named(seed), _named(seed + 100)
    found, out = _send(Sending(clip=clip), values, starts, {})
    whole = _minus(values, starts)
    assert _norm(found) <= clip * (1 + 1e-9)
    assert out.is_within == (_norm(whole) <= clip)
    factor = min(1.0, clip / _norm(whole))
    _close(found, {key: tensor * factor for key, tensor in whole.items()}, 1e-9)


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_a_reply_takes_what_was_reckoned_and_no_more_where_its_size_varies(feedback: str) -> None:
    for codec in ("", TOP_K, INT8, codec_text("lossless", {})):
        if feedback != "none" and not codec:
            continue
        sending = Sending(codec=codec, feedback=feedback, variates=True)
        for whole in (False, True):
            out = pack(sending, _named(0), _named(9), {}, seed=1, expected=EXPECTED, is_whole=whole)
            taken = sum(array.nbytes for arrays in out.arrays.values() for array in arrays.values())
            variates = 8 * (OUT * RANK + RANK * IN + OUT)
            reckoned = sum(EXPECTED.max_bytes(sending, is_whole=whole).values())
            is_fixed = codec_of(codec).is_fixed_size or (whole and feedback == "marina")
            assert taken + variates == reckoned if is_fixed else taken + variates <= reckoned


@pytest.mark.parametrize("side", ["b", "a"])
def test_a_difference_in_the_span_of_the_drawn_factor_is_said_exactly_by_the_other_one(side: str) -> None:
    link = _link(side=side, scale=0.25)
    (term,) = link.terms
    drawn = sketch.draw(link.drawn[0]).double()
    factor = _numbers(4, OUT, RANK) if side == "b" else _numbers(4, RANK, IN)
    difference = 0.25 * (factor @ drawn if side == "b" else drawn @ factor)
    name, found = as_factor(difference, term)
    assert name == f"fc1.lora_{side}"
    torch.testing.assert_close(found, factor, rtol=1e-10, atol=1e-10)
    assert factor_sides(link) == {"fc1": f"lora_{side}"}


def test_of_a_weight_trained_in_full_the_nearest_factor_is_sent() -> None:
    """(W_k - W) A^T (A A^T)^-1 / s, here by least squares."""
    link = _link(scale=0.25)
    trained, start = {"fc1.weight": _numbers(1, OUT, IN)}, {"fc1.weight": _numbers(2, OUT, IN)}
    plan = RoundPlan(1, Training({"fc1": "w"}, sends_factor=True))
    values, starts = sent_values(plan, trained, start, link)
    drawn = sketch.draw(link.drawn[0]).double().numpy()
    move = (trained["fc1.weight"] - start["fc1.weight"]).numpy()
    expected = np.linalg.lstsq(drawn.T, move.T, rcond=None)[0].T / 0.25
    np.testing.assert_allclose(values["fc1.lora_b"].numpy(), expected, rtol=1e-9)
    assert not starts["fc1.lora_b"].any()
    found = manifest(plan.training, link, {"fc1.weight": (OUT, IN)}, torch.float64)
    assert found.shapes == {"update": {"fc1.lora_b": (OUT, RANK)}}


def test_control_variates_are_option_two_of_scaffold() -> None:
    own, server, values, starts = (_named(seed) for seed in (0, 10, 20, 30))
    new, change = next_variates(own, server, values, starts, 0.1 * 5)
    for key in values:
        expected = own[key] - server[key] + (starts[key] - values[key]) / (5 * 0.1)
        torch.testing.assert_close(new[key], expected)
        torch.testing.assert_close(change[key], expected - own[key])
    first, _ = next_variates({}, {}, values, starts, 0.5)
    _close(first, {key: (starts[key] - values[key]) / 0.5 for key in values})
