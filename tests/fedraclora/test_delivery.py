"""Tests of fedraclora.delivery: any replica ends at the server's bits, and is sent no byte too many."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora import sketch
from fedraclora.chain import Chain, equal_weights
from fedraclora.codec import codec_text
from fedraclora.delivery import (
    CATCH_UPS,
    NOTHING,
    Delivery,
    Needs,
    OpenLink,
    VersionMismatch,
    deliver,
    receive,
    sketch_digest,
)
from fedraclora.link import Dense, Link, LowRank, Private, Set, Stack, Term, Zero
from fedraclora.narrowing import narrow
from fedraclora.server_rule import ServerRule
from fedraclora.sketch import SketchKey
from fedraclora.travel import CATCH_UP, CONTROL, DENSE, FLAT, SNAPSHOT, UPDATE, Kept, encode_link, kept_of

OUT, IN, RANK, HEAD = 6, 24, 2, 5
FLOAT_BYTES = 4
LINK_BYTES = FLOAT_BYTES * OUT * RANK
SNAPSHOT_BYTES = FLOAT_BYTES * OUT * IN


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _start() -> Chain:
    return Chain.start(
        {"fc1.weight": _numbers(0, OUT, IN), "head.bias": _numbers(1, HEAD), "norm.weight": _numbers(2, HEAD)}
    )


def _low_rank(index: int, lora_b: Tensor | Zero) -> LowRank:
    return LowRank("fc1", 0.5, SketchKey("orthonormal", 3, index, "fc1", "b", RANK, IN), lora_b)


def _open(chain: Chain) -> None:
    if chain.open is None:
        chain.open_link(Link(chain.num_links, (_low_rank(chain.num_links, Zero((OUT, RANK))),)))


def _advance(chain: Chain, *, close: bool = True, dense: Sequence[str] = ()) -> None:
    """Run one round of a server: open a link where none is, and replace its terms."""
    _open(chain)
    terms: list[Term] = [_low_rank(chain.num_links, _numbers(100 + chain.version, OUT, RANK))]
    terms += [Set(name, _numbers(200 + chain.version, HEAD)) for name in dense]
    _update(chain, terms, close=close)


def _update(chain: Chain, terms: Sequence[Term], *, close: bool) -> None:
    chain.update(Link(chain.num_links, tuple(terms)), close=close)


def _deliver(chain: Chain, needs: Needs, *, policy: str = "cheapest") -> Delivery:
    """Deliver to a client that trains in the open link, if there is one, and keeps nothing of it."""
    opened = None if chain.open is None else OpenLink(chain.open, {})
    return deliver(chain, needs, policy=policy, opened=opened)


def _grown(num_links: int, dense: Sequence[str] = ()) -> Chain:
    chain = _start()
    for _ in range(num_links):
        _advance(chain, dense=dense)
    return chain


def _num_bytes(delivery: Delivery) -> dict[str, int]:
    return {kind: sum(array.nbytes for array in group.values()) for kind, group in delivery.arrays.items()}


def _assert_same(replica: Chain, server: Chain) -> None:
    assert replica.digest == server.digest
    assert replica.num_links == server.num_links
    assert equal_weights(replica.weights(), server.weights())
    # What the open link sets, a replica need not hold in its closed weights as well.
    closed = {name: tensor for name, tensor in server.merged.items() if name not in _set_by_open(server)}
    assert equal_weights({name: replica.merged[name] for name in closed}, closed)


def _set_by_open(chain: Chain) -> set[str]:
    return set() if chain.open is None else {term.target for term in chain.open.terms if isinstance(term, Set)}


# ---- replicas end where the server is ----


@settings(max_examples=50)
@given(data=st.data())
def test_any_pattern_of_participation_ends_at_the_servers_bits(data: st.DataObject) -> None:
    num_rounds, num_clients = data.draw(st.integers(1, 20)), 3
    rounds_per_link = data.draw(st.integers(1, 4))
    names = ["head.bias", "norm.weight"]
    server, replicas = _start(), [_start() for _ in range(num_clients)]
    held = [0] * num_clients
    for round in range(num_rounds):
        _open(server)
        for client in data.draw(st.sets(st.integers(0, num_clients - 1))):
            receive(replicas[client], _deliver(server, Needs(held[client])))
            _assert_same(replicas[client], server)
            held[client] = server.num_links
        chosen = data.draw(st.lists(st.sampled_from(names), unique=True))
        dense = sorted({*chosen, *_set_by_open(server)})
        _advance(server, close=(round + 1) % rounds_per_link == 0, dense=dense)
    for client, replica in enumerate(replicas):
        receive(replica, _deliver(server, Needs(held[client])))
        _assert_same(replica, server)


@settings(max_examples=30)
@given(data=st.data())
def test_a_replica_shared_by_clients_takes_their_deliveries_in_any_order(data: st.DataObject) -> None:
    """The simulator's clients hold different versions but share one replica, which is as new as the newest."""
    newest = data.draw(st.integers(0, 4))
    server, replica = _grown(newest, dense=["head.bias"]), _start()
    receive(replica, _deliver(server, Needs(0)))
    for _ in range(data.draw(st.integers(0, 20))):
        _advance(server, dense=["head.bias"])
    _open(server)
    held = data.draw(st.permutations([newest, *data.draw(st.lists(st.integers(0, newest), max_size=3))]))
    deliveries = [_deliver(server, Needs(num_held)) for num_held in held]
    for delivery in deliveries:
        receive(replica, delivery)
        _assert_same(replica, server)


def test_dense_differences_and_explicit_factors_arrive_too() -> None:
    server, replica = _start(), _start()
    for index in range(3):
        server.open_link(Link(index, ()))
        terms: list[Term] = [
            LowRank("fc1", 2.0, _numbers(index, 1, IN), _numbers(index + 9, OUT, 1)),
            Dense("norm.weight", torch.ones(HEAD)),
        ]
        _update(server, terms, close=True)
    receive(replica, _deliver(server, Needs(0)))
    _assert_same(replica, server)


