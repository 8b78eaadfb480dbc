"""The round loop: what a faulty client changes (nothing), who takes part, and where a run stops."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.local import LocalConfig
from strategies.base import ChainStrategy
from strategies.rounds import RoundSettings, sample_cohort
from strategies.state import Budget, BudgetTooSmall, ServerState
from tests.helpers import (
    METHODS,
    assert_close,
    edit_array,
    error_reply,
    federate,
    federation,
    merged_over,
    put,
    same_weights,
    settings,
    spoil,
)


def test_all_replies_are_used_and_weighted_by_examples():
    parts = federate()
    reports = parts.run()
    assert [(report.num_ok, report.num_failed, report.num_missing) for report in reports[1:]] == [(4, 0, 0)] * 3
    assert_close(parts.chain.weights(), merged_over(parts, {round: [0, 1, 2, 3] for round in (1, 2, 3)}))


def test_uniform_weighting_counts_every_client_the_same():
    chosen = settings(fraction=1.0, num_clients=4, rounds=1, weighting="uniform")
    parts = federation(chosen)
    parts.run()
    expected = merged_over(parts, {1: [0, 1, 2, 3]})
    assert any(not torch.allclose(parts.chain.weights()[name].double(), expected[name], atol=1e-5) for name in expected)


@pytest.mark.parametrize("name", METHODS)
def test_with_every_method_a_lost_reply_is_as_good_as_a_refused_one(name):
    chosen = settings(method=name, fraction=1.0, num_clients=4)
    lost = federation(chosen, fault=spoil(lambda reply: None, partition=2))
    refused = federation(chosen, fault=spoil(error_reply, partition=2))
    spoiled = federation(chosen, fault=spoil(lambda reply: edit_array(reply, put(np.nan)), partition=2))
    reports = [parts.run()[2] for parts in (lost, refused, spoiled)]
    counts = [(report.num_ok, report.num_failed, report.num_missing) for report in reports]
    assert counts == [(3, 0, 1), (3, 1, 0), (3, 1, 0)]
    assert lost.chain.digest == refused.chain.digest == spoiled.chain.digest
    assert federation(chosen).chain.digest != lost.chain.digest


def test_a_lost_reply_leaves_its_client_where_it_was_and_it_catches_up_later():
    parts = federate(fault=spoil(lambda reply: None, partition=2, only_round=2))
    reports = parts.run()
    kinds = {row.kind for row in reports[3].rows if row.partition == 2 and row.direction == "down" and row.parameters}
    assert kinds == {"update", "catch_up"}
    others = {row.kind for row in reports[3].rows if row.partition == 1 and row.direction == "down" and row.parameters}
    assert others == {"update"}
    assert reports[3].num_ok == 4


@pytest.mark.parametrize("min_replies", [1, 3, 4])
def test_too_few_usable_replies_leave_the_model_unchanged(min_replies):
    chosen = settings(fraction=1.0, num_clients=4, rounds=3, min_replies=min_replies)
    parts = federation(chosen, fault=spoil(error_reply, partition=1))
    digests, updated = [], []
    for report in parts.iterate():
        digests.append([parts.chain.version, {name: t.clone() for name, t in parts.chain.weights().items()}])
        updated.append(report.is_updated)
    is_enough = min_replies <= 3
    assert updated == [False, True, is_enough, True]
    assert [version for version, _ in digests] == [0, 1, 2 if is_enough else 1, 3 if is_enough else 2]
    assert same_weights(digests[1][1], digests[2][1]) != is_enough


def test_a_voided_round_keeps_its_link_and_the_next_one_trains_it_again():
    chosen = settings(fraction=1.0, num_clients=4, rounds=2, min_replies=4)
    parts = federation(chosen, fault=spoil(error_reply, partition=1, only_round=1))
    reports = parts.run()
    assert [report.link for report in reports[1:]] == [0, 0]
    assert [report.is_updated for report in reports[1:]] == [False, True]
    assert parts.chain.num_links == 1


def test_no_reply_at_all_leaves_the_model_unchanged_and_the_run_alive():
    parts = federate(fault=lambda who, reply: None if reply.metadata.group_id == "2" else reply)
    reports = parts.run()
    assert (reports[2].num_ok, reports[2].num_missing, reports[2].is_updated) == (0, 4, False)
    assert np.isnan(reports[2].train_loss)
    assert not reports[2].has_diverged
    assert reports[3].is_updated


def test_a_cohort_whose_numbers_are_all_not_finite_has_diverged():
    parts = federation(settings(fraction=1.0, num_clients=4, lr=1e30))
    reports = [report for report, _ in zip(parts.iterate(), range(6), strict=False)]
    last = next(report for report in reports if report.has_diverged)
    assert (last.num_ok, last.num_failed, last.is_updated) == (0, 4, False)
    assert all(torch.isfinite(tensor).all() for tensor in parts.chain.weights().values())


def test_errors_alone_are_no_divergence():
    parts = federate(fault=lambda who, reply: error_reply(reply))
    assert not any(report.has_diverged for report in parts.run())


def test_a_client_without_data_answers_with_an_error_and_does_not_disturb_the_others():
    parts, whole = federate(), federate()
    parts.replica.data.partitions[3] = np.zeros(0, dtype=np.int64)
    reports = parts.run()
    assert all(list(report.failures) == [3] and "partition 3" in report.failures[3] for report in reports[1:])
    without = federate(fault=lambda who, reply: None if who == 3 else reply)
    without.run()
    whole.run()
    assert parts.chain.digest != whole.chain.digest
    assert_close(parts.chain.weights(), {name: t.double() for name, t in without.chain.weights().items()})


def test_a_client_whose_training_raises_does_not_disturb_the_others():
    """Row 10**9 does not exist, so the cohort's pass raises; then each client is tried by itself."""
    parts = federation(settings(fraction=1.0, num_clients=4, exact=True))
    parts.replica.data.partitions[0] = np.full(8, 10**9, dtype=np.int64)
    reports = parts.run()
    assert all((report.num_ok, list(report.failures)) == (3, [0]) for report in reports[1:])
    without = federation(
        settings(fraction=1.0, num_clients=4, exact=True), fault=lambda who, reply: None if who == 0 else reply
    )
    without.run()
    assert parts.chain.digest == without.chain.digest


