"""A Flower Grid in this process: no Ray, no sockets, no serialisation, and the whole cohort trained in one pass.

Train messages of one push become one cohort; every other message goes to the ClientApp, client by client. As in
Flower, a client that fails answers with an error, keeps its state, and leaves the others alone; replies come in the
order of the messages. Differs from Flower: timeouts and message lifetimes are not modelled; a push is answered at once,
and what gets no reply is answered as Flower answers for a message whose time is over.

Where clients have devices (`experiments/devices.py`), time is simulated beside all this, and decides whose reply the
server sees. A client that drops out or is late was sent its message, which the ledger charges, has trained and keeps
its candidate state; its reply does not come, and is not charged. A client that cannot be reached in a round stays
listed: it is away and not replaced, so the strategy leaves it out of the round (which costs nothing) and need not be
introduced to it again.

This file and `strategies/wire.py` are the only ones that use private names of Flower: a `Message` can be made only
where a process-wide task identity is set, so one grid can be in use at a time.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from clients.app import client_app, partition_of
from clients.cohort import Request, train
from clients.replica import Replica
from clients.state_store import ClientStore
from experiments.devices import Timeline, timeline_of
from experiments.problem import Problem
from experiments.recorder import Recorder
from experiments.server import Watcher, serve
from experiments.settings import Settings
from strategies.wire import record_bytes

RUN_ID, SERVER_NODE, TASK_ID = 1, 1, 1
# Flower's code for a message whose reply will not come.
NO_REPLY = 3

Fault = Callable[[int, Message], Message | None]


@dataclass
class Config:
    """The runtime has no settings."""


class InProcess:
    """All clients in this process, on one replica."""

    def run(self, settings: Settings, problem: Problem, folder: Path, watcher: Watcher) -> dict[str, Any]:
        """Run the rounds here; the clients keep their own states beside the chain."""
        timeline = timeline_of(settings)

        def make_grid(problem: Problem, recorder: Recorder) -> "InProcessGrid":
            replica = problem.replica(recorder.replica(), ClientStore(folder / "clients"))
            return InProcessGrid(replica, settings.num_clients, timeline=timeline)

        return serve(settings, problem, folder, watcher, make_grid=make_grid, timeline=timeline)


def build(config: Config) -> InProcess:
    """Return the runtime."""
    del config
    return InProcess()


class Shared:
    """The one replica of all clients, which needs neither a disk nor to be told of the run."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def open(self, context: Context, message: Message) -> Replica:
        """Return the replica."""
        self._replica.advance()
        return self._replica

    def forget(self) -> None:
        """Do nothing: there is no other copy."""


class InProcessGrid(Grid):
    """The clients of partitions `0 .. num_clients - 1`, all on one replica.

    `timeline` simulates time. `fault` is for tests: given a partition and its reply it returns what the server gets to
    see, None for a lost reply.
    """

    def __init__(
        self, replica: Replica, num_clients: int, *, fault: Fault | None = None, timeline: Timeline | None = None
    ) -> None:
        self._replica, self._app, self._fault = replica, client_app(Shared(replica)), fault
        self._timeline = timeline
        self._contexts = {_node_id(partition): _context(partition, num_clients) for partition in range(num_clients)}
        self._inbox: dict[str, Message] = {}
        self._counter = itertools.count()
        self._run = Run.create_empty(RUN_ID)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, TASK_ID

    def set_run(self, run: Run) -> None:
        """Set the run whose messages are sent."""
        self._run = run

    @property
    def run(self) -> Run:
        """Return the run."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes; they depend on the partition alone."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return all nodes."""
        return [NodeInfo(node_id=node) for node in self._contexts]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to one node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver the messages, wait for all replies, and return the messages' ids."""
        batch = list(messages)
        for message in batch:
            message.metadata.__dict__["_message_id"] = self._new_id()
        for message, reply in zip(batch, self._answer(batch), strict=True):
            answer = reply or Message(Error(NO_REPLY, "no reply will come"), reply_to=message)
            answer.metadata.__dict__["_message_id"] = self._new_id()
            self._inbox[message.metadata.message_id] = answer
        return [message.metadata.message_id for message in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to the named messages, each once."""
        return [self._inbox.pop(name) for name in list(message_ids) if name in self._inbox]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the replies to the messages."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, batch: list[Message]) -> list[Message | None]:
        known = [message for message in batch if message.metadata.dst_node_id in self._contexts]
        train_messages = [message for message in known if message.metadata.message_type == MessageType.TRAIN]
        replies = dict(zip(map(id, train_messages), self._train(train_messages), strict=True))
        for message in known:
            if id(message) not in replies:
                replies[id(message)] = self._app(message, self._contexts[message.metadata.dst_node_id])
        return [self._seen(message, replies.get(id(message))) for message in batch]

    def _train(self, messages: list[Message]) -> list[Message]:
        requests = [Request(self._partition(message), message) for message in messages]
        return train(self._replica, requests) if requests else []

    def _seen(self, message: Message, reply: Message | None) -> Message | None:
        if reply is not None and self._timeline is not None and not self._is_in_time(self._timeline, message, reply):
            return None
        if reply is None or self._fault is None or message.metadata.message_type != MessageType.TRAIN:
            return reply
        return self._fault(self._partition(message), reply)

    def _is_in_time(self, timeline: Timeline, message: Message, reply: Message) -> bool:
        return timeline.receives(
            int(message.metadata.group_id),
            self._partition(message),
            down_bytes=sum(record_bytes(message).values()),
            up_bytes=sum(record_bytes(reply).values()),
            steps=_num_steps(reply),
        )

    def _partition(self, message: Message) -> int:
        return partition_of(self._contexts[message.metadata.dst_node_id])

    def _new_id(self) -> str:
        """Return a message id of the length that Flower's have, so that sizes are those of a real message."""
        return hashlib.sha256(str(next(self._counter)).encode()).hexdigest()


def _num_steps(reply: Message) -> int:
    """Return the local steps that a reply states, 0 where it comes of no training."""
    if reply.has_error():
        return 0
    stated: Mapping[str, object] = reply.content.metric_records.get("metrics", {})
    steps = stated.get("num-steps", 0)
    return steps if isinstance(steps, int) else 0


def _context(partition: int, num_clients: int) -> Context:
    config = {"partition-id": partition, "num-partitions": num_clients}
    return Context(run_id=RUN_ID, node_id=_node_id(partition), node_config=config, state=RecordDict(), run_config={})  # type: ignore[arg-type]


def _node_id(partition: int) -> int:
    """Return a 63-bit id, as Flower's are, with the top bits set so that every id takes as many bytes in a message."""
    return int.from_bytes(hashlib.sha256(b"node %d" % partition).digest()[:8], "big") >> 1 | 1 << 62
