"""The steps from replies to the next version, each by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.chain import Chain
from fedraclora.codec import codec_text
from fedraclora.link import Dense, Link, LowRank, Set, Zero, materialize, product
from fedraclora.narrowing import narrow
from fedraclora.plan import RoundPlan, Sending, Training
from fedraclora.privacy import Privacy
from fedraclora.server_rule import ServerRule
from fedraclora.sketch import SketchKey
from strategies.memory import VARIATES, Memory
from strategies.merging import (
    AGGREGATES,
    Finish,
    Robust,
    aggregation_gap,
    combine,
    estimate_reply,
    private_mean,
    update_variates,
    values_of,
    widen,
)
from strategies.method import ClientUpdate, Step, mean_update
from strategies.replies import Reply

OUT, IN, RANK = 5, 7, 4
KEY = SketchKey("orthonormal", 1, 0, "fc1", "b", RANK, IN)
LIKE = torch.zeros((), dtype=torch.float64)


def random(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


WEIGHTS = {"fc1.weight": random(1, OUT, IN), "fc1.bias": random(2, OUT)}
OPEN = Link(0, (LowRank("fc1", 1.5, KEY, random(3, OUT, RANK)), Set("fc1.bias", random(4, OUT))))


def client(seed, weight=1.0, link=OPEN):
    return ClientUpdate({"fc1.lora_b": random(seed, OUT, RANK), "fc1.bias": random(seed + 100, OUT)}, weight, link)


UPDATES = {who: client(10 + who, weight=1.0 + who) for who in (3, 0, 2, 1)}


# ---- values, and ranks


def test_a_difference_is_added_to_where_training_started():
    """A factor starts at the link's, a whole tensor at what the link sets, else at the closed weights'."""
    differences = {"fc1.lora_b": random(5, OUT, RANK), "fc1.bias": random(6, OUT), "fc1.weight": random(7, OUT, IN)}
    found = values_of(differences, OPEN, WEIGHTS)
    starts = {"fc1.lora_b": OPEN.terms[0].lora_b, "fc1.bias": OPEN.terms[1].value, "fc1.weight": WEIGHTS["fc1.weight"]}
    for key, start in starts.items():
        assert torch.equal(found[key], start + differences[key])


@given(st.integers(1, RANK), st.floats(0.5, 4), st.sampled_from(["b", "a", "ab"]), st.integers(0, 99))
def test_a_widened_client_is_the_same_change_of_the_model(rank, alpha, trained, seed):
    """Padding adds nothing to the product, and the scale of the client's own is in the factor that trains."""
    drawn_b = SketchKey("orthonormal", 1, 0, "fc1", "a", RANK, OUT)
    zero_a, zero_b = Zero((RANK, IN)), Zero((OUT, RANK))
    start = LowRank("fc1", 1.5, zero_a, drawn_b) if trained == "a" else LowRank("fc1", 1.5, KEY, zero_b)
    full = Link(0, (start,))
    own = narrow(full, {"fc1": rank}, {"fc1": alpha / rank})
    shapes = {"a": {"lora_a": (rank, IN)}, "b": {"lora_b": (OUT, rank)}}
    sent = {f"fc1.{name}": random(seed, *shape) for side in trained for name, shape in shapes[side].items()}
    widened = widen({**sent, "fc1.bias": random(seed, OUT)}, own, full)
    assert torch.equal(widened["fc1.bias"], random(seed, OUT))
    (mine,) = own.with_factors(sent).terms
    (padded,) = full.with_factors({key: value for key, value in widened.items() if key != "fc1.bias"}).terms
    torch.testing.assert_close(product(padded, LIKE), product(mine, LIKE), rtol=1e-12, atol=1e-12)
    assert all(value.shape == full.factors[key].shape for key, value in widened.items() if key != "fc1.bias")


@pytest.mark.parametrize("feedback", ["ef21", "marina"])
def test_the_servers_estimate_moves_with_each_reply_and_starts_anew_with_a_client_that_lost_its_own(feedback):
    memory, plan = Memory(), RoundPlan(1, Training({"fc1": "b"}), sending=Sending("x", feedback=feedback))
    sent = [{"fc1.lora_b": random(seed, OUT, RANK)} for seed in range(4)]

    def reply(number, state):
        return Reply(sent[number], num_examples=1, num_steps=1, train_loss=0.0, is_within=True, state=state)

    def told(number, state, *, is_whole=False):
        return estimate_reply(memory, 5, reply(number, state), OPEN, plan, is_whole=is_whole)["fc1.lora_b"]

    assert torch.equal(told(0, -1), sent[0]["fc1.lora_b"])
    assert torch.equal(told(1, 1), sent[0]["fc1.lora_b"] + sent[1]["fc1.lora_b"])
    whole = told(2, 2, is_whole=True)
    before = sent[0]["fc1.lora_b"] + sent[1]["fc1.lora_b"]
    assert torch.equal(whole, sent[2]["fc1.lora_b"] + (before if feedback == "ef21" else 0))
    assert torch.equal(told(3, -1), sent[3]["fc1.lora_b"])


