"""Replies and handshakes: which ones count, and what those that do not are answered with."""

import copy
from functools import cache

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from strategies.rounds import NOBODY, QUERY_PARTITION
from tests.helpers import (
    RecordingGrid,
    edit_array,
    error_reply,
    federate,
    federation,
    put,
    same_weights,
    settings,
    spoil,
    state_arrays,
)


def with_metrics(reply, **changes):
    values = {**dict(reply.content.metric_records["metrics"]), **changes}
    reply.content["metrics"] = MetricRecord({key: value for key, value in values.items() if value is not None})
    return reply


def with_stated(reply, **changes):
    reply.content["reply"] = ConfigRecord({**dict(reply.content.config_records["reply"]), **changes})
    return reply


def with_extra_array(reply):
    reply.content["surplus"] = ArrayRecord({"flat": Array(np.zeros(3, dtype=np.float32))})
    return reply


def without_record(reply, name):
    del reply.content[name]
    return reply


def with_renamed_array(reply):
    name = next(iter(reply.content.array_records))
    reply.content[name] = ArrayRecord({"other": reply.content.array_records[name]["flat"]})
    return state_arrays(reply)


def with_raw_array(reply, *, keep=1.0, **changes):
    """Return the reply with an array whose bytes or description are not what they should be."""
    array = reply.content.array_records["update"]["flat"]
    known = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
    known["data"] = known["data"][: int(keep * len(array.data))]
    reply.content["update"] = ArrayRecord({"flat": Array(**{**known, **changes})})
    return reply


# Each fault, and words that its reason must hold.
FAULTS = {
    "error": (error_reply, "client error 2"),
    "nan": (lambda reply: edit_array(reply, put(np.nan)), "NaN"),
    "infinity": (lambda reply: edit_array(reply, put(-np.inf)), "NaN or infinity"),
    "too short": (lambda reply: edit_array(reply, lambda values: values[:-1]), "does not hold"),
    "too long": (lambda reply: edit_array(reply, lambda values: np.append(values, values[:1])), "does not hold"),
    "two axes": (lambda reply: edit_array(reply, lambda values: values[None]), "does not hold"),
    "wrong dtype": (lambda reply: edit_array(reply, lambda values: values.astype(np.float64)), "float64"),
    "integers": (lambda reply: edit_array(reply, lambda values: values.astype(np.int32)), "int32"),
    "another version": (lambda reply: with_stated(reply, version="0" * 64), "version digest"),
    "another sketch": (lambda reply: with_stated(reply, sketches="0" * 64), "sketches digest"),
    "no digests": (lambda reply: without_record(reply, "reply"), "version digest"),
    "no loss": (lambda reply: with_metrics(reply, **{"train-loss": None}), "metrics"),
    "surplus metric": (lambda reply: with_metrics(reply, surplus=1), "metrics"),
    "no metrics": (lambda reply: without_record(reply, "metrics"), "metrics"),
    "loss NaN": (lambda reply: with_metrics(reply, **{"train-loss": float("nan")}), "loss"),
    "list for a metric": (lambda reply: with_metrics(reply, **{"train-loss": [1.0, 2.0]}), "metric"),
    "no examples": (lambda reply: with_metrics(reply, **{"num-examples": 0}), "num-examples"),
    "examples NaN": (lambda reply: with_metrics(reply, **{"num-examples": float("nan")}), "num-examples=nan"),
    "examples infinite": (lambda reply: with_metrics(reply, **{"num-examples": float("inf")}), "num-examples=inf"),
    "examples not whole": (lambda reply: with_metrics(reply, **{"num-examples": 12.0}), "num-examples=12.0"),
    "examples negative": (lambda reply: with_metrics(reply, **{"num-examples": -3}), "num-examples=-3"),
    "list of examples": (lambda reply: with_metrics(reply, **{"num-examples": [1, 2]}), "num-examples=[1, 2]"),
    "surplus array": (with_extra_array, "surplus"),
    "no arrays": (lambda reply: without_record(reply, "update"), "update"),
    "another name": (with_renamed_array, "flat"),
    "no bytes": (lambda reply: with_raw_array(reply, data=b""), "its record 'update'"),
    "no array in the bytes": (
        lambda reply: with_raw_array(reply, data=b"no numbers at all"),
        "its record 'update'",
    ),
    "bytes cut short": (lambda reply: with_raw_array(reply, keep=0.5), "its record 'update'"),
    "unknown container": (lambda reply: with_raw_array(reply, stype="torch.tensor"), "its record 'update'"),
    "unknown dtype and no bytes": (
        lambda reply: with_raw_array(reply, dtype="floaty", data=b""),
        "its record 'update'",
    ),
    "text": (lambda reply: edit_array(reply, lambda values: values.astype(str)), "its tensors cannot be read"),
    "complex": (lambda reply: edit_array(reply, lambda values: values.astype(np.complex64)), "complex64"),
    "no axis": (lambda reply: edit_array(reply, lambda values: np.array(values[0])), "does not hold"),
    "no numbers": (lambda reply: edit_array(reply, lambda values: values[:0]), "does not hold"),
}


@cache
def without(partition):
    """Return the federation in which the reply of one client is lost in round 2, after its run."""
    parts = federate(fault=spoil(lambda reply: None, partition))
    parts.run()
    return parts


