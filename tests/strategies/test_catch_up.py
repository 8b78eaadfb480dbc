"""What it costs a client to have been away, from the sizes of the messages that are really sent."""

from dataclasses import replace

import pytest

from experiments.problem import prepare
from strategies import base
from tests.helpers import federation, nodes_grid, same_weights, settings

OUT, IN, RANK, FLOAT = 10, 64, 16, 4
LINK, DENSE = FLOAT * OUT * RANK, FLOAT * OUT * IN
BREAK_EVEN = IN // RANK
CHOSEN = settings(model="softmax_regression", num_clients=2, fraction=1.0, rank=RANK, exact=True, local_steps=1)


@pytest.fixture(scope="module")
def problem():
    return prepare(CHOSEN)


def late(monkeypatch, problem, first, *, grid=None, **changes):
    """Return a federation whose client 1 is sampled in round `first` only, after that round."""
    chosen = replace(CHOSEN, **changes)
    monkeypatch.setattr(base, "sample_cohort", lambda seed, round, settings: [0, 1] if round == first else [0])
    if changes:
        problem = prepare(chosen)
    parts = federation(chosen, problem=problem, **({} if grid is None else {"grid": grid}))
    reports = parts.run(first)
    return parts, reports


def downlink(report, partition):
    rows = [row for row in report.rows if (row.partition, row.direction) == (partition, "down") and row.tensor_bytes]
    return {row.kind: row.tensor_bytes for row in rows}


@pytest.mark.parametrize("first", range(1, BREAK_EVEN + 4))
@pytest.mark.parametrize("policy", ["replay", "snapshot", "cheapest"])
def test_a_client_that_comes_late_pays_what_was_predicted(monkeypatch, tmp_path, problem, first, policy):
    """One link behind is where everyone is who took part in the last round; the policy is for those further behind."""
    _, reports = late(monkeypatch, problem, first, grid=nodes_grid(tmp_path), catch_up=policy)
    num_links = first - 1
    replayed = {"catch_up": (num_links - 1) * LINK, "update": LINK}
    if num_links == 0:
        expected = {}
    elif num_links > 1 and (policy == "snapshot" or (policy == "cheapest" and num_links > BREAK_EVEN)):
        expected = {"snapshot": DENSE}
    else:
        expected = {kind: size for kind, size in replayed.items() if size}
    assert downlink(reports[-1], 1) == expected
    assert downlink(reports[-1], 0) == ({"update": LINK} if num_links else {})
    assert reports[-1].num_ok == 2, "a reply on another version would not have been used"


def test_the_policies_end_in_one_digest(monkeypatch, problem, tmp_path):
    first = BREAK_EVEN + 2
    ends = [
        late(monkeypatch, problem, first, grid=nodes_grid(tmp_path / policy), catch_up=policy)[0].chain
        for policy in ("replay", "snapshot", "cheapest")
    ]
    assert len({chain.digest for chain in ends}) == 1
    assert same_weights(ends[0].weights(), ends[1].weights())


def test_a_replica_on_disk_has_the_servers_version_after_catching_up(monkeypatch, problem, tmp_path):
    parts, _ = late(monkeypatch, problem, BREAK_EVEN + 2, grid=nodes_grid(tmp_path))
    replies = [reply for way, who, reply in parts.grid.seen if (way, who) == ("up", 1)]
    stated = replies[-1].content.config_records["reply"]
    asked = [message for way, who, message in parts.grid.seen if (way, who) == ("down", 1)][-1]
    assert stated["version"] in asked.content.config_records["plan"]["links"]
    assert stated["held"] == BREAK_EVEN + 1


# ---- eager broadcast


@pytest.mark.parametrize("disks", [False, True])
def test_eager_broadcast_sends_each_link_to_everyone_each_round(monkeypatch, problem, tmp_path, disks):
    first, grid = 5, nodes_grid(tmp_path) if disks else None
    eager, reports = late(monkeypatch, problem, first, grid=grid, broadcast="eager")
    lazy, _ = late(monkeypatch, problem, first)
    assert eager.chain.digest == lazy.chain.digest
    assert [downlink(report, 1) for report in reports[1:]] == [{}, *[{"update": LINK}] * (first - 1)]
    assert eager.strategy.state.held == {0: first - 1, 1: first - 1}
    counted = [(report.num_ok, report.num_failed, report.num_missing) for report in reports[1:]]
    assert counted == [(1, 0, 0)] * (first - 1) + [(2, 0, 0)]


def test_a_client_that_misses_an_eager_broadcast_catches_up_with_the_next(monkeypatch, problem):
    chosen = replace(CHOSEN, broadcast="eager")
    monkeypatch.setattr(base, "sample_cohort", lambda seed, round, settings: [0])
    parts = federation(chosen)
    answer = parts.grid._answer

    def lose(batch):
        replies = answer(batch)
        return [
            None if message.metadata.message_type == "query.links" and message.metadata.group_id == "3" else reply
            for message, reply in zip(batch, replies, strict=True)
        ]

    monkeypatch.setattr(parts.grid, "_answer", lose)
    reports = parts.run(5)
    assert [downlink(report, 1) for report in reports[3:]] == [
        {"update": LINK},
        {"catch_up": LINK, "update": LINK},
        {"update": LINK},
    ]


def test_eager_bytes_count_towards_the_budget(monkeypatch, problem):
    chosen = replace(CHOSEN, broadcast="eager", budget_mib=(3 * LINK + 1) / 2**20)
    monkeypatch.setattr(base, "sample_cohort", lambda seed, round, settings: [0])
    parts = federation(chosen)
    reports = parts.run(9)
    # Round 1 sends one upload; each later one an upload, and the last link to both.
    assert [report.round for report in reports] == [0, 1]
    assert "budget_mib" in parts.strategy.stop_reason