# ---- what enters the mean


def test_plain_updates_are_left_alone():
    assert combine(UPDATES, OPEN, WEIGHTS, Robust()) is UPDATES


def starts():
    return {"fc1.lora_b": OPEN.terms[0].lora_b, "fc1.bias": OPEN.terms[1].value}


@pytest.mark.parametrize("aggregate", ["median", "trimmed_mean"])
def test_one_update_stands_for_the_middle_of_all_whatever_their_weights(aggregate):
    found = combine(UPDATES, OPEN, WEIGHTS, Robust(aggregate))
    for key in starts():
        values = np.sort(np.stack([UPDATES[who].tensors[key].numpy() for who in range(4)]), axis=0)
        np.testing.assert_allclose(mean_update(found)[key].numpy(), values[1:3].mean(0), rtol=1e-12)


@pytest.mark.parametrize(("aggregate", "count"), [("krum", 1), ("multi_krum", 3)])
def test_krum_leaves_those_that_are_nearest_to_the_others(aggregate, count):
    """Four clients within 0.1 of one another and one far away, which no count of three holds."""
    near = {who: client(10) for who in range(5)}
    moved = {
        who: replace(update, tensors={k: t + 0.01 * random(who, *t.shape) for k, t in update.tensors.items()})
        for who, update in near.items()
    }
    moved[2] = client(99)
    found = combine(moved, OPEN, WEIGHTS, Robust(aggregate, num_attackers=1, num_chosen=3))
    assert len(found) == count
    assert 2 not in found
    for who, update in found.items():
        for key, tensor in update.tensors.items():
            torch.testing.assert_close(tensor, moved[who].tensors[key], rtol=1e-12, atol=1e-12)


def test_a_bound_on_the_norm_scales_the_whole_difference_from_the_start():
    found = combine(UPDATES, OPEN, WEIGHTS, Robust(max_norm=0.5))
    assert found.keys() == UPDATES.keys()
    for who, update in found.items():
        wanted = {key: UPDATES[who].tensors[key] - start for key, start in starts().items()}
        moved = {key: update.tensors[key] - start for key, start in starts().items()}
        norm = sum(float(t.square().sum()) for t in wanted.values()) ** 0.5
        assert norm > 0.5
        for key, tensor in moved.items():
            torch.testing.assert_close(tensor, wanted[key] * 0.5 / norm, rtol=1e-9, atol=1e-12)
        assert update.weight == UPDATES[who].weight


def test_without_noise_the_private_mean_is_that_of_clipped_updates_over_the_whole_cohort():
    privacy, generator = Privacy("client", clip=9.0, noise=0.0, delta=1e-5), np.random.default_rng(0)
    found = private_mean(UPDATES, OPEN, WEIGHTS, privacy, clip=0.5, cohort_size=5, generator=generator)
    clipped = combine(UPDATES, OPEN, WEIGHTS, Robust(max_norm=0.5))
    for key, start in starts().items():
        expected = start + sum(clipped[who].tensors[key] - start for who in clipped) / 5
        torch.testing.assert_close(mean_update(found)[key], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"aggregate": "mode"}, "robust.aggregate='mode' is unknown"),
        ({"trim": -1}, "must not be negative"),
        ({"num_attackers": -1}, "must not be negative"),
        ({"num_chosen": 0}, "at least 1"),
        ({"max_norm": float("nan")}, "must not be negative"),
    ],
)
def test_what_is_no_aggregate_is_refused(own, words):
    with pytest.raises(ValueError, match=words):
        Robust(**own)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_as_few_replies_as_an_aggregate_needs_are_enough(aggregate):
    robust = Robust(aggregate, trim=1, num_attackers=1, num_chosen=3)
    enough = {who: client(who) for who in range(robust.fewest)}
    assert combine(enough, OPEN, WEIGHTS, robust)
    if robust.fewest > 1:
        with pytest.raises(ValueError, match="client"):
            combine({who: client(who) for who in range(robust.fewest - 1)}, OPEN, WEIGHTS, robust)


# ---- the gap


@given(st.integers(0, 99))
def test_the_gap_is_the_norm_of_what_is_missed_over_that_of_the_mean_change(seed):
    trained = {who: client(seed + 7 * who, weight=1.0 + who) for who in range(3)}
    opened = [LowRank("fc1", 0.7, random(seed, RANK, IN), random(seed + 1, OUT, RANK)), Set("fc1.bias", random(8, OUT))]
    merged = [Dense("fc1.weight", random(seed + 2, OUT, IN))]
    shares = {who: (1.0 + who) / 6 for who in range(3)}
    a = materialize(KEY, LIKE)
    old = 1.5 * OPEN.terms[0].lora_b @ a
    by_weight = sum(share * 1.5 * trained[who].tensors["fc1.lora_b"] @ a for who, share in shares.items()) - old
    by_bias = sum(share * trained[who].tensors["fc1.bias"] for who, share in shares.items()) - OPEN.terms[1].value
    found_weight = 0.7 * opened[0].lora_b @ opened[0].lora_a + merged[0].delta - old
    found_bias = opened[1].value - OPEN.terms[1].value
    missed = (found_weight - by_weight).square().sum() + (found_bias - by_bias).square().sum()
    expected = float(missed / (by_weight.square().sum() + by_bias.square().sum())) ** 0.5
    gap = aggregation_gap(WEIGHTS, OPEN, Step(opened, merged), trained)
    assert gap == pytest.approx(expected, rel=1e-9)


