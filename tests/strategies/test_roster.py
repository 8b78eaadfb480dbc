"""Who is there: asked once, waited for, and believed about what it lacks."""

import pytest

from strategies.state import ServerState
from tests.helpers import RecordingGrid, federate, federation, settings


def growing(num_looks):
    """Return a grid whose last node comes after some looks at the list."""

    class Grid(RecordingGrid):
        looks = 0

        def get_node_ids(self):
            type(self).looks += 1
            nodes = super().get_node_ids()
            return nodes if self.looks > num_looks else nodes[:-1]

    return Grid


def test_the_server_waits_for_clients_that_come_later():
    chosen = settings(num_clients=3, fraction=1.0, rounds=1, connect_s=30.0)
    parts = federation(chosen, grid=growing(2))
    assert parts.run()[1].num_ok == 3


def test_it_begins_without_those_that_do_not_come_in_time():
    chosen = settings(num_clients=3, fraction=1.0, rounds=1, connect_s=0.05)
    parts = federation(chosen, grid=growing(10**9))
    report = parts.run()[1]
    assert (report.num_ok, report.num_missing) == (2, 1)


def test_a_node_is_asked_once():
    parts = federate()
    parts.run()
    asked = [
        message for way, _, message in parts.grid.seen if way == "down" and "query" in message.metadata.message_type
    ]
    assert len(asked) == 4


@pytest.mark.parametrize(("remembered", "expected"), [(5, 2), (1, 1)])
def test_a_client_is_believed_where_it_holds_less_and_not_where_it_holds_more(remembered, expected):
    parts = federate()
    parts.replica.chain.num_links = 2
    parts.strategy.state = ServerState(held={1: remembered})
    parts.strategy.connect(parts.grid)
    assert parts.strategy.state.held[1] == expected


def test_why_nobody_takes_part_is_said(monkeypatch):
    parts = federate()

    def fail():
        raise ValueError("train.npz does not exist")

    monkeypatch.setattr(parts.replica, "advance", fail)
    with pytest.raises(RuntimeError, match=r"no client .* train\.npz does not exist"):
        parts.run()
