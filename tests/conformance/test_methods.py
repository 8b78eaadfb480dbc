"""Laws that every method in `strategies/` obeys; a new file there is tested without a change here."""

from functools import cache

import numpy as np
import pytest
import torch

from experiments.run import run
from fedraclora.local import local_batches
from fedraclora.plan import RoundPlan
from fedraclora.seeding import derive_seed
from tests.conformance.cases import ALL, has_jumps
from tests.helpers import (
    AppsGrid,
    OneByOneGrid,
    RecordingGrid,
    Silent,
    federation,
    relative_distance,
    serialised_size,
    settings,
)

every_case = pytest.mark.parametrize("name", ALL)


@pytest.fixture(autouse=True)
def _same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_here(chosen, grid=RecordingGrid, like=None):
    """Run the settings; `like` is a federation that differs in settings of the machine only."""
    torch.set_num_threads(chosen.threads)
    parts = federation(chosen, grid=grid, problem=like and like.problem)
    parts.reports = parts.run()
    return parts


@cache
def first_run(name, *, dtype="float32", exact=False):
    """Return a run of a case that several laws look at, and change nothing in."""
    like = first_run(name, dtype=dtype) if exact else None
    return run_here(settings(**ALL[name], dtype=dtype, exact=exact), like=like)


def ledger(parts):
    return [row for report in parts.reports for row in report.rows]


def plans(parts):
    return [
        RoundPlan.from_record(message.content.config_records["plan"])
        for direction, _, message in parts.grid.seen
        if direction == "down" and "plan" in message.content.config_records
    ]


def ends(parts):
    """Return where a run ended: its weights, and the open factors too where those alone are no model."""
    weights = parts.chain.weights()
    if parts.problem.method.traits.is_global:
        return weights
    return weights | parts.chain.open.explicit_factors


@every_case
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_a_cohort_trains_as_its_clients_do_one_by_one(name, dtype, tolerance):
    together, alone = first_run(name, dtype=dtype), first_run(name, dtype=dtype, exact=True)
    halves = run_here(settings(**ALL[name], dtype=dtype, chunk_mib=0.01), like=together)
    assert ledger(together) == ledger(alone) == ledger(halves)
    expected = ends(alone)
    if dtype == "float64" or not has_jumps(ALL[name]):
        assert relative_distance(ends(together), expected) <= tolerance
        assert relative_distance(ends(halves), expected) <= tolerance
    base = together.problem.new_chain().weights()
    is_moved = relative_distance({key: expected[key] for key in base}, base) > 1e-3
    assert is_moved == together.problem.method.traits.is_global, "was something trained?"


@every_case
def test_the_same_settings_give_the_same_digest_twice_and_another_seed_another_one(name):
    again, other = (run_here(settings(**ALL[name], seed=seed)).chain.digest for seed in (0, 6))
    assert first_run(name).chain.digest == again
    assert again != other


@every_case
def test_sketches_cohorts_batches_and_bytes_do_not_depend_on_the_number_of_threads(name):
    one = first_run(name)
    two = run_here(settings(**ALL[name], threads=2), like=one)
    assert ledger(one) == ledger(two)
    assert plans(one) == plans(two)
    assert stated(one, "sketches") == stated(two, "sketches")
    for first, second in zip(batches(one), batches(two), strict=True):
        np.testing.assert_array_equal(first, second)
    if not has_jumps(ALL[name]):
        assert relative_distance(ends(one), ends(two)) < 1e-5


def stated(parts, name):
    replies = [message for direction, _, message in parts.grid.seen if direction == "up"]
    return [reply.content.config_records["reply"][name] for reply in replies if reply.content.config_records]


def batches(parts):
    for direction, partition, message in parts.grid.seen:
        if direction == "down" and "plan" in message.content.config_records:
            plan = RoundPlan.from_record(message.content.config_records["plan"])
            seed = derive_seed(plan.batch_seed, "client", partition)
            yield local_batches(parts.replica.data.partitions[partition], seed, plan.local)[0]


