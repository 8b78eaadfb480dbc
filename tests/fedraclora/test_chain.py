"""Tests of fedraclora.chain."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora import sketch
from fedraclora.chain import Chain, Weights, drop_superseded, equal_weights, merge_
from fedraclora.link import Dense, Link, LowRank, Set, Term, Zero, describe, restore
from fedraclora.server_rule import RULES, ServerRule
from fedraclora.sketch import SketchKey

OUT, IN, RANK = 9, 12, 2


def _numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _base(dtype: torch.dtype = torch.float32) -> Weights:
    return {"fc1.weight": _numbers(0, OUT, IN, dtype=dtype), "fc1.bias": _numbers(1, OUT, dtype=dtype)}


def _key(link: int, rank: int = RANK) -> SketchKey:
    return SketchKey("orthonormal", 3, link, "fc1", "b", rank, IN)


def _new_link(index: int) -> Link:
    return Link(index, (LowRank("fc1", 0.5, _key(index), Zero((OUT, RANK))),))


def _trained(index: int, dtype: torch.dtype = torch.float32) -> LowRank:
    return LowRank("fc1", 0.5, _key(index), _numbers(100 + index, OUT, RANK, dtype=dtype))


def _update(chain: Chain, terms: Sequence[Term], *, close: bool) -> None:
    chain.update(Link(chain.num_links, tuple(terms)), close=close)


def _grown(num_links: int, dtype: torch.dtype = torch.float32) -> Chain:
    chain = Chain.start(_base(dtype))
    for index in range(num_links):
        chain.open_link(_new_link(index))
        _update(chain, [_trained(index, dtype)], close=True)
    return chain


# ---- merging ----


@given(
    seed=st.integers(0, 999),
    out=st.integers(1, 6),
    fan_in=st.integers(1, 6),
    rank=st.integers(1, 4),
    scale=st.floats(-3, 3),
)
def test_merging_adds_scale_b_a(seed: int, out: int, fan_in: int, rank: int, scale: float) -> None:
    weight, lora_a, lora_b = (
        _numbers(seed + i, *s, dtype=torch.float64) for i, s in enumerate([(out, fan_in), (rank, fan_in), (out, rank)])
    )
    weights = {"fc1.weight": weight.clone()}
    merge_(weights, [LowRank("fc1", scale, lora_a, lora_b)])
    torch.testing.assert_close(weights["fc1.weight"], weight + scale * lora_b @ lora_a, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 999), out=st.integers(1, 40), fan_in=st.integers(1, 40), rank=st.integers(1, 5))
def test_merging_gives_the_bits_of_rank_one_additions_in_float32(seed: int, out: int, fan_in: int, rank: int) -> None:
    weight, lora_a, lora_b = (
        _numbers(seed + i, *s) for i, s in enumerate([(out, fan_in), (rank, fan_in), (out, rank)])
    )
    weights = {"fc1.weight": weight.clone()}
    merge_(weights, [LowRank("fc1", 0.3, lora_a, lora_b)])
    expected, a, b = weight.numpy().copy(), lora_a.numpy(), lora_b.numpy() * np.float32(0.3)
    for k in range(rank):
        expected = expected + np.outer(b[:, k], a[k])
    assert expected.dtype == np.float32
    assert np.array_equal(weights["fc1.weight"].numpy(), expected)


def test_a_kernel_is_merged_as_its_flattened_matrix() -> None:
    kernel, lora_a, lora_b = _numbers(0, 4, 3, 2, 5), _numbers(1, 2, 30), _numbers(2, 4, 2)
    weights = {"conv.weight": kernel.clone()}
    merge_(weights, [LowRank("conv", 1.0, lora_a, lora_b)])
    torch.testing.assert_close(weights["conv.weight"], kernel + (lora_b @ lora_a).reshape(kernel.shape))


def test_a_seeded_factor_merges_as_its_numbers() -> None:
    seeded, explicit = Chain.start(_base()), Chain.start(_base())
    for chain, lora_a in ((seeded, _key(0)), (explicit, sketch.draw(_key(0)))):
        chain.open_link(Link(0, ()))
        _update(chain, [LowRank("fc1", 0.5, lora_a, _numbers(5, OUT, RANK))], close=True)
    assert equal_weights(seeded.merged, explicit.merged)
    assert seeded.digest != explicit.digest


def test_dense_terms_add_and_set_terms_replace_in_order() -> None:
    weights = {"fc1.bias": torch.tensor([1.0, 2.0])}
    merge_(weights, [Set("fc1.bias", torch.tensor([10.0, 20.0])), Dense("fc1.bias", torch.tensor([1.0, -1.0]))])
    assert weights["fc1.bias"].tolist() == [11.0, 19.0]


def test_an_unknown_tensor_is_refused_with_the_models_names() -> None:
    with pytest.raises(
        ValueError, match=r"'fc2\.weight', which the model lacks; it has \['fc1\.bias', 'fc1\.weight'\]"
    ):
        merge_(_base(), [LowRank("fc2", 1.0, _key(0), Zero((OUT, RANK)))])


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_update_of_t_links_has_rank_min_of_m_n_and_t_r(rank: int) -> None:
    chain = Chain.start(_base(torch.float64))
    for index in range(7):
        chain.open_link(Link(index, ()))
        lora_b = _numbers(50 + index, OUT, rank, dtype=torch.float64)
        _update(chain, [LowRank("fc1", 1.0, _key(index, rank), lora_b)], close=True)
        difference = chain.merged["fc1.weight"] - _base(torch.float64)["fc1.weight"]
        assert np.linalg.matrix_rank(difference.numpy(), tol=1e-9) == min(OUT, IN, (index + 1) * rank)


# ---- versions ----


def test_the_chain_is_base_plus_the_sum_of_its_links() -> None:
    chain = _grown(4, torch.float64)
    expected = _base(torch.float64)["fc1.weight"]
    for index in range(4):
        expected = expected + 0.5 * _trained(index, torch.float64).lora_b @ sketch.draw(_key(index)).double()  # type: ignore[operator]
    torch.testing.assert_close(chain.weights()["fc1.weight"], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(chain.weights()["fc1.bias"], _base(torch.float64)["fc1.bias"])


def test_closing_a_link_and_opening_the_next_changes_no_bit() -> None:
    chain = _grown(2)
    chain.open_link(_new_link(2))
    _update(chain, [_trained(2), Set("fc1.bias", _numbers(9, OUT))], close=False)
    before = {name: tensor.clone() for name, tensor in chain.weights().items()}
    chain.close()
    assert equal_weights(chain.weights(), before)
    chain.open_link(_new_link(3))
    assert equal_weights(chain.weights(), before)


def test_reading_the_weights_changes_nothing() -> None:
    chain = _grown(1)
    merged = {name: tensor.clone() for name, tensor in chain.merged.items()}
    chain.open_link(_new_link(1))
    _update(chain, [_trained(1), Dense("fc1.bias", torch.ones(OUT))], close=False)
    digest = chain.digest
    first, second = chain.weights(), chain.weights()
    assert equal_weights(first, second)
    assert not equal_weights(first, merged)
    assert equal_weights(chain.merged, merged)
    assert chain.digest == digest


def test_an_update_replaces_what_the_open_link_said() -> None:
    replaced, direct = Chain.start(_base()), Chain.start(_base())
    for chain in (replaced, direct):
        chain.open_link(_new_link(0))
    _update(
        replaced, [_trained(5), Set("fc1.bias", torch.ones(OUT)), Dense("fc1.weight", torch.ones(OUT, IN))], close=False
    )
    for chain in (replaced, direct):
        _update(chain, [_trained(0), Set("fc1.bias", torch.zeros(OUT))], close=False)
    assert equal_weights(replaced.weights(), direct.weights())
    assert replaced.digest == direct.digest
    assert (replaced.version, replaced.updates_in_link) == (2, 2)
    assert (direct.version, direct.updates_in_link) == (1, 1)


def test_an_update_may_not_forget_a_tensor_that_the_open_link_sets() -> None:
    """Replicas may never have been sent the older value, so nothing could bring it back."""
    chain = Chain.start(_base())
    chain.open_link(_new_link(0))
    _update(chain, [_trained(0), Set("fc1.bias", torch.ones(OUT))], close=False)
    digest = chain.digest
    for terms in ([_trained(1)], [_trained(1), Dense("fc1.bias", torch.ones(OUT))]):
        with pytest.raises(ValueError, match=r"open link sets \['fc1\.bias'\]; its next terms must set them too"):
            _update(chain, terms, close=True)
    assert (chain.digest, chain.version, chain.num_links) == (digest, 1, 0)
    _update(chain, [Set("fc1.bias", torch.zeros(OUT))], close=True)
    chain.open_link(_new_link(1))
    _update(chain, [_trained(1)], close=True)


def test_counters_follow_updates_and_closed_links() -> None:
    chain = _grown(2)
    assert (chain.version, chain.num_links, chain.num_links_before, len(chain.links)) == (2, 2, 1, 2)
    chain.open_link(_new_link(2))
    assert (chain.version, chain.num_links, chain.updates_in_link) == (2, 2, 0)
    _update(chain, [_trained(2)], close=False)
    assert (chain.version, chain.num_links, chain.num_links_before, chain.updates_in_link) == (3, 2, 2, 1)
    _update(chain, [_trained(2)], close=True)
    assert (chain.version, chain.num_links, chain.num_links_before, chain.updates_in_link) == (4, 3, 2, 2)


def test_the_base_is_copied() -> None:
    base = _base()
    chain = Chain.start(base)
    base["fc1.bias"].zero_()
    assert equal_weights(chain.merged, _base())


def test_links_open_in_order_and_one_at_a_time() -> None:
    chain = _grown(1)
    with pytest.raises(ValueError, match=r"cannot open link 2: 1 links are closed and the last one is closed"):
        chain.open_link(_new_link(2))
    chain.open_link(_new_link(1))
    with pytest.raises(ValueError, match=r"cannot open link 1: 1 links are closed and the last one is open"):
        chain.open_link(_new_link(1))


def test_updates_and_closing_need_an_open_link() -> None:
    with pytest.raises(ValueError, match="no link is open; open one"):
        _update(_grown(1), [_trained(1)], close=True)
    with pytest.raises(ValueError, match="no link is open"):
        _grown(1).close()


@pytest.mark.parametrize("num_held", [0, 1, 3])
def test_missing_links_are_the_newest_ones(num_held: int) -> None:
    assert [link.index for link in _grown(3).missing_links(num_held)] == list(range(num_held, 3))


def test_links_that_are_not_kept_cannot_be_asked_for() -> None:
    chain = _grown(3)
    with pytest.raises(LookupError, match="links 4 to 2 are asked for"):
        chain.missing_links(4)
    del chain.links[0]
    assert [link.index for link in chain.missing_links(1)] == [1, 2]
    with pytest.raises(LookupError, match="links 0 to 2 are asked for, the last 2 are kept"):
        chain.missing_links(0)


# ---- cores ----


@settings(max_examples=40)
@given(seed=st.integers(0, 999), out=st.integers(1, 20), fan_in=st.integers(1, 20), rank=st.integers(1, 40))
def test_merging_with_a_core_gives_the_bits_of_its_sums_in_order(seed: int, out: int, fan_in: int, rank: int) -> None:
    """In float32, by single rounded products and sums; it stands for scale * B @ core @ A."""
    shapes = [(out, fan_in), (rank, fan_in), (out, rank), (rank, rank)]
    weight, lora_a, lora_b, core = (_numbers(seed + place, *shape) for place, shape in enumerate(shapes))
    weights = {"fc1.weight": weight.clone()}
    merge_(weights, [LowRank("fc1", 0.3, lora_a, lora_b, core)])
    left, expected = np.zeros((out, rank), np.float32), weight.numpy()
    for k in range(rank):
        left = left + np.outer((lora_b.numpy() * np.float32(0.3))[:, k], core.numpy()[k])
    for k in range(rank):
        expected = expected + np.outer(left[:, k], lora_a.numpy()[k])
    assert expected.dtype == np.float32
    assert np.array_equal(weights["fc1.weight"].numpy(), expected)
    whole = weight + 0.3 * lora_b @ core @ lora_a
    torch.testing.assert_close(weights["fc1.weight"], whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", ["lora_a", "lora_b", "core"])
def test_a_term_with_a_factor_of_zeros_changes_nothing(place: str) -> None:
    shapes = {"lora_a": (RANK, IN), "lora_b": (OUT, RANK), "core": (RANK, RANK)}
    factors = {name: Zero(shape) if name == place else _numbers(5, *shape) for name, shape in shapes.items()}
    chain = _grown(1)
    chain.open_link(Link(1, (LowRank("fc1", 2.0, **factors),)))
    assert equal_weights(chain.weights(), chain.merged)


# ---- server rules ----


def _by_hand(rule: ServerRule, updates: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of the steps of Algorithm 2 of arXiv 2003.00295 (FedAvgM's for momentum)."""
    m, v, total = 0.0, rule.tau**2, 0.0
    for u in updates:
        m = rule.beta1 * m + (1 if rule.name in ("sgd", "momentum") else 1 - rule.beta1) * u
        if rule.name == "sgd":
            total = total + rule.lr * u
            continue
        if rule.name == "momentum":
            total = total + rule.lr * m
            continue
        changes = {
            "adagrad": u**2,
            "adam": (1 - rule.beta2) * (u**2 - v),
            "yogi": -(1 - rule.beta2) * u**2 * np.sign(v - u**2),
        }
        v = v + changes[rule.name]
        total = total + rule.lr * m / (np.sqrt(v) + rule.tau)
    return np.asarray(total)


