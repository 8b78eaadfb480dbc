"""Every fault, on clients with disks and a process for each message: no wrong update ever gets into the chain.

What a fault takes away is computed here from the replies that were used; what it only delays must end in the very
model of a run without it.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord

from clients import replica_store
from experiments.problem import prepare
from fedraclora import sketch
from fedraclora.chain import Chain
from fedraclora.chain_store import ChainStore
from strategies.base import ChainStrategy
from strategies.state import Budget, ServerState
from tests.helpers import (
    METHODS,
    ProcessDied,
    assert_close,
    edit_array,
    error_reply,
    federation,
    merged_over,
    nodes_grid,
    put,
    settings,
    spoil,
)

ROUNDS = 4
CHOSEN = settings(fraction=1.0, num_clients=4, rounds=ROUNDS, exact=True)
WHO, WHEN = 2, 3


@pytest.fixture(scope="module")
def problem():
    return prepare(CHOSEN)


@pytest.fixture(scope="module")
def undisturbed(problem):
    parts = federation(CHOSEN, problem=problem)
    parts.run()
    return parts


def once(act):
    """Return a trouble that hits one client in one round, at its first message."""
    hit = []

    def trouble(partition, message, disk):
        if (partition, message.metadata.group_id) == (WHO, str(WHEN)) and not hit:
            hit.append(True)
            act(disk)

    return trouble


def counts(report):
    return report.num_ok, report.num_failed, report.num_missing, report.num_retried


def test_clients_on_disks_are_the_clients_of_the_simulator(tmp_path, problem, undisturbed):
    parts = federation(CHOSEN, grid=nodes_grid(tmp_path), problem=problem)
    reports = parts.run()
    assert parts.chain.digest == undisturbed.chain.digest
    assert [counts(report) for report in reports[1:]] == [(4, 0, 0, 0)] * ROUNDS
    disks = list(tmp_path.glob("disk_*"))
    kept = [len(list(disk.glob("*/link_*")) + list(disk.glob("*/weights_*"))) for disk in disks]
    assert min(kept) > 0


@pytest.mark.parametrize(("name", "moments"), [*((name, "reset") for name in METHODS), ("rac_lora", "carry")])
def test_with_every_method_a_reply_that_is_lost_changes_what_it_changes_in_the_simulator(tmp_path, name, moments):
    """Also where clients carry state, which an unused reply must not touch."""
    own = {"moments": moments} if name == "rac_lora" else {}
    chosen = replace(
        settings(method=(name, own), momentum=0.5, rounds=ROUNDS, exact=True), num_clients=4, fraction=0.75
    )
    lost = spoil(lambda reply: None, partition=WHO, only_round=WHEN)
    expected = federation(chosen, fault=lost)
    found = federation(chosen, fault=lost, grid=nodes_grid(tmp_path), problem=expected.problem)
    assert [counts(report) for report in expected.run()] == [counts(report) for report in found.run()]
    assert found.chain.digest == expected.chain.digest


def stale(reply):
    reply.content["reply"] = ConfigRecord({**reply.content.config_records["reply"], "version": "0" * 64})
    return reply


def other_sketches(reply):
    reply.content["reply"] = ConfigRecord({**reply.content.config_records["reply"], "sketches": "0" * 64})
    return reply


FAULTY_REPLIES = {
    "an error": error_reply,
    "a crash": lambda reply: error_reply(reply, code=8),
    "NaN": lambda reply: edit_array(reply, put(np.nan)),
    "infinity": lambda reply: edit_array(reply, put(np.inf)),
    "a wrong shape": lambda reply: edit_array(reply, lambda values: values[:-1]),
    "a wrong version": stale,
    "other sketches": other_sketches,
    "a huge norm": lambda reply: edit_array(reply, lambda values: values + 1e7),
    "no answer in time": lambda reply: None,
}


@pytest.mark.parametrize("name", FAULTY_REPLIES)
def test_a_reply_that_cannot_be_used_leaves_the_mean_of_the_others(tmp_path, problem, name):
    fault = spoil(FAULTY_REPLIES[name], partition=WHO, only_round=WHEN)
    parts = federation(CHOSEN, fault=fault, grid=nodes_grid(tmp_path), problem=problem)
    reports = parts.run()
    everyone, others = [0, 1, 2, 3], [0, 1, 3]
    is_missing = name == "no answer in time"
    assert counts(reports[WHEN]) == (3, 0 if is_missing else 1, 1 if is_missing else 0, 0)
    assert [counts(report) for report in reports[1:] if report.round != WHEN] == [(4, 0, 0, 0)] * (ROUNDS - 1)
    used = {round: others if round == WHEN else everyone for round in range(1, ROUNDS + 1)}
    assert_close(parts.chain.weights(), merged_over(parts, used))


def die(disk):
    raise ProcessDied("killed")


def break_the_data(disk):
    raise ProcessDied("the data cannot be read")


@pytest.mark.parametrize("act", [die, break_the_data])
def test_a_client_process_that_dies_takes_only_its_own_reply_with_it(tmp_path, problem, act):
    parts = federation(CHOSEN, grid=nodes_grid(tmp_path, once(act)), problem=problem)
    reports = parts.run()
    assert counts(reports[WHEN]) == (3, 1, 0, 0)
    used = {round: [0, 1, 3] if round == WHEN else [0, 1, 2, 3] for round in range(1, ROUNDS + 1)}
    assert_close(parts.chain.weights(), merged_over(parts, used))
    assert counts(reports[WHEN + 1]) == (4, 0, 0, 0)


def test_a_round_without_any_client_leaves_the_model_as_it_was(tmp_path, problem):
    gone = lambda who, reply: None if reply.metadata.group_id == str(WHEN) else reply  # noqa: E731
    parts = federation(CHOSEN, fault=gone, grid=nodes_grid(tmp_path), problem=problem)
    reports = parts.run()
    assert counts(reports[WHEN]) == (0, 0, 4, 0)
    used = {round: [0, 1, 2, 3] for round in range(1, ROUNDS + 1) if round != WHEN}
    assert_close(parts.chain.weights(), merged_over(parts, used))


def test_an_answer_that_comes_a_round_late_is_never_seen(tmp_path, problem):
    kept = []

    class Late(nodes_grid(tmp_path)):
        def pull_messages(self, message_ids):
            came = super().pull_messages(message_ids)
            late = [m for m in came if m.metadata.group_id == str(WHEN) and self._who(m) == WHO and not m.has_error()]
            kept.extend(late)
            is_next_round = any(message.metadata.group_id == str(WHEN + 1) for message in came)
            return [message for message in came if message not in late] + (kept if is_next_round else [])

        def _who(self, message):
            return self._contexts[message.metadata.src_node_id].node_config["partition-id"]

    chosen = replace(CHOSEN, timeout_s=0.2)
    parts = federation(chosen, grid=Late)
    reports = parts.run()
    assert counts(reports[WHEN]) == (3, 0, 1, 0)
    assert [counts(report) for report in reports[1:] if report.round != WHEN] == [(4, 0, 0, 0)] * (ROUNDS - 1)
    used = {round: [0, 1, 3] if round == WHEN else [0, 1, 2, 3] for round in range(1, ROUNDS + 1)}
    assert_close(parts.chain.weights(), merged_over(parts, used))


# ---- what a client can make good within the round


def lose_the_disk(disk):
    shutil.rmtree(disk)


def lose_the_links(disk):
    for path in [*disk.glob("*/link_*"), *disk.glob("*/weights_*")]:
        path.unlink()


def corrupt(disk):
    for path in [*disk.glob("*/link_*"), *disk.glob("*/weights_*")]:
        content = bytearray(path.read_bytes())
        content[-2] ^= 4
        path.write_bytes(bytes(content))


@pytest.mark.parametrize("act", [lose_the_disk, lose_the_links, corrupt])
@pytest.mark.parametrize("policy", ["replay", "snapshot", "cheapest"])
def test_a_client_that_lost_its_replica_is_brought_up_within_the_round(tmp_path, undisturbed, act, policy):
    chosen = replace(CHOSEN, catch_up=policy)
    parts = federation(chosen, grid=nodes_grid(tmp_path, once(act)))
    reports = parts.run()
    assert counts(reports[WHEN]) == (4, 0, 0, 1)
    assert parts.chain.digest == undisturbed.chain.digest
    sent = [row for row in reports[WHEN].rows if (row.partition, row.direction) == (WHO, "down")]
    assert len([row for row in sent if row.kind == "control"]) == 2, "two messages went out, and both are charged"
    answers = [row for row in reports[WHEN].rows if (row.partition, row.direction, row.kind) == (WHO, "up", "metrics")]
    assert len(answers) == 2


def test_a_disk_that_refuses_to_write_costs_bytes_and_nothing_else(tmp_path, monkeypatch, problem, undisturbed):
    real = replica_store.write_tensors

    def write(path, tensors, metadata):
        if f"disk_{WHO}" in str(path):
            raise OSError(28, "No space left on device")
        real(path, tensors, metadata)

    monkeypatch.setattr(replica_store, "write_tensors", write)
    parts = federation(CHOSEN, grid=nodes_grid(tmp_path), problem=problem)
    reports = parts.run()
    assert [counts(report) for report in reports[1:]] == [(4, 0, 0, 0)] * ROUNDS
    assert parts.chain.digest == undisturbed.chain.digest
    assert parts.strategy.state.held[WHO] == 0
    assert reports[-1].traffic.catchup_bytes > 0


def test_a_machine_that_draws_other_factors_is_sent_them_from_then_on(tmp_path, monkeypatch, problem, undisturbed):
    real, current = sketch.draw, []

    def draw(key):
        drawn = real(key).clone()
        if current == [WHO]:
            drawn[0, 0] += 1e-6
        return drawn

    def note(partition, message, disk):
        current[:] = [partition]

    monkeypatch.setattr(sketch, "draw", draw)
    grid = nodes_grid(tmp_path, note)

    class Grid(grid):
        def _new_process(self, message, context):
            try:
                return super()._new_process(message, context)
            finally:
                current.clear()

    parts = federation(CHOSEN, grid=Grid, problem=problem)
    reports = parts.run()
    assert [counts(report) for report in reports[1:]] == [(4, 0, 0, 1), *[(4, 0, 0, 0)] * (ROUNDS - 1)]
    assert parts.chain.digest == undisturbed.chain.digest
    control = {row.partition for report in reports for row in report.rows if row.kind == "control" and row.parameters}
    assert control == {WHO}
    assert all(any(row.parameters and row.kind == "control" for row in report.rows) for report in reports[1:])


def test_merged_weights_that_drifted_are_replaced_by_a_snapshot(tmp_path, monkeypatch, undisturbed):
    """As where a machine's arithmetic differs: what is on its disk reads well, and is not what its server has."""

    def drift(disk):
        (folder,) = disk.iterdir()
        store = replica_store.ReplicaStore(folder)
        chain = Chain.start(undisturbed.problem.new_chain().merged)
        store.advance(chain)
        chain.merged["fc1.weight"][0, 0] += 1e-3
        store._fold(chain)

    parts = federation(CHOSEN, grid=nodes_grid(tmp_path, once(drift)))
    reports = parts.run()
    assert counts(reports[WHEN]) == (4, 0, 0, 1)
    assert parts.chain.digest == undisturbed.chain.digest
    assert any(row.kind == "snapshot" and row.partition == WHO for row in reports[WHEN].rows)