def test_a_double_precision_chain_arrives_in_double_precision() -> None:
    server, replica = (Chain.start({"fc1.weight": _numbers(0, OUT, IN).double()}) for _ in range(2))
    for index in range(2):
        server.open_link(Link(index, ()))
        _update(server, [_low_rank(index, _numbers(index, OUT, RANK).double() / 3)], close=True)
    delivery = _deliver(server, Needs(0))
    assert all(group[FLAT].dtype == np.float64 for group in delivery.arrays.values())
    receive(replica, delivery)
    _assert_same(replica, server)


@pytest.mark.parametrize("num_held", [0, 3])
def test_receiving_a_delivery_twice_changes_nothing(num_held: int) -> None:
    server, replica = _grown(3, dense=["head.bias"]), _start()
    receive(replica, _deliver(server, Needs(0)))
    _advance(server, close=False)
    delivery = _deliver(server, Needs(num_held))
    receive(replica, delivery)
    before = {name: tensor.clone() for name, tensor in replica.merged.items()}
    receive(replica, delivery)
    assert equal_weights(replica.merged, before)
    _assert_same(replica, server)


def test_the_receivers_weights_do_not_share_memory_with_the_message() -> None:
    server, replica = _grown(1, dense=["head.bias"]), _start()
    _advance(server, close=False)
    delivery = _deliver(server, Needs(0))
    receive(replica, delivery)
    for group in delivery.arrays.values():
        group[FLAT][:] = 0
    _assert_same(replica, server)


# ---- what it costs ----


def test_a_client_of_the_last_round_is_sent_exactly_the_last_link() -> None:
    server = _grown(3)
    _open(server)
    delivery = _deliver(server, Needs(2))
    assert _num_bytes(delivery) == {UPDATE: LINK_BYTES}
    assert delivery.num_bytes == LINK_BYTES


def test_a_client_that_is_up_to_date_is_sent_nothing_and_an_open_link_as_update() -> None:
    server = _grown(2)
    _open(server)
    assert _deliver(server, Needs(2)).num_bytes == 0
    _advance(server, close=False)
    assert _num_bytes(_deliver(server, Needs(2))) == {UPDATE: LINK_BYTES}


def test_dense_values_of_the_last_round_are_their_own_kind() -> None:
    assert _num_bytes(_deliver(_grown(3, dense=["head.bias"]), Needs(2))) == {
        UPDATE: LINK_BYTES,
        DENSE: FLOAT_BYTES * HEAD,
    }


@pytest.mark.parametrize("num_missed", [1, 2, 5])
def test_missed_links_are_catch_up_of_j_m_r_floats(num_missed: int) -> None:
    server = _grown(8)
    expected = {CATCH_UP: num_missed * LINK_BYTES, UPDATE: LINK_BYTES}
    assert _num_bytes(_deliver(server, Needs(8 - 1 - num_missed))) == expected


def test_links_missed_before_an_open_one_are_catch_up() -> None:
    server = _grown(3)
    _advance(server, close=False)
    assert _num_bytes(_deliver(server, Needs(1))) == {CATCH_UP: 2 * LINK_BYTES, UPDATE: LINK_BYTES}


