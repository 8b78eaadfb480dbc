"""Client state between rounds: carried, transported or reset, and only if the server used the reply."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from clients import cohort
from clients.cohort import Request
from clients.state_store import MOMENTS, PRIVATE, SECOND_MOMENTS
from experiments.run import run
from fedraclora.link import materialize
from fedraclora.local import local_batches, train_cohort
from fedraclora.plan import MOMENTS as MODES
from fedraclora.plan import RoundPlan, Training
from fedraclora.seeding import derive_seed
from tests.helpers import (
    AppsGrid,
    OneByOneGrid,
    Silent,
    error_reply,
    federation,
    final_weights,
    relative_distance,
    same_weights,
    settings,
)


def with_moments(mode, **changes):
    return settings(**{"method": ("rac_lora", {"moments": mode}), "momentum": 0.9, "fraction": 1.0, **changes})


def digest(chosen, **options):
    parts = federation(chosen, **options)
    parts.run()
    return parts.chain.digest


def test_the_rules_on_moments_are_different_rules():
    digests = {mode: digest(with_moments(mode, optimizer="adamw", lr=0.05)) for mode in MODES}
    assert len(set(digests.values())) == len(MODES)


def test_the_first_round_is_the_same_for_all_rules():
    chosen = {"optimizer": "adamw", "lr": 0.05, "rounds": 1}
    assert len({digest(with_moments(mode, **chosen)) for mode in MODES}) == 1


def test_without_second_moments_keep_is_carry():
    assert digest(with_moments("keep")) == digest(with_moments("carry"))


def trained_by_torch(parts):
    """Return the weights of a run's one client by a torch optimiser that is never rebuilt: factors are reset in place.

    This is how the paper's released code trains a chain.
    """
    chosen, method = parts.settings, parts.problem.method
    weights = {name: tensor.clone() for name, tensor in parts.problem.new_chain().weights().items()}
    terms, leaves, optimizer, index, updates = {}, {}, None, 0, 0
    for round in range(1, chosen.rounds + 1):
        plan = plan_of(parts, round)
        if updates == 0:
            terms = method.open_link(index, weights).low_rank_terms()
            for term in terms.values():
                for key, factor in term.factors.items():
                    start = materialize(factor, weights[term.target])
                    leaves.setdefault(key, start.clone()).data.copy_(start)
        leaves = leaves or weights
        if optimizer is None:
            trained = [leaves[key].requires_grad_() for key in (*plan.training.keys, *plan.training.dense)]
            optimizer = torch.optim.AdamW(trained, lr=chosen.lr, weight_decay=chosen.weight_decay)
        seed = derive_seed(plan.batch_seed, "client", 0)
        for rows, size in zip(*local_batches(parts.problem.split.indices[0], seed, plan.local), strict=True):
            batch = parts.replica.data.examples.select(rows[:size])
            outputs = torch.func.functional_call(
                parts.problem.model, merged_with(weights, terms, leaves), (batch.inputs,)
            )
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(outputs, batch.targets).backward()
            optimizer.step()
        updates += 1
        if method.closes(updates):
            weights, index, updates = detached(merged_with(weights, terms, leaves)), index + 1, 0
    return weights if updates == 0 else detached(merged_with(weights, terms, leaves))


def merged_with(weights, terms, leaves):
    added = {t.target: t.scale * leaves[f"{n}.lora_b"] @ leaves[f"{n}.lora_a"] for n, t in terms.items()}
    return {name: tensor + added[name] if name in added else tensor for name, tensor in weights.items()}


def detached(weights):
    return {name: tensor.detach() for name, tensor in weights.items()}


def plan_of(parts, round):
    """Return the plan that the run's client was sent in a round."""
    (record,) = [
        message.content.config_records["plan"]
        for way, _, message in parts.grid.seen
        if way == "down" and message.metadata.group_id == str(round) and "plan" in message.content.config_records
    ]
    return RoundPlan.from_record(record)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("ffa_lora", {}),
        ("fed_it", {}),
        ("full", {}),
        ("rac_lora", {"rounds_per_link": 0, "side": "a"}),
        ("rac_lora", {}),
        ("chain_of_lora", {}),
    ],
    ids=["ffa_lora", "fed_it", "full", "rac_lora open", "rac_lora", "chain_of_lora"],
)
def test_moments_that_are_kept_are_those_of_an_optimiser_that_is_never_rebuilt(tmp_path, method, own):
    """One client, whose rounds are one long training; its state is read back from disk in each of them."""
    training = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "local_steps": 4, "rounds": 4}
    alone = {"num_clients": 1, "fraction": 1.0, "dtype": "float64", "partition": "iid"}
    parts = federation(settings(method=(method, {"moments": "keep", **own}), **training, **alone), folder=tmp_path)
    for _ in parts.iterate():
        parts.replica.store._states.clear()
    found, expected = parts.chain.weights(), trained_by_torch(parts)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("mode", "purposes"), [("carry", {MOMENTS}), ("keep", {MOMENTS, SECOND_MOMENTS})])
