"""A replica is the server's model, and what it trains with is frozen but for the plan."""

import pytest
import torch

from clients.replica_store import ReplicaStore
from experiments.settings import SketchSettings
from fedraclora import sketch
from fedraclora.delivery import NOTHING, Needs, OpenLink, VersionMismatch, deliver
from fedraclora.local import LocalClient, LocalConfig, train_cohort
from fedraclora.plan import RoundPlan, Training
from tests.helpers import federation, same_weights, settings


@pytest.fixture
def parts():
    parts = federation(settings(dense=["fc1.bias"], momentum=0.5))
    parts.run()
    parts.chain.open_link(parts.problem.method.open_link(parts.chain.num_links, parts.chain.merged))
    bring(parts)
    return parts


def bring(parts):
    """Bring the replica to the server's version."""
    opened = OpenLink(parts.chain.open, {})
    parts.replica.receive([deliver(parts.chain, Needs(parts.replica.chain.num_links), opened=opened)])


def plan(parts):
    training = parts.problem.method.trains(9, parts.chain.open)
    return RoundPlan(round=9, training=training, local=LocalConfig(steps=4, lr=0.5))


def test_a_replica_ends_at_the_servers_version_bit_for_bit(parts):
    assert parts.replica.chain.digest == parts.chain.digest
    assert same_weights(parts.replica.chain.weights(), parts.chain.weights())


def test_a_replica_keeps_no_old_links(parts):
    assert parts.replica.chain.links == []


def test_deliveries_with_a_gap_are_refused(parts):
    late = parts.problem.replica(parts.problem.new_chain(), parts.replica.store)
    with pytest.raises(VersionMismatch, match="holds 0 links"):
        late.receive([deliver(parts.chain, Needs(2))])


def test_the_trained_part_starts_at_zero_and_the_model_as_the_server_has_it(parts):
    trainer, start = parts.replica.prepare(plan(parts))
    assert list(start) == ["fc1.lora_b", "fc2.lora_b", "fc1.bias"]
    assert all(not start[key].any() for key in start if key.endswith("lora_b"))
    inputs = parts.problem.dataset.test.inputs[:5]
    trainer.model.bind({key: tensor.unsqueeze(0) for key, tensor in start.items()}, num_clients=1)
    model = parts.problem.model
    model.load_state_dict(parts.chain.weights())
    # C12 seen from a client: the open link changes no bit of the outputs but through the order of a sum.
    torch.testing.assert_close(trainer.model(inputs), model(inputs), rtol=1e-6, atol=1e-6)


def test_a_plan_for_some_layers_computes_with_the_other_layers_terms_merged():
    """The open link of two layers was trained before; now only one of them goes on."""
    parts = federation(settings(method=("rac_lora", {"rounds_per_link": 0}), dtype="float64", dense=["fc2.bias"]))
    parts.run()
    bring(parts)
    terms = parts.chain.open.low_rank_terms()
    assert all(float(term.lora_b.abs().max()) > 0 for term in terms.values())
    inputs = parts.problem.dataset.test.inputs[:5]
    model = parts.problem.model
    model.load_state_dict(parts.chain.weights())
    for layer in terms:
        trainer, start = parts.replica.prepare(RoundPlan(round=9, training=Training({layer: "b"})))
        assert list(start) == [f"{layer}.lora_b"]
        assert torch.equal(start[f"{layer}.lora_b"], terms[layer].lora_b)
        trainer.model.bind({key: tensor.unsqueeze(0) for key, tensor in start.items()}, num_clients=1)
        torch.testing.assert_close(trainer.model(inputs), model(inputs), rtol=1e-12, atol=1e-12)


