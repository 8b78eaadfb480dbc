"""The ClientApp: one for all methods, because a plan says everything that differs."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.cohort import Request, train
from clients.replica import Replica


def client_app(replica: Replica) -> ClientApp:
    """Return the app of a machine whose clients share `replica`; a node's config names its `partition-id`."""
    app = ClientApp()

    @app.query("partition")
    def _partition(message: Message, context: Context) -> Message:
        partition = MetricRecord({"partition-id": partition_of(context)})
        return Message(RecordDict({"partition": partition}), reply_to=message)

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        return train(replica, [Request(partition_of(context), message)])[0]

    return app


def partition_of(context: Context) -> int:
    """Return the partition that a node owns. Raises ValueError where its config names none."""
    if "partition-id" not in context.node_config:
        raise ValueError("this node's config has no partition-id; start it with --node-config 'partition-id=0'")
    return int(context.node_config["partition-id"])
