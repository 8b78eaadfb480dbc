"""The machine that a ClientApp runs on: where its replica lives, where its data are, and what it was told of the run.

A deployed node says so in its node config: `partition-id`, `replica-path` (the folder for replicas), `data-path` (its
own examples), `dataset` (the plug-in that reads them) and `device`. Where a node has no data of its own, as all
virtual clients in a simulation, the run's data set is loaded and split as the server says.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Context, Message

from clients.replica import LocalData, Memory, Replica
from clients.replica_store import ReplicaStore
from clients.state_store import ClientStore
from fedraclora.chain import Chain
from fedraclora.data import check_examples
from fedraclora.files import write_atomically
from fedraclora.plugins import find
from fedraclora.setup import (
    DATASETS,
    Plugin,
    Setup,
    base_weights,
    build_dataset,
    hold_out,
    hold_out_own,
    set_threads,
    split_dataset,
)

# A machine keeps the replicas of this many runs; those used longest ago go first.
KEPT_RUNS = 4
DEFAULT_ROOT = Path.home() / ".fedraclora" / "replicas"


class LostSetup(ValueError):
    """This machine does not know the run: it was never told, or has lost its disk."""


@dataclass(frozen=True)
class Node:
    """What a node's config says of it."""

    partition: int
    replica_path: str
    data_path: str = ""
    dataset: str = ""
    device: str = ""

    @property
    def has_own_data(self) -> bool:
        """Return whether this node trains on its own examples and not on a share of the run's."""
        return bool(self.data_path or self.dataset)


def node_of(context: Context) -> Node:
    """Return what the context says of this node. Raises ValueError where it names no partition."""
    config = context.node_config
    if "partition-id" not in config:
        raise ValueError("this node's config has no partition-id; start it with --node-config 'partition-id=0'")
    root = config.get("replica-path") or context.run_config.get("replica-path") or DEFAULT_ROOT
    texts = {name: str(config.get(name, "")) for name in ("data-path", "dataset", "device")}
    return Node(int(config["partition-id"]), str(root), *texts.values())


class Machines:
    """The replicas of this process; each is opened once, from disk, and forgotten where it turns out spoilt."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str, Node | None], Replica] = {}

    def open(self, context: Context, message: Message) -> Replica:
        """Return this node's replica of the run that a message belongs to, as far as its disk brings it.

        Raises LostSetup where the run is unknown here.
        """
        node, (chain, text) = node_of(context), _stated(message)
        folder = Path(node.replica_path).expanduser() / chain
        text = remember_setup(folder, text)
        # Nodes without data of their own share one replica.
        key = (str(folder), text, node if node.has_own_data else None)
        if key not in self._open:
            # One run at a time: another run's model and data need not stay in memory.
            self._open = {key: open_replica(folder, Setup.from_json(text), node)}
        self._open[key].advance()
        return self._open[key]

    def forget(self) -> None:
        """Open replicas from disk again when they are next asked for."""
        self._open = {}


def _stated(message: Message) -> tuple[str, str]:
    """Return the id of the chain and the text of the setup (empty where there is none) that a message carries."""
    records = message.content.config_records
    setup = records.get("setup")
    chain, text = (records["plan"]["chain"], "") if setup is None else (setup["chain"], setup["text"])
    if not re.fullmatch("[0-9a-f]{32}", str(chain)):
        # It becomes the name of a folder.
        raise ValueError(f"a message names the run {chain!r}; 32 hexadecimal digits are right")
    return str(chain), str(text)


def remember_setup(folder: Path, text: str) -> str:
    """Write the setup that came with a message, or return the one that is known. Raises LostSetup without any."""
    path = folder / "setup.json"
    if text and not (path.exists() and path.read_text() == text):
        _make_room(folder)
        write_atomically(path, text.encode())
    if not path.exists():
        raise LostSetup(f"this machine does not know the run {folder.name[:12]}")
    return path.read_text()


def _make_room(folder: Path) -> None:
    known = [path for path in folder.parent.glob("*/setup.json") if path.parent != folder]
    for path in sorted(known, key=lambda path: path.stat().st_mtime)[: -KEPT_RUNS + 1 or None]:
        shutil.rmtree(path.parent, ignore_errors=True)


def open_replica(folder: Path, setup: Setup, node: Node) -> Replica:
    """Return a node's replica as its disk holds it. Raises ValueError where its data do not fit the run."""
    set_threads(setup)
    model = setup.initial_model()
    chain = Chain.start(base_weights(model))
    if chain.hash != setup.base:
        # Another PyTorch draws other weights, and a run may start from given ones: the server sends everything, once.
        chain.num_links, chain.hash = -1, ""
    memory = Memory(setup.chunk_bytes, setup.chunk_clients)
    store = ClientStore(folder / "clients")
    model = model.to(node.device or setup.device)
    return Replica(model, local_data(setup, node), chain, store, memory, ReplicaStore(folder))


def local_data(setup: Setup, node: Node) -> LocalData:
    """Return the examples of this machine: the node's own, or the run's data set with its partitions."""
    device, dtype = node.device or setup.device, setup.model.torch_dtype
    if not node.has_own_data:
        dataset = hold_out(build_dataset(setup.dataset), setup.dataset, validation=setup.validation)
        split = split_dataset(setup.partition, dataset, num_clients=setup.num_clients)
        rows, held_out = hold_out_own(dataset.train, dict(enumerate(split.indices)), setup)
        return LocalData(dataset.train.to(device=device, dtype=dtype), rows, setup.task, held_out)
    plugin = own_dataset(setup, node)
    train = build_dataset(plugin).train
    where = f"{node.data_path or plugin.name} of client {node.partition}"
    check_examples(train, f"{where}: the targets", setup.task, setup.model.num_outputs)
    if tuple(train.inputs.shape[1:]) != setup.model.input_shape:
        found, right = tuple(train.inputs.shape[1:]), setup.model.input_shape
        raise ValueError(f"{where}: an input has the shape {found}, the run's model takes {right}")
    rows, held_out = hold_out_own(train, {node.partition: np.arange(len(train), dtype=np.int64)}, setup)
    return LocalData(train.to(device=device, dtype=dtype), rows, setup.task, held_out)


def own_dataset(setup: Setup, node: Node) -> Plugin:
    """Return the plug-in that reads a node's own data.

    That is the one that the node names, else the run's own where it has a setting `path`, else `files`. The run's
    settings of the same plug-in are kept; `path` is the node's.
    """
    known = hasattr(find(DATASETS, setup.dataset.name).Config(), "path")
    name = node.dataset or (setup.dataset.name if known else "files")
    config = dict(setup.dataset.config) if name == setup.dataset.name else dict(vars(find(DATASETS, name).Config()))
    return Plugin(name, config | ({"path": node.data_path} if node.data_path else {}), setup.dataset.seed)
