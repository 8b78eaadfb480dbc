"""Client state between rounds: carried, transported or reset, and only if the server used the reply."""

import pytest
import torch

from experiments.run import run
from fedraclora.link import Link, LowRank, materialize
from fedraclora.moments import carry_over
from fedraclora.optim import Moments
from fedraclora.sketch import SketchKey
from tests.helpers import (
    AppsGrid,
    OneByOneGrid,
    Silent,
    error_reply,
    federation,
    same_weights,
    settings,
)


def with_moments(mode, **changes):
    return settings(**{"method": ("rac_lora", {"moments": mode}), "momentum": 0.9, "fraction": 1.0, **changes})


def digest(chosen, **options):
    parts = federation(chosen, **options)
    parts.run()
    return parts.chain.digest


def test_reset_carry_and_transport_are_three_different_rules():
    digests = {mode: digest(with_moments(mode)) for mode in ("reset", "carry", "transport")}
    assert len(set(digests.values())) == 3


def test_the_first_round_is_the_same_for_all_rules():
    assert len({digest(with_moments(mode, rounds=1)) for mode in ("reset", "carry", "transport")}) == 1


def test_within_a_link_transport_is_carry():
    shared = {"rounds_per_link": 0}
    carried, transported = (
        digest(settings(method=("rac_lora", {"moments": mode, **shared}), momentum=0.9, fraction=1.0))
        for mode in ("carry", "transport")
    )
    assert carried == transported


def test_a_carried_moment_is_the_one_that_the_client_had():
    """One SGD step with momentum mu moves by -lr (mu m + g), so the carried m shows in the difference to a reset."""
    chosen = {"rounds": 2, "local_steps": 1, "dtype": "float64", "num_clients": 1, "rank": 2, "lr": 0.1}
    carried, reset = (federation(with_moments(mode, **chosen)) for mode in ("carry", "reset"))
    carried.run(1)
    moment = carried.replica.store.load(0, 1).moments.tensors
    carried.run(2)
    reset.run()
    for mine, plain in zip(carried.chain.links[1].terms, reset.chain.links[1].terms, strict=True):
        expected = plain.lora_b - 0.1 * 0.9 * moment[f"{mine.layer}.lora_b"]
        torch.testing.assert_close(mine.lora_b, expected, rtol=1e-10, atol=1e-12)


def test_transported_moments_stand_for_the_nearest_direction_in_weight_space():
    """m_new A_new is the projection of m A_old on the rows of A_new; for side a the mirror image."""

    def link(index, side):
        dim = 6 if side == "a" else 9
        key = SketchKey("gaussian", 1, index, "fc1", side, 3, dim)
        zero = torch.zeros(3, 9) if side == "a" else torch.zeros(6, 3)
        return Link(index, (LowRank("fc1", 1.0, zero, key) if side == "a" else LowRank("fc1", 1.0, key, zero),))

    generator = torch.Generator().manual_seed(0)
    for side, shape in (("b", (6, 3)), ("a", (3, 9))):
        moment = torch.randn(shape, generator=generator, dtype=torch.float64)
        old, new = link(0, side), link(1, side)
        key = f"fc1.lora_{side}"
        moved = carry_over(Moments({key: moment}, 5), old, new, mode="transport")
        drawn = "lora_a" if side == "b" else "lora_b"
        before, after = (materialize(getattr(item.terms[0], drawn), moment) for item in (old, new))
        if side == "b":
            found, target = moved.tensors[key] @ after, moment @ before
            projected = target @ torch.linalg.pinv(after) @ after
        else:
            found, target = after @ moved.tensors[key], before @ moment
            projected = after @ torch.linalg.pinv(after) @ target
        torch.testing.assert_close(found, projected, rtol=1e-10, atol=1e-10)
        assert moved.num_steps == 5


@pytest.mark.parametrize("mode", ["carry", "transport"])
def test_the_candidate_of_a_reply_that_was_not_used_is_not_started_from(mode):
    """Round 2 of client 1 is refused, so in round 3 it starts from the state that round 1 left."""
    parts = federation(with_moments(mode, rounds=3), fault=refuse(partition=1, round=2))
    parts.run()
    starts = {
        (int(message.metadata.group_id), part): message.content.config_records["plan"]["start_state"]
        for way, part, message in parts.grid.seen
        if way == "down" and "plan" in message.content.config_records
    }
    assert (starts[3, 1], starts[3, 0]) == (1, 2)
    # Whether the reply arrived and was refused, or training never happened, must be the same.
    never = federation(with_moments(mode, rounds=3), fault=refuse(partition=1, round=2))
    for report in never.iterate():
        if report.round == 2:
            never.replica.store._states.pop((1, 2))
    assert parts.chain.digest == never.chain.digest


def refuse(partition, round):
    def fault(who, reply):
        return error_reply(reply) if who == partition and reply.metadata.group_id == str(round) else reply

    return fault


def test_lost_state_is_reset_for_its_client_alone():
    parts = federation(with_moments("carry", rounds=2, num_clients=3))
    for report in parts.iterate():
        if report.round == 1:
            parts.replica.store._states.pop((2, 1))
    reset = federation(with_moments("carry", rounds=2, num_clients=3))
    for report in reset.iterate():
        if report.round == 1:
            reset.strategy.state.last_used.pop(2)
    assert same_weights(parts.chain.weights(), reset.chain.weights())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_state_on_disk_is_state_in_memory(tmp_path, optimizer):
    chosen = with_moments("transport", optimizer=optimizer, lr=0.05)
    assert digest(chosen, folder=tmp_path / "clients") == digest(chosen)


def test_state_is_kept_by_each_client_alone():
    chosen = with_moments("transport", exact=True, rounds=4, fraction=0.5)
    apart = federation(chosen)
    apart.grid = AppsGrid(apart.problem, chosen)
    apart.run()
    assert apart.chain.digest == digest(chosen) == digest(chosen, grid=OneByOneGrid)


def test_resuming_from_disk_is_exact(tmp_path):
    def go(out, rounds, **more):
        chosen = with_moments("carry", rounds=rounds, fraction=0.5, out=str(tmp_path / out), **more)
        return run(chosen, Silent())["chain_digest"]

    whole = go("whole", 6)
    go("parts", 2)
    go("parts", 3, resume=True)
    assert go("parts", 6, resume=True) == whole


def test_reset_moments_are_neither_kept_nor_named():
    parts = federation(with_moments("reset"))
    parts.run()
    assert parts.replica.store._states == {}
    plans = [
        message.content.config_records["plan"]
        for way, _, message in parts.grid.seen
        if way == "down" and "plan" in message.content.config_records
    ]
    assert {plan["start_state"] for plan in plans} == {-1}


def test_plain_sgd_keeps_no_state():
    parts = federation(settings())
    parts.run()
    assert parts.replica.store._states == {}
