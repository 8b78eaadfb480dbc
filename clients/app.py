"""The ClientApp: one for all methods, because a plan says everything that differs.

`app` is the one that Flower's runtimes load. It keeps nothing that matters in memory, because a deployed ClientApp is a
new process for every message.
"""

from collections.abc import Callable
from typing import Protocol

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.cohort import Request, delivery_of, failure, needs_reply, train
from clients.machine import LostSetup, Machines, node_of
from clients.replica import Replica
from fedraclora.delivery import Needs, VersionMismatch


class Replicas(Protocol):
    """Where a message finds the replica of its node."""

    def open(self, context: Context, message: Message) -> Replica:
        """Return the replica of the run that a message belongs to. Raises LostSetup where it is unknown."""
        ...

    def forget(self) -> None:
        """Open replicas from disk again when they are next asked for."""
        ...


def client_app(replicas: Replicas) -> ClientApp:
    """Return the app of a machine; a node's config names its `partition-id`."""
    app = ClientApp()

    @app.query("partition")
    def _partition(message: Message, context: Context) -> Message:
        try:
            replica = replicas.open(context, message)
            stated = MetricRecord(
                {"partition-id": partition_of(context), "held": replica.num_kept, "open": replica.open_version}
            )
        except Exception as error:  # noqa: BLE001
            # Whatever keeps this machine from taking part, its server must hear why before any training starts.
            return failure(message, error)
        return Message(RecordDict({"partition": stated}), reply_to=message)

    @app.query("links")
    def _links(message: Message, context: Context) -> Message:
        return _answer(replicas, context, message, lambda replica: take_links(replica, message))

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        return _answer(replicas, context, message, lambda replica: _train_alone(replica, context, message))

    return app


def _answer(replicas: Replicas, context: Context, message: Message, act: Callable[[Replica], Message]) -> Message:
    """Return what `act` replies, or what this machine needs before it can."""
    try:
        reply = act(replicas.open(context, message))
    except LostSetup as error:
        return needs_reply(message, Needs(), str(error), setup=True)
    except Exception as error:  # noqa: BLE001
        # As an error reply of ours it carries the reason; Flower's own would wrap it in a traceback.
        return failure(message, error)
    if reply.has_content() and "needs" in reply.content.config_records:
        # What is in memory may be spoilt; what is on disk is not.
        replicas.forget()
    return reply


def _train_alone(replica: Replica, context: Context, message: Message) -> Message:
    return train(replica, [Request(partition_of(context), message)])[0]


def take_links(replica: Replica, message: Message) -> Message:
    """Take in the links that came for a client which does not train this round, and reply how many it now holds."""
    try:
        replica.receive([delivery_of(message)])
    except VersionMismatch as error:
        return failure(message, error)
    return Message(RecordDict({"reply": ConfigRecord({"held": replica.num_kept})}), reply_to=message)


def partition_of(context: Context) -> int:
    """Return the partition that a node owns. Raises ValueError where its config names none."""
    return node_of(context).partition


app = client_app(Machines())
