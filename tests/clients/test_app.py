"""The ClientApp as Flower calls it: one message, one context, one reply."""

import pytest
from flwr.app import Context, Message, RecordDict

from clients.app import client_app, partition_of
from experiments.runtimes.in_process import Shared
from tests.helpers import federation, settings


def context(**config):
    return Context(run_id=1, node_id=5, node_config=config, state=RecordDict(), run_config={})


def test_a_node_says_which_partition_it_owns():
    parts = federation(settings())
    question = Message(RecordDict(), 5, "query.partition", group_id="0")
    reply = client_app(Shared(parts.replica))(question, context(**{"partition-id": 3}))
    assert dict(reply.content.metric_records["partition"]) == {"partition-id": 3, "held": 0, "open": -1}


def test_a_node_without_a_partition_is_told_what_to_do():
    with pytest.raises(ValueError, match="partition-id"):
        partition_of(context())


def test_a_train_message_is_answered_with_arrays_metrics_and_digests_and_the_context_is_left_alone():
    parts = federation(settings())
    parts.strategy.connect(parts.grid)
    message = parts.strategy.open_round(1, parts.grid)[0]
    parts.grid.push_messages([])
    message.metadata.__dict__["_message_id"] = "0" * 64
    own = context(**{"partition-id": 0})
    reply = client_app(Shared(parts.replica))(message, own)
    assert set(reply.content) == {"update", "metrics", "reply"}
    assert set(reply.content.metric_records["metrics"]) == {*("num-examples", "num-steps", "train-loss", "is-within")}
    assert reply.content.metric_records["metrics"]["num-examples"] == len(parts.problem.split.indices[0])
    assert reply.content.metric_records["metrics"]["num-steps"] == parts.settings.local_steps
    assert reply.content.config_records["reply"]["version"] == parts.chain.digest
    assert own.state == RecordDict()
