"""What several tests build: settings of a tiny run, the federation of such settings, and grids that watch or meddle."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType

from clients.app import client_app
from clients.cohort import Request, train
from clients.machine import Machines
from clients.replica import Replica
from clients.state_store import ClientStore
from experiments.groups import configure
from experiments.problem import Problem, prepare
from experiments.runtimes.in_process import Fault, InProcessGrid
from experiments.settings import CompareSettings, Settings
from fedraclora.chain import Chain
from fedraclora.ledger import MIB
from fedraclora.link import materialize
from fedraclora.payload import digest_arrays, unflatten
from fedraclora.plugins import names
from strategies.base import ChainStrategy
from strategies.rounds import RoundReport

METHODS = names("strategies")
TINY = {
    "dataset": "digits",
    "model": ("mlp", {"hidden": [12]}),
    "partition": "dirichlet",
    "method": "rac_lora",
    "runtime": "in_process",
    "uplink": "none",
    "downlink": "none",
    "num_clients": 6,
    "fraction": 0.5,
    "rounds": 3,
    "rank": 2,
    "local_steps": 3,
    "batch_size": 8,
    "threads": 1,
    "connect_s": 0.05,
}
GROUPS = ("method", "model", "dataset", "partition", "runtime", "uplink", "downlink")
# What a method cannot do without: its model is scored on the clients.
NEEDED = {"fed_sa_lora": {"personal_fraction": 0.2}}
Weights = dict[str, torch.Tensor]


def settings(kind: type[Settings] = Settings, **changes: Any) -> Any:
    """Return the settings of a tiny run; a plug-in is a name or a pair of a name and its own settings."""
    method = changes.get("method", TINY["method"])
    needed = NEEDED.get(method if isinstance(method, str) else method[0], {})
    values = {**TINY, **needed, **changes}
    for group in GROUPS:
        chosen = values[group]
        name, own = chosen if isinstance(chosen, tuple) else (chosen, {})
        values[group] = configure(group, name, own)
    unknown = values.keys() - {item.name for item in fields(kind)}
    assert not unknown, unknown
    return kind(**values)


def compare_settings(**changes: Any) -> CompareSettings:
    return settings(CompareSettings, **changes)


def shared_data(name: str) -> Path:
    """Return a file of the shared test data; where it is not, the test is skipped, or fails where it has to be."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    file = Path(os.environ.get("FEDRACLORA_SHARED_DATA", default)) / name
    if not file.is_file():
        reason = f"{name} is not at {file}; set FEDRACLORA_SHARED_DATA to its folder"
        (pytest.fail if os.environ.get("FEDRACLORA_REQUIRE_SHARED_DATA") else pytest.skip)(reason)
    return file


class Silent:
    """A watcher that keeps the rows it is shown."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_round(self, row, num_rounds):
        self.rows.append(row)


class RecordingGrid(InProcessGrid):
    """Keeps the train messages and what the server saw of the replies, in order."""

    def __init__(self, replica: Replica, num_clients: int, *, fault: Fault | None = None) -> None:
        super().__init__(replica, num_clients, fault=fault)
        self.seen: list[tuple[str, int, Message]] = []

    def _answer(self, batch):
        replies = super()._answer(batch)
        for message, reply in zip(batch, replies, strict=True):
            self.seen.append(("down", self._partition(message), message))
            if reply is not None:
                self.seen.append(("up", self._partition(message), reply))
        return replies


class OneByOneGrid(InProcessGrid):
    """Hands every train message to the ClientApp by itself, as a real node does."""

    def _train(self, messages):
        return [self._app(message, self._contexts[message.metadata.dst_node_id]) for message in messages]


class AppsGrid(InProcessGrid):
    """Clients with a replica and a store each, as on machines of their own."""

    def __init__(self, problem: Problem, chosen: Settings) -> None:
        problem = on_machine(problem, chosen)
        self.replicas = [problem.replica(problem.new_chain(), ClientStore()) for _ in range(chosen.num_clients)]
        super().__init__(self.replicas[0], chosen.num_clients)

    def _train(self, messages):
        parts = [self._partition(message) for message in messages]
        return [
            train(self.replicas[part], [Request(part, message)])[0]
            for part, message in zip(parts, messages, strict=True)
        ]


class NodesGrid(RecordingGrid):
    """Clients as on real nodes: each has its own disk below `folder`, and a new process for every message.

    `trouble(partition, message, disk)` is called before a client sees a message; what it raises ends that process.
    """

    folder: Path
    trouble: Callable[[int, Message, Path], None] | None = None

    def __init__(self, replica: Replica, num_clients: int, *, fault: Fault | None = None) -> None:
        super().__init__(replica, num_clients, fault=fault)
        for context in self._contexts.values():
            partition = context.node_config["partition-id"]
            own = {"replica-path": str(self.folder / f"disk_{partition}"), "dataset": "files"}
            context.node_config |= {**own, "data-path": str(self.folder / f"data_{partition}.npz")}
            held_out = replica.data.held_out.get(partition, np.zeros(0, dtype=np.int64))
            mine = replica.data.examples.select(np.union1d(replica.data.partitions[partition], held_out))
            self.folder.mkdir(exist_ok=True)
            np.savez(context.node_config["data-path"], inputs=mine.inputs.numpy(), targets=mine.targets.numpy())
        self._app = self._new_process

    def _new_process(self, message, context):
        partition = context.node_config["partition-id"]
        try:
            if self.trouble is not None:
                self.trouble(partition, message, Path(context.node_config["replica-path"]))
            return client_app(Machines())(message, context)
        except ProcessDied as error:
            return Message(Error(8, str(error)), reply_to=message)

    def _train(self, messages):
        return [self._app(message, self._contexts[message.metadata.dst_node_id]) for message in messages]


class ProcessDied(Exception):
    """A client's process is gone; Flower answers for it."""