# ---- the server goes away


def go_on(parts, state, chain, *, problem):
    strategy = ChainStrategy(
        problem.method, chain, problem.rounds, setup=problem.setup.to_json(), state=ServerState.from_json(state)
    )
    return strategy, list(strategy.rounds(parts.grid, ROUNDS))


def test_a_server_that_comes_back_goes_on_to_the_same_model(tmp_path, problem, undisturbed):
    parts = federation(CHOSEN, grid=nodes_grid(tmp_path), problem=problem)
    parts.run(2)
    again, reports = go_on(parts, parts.strategy.state.to_json(), parts.chain, problem=problem)
    assert [counts(report) for report in reports] == [(4, 0, 0, 0)] * 2
    assert again.chain.digest == undisturbed.chain.digest


def test_a_server_restored_from_an_old_copy_brings_its_clients_back_to_it(tmp_path, problem):
    """Clients that are ahead hold links that do not exist any more; they begin again from the base."""
    parts = federation(CHOSEN, grid=nodes_grid(tmp_path / "disks"), problem=problem)
    store = ChainStore(tmp_path / "chain")
    store.create(parts.chain)
    state = {}
    for report in parts.iterate(3):
        if report.round:
            store.append(parts.chain)
        if report.round == 1:
            state = parts.strategy.state.to_json()
    # Another history from round 2 on: one client's reply is lost.
    parts.grid._fault = spoil(lambda reply: None, partition=0, only_round=2)
    again, reports = go_on(parts, state, ChainStore(tmp_path / "chain").load(1), problem=problem)
    expected = federation(CHOSEN, fault=spoil(lambda reply: None, partition=0, only_round=2), problem=problem)
    expected.run()
    assert again.chain.digest == expected.chain.digest
    assert reports[0].num_retried > 0