# ---- cohorts


def round_settings(num_clients, fraction):
    return RoundSettings(num_clients=num_clients, fraction=fraction, local=LocalConfig(), seed=0)


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 2**62), st.integers(1, 1000))
def test_a_cohort_is_sorted_and_without_repeats(num_clients, fraction, seed, round):
    chosen = round_settings(num_clients, fraction)
    cohort = sample_cohort(seed, round, chosen)
    assert cohort == sorted(set(cohort))
    assert len(cohort) == max(1, round_half_even(fraction * num_clients))
    assert set(cohort) <= set(range(num_clients))
    assert cohort == sample_cohort(seed, round, chosen)


def round_half_even(number):
    return int(np.rint(number))


def test_two_seeds_share_no_sequence_of_cohorts():
    chosen = round_settings(50, 0.2)
    sequences = {tuple(tuple(sample_cohort(seed, round, chosen)) for round in range(1, 6)) for seed in range(50)}
    assert len(sequences) == 50
    # Nor do they meet at shifted rounds.
    cohorts = [tuple(sample_cohort(seed, round, chosen)) for seed in range(20) for round in range(1, 21)]
    assert len(set(cohorts)) == len(cohorts)


def test_every_client_is_drawn_equally_often():
    """Counts over 2,000 rounds are binomial(2000, 1/5): mean 400, standard deviation 18; five of them are allowed."""
    chosen = round_settings(20, 0.2)
    counts = np.bincount([who for round in range(2000) for who in sample_cohort(7, round, chosen)], minlength=20)
    assert (np.abs(counts - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8)).all()


def test_the_clients_of_a_round_are_those_that_are_sampled():
    parts = federation(settings(rounds=5))
    for report in parts.run()[1:]:
        asked = {row.partition for row in report.rows}
        assert asked == set(sample_cohort(parts.settings.seed, report.round, parts.problem.rounds))


def test_clients_are_sent_derived_seeds_and_never_the_root():
    root = 123456789
    parts = federation(settings(seed=root))
    parts.run()
    sent = [message.content for way, _, message in parts.grid.seen if way == "down" and message.content.config_records]
    assert sent
    for content in sent:
        assert all(str(root) not in str(dict(record)) for record in content.config_records.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_clients": 0}, "num_clients"),
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "fraction"),
        ({"min_replies": 0}, "min_replies"),
        ({"min_replies": 3, "fraction": 0.2}, "min_replies"),
        ({"weighting": "sizes"}, "weighting"),
    ],
)
def test_settings_with_which_no_round_can_be_run_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        RoundSettings(**{"num_clients": 10, "fraction": 1.0, "local": LocalConfig(), "seed": 0, **changes})