def test_the_mean_itself_has_no_gap_and_no_change_has_none():
    mean = mean_update(UPDATES)
    exact = Step([replace(OPEN.terms[0], lora_b=mean["fc1.lora_b"]), Set("fc1.bias", mean["fc1.bias"])])
    assert aggregation_gap(WEIGHTS, OPEN, exact, UPDATES) < 1e-14
    still = {0: ClientUpdate(starts(), 1.0, OPEN)}
    assert aggregation_gap(WEIGHTS, OPEN, Step(OPEN.terms), still) == 0


# ---- the last word


def chain_with(opened):
    chain = Chain.start(WEIGHTS)
    chain.open_link(opened)
    return chain


def finish(step, *, closes=False, opened=OPEN, memory=None, **own):
    return Finish(**own).apply(chain_with(opened), step, memory or Memory(), closes=closes, seed=7)


NEXT = (replace(OPEN.terms[0], lora_b=random(20, OUT, RANK)), Set("fc1.bias", random(21, OUT)))


def test_a_plain_finish_takes_the_step_as_it_is():
    link, merged = finish(Step(NEXT))
    assert (link, merged) == (Link(0, NEXT), None)
    link, merged = finish(Step(NEXT, [Dense("fc1.weight", WEIGHTS["fc1.weight"])]))
    assert (link.index, merged.index) == (1, 0)
    assert link.rule is merged.rule is None


def test_a_rule_goes_with_what_is_merged_and_not_with_a_link_that_stays_open():
    rule = ServerRule("adam")
    assert finish(Step(NEXT), rule=rule, closes=True)[0].rule == rule
    assert finish(Step(NEXT), rule=rule)[0].rule is None
    link, merged = finish(Step(NEXT, [Dense("fc1.weight", WEIGHTS["fc1.weight"])]), rule=rule)
    assert (link.rule, merged.rule) == (None, rule)


def test_where_nothing_is_merged_the_rule_moves_what_the_clients_moved():
    kept = (NEXT[0], OPEN.terms[1])
    memory = Memory()
    link, _ = finish(Step(kept), rule=ServerRule("momentum", lr=0.5), merges=False, memory=memory)
    moved = kept[0].lora_b - OPEN.terms[0].lora_b
    torch.testing.assert_close(link.terms[0].lora_b, OPEN.terms[0].lora_b + 0.5 * moved)
    assert torch.equal(link.terms[1].value, OPEN.terms[1].value)
    assert set(memory.tensors["slots"]) == {"fc1.lora_b/first"}
    assert link.rule is None


def test_a_compressed_downlink_encodes_what_is_new_and_leaves_the_rest_bit_for_bit():
    codec = codec_text("int8", {"stochastic": True, "scale_per": "tensor"})
    kept = (NEXT[0], OPEN.terms[1], LowRank("fc2", 1.0, OPEN.terms[0].lora_b, random(22, 3, OUT)))
    link, _ = finish(Step(kept), codec=codec)
    assert set(link.packed) == {"fc1.lora_b", "set fc1.bias", "fc2.lora_b"}
    assert torch.equal(link.terms[2].lora_a, OPEN.terms[0].lora_b), "clients hold it already"
    step = float(NEXT[0].lora_b.abs().max()) / 127
    assert 0 < float((link.terms[0].lora_b - NEXT[0].lora_b).abs().max()) <= step * (1 + 1e-6)


def test_a_sparse_downlink_leaves_whole_tensors_alone():
    link, merged = finish(
        Step(NEXT, [Dense("fc1.weight", random(23, OUT, IN))]), codec=codec_text("top_k", {"share": 0.2}), closes=True
    )
    assert set(link.packed) == {"fc1.lora_b"}
    assert set(merged.packed) == {"add fc1.weight"}
    assert torch.equal(link.terms[1].value, NEXT[1].value)
    assert int((merged.terms[0].delta != 0).sum()) == OUT * IN // 5


def test_control_variates_move_by_the_sum_of_the_changes_over_all_clients():
    memory = Memory()
    changes = {who: {"fc1.lora_b": random(who, OUT, RANK)} for who in (1, 4)}
    for count in (1, 2):
        update_variates(memory, changes, OPEN, num_clients=8, mode="transport")
        expected = count * (changes[1]["fc1.lora_b"] + changes[4]["fc1.lora_b"]) / 8
        torch.testing.assert_close(memory.recall(VARIATES, OPEN, mode="carry")["fc1.lora_b"], expected)