def test_a_node_that_comes_back_under_another_name_is_met_in_the_next_round(tmp_path, problem, undisturbed):
    parts = federation(CHOSEN, grid=nodes_grid(tmp_path), problem=problem)
    reports = []
    for report in parts.iterate():
        reports.append(report)
        if report.round == 1:
            contexts = parts.grid._contexts
            old = list(contexts)[WHO]
            contexts[4711 | 1 << 62] = contexts.pop(old)
    assert [counts(report) for report in reports[1:]] == [(4, 0, 0, 0)] * ROUNDS
    assert parts.chain.digest == undisturbed.chain.digest
    assert [row.kind for row in reports[2].rows if row.kind == "setup"] == ["setup"] * 2


def test_a_node_that_is_gone_is_missing_and_the_others_go_on(tmp_path, problem):
    parts = federation(CHOSEN, grid=nodes_grid(tmp_path), problem=problem)
    reports = []
    for report in parts.iterate():
        reports.append(report)
        if report.round == 1:
            del parts.grid._contexts[list(parts.grid._contexts)[WHO]]
    assert [counts(report) for report in reports[2:]] == [(3, 0, 1, 0)] * (ROUNDS - 1)
    used = {round: [0, 1, 2, 3] if round == 1 else [0, 1, 3] for round in range(1, ROUNDS + 1)}
    assert_close(parts.chain.weights(), merged_over(parts, used))