# ---- budgets


SPENT = {
    "budget_mib": lambda state: state.traffic.total_bytes,
    "uplink_mib": lambda state: state.traffic.uplink_bytes,
    "per_client_mib": lambda state: max(state.spent.values()),
}


def limits(**own):
    return settings(rounds=30, **own)


@pytest.fixture(scope="module")
def free():
    """Return each round's report of a run without limits, and by limit what was spent by then."""
    parts = federation(limits())
    return [(report, {key: spent(parts.strategy.state) for key, spent in SPENT.items()}) for report in parts.iterate()]


@pytest.mark.parametrize(
    ("key", "mib"),
    [
        ("budget_mib", 0.007),
        ("budget_mib", 0.015),
        ("uplink_mib", 0.006),
        ("per_client_mib", 0.003),
        ("per_client_mib", 0.005),
    ],
)
def test_a_run_stops_before_the_round_that_would_exceed_its_budget(free, key, mib):
    parts = federation(limits(**{key: mib}))
    reports = parts.run()
    affordable = [report.round for report, spent in free if spent[key] <= mib * 2**20]
    assert 1 < reports[-1].round < 30
    assert reports[-1].round == affordable[-1]
    assert SPENT[key](parts.strategy.state) <= mib * 2**20
    assert key in parts.strategy.stop_reason
    assert [report.traffic for report in reports] == [report.traffic for report, _ in free[: len(reports)]]


def test_a_budget_that_is_met_exactly_is_not_exceeded(free):
    total = free[5][1]["budget_mib"]
    assert federation(limits(budget_mib=total / 2**20)).run()[-1].round == 5
    assert federation(limits(budget_mib=(total - 1) / 2**20)).run()[-1].round == 4


@pytest.mark.parametrize("key", ["budget_mib", "uplink_mib", "per_client_mib"])
def test_a_budget_below_one_round_is_refused(key):
    parts = federation(limits(**{key: 1e-6}))
    with pytest.raises(BudgetTooSmall, match=key):
        parts.run()
    assert parts.chain.version == 0


def test_a_resumed_run_that_can_afford_no_more_just_stops():
    """It had its rounds, so this is an end and no error."""
    first = federation(limits())
    for report in first.iterate():
        if report.round == 2:
            break
    first.strategy.settings = RoundSettings(
        **{**vars(first.strategy.settings), "budget": Budget(total_bytes=first.strategy.state.traffic.total_bytes)}
    )
    assert list(first.strategy.rounds(first.grid, 60)) == []
    assert first.strategy.stop_reason is not None


# ---- Flower's interface


def test_start_is_what_flower_calls_and_equals_the_loop():
    one, other = federation(settings()), federation(settings())
    reports = one.run()
    seen = []

    def evaluate(round, arrays):
        seen.append(round)
        return MetricRecord({"norm": float(sum(np.square(array.numpy()).sum() for array in arrays.values()))})

    result = other.strategy.start(grid=other.grid, num_rounds=3, evaluate_fn=evaluate)
    assert other.chain.digest == one.chain.digest
    found = {name: torch.from_numpy(array.numpy().copy()) for name, array in result.arrays.items()}
    assert same_weights(found, one.chain.weights())
    assert seen == [0, 1, 2, 3]
    losses = {round: metrics["train-loss"] for round, metrics in result.train_metrics_clientapp.items()}
    assert losses[3] == reports[3].train_loss
    assert set(result.evaluate_metrics_serverapp) == {0, 1, 2, 3}


def test_start_refuses_what_the_chain_already_says():
    parts = federation(settings())
    with pytest.raises(ValueError, match="initial_arrays"):
        parts.strategy.start(parts.grid, initial_arrays=ArrayRecord({"w": Array(np.zeros(1))}))


def test_a_strategy_goes_on_from_a_state():
    whole = federation(settings(rounds=4))
    whole.run()
    first = federation(settings(rounds=4))
    early = first.run(2)
    state = ServerState.from_json(json.loads(json.dumps(first.strategy.state.to_json())))
    again = ChainStrategy(first.problem.method, first.chain, first.problem.rounds, state=state)
    late = list(again.rounds(first.grid, 4))
    assert [report.round for report in early + late] == [0, 1, 2, 3, 4]
    assert again.chain.digest == whole.chain.digest
    own = {name: getattr(first.strategy.state, name) for name in ("chain_id", "secret")}
    assert again.state == replace(whole.strategy.state, **own)