def _ruled_link(index: int, rule: ServerRule | None) -> Link:
    """A link that adds to a weight twice, adds to the bias, and sets another tensor."""
    double = torch.float64
    terms: list[Term] = [
        _trained(index, double),
        Dense("fc1.weight", _numbers(300 + index, OUT, IN, dtype=double)),
        Dense("fc1.bias", _numbers(400 + index, OUT, dtype=double)),
        Set("norm.weight", _numbers(500 + index, 3, dtype=double)),
    ]
    return Link(index, tuple(terms), rule)


def _ruled(rules: Sequence[ServerRule | None]) -> Chain:
    chain = Chain.start({**_base(torch.float64), "norm.weight": torch.ones(3, dtype=torch.float64)})
    for index, rule in enumerate(rules):
        chain.open_link(_new_link(index))
        chain.update(_ruled_link(index, rule), close=True)
    return chain


@pytest.mark.parametrize("name", RULES)
def test_merging_by_a_servers_rule_takes_the_rules_step_for_what_a_link_adds(name: str) -> None:
    rule, count = ServerRule(name, lr=0.3, beta1=0.8, beta2=0.9, tau=0.05), 4
    chain = _ruled([rule] * count)
    products = [
        _trained(index, torch.float64).scale
        * _numbers(100 + index, OUT, RANK, dtype=torch.float64).numpy()
        @ sketch.draw(_key(index)).double().numpy()
        for index in range(count)
    ]
    added = {
        "fc1.weight": [
            product + _numbers(300 + index, OUT, IN, dtype=torch.float64).numpy()
            for index, product in enumerate(products)
        ],
        "fc1.bias": [_numbers(400 + index, OUT, dtype=torch.float64).numpy() for index in range(count)],
    }
    for target, updates in added.items():
        expected = _base(torch.float64)[target].numpy() + _by_hand(rule, updates)
        torch.testing.assert_close(chain.merged[target], torch.from_numpy(expected), rtol=1e-10, atol=1e-10)
    # What a link sets is no update; the rule has no say in it.
    assert torch.equal(chain.merged["norm.weight"], _numbers(500 + count - 1, 3, dtype=torch.float64))
    assert {key.partition("/")[0] for key in chain.slots} == (set(added) if rule.has_state else set())