def test_with_nobody_left_the_run_ends_with_a_reason(tmp_path, problem):
    parts = federation(CHOSEN, grid=nodes_grid(tmp_path), problem=problem)
    rounds = parts.iterate()
    next(rounds)
    next(rounds)
    parts.grid._contexts.clear()
    with pytest.raises(RuntimeError, match="no client"):
        next(rounds)
    assert parts.chain.version == 1


def test_only_a_forced_catch_up_may_exceed_the_budget_and_it_is_shown(tmp_path, problem):
    planned = [report.traffic.total_bytes for report in federation(CHOSEN, problem=problem).run()]
    limit = sum(planned[: WHEN + 1])
    limited = replace(problem, rounds=replace(problem.rounds, budget=Budget(total_bytes=limit)))
    assert federation(CHOSEN, problem=limited).run()[-1].round == WHEN

    lost_disk = nodes_grid(tmp_path, once(lose_the_disk))
    parts = federation(CHOSEN, grid=lost_disk, problem=limited)
    reports = parts.run()
    assert (reports[-1].round, counts(reports[-1])) == (WHEN, (4, 0, 0, 1))
    excess = sum(report.traffic.total_bytes for report in reports) - limit
    # What was sent in vain, and the links or the snapshot that came after it.
    second = [row for row in reports[-1].rows if row.partition == WHO and row.direction == "down"]
    assert 0 < excess < sum(row.tensor_bytes for row in second)
    assert reports[-1].traffic.catchup_bytes > 0
    assert "budget_mib" in parts.strategy.stop_reason
