"""Tests of fedraclora.delivery: any replica ends at the server's bits, and is sent no byte too many."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora import sketch
from fedraclora.chain import Chain, equal_weights
from fedraclora.delivery import (
    CATCH_UP,
    CATCH_UPS,
    DENSE,
    SNAPSHOT,
    UPDATE,
    Delivery,
    Needs,
    VersionMismatch,
    deliver,
    receive,
    sketch_digest,
)
from fedraclora.link import Dense, Link, LowRank, Set, Term, Zero
from fedraclora.sketch import SketchKey

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
    chain.update(terms, close=close)


def _grown(num_links: int, dense: Sequence[str] = ()) -> Chain:
    chain = _start()
    for _ in range(num_links):
        _advance(chain, dense=dense)
    return chain


def _num_bytes(delivery: Delivery) -> dict[str, int]:
    return {kind: array.nbytes for kind, array in delivery.arrays.items()}


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
            receive(replicas[client], deliver(server, Needs(held[client])))
            _assert_same(replicas[client], server)
            held[client] = server.num_links
        chosen = data.draw(st.lists(st.sampled_from(names), unique=True))
        dense = sorted({*chosen, *_set_by_open(server)})
        _advance(server, close=(round + 1) % rounds_per_link == 0, dense=dense)
    for client, replica in enumerate(replicas):
        receive(replica, deliver(server, Needs(held[client])))
        _assert_same(replica, server)


@settings(max_examples=30)
@given(data=st.data())
def test_a_replica_shared_by_clients_takes_their_deliveries_in_any_order(data: st.DataObject) -> None:
    """The simulator's clients hold different versions but share one replica, which is as new as the newest."""
    newest = data.draw(st.integers(0, 4))
    server, replica = _grown(newest, dense=["head.bias"]), _start()
    receive(replica, deliver(server, Needs(0)))
    for _ in range(data.draw(st.integers(0, 20))):
        _advance(server, dense=["head.bias"])
    _open(server)
    held = data.draw(st.permutations([newest, *data.draw(st.lists(st.integers(0, newest), max_size=3))]))
    deliveries = [deliver(server, Needs(num_held)) for num_held in held]
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
        server.update(terms, close=True)
    receive(replica, deliver(server, Needs(0)))
    _assert_same(replica, server)


def test_a_double_precision_chain_arrives_in_double_precision() -> None:
    server, replica = (Chain.start({"fc1.weight": _numbers(0, OUT, IN).double()}) for _ in range(2))
    for index in range(2):
        server.open_link(Link(index, ()))
        server.update([_low_rank(index, _numbers(index, OUT, RANK).double() / 3)], close=True)
    delivery = deliver(server, Needs(0))
    assert all(array.dtype == np.float64 for array in delivery.arrays.values())
    receive(replica, delivery)
    _assert_same(replica, server)


@pytest.mark.parametrize("num_held", [0, 3])
def test_receiving_a_delivery_twice_changes_nothing(num_held: int) -> None:
    server, replica = _grown(3, dense=["head.bias"]), _start()
    receive(replica, deliver(server, Needs(0)))
    _advance(server, close=False)
    delivery = deliver(server, Needs(num_held))
    receive(replica, delivery)
    before = {name: tensor.clone() for name, tensor in replica.merged.items()}
    receive(replica, delivery)
    assert equal_weights(replica.merged, before)
    _assert_same(replica, server)


def test_the_receivers_weights_do_not_share_memory_with_the_message() -> None:
    server, replica = _grown(1, dense=["head.bias"]), _start()
    _advance(server, close=False)
    delivery = deliver(server, Needs(0))
    receive(replica, delivery)
    for array in delivery.arrays.values():
        array[:] = 0
    _assert_same(replica, server)


# ---- what it costs ----


def test_a_client_of_the_last_round_is_sent_exactly_the_last_link() -> None:
    server = _grown(3)
    _open(server)
    delivery = deliver(server, Needs(2))
    assert _num_bytes(delivery) == {UPDATE: LINK_BYTES}
    assert delivery.num_bytes == LINK_BYTES


def test_a_client_that_is_up_to_date_is_sent_nothing_and_an_open_link_as_update() -> None:
    server = _grown(2)
    _open(server)
    assert deliver(server, Needs(2)).num_bytes == 0
    _advance(server, close=False)
    assert _num_bytes(deliver(server, Needs(2))) == {UPDATE: LINK_BYTES}


