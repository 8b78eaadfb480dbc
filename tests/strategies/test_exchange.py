"""Messages go out, replies come back, and nothing is waited for beyond the deadline."""

import time
from dataclasses import dataclass, field

import pytest
from flwr.app import Error, Message, RecordDict

from strategies import exchange as exchanges
from strategies.exchange import exchange
from tests.helpers import federate


@dataclass
class Postbox:
    """A grid that answers a message after some number of looks into it; `after` is by node, None for never."""

    after: dict
    looks: int = 0
    sent: dict = field(default_factory=dict)
    error: int | None = None

    def push_messages(self, messages):
        assert isinstance(messages, list), "a deployed grid takes lists only"
        names = []
        for message in messages:
            if self.after.get(message.metadata.dst_node_id) == "refused":
                names.append(None)
                continue
            name = f"{len(self.sent):064d}"
            message.metadata.__dict__["_message_id"] = name
            self.sent[name] = message, self.looks
            names.append(name)
        return names

    def pull_messages(self, message_ids):
        self.looks += 1
        came = []
        for name in sorted(message_ids, reverse=True):
            message, since = self.sent[name]
            due = self.after[message.metadata.dst_node_id]
            if due is not None and self.looks - since > due:
                came.append(self._reply(message))
        return came

    def _reply(self, message):
        if self.error is not None:
            return Message(Error(self.error, "no reply"), reply_to=message)
        return Message(RecordDict(), reply_to=message)


@pytest.fixture(autouse=True)
def _identity():
    federate()


def ask(node, kind="train"):
    return Message(RecordDict(), node, kind, group_id="1")


def nodes(replies):
    return [reply.metadata.src_node_id for reply in replies]


def test_replies_come_in_the_order_of_the_messages():
    grid = Postbox({5: 1, 7: 0, 6: 0})
    assert nodes(exchange(grid, [ask(5), ask(7), ask(6)], timeout_s=10)) == [5, 7, 6]


def test_the_deadline_ends_the_wait_and_keeps_what_came():
    grid = Postbox({5: 0, 6: None})
    began = time.monotonic()
    assert nodes(exchange(grid, [ask(5), ask(6)], timeout_s=0.3)) == [5]
    assert time.monotonic() - began < 5


def test_a_node_that_has_gone_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(exchanges, "PRESENCE_S", 0.0)
    grid = Postbox({5: 3, 6: None})
    grid.get_node_ids = lambda: [5]
    began = time.monotonic()
    assert nodes(exchange(grid, [ask(5), ask(6)], timeout_s=60)) == [5]
    assert time.monotonic() - began < 30


def test_a_node_that_is_away_for_a_moment_is_waited_for(monkeypatch):
    monkeypatch.setattr(exchanges, "PRESENCE_S", 0.0)
    grid, here = Postbox({5: 4}), iter([[5], [], [5], [], [5], [5], [5]])
    grid.get_node_ids = lambda: next(here)
    assert nodes(exchange(grid, [ask(5)], timeout_s=60)) == [5]


def test_a_message_that_is_not_accepted_is_not_waited_for():
    assert nodes(exchange(Postbox({5: 0, 6: "refused"}), [ask(5), ask(6)], timeout_s=60)) == [5]


@pytest.mark.parametrize("code", [3, 4, 5])
def test_flowers_word_that_no_reply_will_come_is_no_reply(code):
    assert exchange(Postbox({5: 0}, error=code), [ask(5)], timeout_s=60) == []


@pytest.mark.parametrize("code", [0, 2, 8])
def test_the_error_of_a_client_is_its_reply(code):
    (reply,) = exchange(Postbox({5: 0}, error=code), [ask(5)], timeout_s=60)
    assert reply.error.code == code


def test_a_follow_up_is_sent_at_once_and_its_reply_stands_in():
    grid, seen = Postbox({5: 0, 6: 2}), []

    def follow_up(asked, reply):
        seen.append(asked.metadata.dst_node_id)
        return ask(5, "query.more") if seen == [5] else None

    replies = exchange(grid, [ask(5), ask(6)], timeout_s=10, follow_up=follow_up)
    assert nodes(replies) == [5, 6]
    assert replies[0].metadata.message_type == "query.more"
    assert seen == [5, 5, 6], "the second answer of 5 came before the slow one of 6"


def test_nothing_to_send_is_nothing_to_wait_for():
    assert exchange(Postbox({}), [], timeout_s=60) == []