def test_second_moments_are_remembered_where_they_are_kept_alone(mode, purposes):
    parts = federation(with_moments(mode, optimizer="adamw", lr=0.05, rounds=2))
    parts.run()
    state = parts.replica.store.load(0, 2)
    assert set(state.tensors) == purposes
    assert state.num_steps == 2 * parts.settings.local_steps


def test_with_dropout_clients_on_machines_of_their_own_train_as_in_one_cohort():
    own = {"hidden": [12], "dropout": 0.3}
    chosen = settings(model=("mlp", own), fraction=1.0, dtype="float64", local_steps=6)
    together = final_weights(chosen)
    parts = federation(chosen)
    parts.grid = AppsGrid(parts.problem, chosen)
    parts.run()
    assert relative_distance(parts.chain.weights(), together) <= 1e-12
    assert relative_distance(final_weights(settings(fraction=1.0, dtype="float64", local_steps=6)), together) > 1e-3


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
    moment = carried.replica.store.load(0, 1).tensors[MOMENTS]
    carried.run(2)
    reset.run()
    for mine, plain in zip(carried.chain.links[1].terms, reset.chain.links[1].terms, strict=True):
        expected = plain.lora_b - 0.1 * 0.9 * moment[f"{mine.layer}.lora_b"]
        torch.testing.assert_close(mine.lora_b, expected, rtol=1e-10, atol=1e-12)


def test_clients_of_two_ranks_train_apart_and_each_as_it_would_alone():
    chosen = settings(client_ranks=[1, 2, 1, 2, 2, 1], fraction=1.0, exact=True)
    assert digest(chosen) == digest(chosen, grid=OneByOneGrid)
    parts = federation(chosen)
    parts.run()
    sizes = {
        part: message.content.array_records["update"]["flat"].shape[0]
        for way, part, message in parts.grid.seen
        if way == "up" and "update" in message.content.array_records
    }
    assert sizes == {part: rank * (12 + 10) for part, rank in enumerate(chosen.client_ranks)}


@pytest.mark.parametrize(
    ("changes", "per_round"),
    [
        ({}, 1),
        ({"client_lr_scales": [1.0, 0.5, 1.0, 2.0, 1.0, 1.0]}, 1),
        ({"method": ("rac_lora", {"moments": "carry"}), "momentum": 0.9}, 1),
        ({"client_ranks": [1, 2, 1, 2, 2, 1]}, 2),
    ],
    ids=["alike", "own rates", "own states", "two ranks"],
)
def test_clients_train_in_one_cohort_unless_their_links_differ(changes, per_round, monkeypatch):
    calls = []

    def counted(trainer, start, clients, config):
        calls.append(len(clients))
        return train_cohort(trainer, start, clients, config)

    monkeypatch.setattr(cohort, "train_cohort", counted)
    federation(settings(fraction=1.0, rounds=2, **changes)).run()
    assert len(calls) == 2 * per_round
    assert sum(calls) == 2 * 6