def test_dense_values_of_the_last_round_are_their_own_kind() -> None:
    assert _num_bytes(deliver(_grown(3, dense=["head.bias"]), Needs(2))) == {
        UPDATE: LINK_BYTES,
        DENSE: FLOAT_BYTES * HEAD,
    }


@pytest.mark.parametrize("num_missed", [1, 2, 5])
def test_missed_links_are_catch_up_of_j_m_r_floats(num_missed: int) -> None:
    server = _grown(8)
    expected = {CATCH_UP: num_missed * LINK_BYTES, UPDATE: LINK_BYTES}
    assert _num_bytes(deliver(server, Needs(8 - 1 - num_missed))) == expected


def test_links_missed_before_an_open_one_are_catch_up() -> None:
    server = _grown(3)
    _advance(server, close=False)
    assert _num_bytes(deliver(server, Needs(1))) == {CATCH_UP: 2 * LINK_BYTES, UPDATE: LINK_BYTES}


@given(num_links=st.integers(1, 3 * IN // RANK), num_held=st.integers(0, 40))
@settings(max_examples=40)
def test_the_cheaper_of_replay_and_snapshot_is_sent(num_links: int, num_held: int) -> None:
    """The break-even is at n / r links: j links of m r floats against m n."""
    num_held = min(num_held, num_links)
    found = _num_bytes(deliver(_grown(num_links), Needs(num_held)))
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
    server.update([LowRank("fc1", 1.0, _numbers(0, IN, IN), _numbers(1, OUT, IN))], close=True)
    assert _num_bytes(deliver(server, Needs(0))) == {UPDATE: FLOAT_BYTES * IN * (IN + OUT)}
    _advance(server)
    assert _num_bytes(deliver(server, Needs(0))) == {SNAPSHOT: SNAPSHOT_BYTES}


def test_a_snapshot_comes_with_the_open_link_and_only_changed_tensors() -> None:
    server = _grown(IN, dense=["head.bias"])
    _advance(server, close=False)
    assert _num_bytes(deliver(server, Needs(0))) == {SNAPSHOT: SNAPSHOT_BYTES + FLOAT_BYTES * HEAD, UPDATE: LINK_BYTES}


def test_a_value_that_a_later_link_sets_again_is_not_sent() -> None:
    server = _grown(5, dense=["head.bias"])
    for num_held in range(5):
        sent = _num_bytes(deliver(server, Needs(num_held)))
        assert sent[DENSE] == FLOAT_BYTES * HEAD
        assert sent.get(CATCH_UP, 0) == (5 - 1 - num_held) * LINK_BYTES


HEAD_BYTES = FLOAT_BYTES * HEAD


def test_a_value_that_the_open_link_sets_again_is_not_sent_with_closed_links() -> None:
    server = _grown(3, dense=["head.bias", "norm.weight"])
    _advance(server, close=False, dense=["head.bias"])
    # Of the closed links only the newest norm is left to send.
    expected = {CATCH_UP: 3 * LINK_BYTES + HEAD_BYTES, UPDATE: LINK_BYTES, DENSE: HEAD_BYTES}
    assert _num_bytes(deliver(server, Needs(0))) == expected
    for num_held in range(4):
        replica = _start()
        receive(replica, deliver(_grown(num_held, dense=["head.bias", "norm.weight"]), Needs(0)))
        receive(replica, deliver(server, Needs(num_held)))
        _assert_same(replica, server)


def test_a_value_that_the_open_link_sets_again_is_not_in_a_snapshot() -> None:
    server = _grown(IN, dense=["head.bias", "norm.weight"])
    _advance(server, close=False, dense=["head.bias"])
    delivery = deliver(server, Needs(0))
    expected = {SNAPSHOT: SNAPSHOT_BYTES + HEAD_BYTES, UPDATE: LINK_BYTES, DENSE: HEAD_BYTES}
    assert _num_bytes(delivery) == expected
    replica = _start()
    receive(replica, delivery)
    _assert_same(replica, server)
    # Once the link is closed its value is part of the weights again, for old replicas and for new ones.
    _advance(server, dense=["head.bias"])
    receive(replica, deliver(server, Needs(IN)))
    late = _start()
    receive(late, deliver(server, Needs(0)))
    for one in (replica, late):
        _assert_same(one, server)
        assert equal_weights(one.merged, server.merged)


def test_a_value_set_once_long_ago_is_sent_to_who_lacks_it() -> None:
    server = _start()
    _advance(server, dense=["head.bias"])
    for _ in range(3):
        _advance(server, dense=["norm.weight"])
    assert _num_bytes(deliver(server, Needs(0)))[CATCH_UP] == 3 * LINK_BYTES + FLOAT_BYTES * HEAD
    assert _num_bytes(deliver(server, Needs(1)))[CATCH_UP] == 2 * LINK_BYTES


def test_seeds_and_zeros_cost_no_tensor_bytes() -> None:
    server = _start()
    _open(server)
    assert deliver(server, Needs(0)).arrays == {}
    server.update(
        [LowRank("fc1", 1.0, SketchKey("raw", 1, 0, "fc1", "b", 1, IN), SketchKey("raw", 1, 0, "fc1", "a", 1, OUT))],
        close=True,
    )
    delivery = deliver(server, Needs(0))
    assert delivery.num_bytes == 0
    replica = _start()
    receive(replica, delivery)
    _assert_same(replica, server)


# ---- mismatches ----


def test_a_gap_between_replica_and_delivery_is_a_version_mismatch() -> None:
    replica = _start()
    with pytest.raises(VersionMismatch, match=r"replica holds 0 links, those delivered are \[2, 3\]"):
        receive(replica, deliver(_grown(4), Needs(2)))
    assert equal_weights(replica.merged, _start().merged)
    receive(replica, deliver(_grown(4), Needs(0)))
    _assert_same(replica, _grown(4))


def test_a_replica_of_another_history_is_a_version_mismatch() -> None:
    replica = _start()
    _advance(replica)
    replica.merged["head.bias"] += 1
    other = Chain.start(replica.merged)
    with pytest.raises(VersionMismatch, match="replica would end at"):
        receive(other, deliver(_grown(1), Needs(0)))


def test_wrong_numbers_in_a_closed_link_are_refused_before_they_are_merged() -> None:
    delivery = deliver(_grown(2), Needs(0))
    replica = _start()
    arrays = {kind: array + 1 for kind, array in delivery.arrays.items()}
    with pytest.raises(VersionMismatch):
        receive(replica, replace(delivery, arrays=arrays))
    assert equal_weights(replica.merged, _start().merged)
    receive(replica, delivery)
    _assert_same(replica, _grown(2))


def _altered(delivery: Delivery, kind: str) -> Delivery:
    """Return the delivery with the last bit of one number turned over."""
    array = delivery.arrays[kind].copy()
    array.view(np.uint32)[0] ^= 1
    return replace(delivery, arrays={**delivery.arrays, kind: array})


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
    _assert_refused_before_merging(deliver(server, Needs(0)), SNAPSHOT, server, "snapshot is not what its digest says")


@pytest.mark.parametrize("is_open", [True, False])
def test_wrong_numbers_in_a_link_without_its_superseded_values_are_refused_too(is_open: bool) -> None:
    """The digest that the chain counts covers values that were never sent, so such a link needs one of its own."""
    server = _grown(3, dense=["head.bias"])
    if is_open:
        _advance(server, close=False, dense=["head.bias"])
    _assert_refused_before_merging(deliver(server, Needs(0)), CATCH_UP, server, "link 0 is not what its digest")


def test_another_digest_is_a_version_mismatch() -> None:
    delivery = deliver(_grown(2), Needs(0))
    header = json.loads(delivery.header) | {"digest": "0" * 64}
    with pytest.raises(VersionMismatch, match="its server is at 000000000000"):
        receive(_start(), replace(delivery, header=json.dumps(header)))


def test_other_numbers_in_an_open_link_are_a_version_mismatch() -> None:
    server = _grown(1)
    _advance(server, close=False)
    delivery = deliver(server, Needs(1))
    replica = _start()
    receive(replica, deliver(_grown(1), Needs(0)))
    arrays = {kind: array + 1 for kind, array in delivery.arrays.items()}
    with pytest.raises(VersionMismatch, match="replica would end at"):
        receive(replica, replace(delivery, arrays=arrays))
    receive(replica, delivery)
    _assert_same(replica, server)


def test_missing_arrays_are_named() -> None:
    delivery = deliver(_grown(3), Needs(0))
    arrays = {UPDATE: delivery.arrays[UPDATE]}
    with pytest.raises(VersionMismatch, match=r"lacks its arrays \['catch_up'\]; it holds \['update'\]"):
        receive(_start(), replace(delivery, arrays=arrays))


def test_arrays_of_another_length_are_refused() -> None:
    delivery = deliver(_grown(3), Needs(0))
    arrays = {kind: array[:-1] for kind, array in delivery.arrays.items()}
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
            receive(replica, deliver(server, needs, policy=policy, with_open=what == "all"))
            num_held = server.num_links
        if what == "all":
            _assert_same(replica, server)
        _advance(server, close=(round + 1) % rounds_per_link == 0, dense=["head.bias"])
    receive(replica, deliver(server, Needs(num_held), policy=data.draw(st.sampled_from(CATCH_UPS))))
    _assert_same(replica, server)


def test_the_policies_send_what_they_are_named_after() -> None:
    server = _grown(IN + 1)
    assert set(_num_bytes(deliver(server, Needs(0), policy="replay"))) == {CATCH_UP, UPDATE}
    assert set(_num_bytes(deliver(server, Needs(IN), policy="snapshot"))) == {UPDATE}, "it took part in the last update"
    assert set(_num_bytes(deliver(server, Needs(IN - 1), policy="snapshot"))) == {SNAPSHOT}
    assert set(_num_bytes(deliver(server, Needs(IN - 1), policy="cheapest"))) == {CATCH_UP, UPDATE}


def _other_machine(key: SketchKey) -> Tensor:
    drawn = _REAL_DRAW(key).clone()
    drawn.view(torch.int32)[0, 0] ^= 1
    return drawn


_REAL_DRAW = sketch.draw


def test_a_machine_that_draws_other_bits_says_so_and_is_mended_by_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    server = _grown(2)
    _open(server)
    plain, explicit = deliver(server, Needs(0)), deliver(server, Needs(0, factors=True))
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
    assert explicit.arrays["control"].nbytes == 3 * FLOAT_BYTES * RANK * IN


def test_a_replica_whose_numbers_drifted_says_so_and_is_mended_by_a_snapshot() -> None:
    server, replica = _grown(3), _start()
    receive(replica, deliver(server, Needs(0)))
    replica.merged["fc1.weight"][0, 0] += 1e-3
    _advance(server)
    with pytest.raises(VersionMismatch, match="merged weights") as caught:
        receive(replica, deliver(server, Needs(3)))
    assert caught.value.needs.snapshot
    receive(replica, deliver(server, caught.value.needs))
    _assert_same(replica, server)


def test_drift_is_found_where_nothing_is_missing_too() -> None:
    server, replica = _grown(3), _start()
    receive(replica, deliver(server, Needs(0)))
    replica.merged["fc1.weight"][0, 0] += 1
    replica._weights_digest = ("", frozenset(), "")  # as after a restart
    with pytest.raises(VersionMismatch, match="merged weights"):
        receive(replica, deliver(server, Needs(3)))


@pytest.mark.parametrize("num_links", [0, 2])
def test_a_machine_without_the_base_takes_a_snapshot_of_everything_only(num_links: int) -> None:
    server, replica = _grown(num_links, dense=["head.bias"]), _start()
    for tensor in replica.merged.values():
        tensor.fill_(7.0)
    replica.num_links, replica.hash = -1, ""
    with pytest.raises(VersionMismatch, match="base") as caught:
        receive(replica, deliver(server, Needs(0)))
    assert caught.value.needs == Needs(base=True)
    whole = deliver(server, caught.value.needs)
    assert whole.arrays[SNAPSHOT].size == sum(tensor.numel() for tensor in server.merged.values())
    receive(replica, whole)
    _assert_same(replica, server)


def test_a_replica_of_other_links_has_diverged() -> None:
    server, other, replica = _grown(3), _start(), _start()
    for _ in range(2):
        _advance(other, dense=["head.bias"])
    receive(replica, deliver(other, Needs(0)))
    with pytest.raises(VersionMismatch) as caught:
        receive(replica, deliver(server, Needs(2)))
    assert caught.value.has_diverged
    assert caught.value.needs == Needs(0)


def test_a_replica_that_is_ahead_has_diverged() -> None:
    replica = _start()
    receive(replica, deliver(_grown(3), Needs(0)))
    with pytest.raises(VersionMismatch) as caught:
        receive(replica, deliver(_grown(2), Needs(2)))
    assert caught.value.has_diverged


def test_what_was_received_is_told_link_by_link() -> None:
    server, replica = _grown(2), _start()
    received = receive(replica, deliver(server, Needs(0), policy="replay"))
    assert [item.link.index for item in received.links] == [0, 1]
    assert received.links[-1].hash == server.hash
    assert not received.is_snapshot
    assert receive(replica, deliver(server, Needs(0), policy="replay")).links == ()
