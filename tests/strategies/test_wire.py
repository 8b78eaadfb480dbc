"""The computed size of a message is that of Flower's own serialisation."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from strategies.wire import CHUNK_BYTES, record_bytes
from tests.helpers import federation, serialised_size, settings


@pytest.fixture(scope="module", autouse=True)
def _task():
    """Flower makes messages only where a task is named, which the grid does."""
    federation(settings())


def sent(message: Message) -> Message:
    """Return the message as it is once sent: with an id."""
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def arrays(*sizes):
    rng = np.random.default_rng(0)
    return {
        f"kind{place}": ArrayRecord({"flat": Array(rng.random(size, dtype=np.float32))})
        for place, size in enumerate(sizes)
    }


@given(
    sizes=st.lists(st.integers(1, 5000), max_size=3),
    text=st.text(max_size=300),
    numbers=st.lists(st.integers(-(2**40), 2**40), max_size=5),
    node=st.integers(1, 2**63 - 1),
    group=st.integers(0, 10**6),
)
def test_size_is_that_of_the_serialised_message_and_the_same_before_it_is_sent(sizes, text, numbers, node, group):
    records = {"plan": ConfigRecord({"links": text, "numbers": numbers, "lr": 0.5}), "m": MetricRecord({"loss": 1.25})}
    message = Message(RecordDict({**arrays(*sizes), **records}), node, "train", group_id=str(group))
    before = record_bytes(message)
    assert record_bytes(sent(message)) == before
    assert sum(before.values()) == serialised_size(message)
    assert before.keys() == {"", *(f"kind{place}" for place in range(len(sizes)))}


@pytest.mark.parametrize("size", [CHUNK_BYTES // 4 - 1, CHUNK_BYTES // 4, 3 * CHUNK_BYTES // 4 + 17])
def test_arrays_that_flower_cuts_into_chunks_are_counted_whole(size):
    message = sent(Message(RecordDict(arrays(size)), 7, "train", group_id="1"))
    assert sum(record_bytes(message).values()) == serialised_size(message)


def test_empty_content_and_errors_have_a_size_too():
    question = sent(Message(RecordDict(), 7, "query.partition", group_id="0"))
    refusal = sent(Message(Error(2, "no data of partition 3"), reply_to=question))
    assert record_bytes(question) == {"": serialised_size(question)}
    assert record_bytes(refusal) == {"": serialised_size(refusal)}


def test_equal_arrays_are_counted_each_time():
    zeros = ArrayRecord({"flat": Array(np.zeros(100, dtype=np.float32))})
    one = record_bytes(Message(RecordDict({"a": zeros}), 7, "train", group_id="1"))
    two = record_bytes(Message(RecordDict({"a": zeros, "b": zeros}), 7, "train", group_id="1"))
    assert two["a"] == two["b"] == one["a"]
