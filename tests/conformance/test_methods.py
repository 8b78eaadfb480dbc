"""Laws that every method in `strategies/` obeys; a new file there is tested without a change here."""

import numpy as np
import pytest
import torch

from experiments.run import run
from fedraclora.local import local_batches
from fedraclora.plan import RoundPlan
from fedraclora.seeding import derive_seed
from tests.helpers import (
    METHODS,
    AppsGrid,
    OneByOneGrid,
    RecordingGrid,
    Silent,
    federation,
    relative_distance,
    serialised_size,
    settings,
)

# What the methods' own defaults leave out: the optimiser's state, other links and sides, heads trained in full.
EPOCHS = {"local_epochs": 1, "batch_size": 40}
VARIANTS = [
    {"method": ("rac_lora", {"side": "a", "rounds_per_link": 2})},
    {"method": ("rac_lora", {"side": "auto", "moments": "carry"}), "momentum": 0.9, "proximal": 0.1, **EPOCHS},
    {"method": ("rac_lora", {"moments": "transport"}), "optimizer": "adamw", "lr": 0.01, "clip_norm": 1.0, **EPOCHS},
    {"method": "fed_it", "weighting": "uniform", **EPOCHS},
    {"method": "rac_lora", "dense": ["*.bias"], "alpha": 3.0},
]
CASES = [pytest.param({"method": name}, id=name) for name in METHODS] + [
    pytest.param(case, id=f"variant{place}") for place, case in enumerate(VARIANTS)
]
every_case = pytest.mark.parametrize("case", CASES)


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


def ledger(parts):
    return [row for report in parts.reports for row in report.rows]


def plans(parts):
    return [
        RoundPlan.from_record(message.content.config_records["plan"])
        for direction, _, message in parts.grid.seen
        if direction == "down" and "plan" in message.content.config_records
    ]


@every_case
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_a_cohort_trains_as_its_clients_do_one_by_one(case, dtype, tolerance):
    together = run_here(settings(**case, dtype=dtype))
    alone = run_here(settings(**case, dtype=dtype, exact=True), like=together)
    halves = run_here(settings(**case, dtype=dtype, chunk_mib=0.01), like=together)
    expected = alone.chain.weights()
    assert relative_distance(together.chain.weights(), expected) <= tolerance
    assert relative_distance(halves.chain.weights(), expected) <= tolerance
    assert ledger(together) == ledger(alone) == ledger(halves)
    assert relative_distance(expected, together.problem.new_chain().weights()) > 1e-3, "nothing was trained"


@every_case
def test_the_same_settings_give_the_same_digest_twice_and_another_seed_another_one(case):
    first, second, other = (run_here(settings(**case, seed=seed)).chain.digest for seed in (5, 5, 6))
    assert first == second
    assert first != other


@every_case
def test_sketches_cohorts_batches_and_bytes_do_not_depend_on_the_number_of_threads(case):
    one = run_here(settings(**case, threads=1))
    two = run_here(settings(**case, threads=2), like=one)
    assert ledger(one) == ledger(two)
    assert plans(one) == plans(two)
    assert stated(one, "sketches") == stated(two, "sketches")
    for first, second in zip(batches(one), batches(two), strict=True):
        np.testing.assert_array_equal(first, second)
    assert relative_distance(one.chain.weights(), two.chain.weights()) < 1e-5


def stated(parts, name):
    replies = [message for direction, _, message in parts.grid.seen if direction == "up"]
    return [reply.content.config_records["reply"][name] for reply in replies if reply.content.config_records]


def batches(parts):
    for direction, partition, message in parts.grid.seen:
        if direction == "down" and "plan" in message.content.config_records:
            plan = RoundPlan.from_record(message.content.config_records["plan"])
            seed = derive_seed(plan.batch_seed, "client", partition)
            yield local_batches(parts.problem.split.indices[partition], seed, plan.local)[0]


@every_case
def test_every_client_draws_the_same_sketch_in_a_round(case):
    parts = run_here(settings(**case, exact=True), grid=RecordingGrid)
    by_round = {}
    for direction, _, message in parts.grid.seen:
        if direction == "up" and message.content.config_records:
            digest = message.content.config_records["reply"]["sketches"]
            by_round.setdefault(message.metadata.group_id, set()).add(digest)
    assert all(len(digests) == 1 for digests in by_round.values())
    assert len(by_round) == parts.settings.rounds


@every_case
def test_an_exact_run_ends_at_one_digest_whatever_the_chunks_the_threads_and_who_trains(case):
    chosen = settings(**case, exact=True)
    first = run_here(chosen)
    for other in (
        run_here(settings(**case, exact=True, chunk_mib=0.001), like=first),
        run_here(chosen, grid=OneByOneGrid, like=first),
    ):
        assert other.chain.digest == first.chain.digest


@every_case
def test_clients_with_a_replica_each_need_nothing_but_their_messages(case):
    """No client sees another's messages here: what it lacks must have been sent, and charged, to it alone."""
    chosen = settings(**case, exact=True, rounds=5, fraction=0.34)
    shared = run_here(chosen)
    apart = federation(chosen, problem=shared.problem)
    apart.grid = AppsGrid(apart.problem, chosen)
    reports = apart.run()
    assert all(report.num_failed == report.num_missing == 0 for report in reports)
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
def test_the_ledger_equals_an_independent_count_of_the_messages(case):
    parts = run_here(settings(**case))
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
def test_the_frozen_part_of_the_model_does_not_move(case):
    """What neither a factor nor the plan's dense tensors name keeps its bits."""
    parts = run_here(settings(**case))
    trained = parts.problem.method.trains(1)
    moved = {f"{layer}.weight" for layer in trained.factors} | set(trained.dense)
    before = parts.problem.new_chain().weights()
    for name, tensor in parts.chain.weights().items():
        assert torch.equal(tensor, before[name]) == (name not in moved)


@every_case
def test_clients_state_the_version_that_the_server_had_before_the_round(case):
    parts, before = federation(settings(**case)), ""
    for report in parts.iterate():
        replies = [message for direction, _, message in parts.grid.seen if direction == "up"][-report.num_ok :]
        if report.round:
            assert {reply.content.config_records["reply"]["version"] for reply in replies} == {before}
        if parts.chain.open is None:
            parts.chain.open_link(parts.problem.method.open_link(parts.chain.num_links))
        before = parts.chain.digest