def nodes_grid(where: Path, trouble: Callable[[int, Message, Path], None] | None = None) -> type[NodesGrid]:
    """Return a NodesGrid over disks in `where`."""
    call = None if trouble is None else staticmethod(trouble)
    return type("Grid", (NodesGrid,), {"folder": where, "trouble": call})


@dataclass
class Federation:
    """A problem with its server and its clients, before the first round."""

    settings: Settings
    problem: Problem
    replica: Replica
    grid: InProcessGrid
    strategy: ChainStrategy

    @property
    def chain(self) -> Chain:
        return self.strategy.chain

    def run(self, num_rounds: int | None = None) -> list[RoundReport]:
        return list(self.strategy.rounds(self.grid, num_rounds or self.settings.rounds))

    def iterate(self, num_rounds: int | None = None) -> Iterator[RoundReport]:
        return self.strategy.rounds(self.grid, num_rounds or self.settings.rounds)


def federation(
    chosen: Settings,
    *,
    grid: type[InProcessGrid] = RecordingGrid,
    fault: Fault | None = None,
    folder: Path | None = None,
    problem: Problem | None = None,
) -> Federation:
    """Return the federation of some settings; `fault` tampers with replies as in `InProcessGrid`.

    `problem` saves the time to prepare one where another federation has the same, machine settings aside.
    """
    problem = problem or prepare(chosen)
    replica = on_machine(problem, chosen).replica(problem.new_chain(), ClientStore(folder))
    clients = grid(replica, chosen.num_clients, fault=fault)
    strategy = ChainStrategy(problem.method, problem.new_chain(), problem.rounds, setup=problem.setup.to_json())
    return Federation(chosen, problem, replica, clients, strategy)


def on_machine(problem: Problem, chosen: Settings) -> Problem:
    """Return a problem that was prepared with other settings of the machine as these settings would have it."""
    limits = {"chunk_bytes": int(chosen.chunk_mib * MIB), "chunk_clients": 1 if chosen.exact else 0}
    return replace(problem, setup=replace(problem.setup, **limits))


def final_weights(chosen: Settings, **options: Any) -> Weights:
    """Return the merged weights after all rounds."""
    parts = federation(chosen, **options)
    parts.run()
    return parts.chain.weights()


def relative_distance(found: Weights, expected: Weights) -> float:
    """Return the Frobenius norm of the difference of two models over that of the expected one."""
    assert found.keys() == expected.keys()
    gap = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (gap / sum(float(tensor.double().square().sum()) for tensor in expected.values())) ** 0.5


def edit_array(reply: Message, change, kind: str | None = None) -> Message:
    """Return the reply with one of its arrays replaced by `change(array)`."""
    name = kind or next(iter(reply.content.array_records))
    values = reply.content.array_records[name]["flat"].numpy().copy()
    reply.content[name] = ArrayRecord({"flat": Array(change(values))})
    return state_arrays(reply)


