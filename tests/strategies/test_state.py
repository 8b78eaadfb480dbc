"""What the server remembers survives a trip through JSON, and the budget is kept to the byte."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.ledger import LedgerRow, Traffic
from strategies.state import MIB, Budget, ServerState, exceeded

counts = st.dictionaries(st.integers(0, 10**6), st.integers(0, 10**12), max_size=4)


STATES = st.builds(
    ServerState,
    round=st.integers(-1, 10**6),
    traffic=st.builds(Traffic, uplink_bytes=st.integers(0, 10**15)),
    **dict.fromkeys(("held", "last_used", "spent", "held_open", "num_steps", "num_examples"), counts),
    draws_otherwise=st.lists(st.integers(0, 99), max_size=3),
    open_since=st.dictionaries(st.text(max_size=9), st.integers(0, 99), max_size=3),
    clip=st.none() | st.floats(1e-6, 1e6),
)


@given(STATES)
def test_state_survives_json(state):
    assert ServerState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_what_was_written_down_does_not_follow_what_comes_later():
    state = ServerState(held={1: 2}, draws_otherwise=[3])
    written = state.to_json()
    state.held[1], state.held[4] = 5, 6
    state.draws_otherwise.append(7)
    again = ServerState.from_json(written)
    assert (again.held, again.draws_otherwise) == ({1: 2}, [3])


def test_no_two_servers_have_one_secret_or_one_chain():
    states = [ServerState() for _ in range(20)]
    assert len({state.secret for state in states}) == len({state.chain_id for state in states}) == 20


def test_charging_adds_each_clients_bytes():
    state = ServerState()
    rows = [
        LedgerRow(1, "up", 3, "update", 10, 40, 700),
        LedgerRow(1, "down", 3, "catch_up", 5, 20, 300),
        LedgerRow(1, "down", 4, "update", 1, 4, 200),
        LedgerRow(1, "down", 4, "control", 0, 0, 100),
    ]
    own = state.charge(rows)
    assert own == Traffic(40, 24, 20, 700, 600)
    state.charge(rows)
    assert state.traffic == own + own
    assert state.spent == {3: 120, 4: 8}


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Budget(total_bytes=100 + 36), "budget_mib"),
        (Budget(uplink_bytes=60 + 20), "uplink_mib"),
        (Budget(per_client_bytes=50 + 22), "per_client_mib"),
    ],
)
def test_a_limit_holds_to_the_byte(budget, name):
    """Spent so far: 60 up, 40 down, 50 by client 1. Next: 10 up each from clients 1 and 2, 12 and 4 bytes down."""
    state = ServerState(3, Traffic(uplink_bytes=60, downlink_bytes=40), spent={1: 50, 2: 50})
    assert exceeded(budget, state, {1: 12, 2: 4}, {1: 10, 2: 10}) is None
    tighter = Budget(*(None if limit is None else limit - 1 for limit in vars(budget).values()))
    reason = exceeded(tighter, state, {1: 12, 2: 4}, {1: 10, 2: 10})
    assert reason is not None
    assert name in reason


def test_no_limit_is_never_exceeded():
    assert exceeded(Budget(), ServerState(), {0: MIB**2}, {0: MIB}) is None
