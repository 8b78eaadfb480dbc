"""Floats a client and round in steady state, against the table of formulas (m outputs, n inputs, rank r, one layer)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from experiments.settings import MemorySettings, ServerSettings, SketchSettings
from fedraclora.sketch import SketchKey
from strategies.dry_run import DryRun
from tests.helpers import METHODS, federation, settings

M, N, R, FLOAT = 10, 64, 2, 4
PAIR, WEIGHT = R * (M + N), M * N
By = Callable[[int], int]


def always(number: int) -> By:
    """Return the same number of floats for every round."""
    return lambda round: number


@dataclass(frozen=True)
class Formula:
    """The floats that one client of `num_clients`, all of which take part, sends and is sent in each round.

    What is sent before the first update is `first`: seeds alone cost nothing.
    """

    up: By
    down: By
    own: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    num_clients: int = 6
    first: int = 0


def both(number: int, own: Mapping[str, Any] | None = None, **more: Any) -> Formula:
    return Formula(always(number), always(number), own or {}, more)


def alternating(odd: int, even: int) -> Formula:
    """Return RoLoRA's: B in odd rounds and A in even ones; a client is sent what the round before has changed."""
    return Formula(lambda round: odd if round % 2 else even, lambda round: even if round % 2 else odd)


# Whatever differs from r(m + n), or from m n, is the method's overhead or its saving.
FORMULAS = {
    # One trained factor; what is drawn costs nothing.
    "rac_lora": both(R * M),
    "rac_lora a": both(R * N, {"side": "a"}),
    "rac_lora auto": both(R * M, {"side": "auto"}),
    "ffa_lora": both(R * M),
    "sketched_full": both(R * M),
    "sketched_full a": both(R * N, {"side": "a"}),
    "bernoulli_lora never": both(R * M, {"probability": 0.0}),
    "bernoulli_lora always": both(R * N, {"probability": 1.0}),
    # Draws of their own: the server hands on the factors of all K clients.
    "rac_lora private": Formula(always(R * M), always(6 * R * M), more={"sketch": SketchSettings(shared=False)}),
    "rac_lora private, three clients": Formula(
        always(R * M), always(3 * R * M), more={"sketch": SketchSettings(shared=False)}, num_clients=3
    ),
    # S subspaces a round, all of whose accumulators travel.
    "fed_krso": both(3 * M * R, {"num_seeds": 3, "block_steps": 1}),
    # Both factors.
    "fed_it": both(PAIR),
    "chain_of_lora": both(PAIR),
    "flexlora": both(PAIR),
    "het_lora": both(PAIR),
    "lora_fair": both(PAIR),
    # Both factors of each client, or their sum multiplied out.
    "flora": Formula(always(PAIR), always(min(6 * PAIR, WEIGHT))),
    "flora three clients": Formula(always(PAIR), always(min(3 * PAIR, WEIGHT)), num_clients=3),
    # The means of both, and a residual whose rank is that of all clients but one.
    "fedex_lora": Formula(always(PAIR), always(PAIR + min(5 * PAIR, WEIGHT))),
    "fedex_lora three clients": Formula(always(PAIR), always(PAIR + min(2 * PAIR, WEIGHT)), num_clients=3),
    "fedex_lora factors": Formula(always(PAIR), always(PAIR + 5 * PAIR), {"residual": "factors"}),
    "fedex_lora truncated": Formula(
        always(PAIR), always(PAIR + 3 * (M + N)), {"residual": "truncated", "residual_rank": 3}
    ),
    # The means of both; the base's principal pair travels once, before the first round.
    "fr_lora": Formula(always(PAIR), always(PAIR), first=PAIR),
    # One factor after the other, and only what has changed comes back.
    "ro_lora": alternating(R * M, R * N),
    # A alone: B never leaves its client.
    "fed_sa_lora": both(R * N),
    # The core; first the full update, out of whose SVD both outer factors come, once.
    "fed_sb": Formula(
        lambda round: WEIGHT if round == 1 else R * R, lambda round: PAIR + R * R if round == 2 else R * R
    ),
    "fed_sb random": both(R * R, {"init": "random"}),
    # All parameters, the bias too.
    "full": both(WEIGHT + M),
    "fed_slop": both(WEIGHT + M),
    "fed_slop factor": both(R * M + M, {"upload": "factor", "moments": "reset"}),
    # What goes with any method: control variates travel beside the update both ways; a replayed optimiser is free.
    "rac_lora scaffold": Formula(always(2 * R * M), always(2 * R * M), more={"scaffold": True}),
    "rac_lora adam": both(R * M, server=ServerSettings("adam")),
    "fed_it momentum": both(PAIR, server=ServerSettings("momentum")),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_everybody_every_round_pays_the_formula_and_was_told_so(name):
    formula = FORMULAS[name]
    parts = federation(
        settings(
            method=(name.split()[0], dict(formula.own)), model="softmax_regression", rank=R, fraction=1.0, rounds=5,
            **{"num_clients": formula.num_clients, **formula.more},
        )
    )  # fmt: skip
    problem, rounds = parts.problem, parts.settings.rounds
    told = DryRun(problem.method, problem.new_chain().merged, problem.rounds)
    spent, predicted = parts.run(), list(told.rounds_to(rounds))
    assert (len(spent), len(predicted)) == (rounds + 1, rounds)
    for report in [*spent, *predicted]:
        traffic = report.traffic
        everyone = parts.settings.num_clients * FLOAT
        assert traffic.uplink_bytes == (everyone * formula.up(report.round) if report.round else 0)
        # Before anything has been trained nothing but seeds is sent, as a rule.
        down = formula.down(report.round) if report.round > 1 else formula.first if report.round else 0
        assert traffic.downlink_bytes == everyone * down
        assert traffic.catchup_bytes == 0
        assert (report.num_ok, report.num_retried) == (report.num_clients, 0)


def test_every_method_has_a_formula():
    assert {name.split()[0] for name in FORMULAS} == set(METHODS)


def test_a_coin_decides_what_a_round_of_bernoulli_lora_costs():
    parts = federation(settings(method="bernoulli_lora", model="softmax_regression", rank=R, fraction=1.0, rounds=6))
    reports = parts.run()
    costs = [R * M if isinstance(link.terms[0].lora_a, SketchKey) else R * N for link in parts.chain.links]
    assert set(costs) == {R * M, R * N}
    everyone = parts.settings.num_clients * FLOAT
    assert [report.traffic.uplink_bytes for report in reports[1:]] == [everyone * cost for cost in costs]
    assert [report.traffic.downlink_bytes for report in reports[1:]] == [everyone * cost for cost in [0, *costs[:-1]]]


@pytest.mark.parametrize("method", ["rac_lora", "flora", "flexlora", "het_lora"])
def test_a_client_of_a_smaller_rank_sends_its_own_rank_only(method):
    ranks = [1, 1, 2, 3, 3, 3]
    chosen = {"model": "softmax_regression", "rank": 3, "client_ranks": ranks, "alpha": 3.0, "lr": 0.05}
    parts = federation(settings(method=method, **chosen, fraction=1.0, rounds=4))
    per_rank = M if method == "rac_lora" else M + N
    # RAC-LoRA's closed link is whole; FLoRA's holds everybody's factors.
    whole = {"rac_lora": 3 * M, "flora": min(sum(ranks) * (M + N), WEIGHT)}
    for report in parts.run()[1:]:
        for row in report.rows:
            rank = ranks[row.partition]
            down = whole.get(method, rank * per_rank) if report.round > 1 else 0
            if row.parameters:
                assert row.parameters == (rank * per_rank if row.direction == "up" else down)
        assert report.traffic.uplink_bytes == FLOAT * per_rank * sum(ranks)


def test_numbers_at_random_places_cost_no_indices():
    """The places are drawn from a seed that both ends know: 5 of the 20 numbers of B are 20 bytes."""
    own = {"model": "softmax_regression", "rank": R, "fraction": 1.0, "uplink": ("rand_k", {"share": 0.25})}
    for report in federation(settings(**own)).run()[1:]:
        rows = [row for row in report.rows if row.direction == "up" and row.tensor_bytes]
        assert [(row.kind, row.tensor_bytes) for row in rows] == [("update", FLOAT * 5)] * 6


def test_what_is_sent_whole_in_a_coins_rounds_is_charged_whole():
    """MARINA: all numbers in a client's first round and when the coin falls so, else a share of them."""
    memory = MemorySettings("marina", whole_probability=0.3)
    own = {"model": "softmax_regression", "rank": R, "fraction": 1.0, "rounds": 12, "memory": memory}
    reports = federation(settings(**own, uplink=("rand_k", {"share": 0.25}))).run()[1:]
    sizes = [
        {row.tensor_bytes for row in report.rows if row.direction == "up" and row.tensor_bytes} for report in reports
    ]
    assert sizes[0] == {FLOAT * 20}
    assert {min(size) for size in sizes} == {FLOAT * 20, FLOAT * 5}
    assert all(len(size) == 1 for size in sizes), "one coin for all"


def now_and_then(method, num_rounds):
    """Yield each round, a client of it, and what that client was sent, by kind, of a run in which few take part."""
    chosen = settings(method=method, model="softmax_regression", rank=R, fraction=1 / 3, rounds=num_rounds, lr=0.05)
    for report in federation(chosen).run()[1:]:
        for partition in sorted({row.partition for row in report.rows}):
            rows = [row for row in report.rows if (row.partition, row.direction) == (partition, "down")]
            yield report.round, partition, {row.kind: row.parameters for row in rows if row.parameters}


def test_the_outer_factors_of_fed_sb_are_sent_to_each_client_once():
    """Who was asked in round 1 trained the weights in full, and has no factors yet."""
    seen = set()
    for round, partition, sent in now_and_then("fed_sb", 12):
        if round == 1:
            assert sent == {}
        else:
            assert sent == {"update": R * R if partition in seen else PAIR + R * R}
            seen.add(partition)
    assert seen == set(range(6))


def test_the_principal_pair_of_fr_lora_is_sent_to_each_client_once_and_missed_links_are_pairs():
    """Each closed link holds the principal pair too, but as the open one's; a snapshot where that is fewer."""
    held, kinds = {}, set()
    for round, partition, sent in now_and_then("fr_lora", 14):
        closed, pair = round - 1, 0 if partition in held else PAIR
        missed = closed - held.get(partition, 0)
        expected = {"update": pair + PAIR * min(missed, 1), "catch_up": PAIR * max(missed - 1, 0)}
        if missed > 1 and missed * PAIR > WEIGHT:
            expected = {"update": pair, "snapshot": WEIGHT}
        assert sent == {kind: number for kind, number in expected.items() if number}
        held[partition] = closed
        kinds |= set(sent)
    assert kinds == {"update", "catch_up", "snapshot"}
    assert held.keys() == set(range(6))


def test_a_drawn_factor_costs_nothing_whatever_its_size():
    wide = federation(settings(method="rac_lora", model="softmax_regression", rank=1)).run()
    assert all(
        row.parameters == M for report in wide for row in report.rows if row.direction == "up" and row.parameters
    )


@pytest.mark.parametrize(
    ("name", "each_link"), [("rac_lora", R * M), ("rac_lora a", R * N), ("chain_of_lora", R * (M + N))]
)
def test_a_client_that_was_away_pays_for_every_link_it_missed_up_to_the_dense_weight(name, each_link):
    """It lacks every closed link since it was last here; the newest is an update, the others are catch-up.

    More than m n floats are never sent: then the weight itself is (a snapshot).
    """
    chosen = settings(
        method=("rac_lora", {"side": "a"}) if name == "rac_lora a" else name,
        model="softmax_regression",
        rank=R,
        fraction=1 / 6,
        rounds=40,
    )
    parts = federation(chosen)
    held, snapshots = {}, 0
    for report in parts.run()[1:]:
        rows = [row for row in report.rows if row.direction == "down" and row.parameters]
        (partition,) = {row.partition for row in report.rows}
        closed = report.round - 1
        missed = closed - held.get(partition, 0)
        replay = {"update": each_link * min(missed, 1), "catch_up": each_link * max(missed - 1, 0)}
        expected = {"snapshot": M * N} if missed > 1 and missed * each_link > M * N else replay
        snapshots += "snapshot" in expected
        assert {row.kind: row.parameters for row in rows} == {kind: num for kind, num in expected.items() if num}
        caught_up = sum(num for kind, num in expected.items() if kind != "update")
        assert report.traffic.catchup_bytes == FLOAT * caught_up
        held[partition] = closed
    assert (snapshots > 0) == (name != "rac_lora"), "only the costlier links should reach the weight's size here"


@pytest.mark.parametrize("name", ["ffa_lora", "fed_it", "full"])
def test_methods_whose_link_stays_open_have_no_catch_up(name):
    parts = federation(settings(method=name, model="softmax_regression", rank=R, fraction=1 / 6, rounds=12))
    for report in parts.run():
        assert report.traffic.catchup_bytes == 0
        assert report.traffic.downlink_bytes == (FLOAT * FORMULAS[name].down(report.round) if report.round > 1 else 0)


def test_trained_heads_are_their_own_kind_and_only_their_newest_value_is_sent():
    chosen = settings(model="softmax_regression", rank=R, dense=["fc1.bias"], fraction=1 / 6, rounds=15)
    parts = federation(chosen)
    held = {}
    for report in parts.run()[1:]:
        up = {row.kind: row.parameters for row in report.rows if row.direction == "up" and row.parameters}
        assert up == {"update": R * M, "dense": M}
        down = {row.kind: row.parameters for row in report.rows if row.direction == "down" and row.parameters}
        (partition,) = {row.partition for row in report.rows}
        missed = report.round - 1 - held.get(partition, 0)
        expected = {"update": R * M, "dense": M} if missed else {}
        if missed > 1:
            expected["catch_up"] = (missed - 1) * R * M
        assert down == expected
        held[partition] = report.round - 1
