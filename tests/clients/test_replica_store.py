"""A replica on disk: what is read is what was received, damage is noticed, and it never grows without bound."""

import multiprocessing
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients import replica_store
from clients.replica_store import ReplicaStore
from fedraclora import files, sketch
from fedraclora.chain import Chain, equal_weights
from fedraclora.delivery import CATCH_UPS, Needs, deliver, receive
from fedraclora.link import Link, LowRank, Set, Zero
from fedraclora.server_rule import ServerRule
from fedraclora.sketch import SketchKey

OUT, IN, RANK = 6, 24, 2


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start():
    return Chain.start({"fc1.weight": numbers(0, OUT, IN), "head.bias": numbers(1, 5)})


def low_rank(index, lora_b):
    return LowRank("fc1", 0.5, SketchKey("orthonormal", 3, index, "fc1", "b", RANK, IN), lora_b)


def advance(server, num_links):
    for _ in range(num_links):
        if server.open is None:
            server.open_link(Link(server.num_links, (low_rank(server.num_links, Zero((OUT, RANK))),)))
        lora_b = numbers(100 + server.version, OUT, RANK)
        terms = low_rank(server.num_links, lora_b), Set("head.bias", numbers(server.version, 5))
        server.update(Link(server.num_links, terms), close=True)
    return server


def replica_from(folder):
    chain = start()
    ReplicaStore(folder).advance(chain)
    return chain


def bring(folder, server, **options):
    """Receive as a process that reads its disk, takes a delivery in, and ends."""
    chain, store = replica_from(folder), ReplicaStore(folder)
    with store.locked():
        store.keep(chain, receive(chain, deliver(server, Needs(chain.num_links), **options)))
    return chain


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(CATCH_UPS)), max_size=8))
def test_what_is_read_is_what_was_received(steps):
    server = start()
    with tempfile.TemporaryDirectory() as path:
        for num_links, policy in steps:
            advance(server, num_links)
            bring(Path(path), server, policy=policy)
            found = replica_from(Path(path))
            assert (found.num_links, found.hash) == (server.num_links, server.hash)
            assert equal_weights(found.merged, server.merged)


def test_links_are_folded_into_one_snapshot_before_they_outgrow_the_weights(folder):
    server = start()
    most = 0
    for _ in range(60):
        bring(folder, advance(server, 1), policy="replay")
        most = max(most, sum(path.stat().st_size for path in folder.iterdir()))
    weight_bytes = 4 * (OUT * IN + 5)
    header_bytes = 2000
    assert most <= 2 * weight_bytes + 2 * header_bytes
    assert replica_from(folder).num_links == 60


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
@pytest.mark.parametrize("which", ["weights_*", "link_*"])
def test_a_damaged_file_is_deleted_and_its_links_are_lacking(folder, which, damage):
    server = advance(start(), 3)
    bring(folder, server, policy="snapshot")
    bring(folder, advance(server, 1))
    (path,) = folder.glob(f"{which}.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:40]), "empty": b""}[damage])
    found = replica_from(folder)
    assert found.num_links == {"weights_*": 0, "link_*": 3}[which]
    assert not path.exists()
    assert equal_weights(bring(folder, server).merged, server.merged)
    assert equal_weights(replica_from(folder).merged, server.merged)


def test_links_that_follow_another_chain_are_not_taken(folder, monkeypatch):
    monkeypatch.setattr(replica_store, "_weight_bytes", lambda chain: float("inf"))
    bring(folder, advance(start(), 2), policy="replay")
    other = start()
    other.merged["head.bias"] += 1
    other = Chain.start(other.merged)
    ReplicaStore(folder).advance(other)
    assert other.num_links == 0


def test_what_another_process_received_is_taken_in(folder):
    server = advance(start(), 2)
    here = bring(folder, server)
    bring(folder, advance(server, 2))
    ReplicaStore(folder).advance(here)
    assert here.hash == server.hash


def test_a_full_disk_leaves_the_replica_as_it_was(folder, monkeypatch):
    server = advance(start(), 2)
    bring(folder, server)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refuse(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        bring(folder, advance(server, 1))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    assert replica_from(folder).num_links == 2


def test_a_process_that_lives_on_makes_good_what_a_full_disk_refused(folder):
    server, chain, store = advance(start(), 2), start(), ReplicaStore(folder)
    store.keep(chain, receive(chain, deliver(server, Needs(0))))
    receive(chain, deliver(advance(server, 1), Needs(2)))  # and could not be written
    store.keep(chain, receive(chain, deliver(advance(server, 1), Needs(3))))
    assert replica_from(folder).num_links == 4


def test_factors_that_were_sent_are_kept_as_what_they_made(folder, monkeypatch):
    server = advance(start(), 2)
    delivery = deliver(server, Needs(0, factors=True))
    real = sketch.draw

    def other_machine(key):
        return real(key) + 1

    monkeypatch.setattr(sketch, "draw", other_machine)
    chain, store = start(), ReplicaStore(folder)
    store.keep(chain, receive(chain, delivery))
    assert equal_weights(replica_from(folder).merged, server.merged)


def receive_many(path, num_links):
    server = start()
    for _ in range(num_links):
        chain, store = start(), ReplicaStore(Path(path))
        advance(server, 1)
        with store.locked():
            store.advance(chain)
            store.keep(chain, receive(chain, deliver(server, Needs(min(chain.num_links, server.num_links)))))


@pytest.mark.slow
def test_two_processes_may_use_one_replica(folder):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=receive_many, args=(str(folder), 25)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert equal_weights(replica_from(folder).merged, advance(start(), 25).merged)


def test_the_factors_of_an_open_link_come_back_in_another_process(folder):
    kept = {("fc1.lora_a", (2, 24)): numbers(1, 2, 24), ("fc1.lora_b", (6, 2)): numbers(2, 6, 2)}
    ReplicaStore(folder).keep_open(kept, 7)
    found, version = ReplicaStore(folder).read_open()
    assert version == 7
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


def test_a_damaged_file_of_open_factors_is_deleted_and_counts_as_nothing(folder):
    ReplicaStore(folder).keep_open({("fc1.lora_a", (2, 24)): numbers(1, 2, 24)}, 7)
    (path,) = folder.glob("open*")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    assert ReplicaStore(folder).read_open() is None
    assert not path.exists()


def test_moments_of_a_server_rule_are_folded_with_the_weights(folder):
    rule = ServerRule("adam", lr=0.1)
    server = start()
    for index in range(30):
        server.open_link(Link(index, (low_rank(index, Zero((OUT, RANK))),)))
        link = Link(index, (low_rank(index, numbers(index, OUT, RANK)),), rule=rule)
        server.update(link, close=True)
        bring(folder, server, policy="replay")
    assert list(folder.glob("weights_*")), "it was folded"
    found = replica_from(folder)
    assert equal_weights(found.merged, server.merged)
    assert equal_weights(found.slots, server.slots)


def test_clearing_leaves_other_files_alone(folder):
    bring(folder, advance(start(), 3))
    ReplicaStore(folder).keep_open({("fc1.lora_a", (2, 24)): numbers(1, 2, 24)}, 3)
    (folder / "setup.json").write_text("{}")
    ReplicaStore(folder).clear()
    assert {path.name for path in folder.iterdir()} <= {"setup.json", "replica.lock"}
    assert replica_from(folder).num_links == 0