@pytest.mark.parametrize("name", RULES)
def test_a_replica_that_replays_described_links_holds_the_same_bits_and_moments(name: str) -> None:
    server = _ruled([ServerRule(name), None, ServerRule(name, lr=0.1)])
    replica = _ruled([])
    for link in server.links:
        replica.open_link(restore(json.loads(json.dumps(describe(link))), link.tensors))
        replica.close()
    assert equal_weights(replica.everything(), server.everything())
    assert replica.digest == server.digest


def test_a_link_without_a_rule_adds_as_it_is_and_leaves_the_moments_alone() -> None:
    before, after = _ruled([ServerRule("adam")]), _ruled([ServerRule("adam"), None])
    assert equal_weights(before.slots, after.slots)
    expected = {name: tensor.clone() for name, tensor in before.merged.items()}
    merge_(expected, _ruled_link(1, None).terms)
    assert equal_weights(after.merged, expected)


def test_plain_sgd_merges_as_no_rule_does() -> None:
    plain, ruled = _ruled([None, None]), _ruled([ServerRule("sgd")] * 2)
    for name, tensor in plain.merged.items():
        torch.testing.assert_close(ruled.merged[name], tensor, rtol=1e-12, atol=1e-12)


def test_the_digest_tells_rules_apart() -> None:
    histories = [None, ServerRule(), ServerRule("adam"), ServerRule("adam", lr=0.5), ServerRule("yogi")]
    assert len({_ruled([rule]).digest for rule in histories}) == len(histories)


