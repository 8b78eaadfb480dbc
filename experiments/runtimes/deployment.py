"""Flower's deployment runtime: real nodes, on this machine for trying things out, or wherever a SuperLink runs.

Without `superlink` a SuperLink and one SuperNode a client are started on the loopback interface, each node with its
own examples in its own folder, as real clients have them. With it the run is only submitted: the nodes are others'.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.problem import Problem
from experiments.runtimes import flower
from experiments.runtimes.processes import Processes, free_port, program
from experiments.runtimes.superlink import start_superlink
from experiments.server import Watcher, interrupted
from experiments.settings import Settings


@dataclass
class Config:
    """Settings of the deployment.

    superlink: HOST:PORT of a SuperLink that runs already; left out, one is started here with a node for each client.
    root_certificates: the file that proves that SuperLink's certificate; left out, the connection is not encrypted.
    """

    superlink: str | None = None
    root_certificates: str | None = None


@dataclass(frozen=True)
class Security:
    """Certificates of a SuperLink of our own, and by partition the private keys of its nodes; empty: none of it."""

    ca: str = ""
    certificate: str = ""
    key: str = ""
    node_keys: Mapping[int, str] = field(default_factory=dict)

    def superlink_options(self) -> list[str]:
        """Return the SuperLink's options."""
        if not self.ca:
            return ["--insecure"]
        tls = ["--ssl-ca-certfile", self.ca, "--ssl-certfile", self.certificate, "--ssl-keyfile", self.key]
        return [*tls, "--enable-supernode-auth"] if self.node_keys else tls

    def node_options(self, partition: int) -> list[str]:
        """Return a SuperNode's options."""
        if not self.ca:
            return ["--insecure"]
        key = self.node_keys.get(partition)
        return ["--root-certificates", self.ca, *(["--auth-supernode-private-key", key] if key else [])]


@dataclass(frozen=True)
class Deployment:
    """One run over real nodes."""

    config: Config

    def run(self, settings: Settings, problem: Problem, folder: Path, watcher: Watcher) -> dict[str, Any]:
        """Run or continue what the settings describe, in `folder`, and return its summary (empty where it is afar)."""
        with interrupted(settings, problem, folder):
            if self.config.superlink is not None:
                return self._submit_there(settings, folder, watcher)
            with local_superlink(folder / "flower") as nodes:
                data = write_data(problem, folder / "nodes")
                for partition, path in data.items():
                    nodes.start(partition, settings.num_clients, path)
                return submit(nodes.processes, settings, folder, watcher)

    def _submit_there(self, settings: Settings, folder: Path, watcher: Watcher) -> dict[str, Any]:
        assert self.config.superlink is not None
        home = folder / "flower" / "home"
        flower.write_connection(home, flower.Address(self.config.superlink, self.config.root_certificates))
        with Processes(folder / "flower" / "logs", flower.environment(home)) as processes:
            return submit(processes, settings, folder, watcher, stops=True)


def submit(
    processes: Processes, settings: Settings, folder: Path, watcher: Watcher, *, stops: bool = False
) -> dict[str, Any]:
    """Run on a SuperLink that is there, and return the summary; `stops`: an interruption stops the run there, too."""
    run = flower.submit(processes, settings, folder, {})
    try:
        return flower.follow(processes, run, settings, folder, watcher)
    except KeyboardInterrupt:
        if stops:
            flower.stop(processes, run)
        raise


@dataclass(frozen=True)
class Nodes:
    """A SuperLink of our own, and the SuperNodes that connect to it."""

    processes: Processes
    port: int
    security: Security

    def start(self, partition: int, num_partitions: int, folder: Path, options: Sequence[str] | None = None) -> None:
        """Start a partition's SuperNode; `folder` holds its `data` and `replica`."""
        values: dict[str, str | int] = {
            "partition-id": partition,
            "num-partitions": num_partitions,
            "dataset": "files",
            "data-path": str((folder / "data").resolve()),
            "replica-path": str((folder / "replica").resolve()),
        }
        config = " ".join(f"{key}={flower.toml_value(value)}" for key, value in values.items())
        command = [program("flower-supernode"), "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--host", "127.0.0.1", "--port", str(free_port()), "--node-config", config]
        own = self.security.node_options(partition) if options is None else list(options)
        self.processes.start(name_of(partition), [*command, *own])

    def kill(self, partition: int) -> None:
        """Kill a partition's SuperNode and what it runs."""
        self.processes.kill(name_of(partition))


def name_of(partition: int) -> str:
    """Return the name of a partition's node, and of its log and folder."""
    return f"client_{partition:04d}"


@contextmanager
def local_superlink(folder: Path, security: Security | None = None) -> Iterator[Nodes]:
    """Start a SuperLink without nodes on the loopback interface, and end it with all that was started beside it."""
    security, port = security or Security(), free_port()
    certificates = security.ca or None
    with start_superlink(folder, security.superlink_options(), root_certificates=certificates, port=port) as processes:
        yield Nodes(processes, port, security)


def write_data(problem: Problem, folder: Path) -> dict[int, Path]:
    """Write each partition's examples to a folder of its own, as a real client has them, and return the folders."""
    train = problem.dataset.train
    folders: dict[int, Path] = {}
    for partition, rows in enumerate(problem.split.indices):
        folders[partition] = folder / name_of(partition)
        (folders[partition] / "data").mkdir(parents=True, exist_ok=True)
        own = train.select(rows)
        inputs, targets = own.inputs.cpu().numpy(), own.targets.cpu().numpy()
        np.savez(folders[partition] / "data" / "train.npz", inputs=inputs, targets=targets)
    return folders


def build(config: Config) -> Deployment:
    """Return the runtime. Raises ValueError for settings that make no sense."""
    if config.superlink is not None and ":" not in config.superlink:
        raise ValueError(f"runtime.superlink={config.superlink!r} names no port; give HOST:PORT")
    if config.root_certificates is not None and not Path(config.root_certificates).is_file():
        raise ValueError(f"runtime.root_certificates={config.root_certificates} is no file")
    return Deployment(config)