def test_training_moves_and_differentiates_nothing_but_the_trained_part(parts):
    trainer, start = parts.replica.prepare(plan(parts))
    frozen = list(trainer.model.module.state_dict().values())
    sketches = [layer.lora_a for layer in trainer.model._layers.values()]
    copies = [tensor.clone() for tensor in [*frozen, *sketches, *start.values()]]
    rows = parts.problem.split.indices[0]
    (result,) = train_cohort(trainer, start, [LocalClient(rows, seed=1)], plan(parts).local)
    for tensor, copy in zip([*frozen, *sketches, *start.values()], copies, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.grad is None
        assert not tensor.requires_grad
    assert all(float(tensor.abs().max()) > 0 for tensor in result.tensors.values())


def test_training_leaves_the_replicas_chain_alone(parts):
    before = {name: tensor.clone() for name, tensor in parts.replica.chain.merged.items()}
    trainer, start = parts.replica.prepare(plan(parts))
    list(train_cohort(trainer, start, [LocalClient(parts.problem.split.indices[0], seed=1)], plan(parts).local))
    assert same_weights(parts.replica.chain.merged, before)


def test_factors_that_clients_draw_for_themselves_are_those_of_their_own_keys():
    chosen = settings(sketch=SketchSettings(shared=False), dtype="float64")
    parts = federation(chosen)
    parts.chain.open_link(parts.problem.method.open_link(0, parts.chain.merged))
    bring(parts)
    drawn = [parts.replica.own_factors(client, plan(parts)) for client in (0, 1)]
    for client, own in enumerate(drawn):
        assert list(own) == ["fc1.lora_a", "fc2.lora_a"]
        for key, tensor in own.items():
            expected = sketch.draw(parts.chain.open.of_client(client).factors[key])
            assert torch.equal(tensor, expected.double())
    assert not torch.equal(drawn[0]["fc1.lora_a"], drawn[1]["fc1.lora_a"])


def test_what_is_kept_of_an_open_link_survives_on_disk_with_its_version(tmp_path):
    parts = federation(settings(method="ro_lora", rounds=2))
    parts.run()
    store = ReplicaStore(tmp_path)
    parts.replica.files = store
    bring(parts)
    kept, version = store.read_open()
    assert version == parts.chain.version
    assert {name for name, _ in kept} == {"fc1.lora_a", "fc1.lora_b", "fc2.lora_a", "fc2.lora_b"}
    again = parts.problem.replica(parts.problem.new_chain(), parts.replica.store)
    again.files = store
    again.advance()
    assert again.open_version == version


TRAINED = [
    "rac_lora",
    "full",
    "fed_slop",
    "sketched_full",
    "fed_it",
    "ro_lora",
    "fedex_lora",
    "fr_lora",
    "flora",
    "fed_krso",
    ("fed_sb", {"init": "update"}),
    ("fed_sb", {"init": "random"}),
]


@pytest.mark.parametrize("method", TRAINED, ids=str)
def test_whatever_trains_a_client_starts_from_the_servers_model(method):
    parts = federation(settings(method=method, dtype="float64", rounds=2, fraction=1.0))
    parts.run()
    if parts.chain.open is None:
        parts.chain.open_link(parts.problem.method.open_link(parts.chain.num_links, parts.chain.merged))
    bring(parts)
    asked = plan(parts)
    trainer, start = parts.replica.prepare(asked)
    assert set(start) == {*asked.training.keys, *asked.training.dense}
    own = {**start, **parts.replica.own_factors(0, asked)}
    trainer.model.bind({key: tensor.unsqueeze(0) for key, tensor in own.items()}, num_clients=1)
    inputs, model = parts.problem.dataset.test.inputs[:5], parts.problem.model
    model.load_state_dict(parts.chain.weights())
    torch.testing.assert_close(trainer.model(inputs), model(inputs), rtol=1e-10, atol=1e-12)


def test_a_new_process_is_sent_nothing_that_its_disk_keeps_and_ends_at_the_servers_version(tmp_path):
    parts = federation(settings(method="fed_it", rounds=1))
    parts.run()

    def new_process():
        replica = parts.problem.replica(parts.problem.new_chain(), parts.replica.store)
        replica.files = ReplicaStore(tmp_path)
        replica.advance()
        return replica

    names = parts.chain.open.explicit_factors
    opened = OpenLink(parts.chain.open, dict.fromkeys(names, parts.chain.version))
    new_process().receive([deliver(parts.chain, Needs(0), opened=opened)])
    later = new_process()
    assert (later.open_version, later.num_kept) == (parts.chain.version, 0)
    delivery = deliver(parts.chain, Needs(0, open_version=later.open_version), opened=opened)
    assert delivery.num_bytes == 0
    later.receive([delivery])
    assert later.chain.digest == parts.chain.digest
    (tmp_path / "open.safetensors").unlink()
    forgetful = new_process()
    assert forgetful.open_version == NOTHING
    with pytest.raises(VersionMismatch, match="not here any more"):
        forgetful.receive([delivery])


def test_a_disk_that_cannot_keep_the_open_link_keeps_nobody_from_training(tmp_path, monkeypatch):
    parts = federation(settings(method="fed_it", rounds=1))
    parts.run()
    replica = parts.problem.replica(parts.problem.new_chain(), parts.replica.store)
    replica.files = ReplicaStore(tmp_path)

    def refuse(kept, version):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replica.files, "keep_open", refuse)
    opened = OpenLink(parts.chain.open, {})
    replica.receive([deliver(parts.chain, Needs(0), opened=opened)])
    assert replica.open_version == NOTHING, "another process would not have it"
    trainer, _ = replica.prepare(plan(parts))
    assert replica.chain.digest == parts.chain.digest
    assert trainer.model is not None


def test_factors_of_clients_of_other_ranks_are_kept_side_by_side_in_one_process():
    parts = federation(settings(method="het_lora", client_ranks=[1, 2, 1, 2, 1, 2], fraction=1.0, rounds=2))
    parts.run()
    ranks = {shape[0] for name, shape in parts.replica.kept if name == "fc1.lora_a"}
    assert ranks == {1, 2}