def test_one_clients_own_learning_rate_is_its_own_matter():
    scales = [1.0, 0.5, 1.0, 2.0, 1.0, 1.0]
    mixed, plain = (
        federation(settings(client_lr_scales=own, fraction=1.0, rounds=1, dtype="float64")) for own in (scales, [])
    )
    slow = federation(settings(lr=1.0, fraction=1.0, rounds=1, dtype="float64"))
    sent = []
    for parts in (mixed, plain, slow):
        parts.run()
        sent.append(
            {part: reply.content.array_records["update"]["flat"].numpy() for way, part, reply in parts.grid.seen
             if way == "up" and "update" in reply.content.array_records}
        )  # fmt: skip
    assert plain.settings.method.lr == 2.0
    for part in range(6):
        expected = sent[{1.0: 1, 0.5: 2}[scales[part]]][part] if scales[part] < 2 else None
        if expected is not None:
            np.testing.assert_allclose(sent[0][part], expected, rtol=1e-12)
    assert not np.allclose(sent[0][3], sent[1][3])


def test_private_tensors_are_trained_kept_and_never_sent():
    parts = federation(settings(method="fed_sa_lora", personal_fraction=0.2, fraction=1.0, rounds=2))
    parts.run(1)
    kept = {part: parts.replica.store.load(part, 1).tensors[PRIVATE] for part in range(6)}
    assert all(set(own) == {"fc1.lora_b", "fc2.lora_b"} and own["fc1.lora_b"].any() for own in kept.values())
    assert not torch.equal(kept[0]["fc1.lora_b"], kept[1]["fc1.lora_b"])
    up = [row.parameters for report in [parts.strategy.report] for row in report.rows if row.direction == "up"]
    assert max(up) == 2 * (64 + 12), "the A of both layers, rank times inputs"


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
@pytest.mark.parametrize("mode", ["transport", "keep"])
def test_state_on_disk_is_state_in_memory(tmp_path, optimizer, mode):
    chosen = with_moments(mode, optimizer=optimizer, lr=0.05)
    assert digest(chosen, folder=tmp_path / "clients") == digest(chosen)


@pytest.mark.parametrize("mode", ["transport", "keep"])
def test_state_is_kept_by_each_client_alone(mode):
    chosen = with_moments(mode, optimizer="adamw", lr=0.05, exact=True, rounds=4, fraction=0.5)
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


@pytest.mark.parametrize(
    ("plan", "is_same"),
    [
        (RoundPlan(1, Training({"fc1": "b"}), batch_seed=3), True),
        (RoundPlan(1, Training({"fc1": "b"}), batch_seed=3, example_clip=1.0, noise_seed=4), True),
        (RoundPlan(1, Training({"fc1": "b"}), batch_seed=3, example_clip=1.0), False),
    ],
    ids=["not private", "private in a simulation", "private"],
)
def test_only_the_batches_of_private_training_cannot_be_foretold(plan, is_same):
    """A server that knows which examples were in a batch needs less noise to be told apart from."""
    parts = federation(settings())
    record = {**plan.to_record(), "start_state": -1, "lr_scale": 1.0, "is_whole": True}
    message = Message(RecordDict({"plan": ConfigRecord(record)}), 5, "train", group_id="1")
    link = parts.problem.method.open_link(0, parts.chain.merged)
    parts.replica.chain.open_link(link)
    job = cohort._Job(Request(2, message), link, cohort.Remembered(), {})
    first, second = (cohort._local_client(parts.replica, plan, job) for _ in range(2))
    assert (first.seed == second.seed) == is_same
    assert (first.noise_seed is None) == (plan.noise_seed == -1)