@every_case
def test_every_client_draws_the_same_sketch_in_a_round_unless_it_is_its_own(name):
    parts = first_run(name)
    method, ranks = parts.problem.method, parts.problem.rounds.ranks
    link = method.open_link(0, parts.chain.merged)
    by_round = {}
    for direction, partition, message in parts.grid.seen:
        if direction == "up" and message.content.config_records:
            who = partition if link.has_private else ranks[partition] if ranks else None
            digests = by_round.setdefault(int(message.metadata.group_id), {})
            digests.setdefault(who, set()).add(message.content.config_records["reply"]["sketches"])
    assert list(by_round) == [1, 2, 3]
    for round, digests in by_round.items():
        assert all(len(found) == 1 for found in digests.values())
        if method.closes(1) or round == 1:
            assert len(set.union(*digests.values())) == len(digests), "unlike clients drew alike"


@every_case
def test_an_exact_run_ends_at_one_digest_whatever_the_chunks_the_threads_and_who_trains(name):
    first = first_run(name, exact=True)
    for other in (
        run_here(settings(**ALL[name], exact=True, chunk_mib=0.001), like=first),
        run_here(first.settings, grid=OneByOneGrid, like=first),
    ):
        assert other.chain.digest == first.chain.digest


@every_case
def test_clients_with_a_replica_each_need_nothing_but_their_messages(name):
    """No client sees another's messages here: what it lacks must have been sent, and charged, to it alone."""
    chosen = settings(**ALL[name], exact=True, rounds=5, fraction=0.34)
    shared = run_here(chosen)
    apart = federation(chosen, problem=shared.problem)
    apart.grid = AppsGrid(apart.problem, chosen)
    reports = apart.run()
    assert all(report.num_failed == report.num_missing == report.num_retried == 0 for report in reports)
    assert apart.chain.digest == shared.chain.digest
    assert [row for report in reports for row in report.rows] == ledger(shared)


def test_run_sets_the_threads_so_that_exact_runs_agree(tmp_path):
    digests = {
        run(settings(exact=True, out=str(tmp_path / name), rounds=2, **own), Silent())["chain_digest"]
        for name, own in {"a": {}, "b": {"threads": 2}, "c": {"chunk_mib": 0.001, "threads": 2}}.items()
    }
    assert len(digests) == 1


# ---- bytes


@every_case
def test_the_ledger_equals_an_independent_count_of_the_messages(name):
    parts = first_run(name)
    rows = ledger(parts)
    expected = []
    for direction, partition, message in parts.grid.seen:
        key = (int(message.metadata.group_id), direction, partition)
        mine = [row for row in rows if (row.round, row.direction, row.partition) == key]
        assert sum(row.record_bytes for row in mine) == serialised_size(message)
        for kind, record in message.content.array_records.items():
            arrays = [array.numpy() for array in record.values()]
            expected.append((*key, kind, sum(a.size for a in arrays), sum(a.nbytes for a in arrays)))
        assert all(row.tensor_bytes <= row.record_bytes for row in mine)
    with_arrays = [row for row in rows if row.tensor_bytes]
    found = [
        (row.round, row.direction, row.partition, row.kind, row.parameters, row.tensor_bytes) for row in with_arrays
    ]
    assert sorted(found) == sorted(expected)
    assert parts.strategy.state.traffic.total_bytes == sum(item[-1] for item in expected)
    assert parts.strategy.state.traffic.uplink_bytes == sum(item[-1] for item in expected if item[1] == "up")


@every_case
def test_the_frozen_part_of_the_model_does_not_move(name):
    """What neither a factor nor the plan's dense tensors name keeps its bits."""
    parts = first_run(name)
    method, before = parts.problem.method, parts.problem.new_chain().weights()
    trained = method.trains(1, method.open_link(0, before))
    moved = set(trained.dense) | ({f"{layer}.weight" for layer in trained.parts} if method.traits.is_global else set())
    for key, tensor in parts.chain.weights().items():
        assert torch.equal(tensor, before[key]) == (key not in moved)


@every_case
def test_clients_state_the_version_that_the_server_had_before_the_round(name):
    parts, before = federation(settings(**ALL[name]), problem=first_run(name).problem), ""
    is_one = not parts.problem.rounds.ranks
    for report in parts.iterate():
        replies = [message for direction, _, message in parts.grid.seen if direction == "up"][-report.num_ok :]
        if report.round:
            versions = {reply.content.config_records["reply"]["version"] for reply in replies}
            assert versions == {before} if is_one else len(versions) > 1
        if parts.chain.open is None:
            parts.chain.open_link(parts.problem.method.open_link(parts.chain.num_links, parts.chain.merged))
        before = parts.chain.digest