# ---- a link merged beside the open one ----


def _beside(*, close: bool) -> Chain:
    chain = _grown(2)
    chain.open_link(_new_link(2))
    chain.update(Link(2, (_trained(2),)), close=False)
    chain.update(Link(3, (_trained(7),)), close=close, merged=Link(2, (Dense("fc1.bias", torch.ones(OUT)),)))
    return chain


@pytest.mark.parametrize("close", [False, True])
def test_a_link_merged_beside_the_open_one_comes_before_it_for_good(close: bool) -> None:
    chain = _beside(close=close)
    assert (chain.version, chain.num_links, chain.num_links_before) == (4, 3 + close, 2)
    assert (chain.updates_in_link, [link.index for link in chain.links]) == (2, list(range(3 + close)))
    assert (chain.open is None) == close
    expected = {name: tensor.clone() for name, tensor in _grown(2).merged.items()}
    merge_(expected, [Dense("fc1.bias", torch.ones(OUT))])
    if not close:
        assert equal_weights(chain.merged, expected)
    merge_(expected, [_trained(7)])
    assert equal_weights(chain.weights(), expected)


def test_a_version_with_a_merged_link_is_that_of_the_two_links_one_after_the_other() -> None:
    apart = _grown(2)
    apart.open_link(Link(2, ()))
    apart.update(Link(2, (Dense("fc1.bias", torch.ones(OUT)),)), close=True)
    apart.open_link(Link(3, ()))
    apart.update(Link(3, (_trained(7),)), close=False)
    assert _beside(close=False).digest == apart.digest
    assert equal_weights(_beside(close=False).weights(), apart.weights())


