"""Floats a client and round in steady state, against the table of formulas (m outputs, n inputs, rank r, one layer)."""

import pytest

from tests.helpers import federation, settings

M, N, R, FLOAT = 10, 64, 2, 4

# Uplink and steady-state downlink in floats; full weights carry the bias too.
FORMULAS = {
    "rac_lora": (R * M, R * M),
    "rac_lora a": (R * N, R * N),
    "rac_lora auto": (R * M, R * M),
    "ffa_lora": (R * M, R * M),
    "fed_it": (R * (M + N), R * (M + N)),
    "chain_of_lora": (R * (M + N), R * (M + N)),
    "full": (M * N + M, M * N + M),
}


def method(name):
    plugin, _, side = name.partition(" ")
    return (plugin, {"side": side}) if side else plugin


@pytest.mark.parametrize("name", FORMULAS)
def test_everybody_every_round_pays_the_formula(name):
    parts = federation(settings(method=method(name), model="softmax_regression", rank=R, fraction=1.0, rounds=4))
    up, down = FORMULAS[name]
    for report in parts.run():
        traffic = report.traffic
        everyone = parts.settings.num_clients * FLOAT
        assert traffic.uplink_bytes == (everyone * up if report.round else 0)
        # Round 1 sends nothing but seeds: no factor has been trained yet.
        assert traffic.downlink_bytes == (everyone * down if report.round > 1 else 0)
        assert traffic.catchup_bytes == 0


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
    chosen = settings(method=method(name), model="softmax_regression", rank=R, fraction=1 / 6, rounds=40)
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
        assert report.traffic.downlink_bytes == (FLOAT * FORMULAS[name][1] if report.round > 1 else 0)


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
