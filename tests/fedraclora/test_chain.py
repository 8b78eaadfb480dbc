"""Tests of fedraclora.chain."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora import sketch
from fedraclora.chain import Chain, Weights, drop_superseded, equal_weights, merge_
from fedraclora.link import Dense, Link, LowRank, Set, Term, Zero
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


def _grown(num_links: int, dtype: torch.dtype = torch.float32) -> Chain:
    chain = Chain.start(_base(dtype))
    for index in range(num_links):
        chain.open_link(_new_link(index))
        chain.update([_trained(index, dtype)], close=True)
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
        chain.update([LowRank("fc1", 0.5, lora_a, _numbers(5, OUT, RANK))], close=True)
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
        chain.update([LowRank("fc1", 1.0, _key(index, rank), lora_b)], close=True)
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
    chain.update([_trained(2), Set("fc1.bias", _numbers(9, OUT))], close=False)
    before = {name: tensor.clone() for name, tensor in chain.weights().items()}
    chain.close()
    assert equal_weights(chain.weights(), before)
    chain.open_link(_new_link(3))
    assert equal_weights(chain.weights(), before)


def test_reading_the_weights_changes_nothing() -> None:
    chain = _grown(1)
    merged = {name: tensor.clone() for name, tensor in chain.merged.items()}
    chain.open_link(_new_link(1))
    chain.update([_trained(1), Dense("fc1.bias", torch.ones(OUT))], close=False)
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
    replaced.update(
        [_trained(5), Set("fc1.bias", torch.ones(OUT)), Dense("fc1.weight", torch.ones(OUT, IN))], close=False
    )
    for chain in (replaced, direct):
        chain.update([_trained(0), Set("fc1.bias", torch.zeros(OUT))], close=False)
    assert equal_weights(replaced.weights(), direct.weights())
    assert replaced.digest == direct.digest
    assert (replaced.version, replaced.updates_in_link) == (2, 2)
    assert (direct.version, direct.updates_in_link) == (1, 1)


def test_an_update_may_not_forget_a_tensor_that_the_open_link_sets() -> None:
    """Replicas may never have been sent the older value, so nothing could bring it back."""
    chain = Chain.start(_base())
    chain.open_link(_new_link(0))
    chain.update([_trained(0), Set("fc1.bias", torch.ones(OUT))], close=False)
    digest = chain.digest
    for terms in ([_trained(1)], [_trained(1), Dense("fc1.bias", torch.ones(OUT))]):
        with pytest.raises(ValueError, match=r"open link sets \['fc1\.bias'\]; its next terms must set them too"):
            chain.update(terms, close=True)
    assert (chain.digest, chain.version, chain.num_links) == (digest, 1, 0)
    chain.update([Set("fc1.bias", torch.zeros(OUT))], close=True)
    chain.open_link(_new_link(1))
    chain.update([_trained(1)], close=True)


def test_counters_follow_updates_and_closed_links() -> None:
    chain = _grown(2)
    assert (chain.version, chain.num_links, chain.num_links_before, len(chain.links)) == (2, 2, 1, 2)
    chain.open_link(_new_link(2))
    assert (chain.version, chain.num_links, chain.updates_in_link) == (2, 2, 0)
    chain.update([_trained(2)], close=False)
    assert (chain.version, chain.num_links, chain.num_links_before, chain.updates_in_link) == (3, 2, 2, 1)
    chain.update([_trained(2)], close=True)
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
        _grown(1).update([_trained(1)], close=True)
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
        chain.update(terms[::-1] if change == "order" and index == 2 else terms, close=index < 2 or change == "closed")
    return chain


@pytest.mark.parametrize("change", ["base", "bit", "scale", "seed", "order", "closed"])
def test_the_digest_tells_histories_apart_that_differ_in(change: str) -> None:
    assert _history(change).digest != _history().digest


def test_equal_histories_have_equal_digests() -> None:
    assert _history().digest == _history().digest


def test_every_version_has_another_digest() -> None:
    steps: list[Callable[[Chain], None]] = [
        lambda chain: chain.open_link(_new_link(0)),
        lambda chain: chain.update([_trained(0)], close=False),
        lambda chain: chain.update([_trained(7)], close=False),
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
