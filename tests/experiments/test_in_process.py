"""The in-process grid is a Flower Grid whose faults and messages behave as a real one's."""

import pytest
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from experiments.devices import PRESETS, Timeline
from experiments.runtimes.in_process import InProcessGrid
from tests.helpers import federation, settings


@pytest.fixture
def parts():
    return federation(settings(), grid=InProcessGrid)


def ask(node):
    return Message(RecordDict(), node, "query.partition", group_id="0")


def test_it_is_a_grid_with_one_node_a_client(parts):
    nodes = list(parts.grid.get_node_ids())
    assert isinstance(parts.grid, Grid)
    assert len(set(nodes)) == parts.settings.num_clients
    assert [info.node_id for info in parts.grid.get_nodes()] == nodes


def test_node_ids_belong_to_partitions_and_take_equally_many_bytes(parts):
    again = federation(settings(seed=9), grid=InProcessGrid)
    assert list(again.grid.get_node_ids()) == list(parts.grid.get_node_ids())
    assert all(2**62 <= node < 2**63 for node in parts.grid.get_node_ids())


def test_a_reply_is_pulled_once_and_only_by_the_id_of_its_message(parts):
    nodes = list(parts.grid.get_node_ids())
    ids = list(parts.grid.push_messages([ask(nodes[2]), ask(nodes[4])]))
    assert len(set(ids)) == 2
    (reply,) = parts.grid.pull_messages([ids[1], "unknown"])
    assert reply.content.metric_records["partition"]["partition-id"] == 4
    assert reply.metadata.reply_to_message_id == ids[1]
    assert reply.metadata.src_node_id == nodes[4]
    assert list(parts.grid.pull_messages([ids[1]])) == []


def test_a_message_to_nobody_is_answered_as_flower_answers_for_one_that_no_reply_will_come_to(parts):
    (reply,) = parts.grid.send_and_receive([ask(77)])
    assert reply.error.code == 3


def test_ids_are_as_long_as_those_of_flower(parts):
    message = ask(next(iter(parts.grid.get_node_ids())))
    (reply,) = parts.grid.send_and_receive([message])
    assert len(message.metadata.message_id) == len(reply.metadata.message_id) == len(reply.object_id)


def test_faults_hit_train_replies_only():
    parts = federation(settings(), grid=InProcessGrid, fault=lambda who, reply: None)
    reports = parts.run()
    assert reports[0].rows
    assert all(report.num_missing == report.num_clients for report in reports[1:])


def test_a_train_message_that_is_delivered_changes_nothing_in_the_message(parts):
    parts.strategy.connect(parts.grid)
    messages = parts.strategy.open_round(1, parts.grid)
    before = [message.content.object_id for message in messages]
    parts.grid.push_messages(messages)
    assert [message.content.object_id for message in messages] == before


def test_a_reply_that_is_late_on_the_simulated_clock_is_one_that_will_not_come(parts):
    parts.grid._timeline = Timeline([PRESETS["lte"]] * parts.settings.num_clients, seed=0, deadline_s=1e-6)
    parts.strategy.connect(parts.grid)
    messages = parts.strategy.open_round(1, parts.grid)
    assert [reply.error.code for reply in parts.grid.send_and_receive(messages)] == [3] * len(messages)
    assert parts.grid._timeline.seconds(1) == 1e-6