@pytest.mark.parametrize("name", FAULTS)
def test_a_reply_that_cannot_be_used_is_counted_with_its_reason_and_changes_nothing(name):
    change, words = FAULTS[name]
    parts = federate(fault=spoil(change, partition=1))
    reports = parts.run()
    counts = [(report.num_ok, report.num_failed, report.num_missing) for report in reports[1:]]
    assert counts == [(4, 0, 0), (3, 1, 0), (4, 0, 0)]
    assert list(reports[2].failures) == [1]
    assert words in reports[2].failures[1]
    assert parts.chain.digest == without(1).chain.digest
    assert same_weights(parts.chain.weights(), without(1).chain.weights())


def test_bytes_of_an_unknown_type_are_charged_as_they_came():
    parts = federate(fault=spoil(lambda reply: with_raw_array(reply, dtype="floaty", data=b"12345"), partition=1))
    row = next(row for row in parts.run()[2].rows if (row.partition, row.direction, row.kind) == (1, "up", "update"))
    assert row.tensor_bytes == 5


@pytest.mark.parametrize("name", ["nan", "loss NaN"])
def test_one_client_without_finite_numbers_is_no_divergence(name):
    assert not federate(fault=spoil(FAULTS[name][0], partition=1)).run()[2].has_diverged


class TwiceGrid:
    """Mixed into a grid: each reply arrives twice, the second time with other numbers."""

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        trained = [reply for reply in replies if reply.metadata.message_type == "train"]
        copies = [edit_array(copy.deepcopy(reply), lambda values: values + 100) for reply in trained]
        return [*replies, *copies]


def test_the_second_of_two_replies_is_refused():
    class Grid(TwiceGrid, RecordingGrid):
        pass

    parts = federate(grid=Grid)
    reports = parts.run()
    once = federate()
    once_reports = once.run()
    assert parts.chain.digest == once.chain.digest
    assert [(report.num_ok, report.num_failed, report.num_missing) for report in reports[1:]] == [(4, 0, 0)] * 3
    assert reports[1].traffic.uplink_bytes == 2 * once_reports[1].traffic.uplink_bytes, "it was sent, so it is charged"


def test_the_reply_of_a_client_that_was_not_asked_is_ignored():
    class Stray(RecordingGrid):
        def pull_messages(self, message_ids):
            replies = list(super().pull_messages(message_ids))
            if replies[0].metadata.message_type == "train":
                stray = copy.deepcopy(replies[0])
                stray.metadata.__dict__["_src_node_id"] = 12345
                replies.append(stray)
            return replies

    parts, plain = federate(grid=Stray), federate()
    reports = parts.run()
    plain.run()
    assert parts.chain.digest == plain.chain.digest
    assert [(report.num_ok, report.num_failed, report.num_missing) for report in reports[1:]] == [(4, 0, 0)] * 3


def test_the_order_of_the_replies_changes_no_bit():
    class Backwards(RecordingGrid):
        def pull_messages(self, message_ids):
            return list(super().pull_messages(message_ids))[::-1]

    parts, straight = federate(grid=Backwards), federate()
    reports, expected = parts.run(), straight.run()
    assert parts.chain.digest == straight.chain.digest
    assert [row for report in reports for row in report.rows] == [row for report in expected for row in report.rows]


# ---- the handshake


def test_a_grid_without_clients_is_an_error():
    parts = federation(settings())
    parts.grid._contexts.clear()
    with pytest.raises(RuntimeError, match="no client"):
        parts.run()


def test_the_handshake_is_round_zero_and_charged():
    parts = federation(settings())
    report = next(parts.iterate())
    assert report.round == 0
    assert {row.kind for row in report.rows} == {"setup"}
    assert len(report.rows) == 2 * parts.settings.num_clients
    assert report.traffic.total_bytes == 0
    assert report.traffic.uplink_record_bytes > 0
    assert report.traffic.downlink_record_bytes > 0


class Handshake(RecordingGrid):
    """Changes the answers to the question which partition a node owns; `change` gives None for no answer."""

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        changed = [
            self.change(self._partition_of(reply), reply) if reply.metadata.message_type == QUERY_PARTITION else reply
            for reply in replies
        ]
        return [reply for reply in changed if reply is not None]

    def _partition_of(self, reply):
        return list(self._contexts).index(reply.metadata.src_node_id)


def claiming(reply, partition):
    reply.content["partition"] = MetricRecord({"partition-id": partition, "held": 0, "open": -1})
    return reply


def test_two_nodes_that_claim_one_partition_are_an_error():
    class Grid(Handshake):
        def change(self, who, reply):
            return claiming(reply, 1) if who == 3 else reply

    parts = federate(grid=Grid)
    with pytest.raises(RuntimeError, match="two clients say that they own partition 1; each needs one of its own"):
        parts.run()
    assert parts.chain.version == 0


ANSWERS = {
    "none": lambda reply: None,
    "an error": error_reply,
    "no record": lambda reply: without_record(reply, "partition"),
    "a negative number": lambda reply: claiming(reply, -2),
    "half a number": lambda reply: claiming(reply, 1.5),
    "two numbers": lambda reply: claiming(reply, [3, 4]),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_node_that_names_no_partition_is_charged_to_nobody_and_missing_from_then_on(name):
    class Grid(Handshake):
        def change(self, who, reply):
            return ANSWERS[name](reply) if who == 3 else reply

    reports = federate(grid=Grid).run()
    rows = [(row.partition, row.direction) for row in reports[0].rows]
    ways = ["down"] if name == "none" else ["down", "up"]
    assert rows == [(NOBODY, way) for way in ways] + [(who, way) for who in (0, 1, 2) for way in ("down", "up")]
    assert NOBODY == -1
    assert [(report.num_ok, report.num_failed, report.num_missing) for report in reports[1:]] == [(3, 0, 1)] * 3
    assert all(row.partition in (0, 1, 2) for report in reports[1:] for row in report.rows)