@pytest.mark.parametrize(("merged", "link"), [(None, 1), (None, 3), (2, 2), (3, 4), (1, 3), (2, 4)])
def test_links_out_of_place_are_refused_before_anything_is_merged(merged: int | None, link: int) -> None:
    chain = _grown(2)
    chain.open_link(_new_link(2))
    before, digest = {name: tensor.clone() for name, tensor in chain.merged.items()}, chain.digest
    beside = None if merged is None else Link(merged, (Dense("fc1.bias", torch.ones(OUT)),))
    with pytest.raises(ValueError, match=r"an update brings links .*; after 2 closed ones \[2(, 3)?\] are right"):
        chain.update(Link(link, (_trained(2),)), close=True, merged=beside)
    assert equal_weights(chain.merged, before)
    assert (chain.digest, chain.num_links, chain.num_links_before, chain.version) == (digest, 2, 1, 2)


# ---- snapshots ----


@pytest.mark.parametrize("name", RULES)
def test_a_chain_goes_on_from_a_snapshot_as_if_it_had_replayed(name: str) -> None:
    """The moments are part of the snapshot: without them the next step would be another."""
    rule = ServerRule(name)
    server, late = _ruled([rule] * 3), _ruled([rule])
    late.restore(server.everything(), num_links=3, hash=server.hash)
    for chain in (server, late):
        chain.open_link(_new_link(3))
        chain.update(_ruled_link(3, rule), close=True)
    assert late.digest == server.digest
    assert equal_weights(late.everything(), server.everything())


