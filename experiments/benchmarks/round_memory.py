"""The memory and the overhead of a large round: every client of a big federation takes part, with six examples each.

A fresh process holds the data and the model, then runs the real strategy, messages, ledger and clients over the
in-process runtime. What it needs at its peak above data and model grows with the clients only by their messages; what
it takes longer than the training alone is the price of the messages, the byte counts and the checks.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from clients.replica import LocalData, Replica
from experiments.benchmarks.engines import HIDDEN, INPUT_SHAPE, NUM_CLASSES
from experiments.runtimes.in_process import InProcessGrid
from fedraclora.chain import Chain
from fedraclora.data import Examples
from fedraclora.local import LocalClient, train_cohort
from fedraclora.local_config import LocalConfig
from fedraclora.models import mlp
from fedraclora.plan import RoundPlan
from fedraclora.seeding import derive_seed
from fedraclora.targets import find_targets
from strategies import rac_lora
from strategies.base import ChainStrategy
from strategies.method import Adapter
from strategies.rounds import RoundSettings

ROWS_PER_CLIENT, RANK, ROUNDS = 6, 4, 2
LOCAL = LocalConfig(steps=2, batch_size=ROWS_PER_CLIENT)
MIB_IN_KIB = 2**10

Figures = dict[str, float]


def measure_memory(num_clients: int) -> Figures:
    """Return the figures of a round with that many clients, measured in a process of its own (Linux only)."""
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.round_memory",
        str(num_clients),
        str(torch.get_num_threads()),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    figures: Figures = json.loads(done.stdout)
    return figures


def run_rounds(num_clients: int) -> Figures:
    """Return the peak memory of `ROUNDS` rounds in this process, and the CPU seconds of the last one."""
    replica, strategy = _federation(num_clients)
    before = _reset_peak_kib()
    grid = InProcessGrid(replica, num_clients)
    ticks = [(time.process_time(), report) for report in strategy.rounds(grid, ROUNDS)]
    peak = _status_kib("VmHWM") - before
    (began, _), (ended, last) = ticks[-2:]
    assert last.num_ok == num_clients
    training = _training_seconds(replica, strategy)
    return {
        "clients": num_clients,
        "peak MiB above data and model": peak / MIB_IN_KIB,
        "CPU s a round": ended - began,
        "CPU s of its training": training,
        "overhead us a client": 1e6 * (ended - began - training) / num_clients,
    }


def _federation(num_clients: int) -> tuple[Replica, ChainStrategy]:
    """Return the clients' replica and the server of an MLP on random inputs of MNIST's shape."""
    torch.manual_seed(0)
    rows = num_clients * ROWS_PER_CLIENT
    examples = Examples(torch.randn(rows, *INPUT_SHAPE), torch.randint(NUM_CLASSES, (rows,)))
    model = mlp.build(mlp.Config(hidden=HIDDEN), input_shape=INPUT_SHAPE, num_outputs=NUM_CLASSES)
    owned = torch.arange(rows).reshape(num_clients, -1).numpy()
    replica = Replica(
        model, LocalData(examples, dict(enumerate(owned)), "classification"), Chain.start(model.state_dict())
    )
    shapes = find_targets(model, "all")
    adapter = Adapter(
        shapes=shapes,
        ranks=dict.fromkeys(shapes, RANK),
        scales=dict.fromkeys(shapes, 1.0),
        dense=(),
        parameters=tuple(model.state_dict()),
        law="orthonormal",
        seed=0,
    )
    settings = RoundSettings(num_clients=num_clients, fraction=1.0, local=LOCAL, seed=0)
    method = rac_lora.build(rac_lora.Config(), adapter)
    return replica, ChainStrategy(method, Chain.start(model.state_dict()), settings)


def _training_seconds(replica: Replica, strategy: ChainStrategy) -> float:
    """Return the CPU seconds of the same clients' training without anything around it."""
    plan = RoundPlan(round=ROUNDS, training=strategy.method.trains(ROUNDS, replica.link), local=LOCAL)
    trainer, start = replica.prepare(plan)
    owned = replica.data.partitions.items()
    clients = [LocalClient(rows, derive_seed(0, "client", partition)) for partition, rows in owned]
    began = time.process_time()
    _exhaust(train_cohort(trainer, start, clients, LOCAL))
    return time.process_time() - began


def _exhaust(results: Iterable[object]) -> None:
    for _ in results:
        pass


def _reset_peak_kib() -> int:
    """Let the peak count from now on, and return the memory in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_kib("VmRSS")


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    sys.stdout.write(json.dumps(run_rounds(int(sys.argv[1]))))