def state_arrays(reply: Message) -> Message:
    """Return the reply with the digest of its arrays as they are now, as a client that lies would send it."""
    arrays = {
        kind: {n: array.numpy() for n, array in record.items()} for kind, record in reply.content.array_records.items()
    }
    reply.content["reply"] = ConfigRecord({**reply.content.config_records["reply"], "arrays": digest_arrays(arrays)})
    return reply


def put(value: float):
    """Return a change of an array, for `edit_array`: one of its numbers becomes `value`."""

    def change(values: np.ndarray) -> np.ndarray:
        values[len(values) // 2] = value
        return values

    return change


def spoil(change, partition: int, only_round: int = 2) -> Fault:
    """Return a fault that hits one client in one round."""

    def fault(who: int, reply: Message) -> Message | None:
        is_hit = who == partition and reply.metadata.group_id == str(only_round)
        return change(reply) if is_hit else reply

    return fault


def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs draw no figure of their labels, which takes half the time of a tiny one."""
    monkeypatch.setattr("experiments.server.label_distribution_figure", lambda counts: None)
    monkeypatch.setattr("experiments.server.save_png", lambda figure, path: None)


def plug_in(monkeypatch: pytest.MonkeyPatch, name: str, config: type, build) -> str:
    """Make a plug-in that exists for one test only, and return the dotted path that leads to it."""
    module = ModuleType(f"made_up.{name}")
    vars(module).update(Config=dataclass(config), build=build)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def error_reply(reply: Message, code: int = 2) -> Message:
    """Return the reply that Flower makes where a client's program raised (2) or its process died (8)."""
    return Message(Error(code, "the client's program failed"), reply_to=_question(reply))


def _question(reply: Message) -> Message:
    """Return a message that `reply` could be the answer to."""
    question = Message(reply.content, reply.metadata.src_node_id, MessageType.TRAIN, group_id=reply.metadata.group_id)
    question.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return question


def same_weights(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def serialised_size(message: Message) -> int:
    """Return a message's bytes by Flower's own serialisation: its objects, its envelope, and the tree of names."""
    from flwr.app.message.message import remove_content_from_message
    from flwr.common.serde import message_to_proto  # noqa: TID251 - the reference that the project's count is held to
    from flwr.supercore.inflatable.inflatable_object import get_object_tree  # noqa: TID251 - likewise

    objects = sum(len(item.deflate()) for item in _nested(message))
    return (
        objects
        + message_to_proto(remove_content_from_message(message)).ByteSize()
        + get_object_tree(message).ByteSize()
    )


def _nested(item: Any) -> Iterator[Any]:
    yield item
    for child in (item.children or {}).values():
        yield from _nested(child)


FOUR_CLIENTS = settings(fraction=1.0, num_clients=4, rounds=3)


@cache
def four_clients_problem():
    return prepare(FOUR_CLIENTS)


def federate(**options):
    """Return a federation of four clients that all take part in three rounds of rac_lora."""
    return federation(FOUR_CLIENTS, problem=four_clients_problem(), **options)


def merged_over(parts, used):
    """Return the weights that the used replies of each round (1, 2, ...) imply, computed here from the messages.

    `used` maps a round to its clients; each round of rac_lora closes a link.
    """
    weights = {name: tensor.double() for name, tensor in parts.problem.new_chain().weights().items()}
    sizes = [len(rows) for rows in parts.problem.split.indices]
    links = iter(parts.chain.links)
    for round, clients in used.items():
        link = next(links)
        shapes = [tuple(term.lora_b.shape) for term in link.terms]
        replies = {
            part: unflatten(reply.content.array_records["update"]["flat"].numpy(), shapes)
            for way, part, reply in parts.grid.seen
            if way == "up" and reply.metadata.group_id == str(round) and part in clients and _is_trained(reply)
        }
        for place, term in enumerate(link.terms):
            total = sum(sizes[part] for part in clients)
            mean = sum(sizes[part] / total * replies[part][place].double() for part in clients)
            drawn = materialize(term.lora_a, parts.chain.merged[term.target]).double()
            weights[term.target] += term.scale * mean @ drawn
    return weights


def assert_close(found, expected):
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)


def _is_trained(reply: Message) -> bool:
    return not reply.has_error() and "update" in reply.content.array_records