def test_a_snapshot_replaces_all_moments_and_shares_no_memory() -> None:
    server, late = _ruled([ServerRule("momentum")]), _ruled([ServerRule("adam")])
    snapshot = {name: tensor.clone() for name, tensor in server.everything().items()}
    late.restore(snapshot, num_links=1, hash=server.hash)
    for tensor in snapshot.values():
        tensor.zero_()
    assert equal_weights(late.everything(), server.everything())
    late.restore({"fc1.bias": torch.zeros(OUT)}, num_links=1, hash=server.hash)
    assert late.slots == {}


def test_everything_is_the_weights_and_the_moments_by_names_of_their_own() -> None:
    chain = _ruled([ServerRule("momentum")])
    everything = chain.everything()
    assert everything.keys() - chain.merged.keys() == {"moment of fc1.weight/first", "moment of fc1.bias/first"}
    assert all(everything[name] is tensor for name, tensor in chain.merged.items())


# ---- digests ----


def _history(change: str = "") -> Chain:
    base = _base()
    if change == "base":
        base["fc1.bias"][0] += 1
    chain = Chain.start(base)
    for index in range(3):
        chain.open_link(_new_link(index))
        lora_b = _numbers(100 + index, OUT, RANK)
        if change == "bit" and index == 0:
            lora_b.view(torch.int32)[0, 0] ^= 1
        scale = 0.25 if change == "scale" and index == 1 else 0.5
        key = _key(index) if change != "seed" or index != 1 else SketchKey("orthonormal", 4, 1, "fc1", "b", RANK, IN)
        terms: list[Term] = [LowRank("fc1", scale, key, lora_b), Set("fc1.bias", torch.full((OUT,), float(index)))]
        _update(
            chain, terms[::-1] if change == "order" and index == 2 else terms, close=index < 2 or change == "closed"
        )
    return chain


@pytest.mark.parametrize("change", ["base", "bit", "scale", "seed", "order", "closed"])
def test_the_digest_tells_histories_apart_that_differ_in(change: str) -> None:
    assert _history(change).digest != _history().digest


def test_equal_histories_have_equal_digests() -> None:
    assert _history().digest == _history().digest


def test_every_version_has_another_digest() -> None:
    steps: list[Callable[[Chain], None]] = [
        lambda chain: chain.open_link(_new_link(0)),
        lambda chain: _update(chain, [_trained(0)], close=False),
        lambda chain: _update(chain, [_trained(7)], close=False),
        lambda chain: chain.close(),
        lambda chain: chain.open_link(_new_link(1)),
    ]
    chain = Chain.start(_base())
    digests = [chain.digest]
    for step in steps:
        step(chain)
        digests.append(chain.digest)
    assert len(set(digests)) == len(digests)


# ---- superseded values ----


@settings(max_examples=60)
@given(data=st.data())
def test_dropping_superseded_values_changes_no_bit_of_the_model(data: st.DataObject) -> None:
    names = ["fc1.weight", "fc1.bias"]
    links = []
    for index in range(data.draw(st.integers(1, 4))):
        terms: list[Term] = (
            [LowRank("fc1", 0.5, _key(index), _numbers(index, OUT, RANK))] if data.draw(st.booleans()) else []
        )
        for name in data.draw(st.lists(st.sampled_from(names), unique=True)):
            kind = Set if data.draw(st.booleans()) else Dense
            terms.append(kind(name, _numbers(index + 20, *_base()[name].shape)))
        links.append(Link(index, tuple(data.draw(st.permutations(terms)))))
    whole, short = _base(), _base()
    kept = drop_superseded(links)
    merge_(whole, [term for link in links for term in link.terms])
    merge_(short, [term for link in kept for term in link.terms])
    assert equal_weights(whole, short)
    assert [link.index for link in kept] == [link.index for link in links]
    values = [term.target for link in kept for term in link.terms if isinstance(term, Set)]
    assert len(values) == len(set(values))


def test_equal_weights_compares_names_and_bits() -> None:
    assert equal_weights(_base(), _base())
    assert not equal_weights(_base(), {"fc1.weight": _base()["fc1.weight"]})
    other = _base()
    other["fc1.bias"].view(torch.int32)[3] ^= 1
    assert not equal_weights(_base(), other)