@given(num_links=st.integers(1, 3 * IN // RANK), num_held=st.integers(0, 40))
@settings(max_examples=40)
def test_the_cheaper_of_replay_and_snapshot_is_sent(num_links: int, num_held: int) -> None:
    """The break-even is at n / r links: j links of m r floats against m n."""
    num_held = min(num_held, num_links)
    found = _num_bytes(_deliver(_grown(num_links), Needs(num_held)))
    replay = (num_links - num_held) * LINK_BYTES
    if num_held >= num_links - 1:
        assert found == ({UPDATE: replay} if replay else {})
    elif replay <= SNAPSHOT_BYTES:
        assert found == {CATCH_UP: replay - LINK_BYTES, UPDATE: LINK_BYTES}
    else:
        assert num_links - num_held > IN / RANK
        assert found == {SNAPSHOT: SNAPSHOT_BYTES}


def test_a_client_of_the_last_round_gets_the_update_even_where_a_snapshot_would_be_smaller() -> None:
    server = _start()
    server.open_link(Link(0, ()))
    _update(server, [LowRank("fc1", 1.0, _numbers(0, IN, IN), _numbers(1, OUT, IN))], close=True)
    assert _num_bytes(_deliver(server, Needs(0))) == {UPDATE: FLOAT_BYTES * IN * (IN + OUT)}
    _advance(server)
    assert _num_bytes(_deliver(server, Needs(0))) == {SNAPSHOT: SNAPSHOT_BYTES}


def test_a_snapshot_comes_with_the_open_link_and_only_changed_tensors() -> None:
    server = _grown(IN, dense=["head.bias"])
    _advance(server, close=False)
    assert _num_bytes(_deliver(server, Needs(0))) == {SNAPSHOT: SNAPSHOT_BYTES + FLOAT_BYTES * HEAD, UPDATE: LINK_BYTES}


def test_a_value_that_a_later_link_sets_again_is_not_sent() -> None:
    server = _grown(5, dense=["head.bias"])
    for num_held in range(5):
        sent = _num_bytes(_deliver(server, Needs(num_held)))
        assert sent[DENSE] == FLOAT_BYTES * HEAD
        assert sent.get(CATCH_UP, 0) == (5 - 1 - num_held) * LINK_BYTES


HEAD_BYTES = FLOAT_BYTES * HEAD


def test_a_value_that_the_open_link_sets_again_is_not_sent_with_closed_links() -> None:
    server = _grown(3, dense=["head.bias", "norm.weight"])
    _advance(server, close=False, dense=["head.bias"])
    # Of the closed links only the newest norm is left to send.
    expected = {CATCH_UP: 3 * LINK_BYTES + HEAD_BYTES, UPDATE: LINK_BYTES, DENSE: HEAD_BYTES}
    assert _num_bytes(_deliver(server, Needs(0))) == expected
    for num_held in range(4):
        replica = _start()
        receive(replica, _deliver(_grown(num_held, dense=["head.bias", "norm.weight"]), Needs(0)))
        receive(replica, _deliver(server, Needs(num_held)))
        _assert_same(replica, server)


def test_a_value_that_the_open_link_sets_again_is_not_in_a_snapshot() -> None:
    server = _grown(IN, dense=["head.bias", "norm.weight"])
    _advance(server, close=False, dense=["head.bias"])
    delivery = _deliver(server, Needs(0))
    expected = {SNAPSHOT: SNAPSHOT_BYTES + HEAD_BYTES, UPDATE: LINK_BYTES, DENSE: HEAD_BYTES}
    assert _num_bytes(delivery) == expected
    replica = _start()
    receive(replica, delivery)
    _assert_same(replica, server)
    # Once the link is closed its value is part of the weights again, for old replicas and for new ones.
    _advance(server, dense=["head.bias"])
    receive(replica, _deliver(server, Needs(IN)))
    late = _start()
    receive(late, _deliver(server, Needs(0)))
    for one in (replica, late):
        _assert_same(one, server)
        assert equal_weights(one.merged, server.merged)


def test_a_value_set_once_long_ago_is_sent_to_who_lacks_it() -> None:
    server = _start()
    _advance(server, dense=["head.bias"])
    for _ in range(3):
        _advance(server, dense=["norm.weight"])
    assert _num_bytes(_deliver(server, Needs(0)))[CATCH_UP] == 3 * LINK_BYTES + FLOAT_BYTES * HEAD
    assert _num_bytes(_deliver(server, Needs(1)))[CATCH_UP] == 2 * LINK_BYTES


def test_seeds_and_zeros_cost_no_tensor_bytes() -> None:
    server = _start()
    _open(server)
    assert _deliver(server, Needs(0)).arrays == {}
    _update(
        server,
        [LowRank("fc1", 1.0, SketchKey("raw", 1, 0, "fc1", "b", 1, IN), SketchKey("raw", 1, 0, "fc1", "a", 1, OUT))],
        close=True,
    )
    delivery = _deliver(server, Needs(0))
    assert delivery.num_bytes == 0
    replica = _start()
    receive(replica, delivery)
    _assert_same(replica, server)


# ---- mismatches ----


def test_a_gap_between_replica_and_delivery_is_a_version_mismatch() -> None:
    replica = _start()
    with pytest.raises(VersionMismatch, match=r"replica holds 0 links, those delivered are \[2, 3\]"):
        receive(replica, _deliver(_grown(4), Needs(2)))
    assert equal_weights(replica.merged, _start().merged)
    receive(replica, _deliver(_grown(4), Needs(0)))
    _assert_same(replica, _grown(4))


def test_a_replica_of_another_history_is_a_version_mismatch() -> None:
    replica = _start()
    _advance(replica)
    replica.merged["head.bias"] += 1
    other = Chain.start(replica.merged)
    with pytest.raises(VersionMismatch, match="replica would end at"):
        receive(other, _deliver(_grown(1), Needs(0)))


def test_wrong_numbers_in_a_closed_link_are_refused_before_they_are_merged() -> None:
    delivery = _deliver(_grown(2), Needs(0))
    replica = _start()
    arrays = {kind: {FLAT: group[FLAT] + 1} for kind, group in delivery.arrays.items()}
    with pytest.raises(VersionMismatch):
        receive(replica, replace(delivery, arrays=arrays))
    assert equal_weights(replica.merged, _start().merged)
    receive(replica, delivery)
    _assert_same(replica, _grown(2))


def _altered(delivery: Delivery, kind: str) -> Delivery:
    """Return the delivery with the last bit of one number turned over."""
    array = delivery.arrays[kind][FLAT].copy()
    array.view(np.uint32)[0] ^= 1
    return replace(delivery, arrays={**delivery.arrays, kind: {FLAT: array}})


def _assert_refused_before_merging(delivery: Delivery, kind: str, server: Chain, words: str) -> None:
    replica = _start()
    with pytest.raises(VersionMismatch, match=words):
        receive(replica, _altered(delivery, kind))
    assert equal_weights(replica.merged, _start().merged)
    assert (replica.hash, replica.num_links) == (_start().hash, 0)
    receive(replica, delivery)
    _assert_same(replica, server)


def test_wrong_numbers_in_a_snapshot_are_refused_before_they_are_merged() -> None:
    server = _grown(IN)
    _advance(server, close=False)
    _assert_refused_before_merging(_deliver(server, Needs(0)), SNAPSHOT, server, "snapshot is not what its digest says")


@pytest.mark.parametrize("is_open", [True, False])
def test_wrong_numbers_in_a_link_without_its_superseded_values_are_refused_too(is_open: bool) -> None:
    """The digest that the chain counts covers values that were never sent, so such a link needs one of its own."""
    server = _grown(3, dense=["head.bias"])
    if is_open:
        _advance(server, close=False, dense=["head.bias"])
    _assert_refused_before_merging(_deliver(server, Needs(0)), CATCH_UP, server, "link 0 is not what its digest")


def test_another_digest_is_a_version_mismatch() -> None:
    delivery = _deliver(_grown(2), Needs(0))
    header = json.loads(delivery.header) | {"digest": "0" * 64}
    with pytest.raises(VersionMismatch, match="its server is at 000000000000"):
        receive(_start(), replace(delivery, header=json.dumps(header)))


def test_other_numbers_in_an_open_link_are_a_version_mismatch() -> None:
    server = _grown(1)
    _advance(server, close=False)
    delivery = _deliver(server, Needs(1))
    replica = _start()
    receive(replica, _deliver(_grown(1), Needs(0)))
    arrays = {kind: {FLAT: group[FLAT] + 1} for kind, group in delivery.arrays.items()}
    with pytest.raises(VersionMismatch, match="replica would end at"):
        receive(replica, replace(delivery, arrays=arrays))
    receive(replica, delivery)
    _assert_same(replica, server)


def test_missing_arrays_are_named() -> None:
    delivery = _deliver(_grown(3), Needs(0))
    arrays = {UPDATE: delivery.arrays[UPDATE]}
    with pytest.raises(VersionMismatch, match=r"lacks its arrays \['catch_up'\]; it holds \['update'\]"):
        receive(_start(), replace(delivery, arrays=arrays))


def test_arrays_of_another_length_are_refused() -> None:
    delivery = _deliver(_grown(3), Needs(0))
    arrays = {kind: {FLAT: group[FLAT][:-1]} for kind, group in delivery.arrays.items()}
    with pytest.raises(ValueError, match="does not hold the"):
        receive(_start(), replace(delivery, arrays=arrays))


# ---- sketches ----


def test_the_sketch_digest_is_that_of_the_drawn_factors_by_name() -> None:
    link = Link(4, (_low_rank(4, Zero((OUT, RANK))), LowRank("fc2", 1.0, _numbers(0, 2, 3), _numbers(1, 3, 2))))
    drawn = {"fc1.lora_a": sketch.draw(SketchKey("orthonormal", 3, 4, "fc1", "b", RANK, IN))}
    assert sketch_digest(link) == sketch.digest_all(drawn)


def test_the_sketch_digest_notices_a_draw_that_differs_in_one_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def link() -> Link:
        return Link(0, (_low_rank(0, Zero((OUT, RANK))),))

    expected, real = sketch_digest(link()), sketch.draw

    def other_machine(key: SketchKey) -> Tensor:
        drawn = real(key).clone()
        drawn.view(torch.int32)[0, 0] ^= 1
        return drawn

    monkeypatch.setattr(sketch, "draw", other_machine)
    assert sketch_digest(link()) != expected


def test_no_link_and_no_drawn_factor_have_one_digest() -> None:
    assert sketch_digest(None) == sketch_digest(Link(0, (Set("head.bias", torch.zeros(HEAD)),)))


# ---- by need


@settings(max_examples=50)
@given(data=st.data())
def test_whatever_the_policy_a_replica_ends_at_the_servers_bits(data: st.DataObject) -> None:
    """Also where it is sent drawn factors, and links between the rounds it trains in (eager broadcast)."""
    server, replica, num_held = _start(), _start(), 0
    rounds_per_link = data.draw(st.integers(1, 3))
    for round in range(data.draw(st.integers(1, 12))):
        _open(server)
        needs = Needs(num_held, factors=data.draw(st.booleans()))
        policy = data.draw(st.sampled_from(CATCH_UPS))
        what = data.draw(st.sampled_from(["nothing", "links", "all"]))
        if what != "nothing":
            opened = OpenLink(server.open, {}) if what == "all" and server.open is not None else None
            receive(replica, deliver(server, needs, policy=policy, opened=opened))
            num_held = server.num_links
        if what == "all":
            _assert_same(replica, server)
        _advance(server, close=(round + 1) % rounds_per_link == 0, dense=["head.bias"])
    receive(replica, _deliver(server, Needs(num_held), policy=data.draw(st.sampled_from(CATCH_UPS))))
    _assert_same(replica, server)


def test_the_policies_send_what_they_are_named_after() -> None:
    server = _grown(IN + 1)
    assert set(_num_bytes(_deliver(server, Needs(0), policy="replay"))) == {CATCH_UP, UPDATE}
    assert set(_num_bytes(_deliver(server, Needs(IN), policy="snapshot"))) == {UPDATE}, (
        "it took part in the last update"
    )
    assert set(_num_bytes(_deliver(server, Needs(IN - 1), policy="snapshot"))) == {SNAPSHOT}
    assert set(_num_bytes(_deliver(server, Needs(IN - 1), policy="cheapest"))) == {CATCH_UP, UPDATE}


def _other_machine(key: SketchKey) -> Tensor:
    drawn = _REAL_DRAW(key).clone()
    drawn.view(torch.int32)[0, 0] ^= 1
    return drawn


_REAL_DRAW = sketch.draw


def test_a_machine_that_draws_other_bits_says_so_and_is_mended_by_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    server = _grown(2)
    _open(server)
    plain, explicit = _deliver(server, Needs(0)), _deliver(server, Needs(0, factors=True))
    expected = server.open.drawn_factors
    monkeypatch.setattr(sketch, "draw", _other_machine)
    replica = _start()
    with pytest.raises(VersionMismatch, match="this machine draws factors") as caught:
        receive(replica, plain)
    assert caught.value.needs == Needs(0, factors=True)
    assert equal_weights(replica.merged, _start().merged), "nothing was merged"
    receive(replica, explicit)
    found = replica.open.drawn_factors
    assert all(torch.equal(found[name], factor) for name, factor in expected.items())
    _assert_same(replica, server)
    assert explicit.num_bytes - plain.num_bytes == 3 * FLOAT_BYTES * RANK * IN
    assert explicit.arrays[CONTROL][FLAT].nbytes == 3 * FLOAT_BYTES * RANK * IN


def test_a_replica_whose_numbers_drifted_says_so_and_is_mended_by_a_snapshot() -> None:
    server, replica = _grown(3), _start()
    receive(replica, _deliver(server, Needs(0)))
    replica.merged["fc1.weight"][0, 0] += 1e-3
    _advance(server)
    with pytest.raises(VersionMismatch, match="merged weights") as caught:
        receive(replica, _deliver(server, Needs(3)))
    assert caught.value.needs.snapshot
    receive(replica, _deliver(server, caught.value.needs))
    _assert_same(replica, server)


def test_drift_is_found_where_nothing_is_missing_too() -> None:
    server, replica = _grown(3), _start()
    receive(replica, _deliver(server, Needs(0)))
    replica.merged["fc1.weight"][0, 0] += 1
    replica._weights_digest = ("", frozenset(), "")  # as after a restart
    with pytest.raises(VersionMismatch, match="merged weights"):
        receive(replica, _deliver(server, Needs(3)))


@pytest.mark.parametrize("num_links", [0, 2])
def test_a_machine_without_the_base_takes_a_snapshot_of_everything_only(num_links: int) -> None:
    server, replica = _grown(num_links, dense=["head.bias"]), _start()
    for tensor in replica.merged.values():
        tensor.fill_(7.0)
    replica.num_links, replica.hash = -1, ""
    with pytest.raises(VersionMismatch, match="base") as caught:
        receive(replica, _deliver(server, Needs(0)))
    assert caught.value.needs == Needs(base=True)
    whole = _deliver(server, caught.value.needs)
    assert whole.arrays[SNAPSHOT][FLAT].size == sum(tensor.numel() for tensor in server.merged.values())
    receive(replica, whole)
    _assert_same(replica, server)


def test_a_replica_of_other_links_has_diverged() -> None:
    server, other, replica = _grown(3), _start(), _start()
    for _ in range(2):
        _advance(other, dense=["head.bias"])
    receive(replica, _deliver(other, Needs(0)))
    with pytest.raises(VersionMismatch) as caught:
        receive(replica, _deliver(server, Needs(2)))
    assert caught.value.has_diverged
    assert caught.value.needs == Needs(0)


def test_a_replica_that_is_ahead_has_diverged() -> None:
    replica = _start()
    receive(replica, _deliver(_grown(3), Needs(0)))
    with pytest.raises(VersionMismatch) as caught:
        receive(replica, _deliver(_grown(2), Needs(2)))
    assert caught.value.has_diverged


def test_what_was_received_is_told_link_by_link() -> None:
    server, replica = _grown(2), _start()
    received = receive(replica, _deliver(server, Needs(0), policy="replay"))
    assert [item.link.index for item in received.links] == [0, 1]
    assert received.links[-1].hash == server.hash
    assert not received.is_snapshot
    assert receive(replica, _deliver(server, Needs(0), policy="replay")).links == ()


# ---- factors that the client keeps


A_BYTES, B_BYTES = FLOAT_BYTES * RANK * IN, FLOAT_BYTES * OUT * RANK


class Server:
    """A chain, and since when each factor of its open link has stood as it is."""

    def __init__(self) -> None:
        self.chain = _start()
        self.since: dict[str, int] = {}

    def advance(self, link: Link, *, close: bool = False, merged: Link | None = None) -> None:
        before = {} if self.chain.open is None else self.chain.open.explicit_factors
        self.chain.update(link, close=close, merged=merged)
        after = {} if self.chain.open is None else self.chain.open.explicit_factors
        self.since = {
            name: self.since[name] if name in before and torch.equal(before[name], tensor) else self.chain.version
            for name, tensor in after.items()
        }

    def deliver(self, needs: Needs, *, policy: str = "cheapest") -> Delivery:
        opened = None if self.chain.open is None else OpenLink(self.chain.open, self.since)
        return deliver(self.chain, needs, policy=policy, opened=opened)


@dataclass
class Client:
    """A replica with the factors of the open link of a version, and what its server believes that it holds."""

    chain: Chain = field(default_factory=_start)
    kept: Kept = field(default_factory=dict)
    needs: Needs = field(default_factory=Needs)

    def receive(self, server: Server, delivery: Delivery) -> None:
        received = receive(self.chain, delivery, kept=self.kept)
        if self.chain.open is not None:
            self.kept = kept_of(self.chain.open)
        self.needs = Needs(self.chain.num_links, open_version=received.version)
        _assert_same(self.chain, server.chain)


def _explicit(a: int, b: int, scale: float = 0.5) -> LowRank:
    return LowRank("fc1", scale, _numbers(a, RANK, IN), _numbers(b, OUT, RANK))


def _with_open_pair() -> tuple[Server, Client]:
    """A server whose open link has been trained once, and a client that has it."""
    server, client = Server(), Client()
    server.chain.open_link(Link(0, ()))
    server.advance(Link(0, (_explicit(1, 2),)))
    client.receive(server, server.deliver(client.needs))
    return server, client


def test_a_factor_that_the_client_keeps_is_not_sent_again() -> None:
    server, client = _with_open_pair()
    assert server.deliver(client.needs).num_bytes == 0
    server.advance(Link(0, (_explicit(1, 3),)))
    delivery = server.deliver(client.needs)
    assert _num_bytes(delivery) == {UPDATE: B_BYTES}
    client.receive(server, delivery)
    server.advance(Link(0, (_explicit(4, 3),)))
    assert _num_bytes(server.deliver(client.needs)) == {UPDATE: A_BYTES}
    client.receive(server, server.deliver(client.needs))


def test_who_missed_a_change_is_sent_it_even_where_it_was_undone() -> None:
    """`since` counts versions and not numbers: a factor that changed twice is new, whatever it is now."""
    server, client = _with_open_pair()
    server.advance(Link(0, (_explicit(1, 3),)))
    server.advance(Link(0, (_explicit(1, 2),)))
    delivery = server.deliver(client.needs)
    assert _num_bytes(delivery) == {UPDATE: B_BYTES}
    client.receive(server, delivery)


def test_a_client_of_an_older_open_link_is_sent_what_changed_since() -> None:
    server, client = _with_open_pair()
    for b in range(3, 6):
        server.advance(Link(0, (_explicit(1, b),)))
    assert _num_bytes(server.deliver(client.needs)) == {UPDATE: B_BYTES}
    newcomer = server.deliver(Needs())
    assert _num_bytes(newcomer) == {UPDATE: A_BYTES + B_BYTES}
    client.receive(server, server.deliver(client.needs))


def test_a_factor_of_which_nothing_is_known_is_sent() -> None:
    """As that of a link that a method has just opened with explicit factors."""
    server, client = _with_open_pair()
    server.since = {"fc1.lora_b": server.since["fc1.lora_b"]}
    assert _num_bytes(server.deliver(client.needs)) == {UPDATE: A_BYTES}


def test_whole_tensors_of_the_open_link_are_always_sent() -> None:
    server, client = _with_open_pair()
    for _ in range(2):
        server.advance(Link(0, (_explicit(1, 2), Set("head.bias", _numbers(5, HEAD)))))
        delivery = server.deliver(client.needs)
        assert _num_bytes(delivery) == {DENSE: FLOAT_BYTES * HEAD}
        client.receive(server, delivery)


@pytest.mark.parametrize("left", ["nothing", "another rank"])
def test_a_client_that_lost_what_it_kept_says_so_and_a_second_delivery_mends_it(left: str) -> None:
    server, client = _with_open_pair()
    server.advance(Link(1, (_explicit(1, 3),)), merged=Link(0, (Dense("head.bias", torch.ones(HEAD)),)))
    client.kept = {} if left == "nothing" else {("fc1.lora_a", (1, IN)): torch.ones(1, IN)}
    before = {name: tensor.clone() for name, tensor in client.chain.merged.items()}
    with pytest.raises(VersionMismatch, match=r"'fc1\.lora_a' \[2, 24\] are not here any more") as caught:
        client.receive(server, server.deliver(client.needs))
    assert caught.value.needs == Needs(0, open_version=NOTHING)
    assert not caught.value.has_diverged
    assert equal_weights(client.chain.merged, before)
    again = server.deliver(caught.value.needs)
    assert _num_bytes(again) == {UPDATE: A_BYTES + B_BYTES, DENSE: FLOAT_BYTES * HEAD}
    client.receive(server, again)


def test_a_kept_factor_that_is_not_what_it_was_is_noticed_and_mended() -> None:
    server, client = _with_open_pair()
    server.advance(Link(0, (_explicit(1, 3),)))
    key = ("fc1.lora_a", (RANK, IN))
    client.kept = {**client.kept, key: client.kept[key] + 1e-6}
    with pytest.raises(VersionMismatch, match="replica would end at") as caught:
        client.receive(server, server.deliver(client.needs))
    client.receive(server, server.deliver(caught.value.needs))


def test_a_machine_without_the_base_that_is_believed_to_keep_factors_asks_for_everything_at_once() -> None:
    server, client = _with_open_pair()
    fresh = Client()
    fresh.chain.num_links, fresh.chain.hash = -1, ""
    with pytest.raises(VersionMismatch) as caught:
        fresh.receive(server, server.deliver(client.needs))
    assert caught.value.needs == Needs(base=True)
    fresh.receive(server, server.deliver(caught.value.needs))


def test_a_client_that_keeps_factors_is_served_by_a_snapshot_too() -> None:
    server, client = _with_open_pair()
    server.advance(Link(0, (_explicit(6, 7),)), close=True)
    for index in range(1, IN):
        server.chain.open_link(Link(index, ()))
        server.advance(Link(index, (_explicit(index, index + 40),)), close=True)
    server.chain.open_link(Link(IN, ()))
    server.advance(Link(IN, (_explicit(1, 2),)))
    delivery = server.deliver(client.needs)
    assert _num_bytes(delivery) == {SNAPSHOT: SNAPSHOT_BYTES, UPDATE: A_BYTES + B_BYTES}
    client.receive(server, delivery)


# ---- links that repeat factors


def test_a_closed_link_pays_only_for_the_factors_that_the_open_one_lacks() -> None:
    """The step of FRLoRA: the mean of the trained factors, less the product of the first ones, which stay open."""
    server, client = _with_open_pair()
    first, mean = _explicit(1, 2), _explicit(5, 6)
    server.advance(Link(1, (first,)), merged=Link(0, (mean, replace(first, scale=-0.5))))
    delivery = server.deliver(client.needs)
    assert _num_bytes(delivery) == {UPDATE: A_BYTES + B_BYTES}, "the means, and nothing of what is kept"
    client.receive(server, delivery)
    newcomer = Client()
    delivery = server.deliver(newcomer.needs)
    assert _num_bytes(delivery) == {UPDATE: 2 * (A_BYTES + B_BYTES)}, "what stands in both links once"
    newcomer.receive(server, delivery)


def test_what_a_closed_link_repeats_is_sent_where_the_open_link_is_not() -> None:
    server, client = _with_open_pair()
    server.advance(Link(1, (_explicit(1, 2),)), merged=Link(0, (_explicit(1, 2, -0.5),)))
    without = deliver(server.chain, Needs(0))
    assert _num_bytes(without) == {UPDATE: A_BYTES + B_BYTES}
    receive(client.chain, without, kept=client.kept)
    assert client.chain.hash == server.chain.hash
    assert equal_weights(client.chain.merged, server.chain.merged)


def test_a_factor_that_the_open_link_has_twice_is_sent_once_and_not_at_all_to_who_keeps_it() -> None:
    server, client = Server(), Client()
    pair = _explicit(1, 2)
    server.chain.open_link(Link(0, (replace(pair, scale=-0.5), pair)))
    # As a method opens a link whose factors are explicit from the start.
    server.since = dict.fromkeys(server.chain.open.explicit_factors, 0)
    delivery = server.deliver(client.needs)
    assert _num_bytes(delivery) == {UPDATE: A_BYTES + B_BYTES}
    client.receive(server, delivery)
    assert server.deliver(client.needs).num_bytes == 0
    client.receive(server, server.deliver(client.needs))


# ---- encoded links


INT8 = codec_text("int8", {"stochastic": True, "scale_per": "tensor"})


def _packed_bytes(link: Link) -> int:
    return sum(array.nbytes for packed in link.packed.values() for array in packed.arrays.values())


def test_encoded_tensors_arrive_with_the_servers_bits_and_cost_their_encoded_bytes() -> None:
    server, client = Server(), Client()
    sizes = []
    for index in range(2):
        server.chain.open_link(Link(index, ()))
        terms = (_explicit(index, index + 5), Set("head.bias", _numbers(index + 8, HEAD)))
        link = encode_link(Link(index, terms), INT8, index, ["fc1.lora_b", "set head.bias"])
        server.advance(link, close=index == 0)
        sizes.append(_packed_bytes(link))
    delivery = server.deliver(Needs(0))
    # Of the closed link the bias is superseded by the open one's.
    closed = sum(array.nbytes for array in server.chain.links[0].packed["fc1.lora_b"].arrays.values())
    assert delivery.num_bytes == closed + sizes[1] + 2 * A_BYTES
    assert delivery.num_bytes < 2 * (A_BYTES + B_BYTES) + HEAD_BYTES
    assert set(delivery.arrays[UPDATE]) == {FLAT, "uint8", "float32"}
    client.receive(server, delivery)
    assert torch.equal(client.chain.open.named_tensors["fc1.lora_b"], server.chain.open.named_tensors["fc1.lora_b"])


def test_an_encoded_factor_that_is_kept_costs_nothing_either() -> None:
    server, client = Server(), Client()
    server.chain.open_link(Link(0, ()))
    server.advance(encode_link(Link(0, (_explicit(1, 2),)), INT8, 0, ["fc1.lora_a", "fc1.lora_b"]))
    client.receive(server, server.deliver(client.needs))
    assert server.deliver(client.needs).num_bytes == 0
    client.receive(server, server.deliver(client.needs))


# ---- rules, cores, private and stacked draws


def test_a_snapshot_brings_the_moments_so_that_the_next_link_merges_alike() -> None:
    server, client = Server(), Client()
    for index in range(3):
        server.chain.open_link(Link(index, ()))
        server.advance(Link(index, (_explicit(index, index + 9),), ServerRule("adam")), close=True)
    _open(server.chain)
    delivery = server.deliver(Needs(0, snapshot=True))
    assert _num_bytes(delivery) == {SNAPSHOT: 3 * SNAPSHOT_BYTES}, "the weight and its two moments"
    client.receive(server, delivery)
    assert equal_weights(client.chain.slots, server.chain.slots)
    server.advance(Link(3, (_explicit(3, 12),), ServerRule("adam")), close=True)
    client.receive(server, server.deliver(client.needs))


def test_the_moments_count_when_the_cheaper_way_is_chosen() -> None:
    """At IN / RANK links of B alone replay and a bare snapshot cost the same; moments make the snapshot dearer."""
    server, late = _start(), _start()
    for index in range(IN // RANK + 2):
        server.open_link(Link(index, ()))
        server.update(Link(index, (_low_rank(index, _numbers(index, OUT, RANK)),), ServerRule("adam")), close=True)
    assert set(_num_bytes(_deliver(server, Needs(0)))) == {CATCH_UP, UPDATE}
    receive(late, _deliver(server, Needs(0)))
    _assert_same(late, server)


def test_a_rule_that_the_replica_does_not_know_is_refused_before_anything_is_merged() -> None:
    server = _start()
    server.open_link(Link(0, ()))
    server.update(Link(0, (_explicit(1, 2),), ServerRule("adam")), close=True)
    delivery = _deliver(server, Needs(0))
    with pytest.raises(ValueError, match=r"server\.rule='adan' is unknown"):
        receive(replica := _start(), replace(delivery, header=delivery.header.replace("adam", "adan")))
    assert equal_weights(replica.merged, _start().merged)


def test_private_factors_are_drawn_by_each_client_and_cost_nothing() -> None:
    server, client = Server(), Client()
    key = SketchKey("gaussian", 3, 0, "fc1", "b", RANK, IN)
    server.chain.open_link(Link(0, (LowRank("fc1", 0.5, Private(key), Zero((OUT, RANK))),)))
    delivery = server.deliver(client.needs)
    assert delivery.num_bytes == 0
    receive(client.chain, delivery)
    assert client.chain.digest == server.chain.digest
    assert client.chain.open == server.chain.open


def test_a_stack_of_draws_is_sent_as_numbers_to_a_machine_that_draws_other_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, replica = _start(), _start()
    keys = tuple(SketchKey("gaussian", seed, 0, "fc1", "b", RANK, IN) for seed in (1, 2))
    server.open_link(Link(0, (LowRank("fc1", 0.5, Stack(keys), Zero((OUT, 2 * RANK))),)))
    expected = server.open.drawn_factors
    plain, delivery = _deliver(server, Needs(0)), _deliver(server, Needs(0, factors=True))
    assert (_num_bytes(plain), _num_bytes(delivery)) == ({}, {CONTROL: 2 * A_BYTES})
    monkeypatch.setattr(sketch, "draw", _other_machine)
    with pytest.raises(VersionMismatch, match="this machine draws factors"):
        receive(_start(), plain)
    receive(replica, delivery)
    assert torch.equal(replica.open.drawn_factors["fc1.lora_a"], expected["fc1.lora_a"])


def test_a_client_of_a_smaller_rank_has_an_open_link_of_its_own() -> None:
    server, client = Server(), Client()
    server.chain.open_link(Link(0, ()))
    server.advance(Link(0, (_explicit(1, 2),)))
    narrowed = narrow(server.chain.open, {"fc1": 1}, {"fc1": 1.0})
    delivery = deliver(server.chain, Needs(0), opened=OpenLink(narrowed, server.since))
    assert _num_bytes(delivery) == {UPDATE: (A_BYTES + B_BYTES) // RANK}
    receive(client.chain, delivery)
    assert client.chain.open.digest == narrowed.digest
    assert client.chain.digest != server.chain.digest
    kept, needs = kept_of(client.chain.open), Needs(0, open_version=1)
    again = deliver(server.chain, needs, opened=OpenLink(narrowed, server.since))
    assert again.num_bytes == 0
    receive(client.chain, again, kept=kept)
    assert client.chain.open.digest == narrowed.digest


# ---- everything at once


def _next_link(data: st.DataObject, server: Server) -> tuple[Link, Link | None]:
    """Return the open link's next form, in which some factors stand as they were, and a link merged beside it."""
    opened = server.chain.open
    assert opened is not None
    terms = [term for term in opened.terms if isinstance(term, LowRank)] or [_explicit(0, 1), _explicit(2, 3, 2.0)]
    version = server.chain.version
    for place in range(len(terms)):
        what = data.draw(st.sampled_from(["nothing", "lora_a", "lora_b", "both"]))
        new = _explicit(100 + 2 * version + place, 300 + 2 * version + place, terms[place].scale)
        for name in ("lora_a", "lora_b"):
            if what in (name, "both"):
                terms[place] = replace(terms[place], **{name: getattr(new, name)})
    if data.draw(st.booleans()):
        terms[1] = replace(terms[0], scale=-1.0)
    more: list[Term] = [term for term in opened.terms if isinstance(term, Set)]
    if data.draw(st.booleans()):
        more = [Set("head.bias", _numbers(500 + version, HEAD))]
    merged = None
    if data.draw(st.booleans()):
        delta = Dense("norm.weight", _numbers(700 + version, HEAD))
        rule = data.draw(st.sampled_from([None, ServerRule("adam")]))
        merged = Link(server.chain.num_links, (replace(terms[0], scale=0.1), delta), rule)
    link = Link(server.chain.num_links + (merged is not None), (*terms, *more))
    if data.draw(st.booleans()):
        held = list(opened.explicit_factors.values())
        fresh = [name for name, t in link.named_tensors.items() if not any(torch.equal(t, h) for h in held)]
        link = encode_link(link, INT8, version, fresh) if fresh else link
    return link, merged


@settings(max_examples=40)
@given(data=st.data())
def test_whatever_a_client_keeps_or_loses_it_ends_at_the_servers_bits(data: st.DataObject) -> None:
    """Also where links are merged beside the open one, by rules, encoded, with factors that stay or are there twice."""
    server, clients = Server(), [Client() for _ in range(2)]
    for _ in range(data.draw(st.integers(1, 8))):
        if server.chain.open is None:
            server.chain.open_link(Link(server.chain.num_links, ()))
            server.since = {}
        link, merged = _next_link(data, server)
        server.advance(link, close=data.draw(st.integers(0, 3)) == 0, merged=merged)
        for client in clients:
            if data.draw(st.booleans()):
                _bring(data, server, client)
    for client in clients:
        _bring(data, server, client)


def _bring(data: st.DataObject, server: Server, client: Client) -> None:
    """Deliver, after the client lost what it kept or nothing; a second delivery mends what it says it lacks."""
    lost = data.draw(st.sets(st.sampled_from(sorted(client.kept)))) if client.kept else set()
    client.kept = {key: tensor for key, tensor in client.kept.items() if key not in lost}
    delivery = server.deliver(client.needs, policy=data.draw(st.sampled_from(CATCH_UPS)))
    try:
        client.receive(server, delivery)
    except VersionMismatch as mismatch:
        assert lost, "a client that lost nothing needs no second delivery"
        client.receive(server, server.deliver(mismatch.needs))


# ---- deliveries that are not what a server sends


def _paths(node: object, path: tuple[int | str, ...] = ()) -> list[tuple[int | str, ...]]:
    """Return the places of all values in a header."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(found for key, child in items for found in _paths(child, (*path, key)))]


def _spoil_header(data: st.DataObject, header: str) -> str:
    """Replace or remove one value of a header, wherever it lies in it."""
    root = {"root": json.loads(header)}
    path = data.draw(st.sampled_from(_paths(root)[1:]))
    parent: Any = root
    for key in path[:-1]:
        parent = parent[key]
    if data.draw(st.booleans()) and len(path) > 1:
        del parent[path[-1]]
    else:
        parent[path[-1]] = data.draw(
            st.sampled_from([None, 0, -1, 10**12, 0.5, "", "x", [], [[]], {}, True, "kept", ["open", "x"]])
        )
    return json.dumps(root["root"])


def _spoil_arrays(data: st.DataObject, delivery: Delivery) -> Delivery:
    places = [(kind, name) for kind, group in delivery.arrays.items() for name in group]
    kind, name = data.draw(st.sampled_from(places))
    array = delivery.arrays[kind][name]
    bits = array.copy()
    bits.view(np.uint8)[data.draw(st.integers(0, array.nbytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changes = [bits, array[:-1], array[:0], np.append(array, array[:1]), array.astype(np.float16), array[None]]
    group = {**delivery.arrays[kind], name: data.draw(st.sampled_from(changes))}
    arrays: dict[str, Any] = {**delivery.arrays, kind: group}
    if data.draw(st.booleans()):
        return replace(delivery, arrays=arrays)
    gone = {key: value for key, value in group.items() if key != name}
    return replace(delivery, arrays={**arrays, kind: gone})


def _rich_server() -> tuple[Server, Client]:
    """A server with all that a delivery can hold, and a client that keeps a factor of its open link."""
    server, client = _with_open_pair()
    first = _explicit(1, 2)
    merged = Link(0, (_explicit(5, 6), replace(first, scale=-0.5)), ServerRule("adam"))
    link = encode_link(Link(1, (_explicit(1, 8), Set("head.bias", _numbers(9, HEAD)))), INT8, 3, ["fc1.lora_b"])
    server.advance(link, merged=merged)
    return server, client


@settings(max_examples=250)
@given(data=st.data(), what=st.sampled_from(["header", "arrays"]), is_snapshot=st.booleans())
def test_no_hostile_delivery_leaves_anything_but_the_old_version_or_the_servers(
    data: st.DataObject, what: str, is_snapshot: bool
) -> None:
    """Whatever is wrong with it, an exception says so, nothing half-done stays, and a right delivery mends it."""
    server, client = _rich_server()
    right = server.deliver(replace(client.needs, snapshot=is_snapshot))
    header = _spoil_header(data, right.header) if what == "header" else right.header
    wrong = replace(right, header=header) if what == "header" else _spoil_arrays(data, right)
    before = {name: tensor.clone() for name, tensor in client.chain.merged.items()}
    replaced = {"head.bias"}  # the open link sets it
    with suppress(Exception):  # which kind depends on what is wrong
        receive(client.chain, wrong, kept=client.kept)
    after = {name: tensor for name, tensor in client.chain.merged.items() if name not in replaced}
    ends = [{name: end[name] for name in after} for end in (before, server.chain.merged)]
    assert any(equal_weights(after, end) for end in ends)
    client.receive(server, server.deliver(Needs(snapshot=True)))
    assert equal_weights(client.chain.slots, server.chain.slots)


def test_given_factors_of_a_closed_link_that_are_wrong_spoil_the_replica_and_it_says_so() -> None:
    """What is drawn is in no link's digest, so only the merged numbers can tell."""
    server = _grown(2)
    _open(server)
    delivery, replica = _deliver(server, Needs(0, factors=True)), _start()
    flat = delivery.arrays[CONTROL][FLAT].copy()
    flat[-1] += 1
    with pytest.raises(VersionMismatch, match="the merged weights are") as caught:
        receive(replica, replace(delivery, arrays={**delivery.arrays, CONTROL: {FLAT: flat}}))
    assert caught.value.needs == Needs(snapshot=True)
    receive(replica, _deliver(server, caught.value.needs))
    _assert_same(replica, server)


def test_encoded_arrays_that_are_missing_are_named() -> None:
    server, client = _rich_server()
    delivery = server.deliver(client.needs)
    arrays = {kind: group for kind, group in delivery.arrays.items() if kind != UPDATE}
    with pytest.raises(VersionMismatch, match=r"lacks its arrays \['update'\]; it holds \['dense'\]"):
        receive(client.chain, replace(delivery, arrays=arrays), kept=client.kept)
