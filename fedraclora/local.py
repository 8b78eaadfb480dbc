"""Local training: the steps of one client or of a whole cohort, in one pass.

Every client minimises the mean loss of its own batches over its own trained tensors. The loss that is differentiated
is the sum over clients of each client's mean loss, so the gradients separate exactly and client `c` takes the very
steps that it would take alone. Clients are sorted by the number of their steps; those still training are a prefix of
the stacked tensors, and nothing touches a client that has finished. The cohort is cut into chunks that fit a byte
budget.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from fedraclora.data import Examples, IndexArray
from fedraclora.layers import CohortModel
from fedraclora.ledger import MIB
from fedraclora.local_config import LocalConfig
from fedraclora.optim import CohortOptimizer, Moments
from fedraclora.seeding import generator
from fedraclora.tasks import RowLoss


@dataclass(frozen=True)
class LocalClient:
    """One client of a cohort: its rows of the examples, the seed of its batch order, and moments to start from."""

    indices: IndexArray
    seed: int
    moments: Moments | None = None


@dataclass(frozen=True)
class LocalResult:
    """What one client has after its steps: its trained tensors (views), its mean training loss and its moments."""

    position: int
    tensors: dict[str, Tensor]
    loss: float
    num_examples: int
    num_steps: int
    moments: Moments


@dataclass(frozen=True)
class Trainer:
    """What all cohorts of a process share.

    `chunk_clients` limits a chunk's clients (0: the byte budget alone decides).
    """

    model: CohortModel
    examples: Examples
    row_loss: RowLoss
    chunk_bytes: int = 64 * MIB
    chunk_clients: int = 0


def local_batches(indices: IndexArray, seed: int, config: LocalConfig) -> tuple[IndexArray, IndexArray]:
    """Return a client's batches `[steps, width]` (row numbers, padded with its first row) and their sizes `[steps]`.

    Each pass goes through the client's rows in a fresh random order; its last batch may be smaller. The order depends
    on the seed and the client's rows alone. Raises ValueError for a client without rows.
    """
    num = len(indices)
    if num == 0:
        raise ValueError("a client has no data to train on")
    width = min(config.batch_size, num)
    per_epoch = ceil(num / width)
    steps = config.steps or config.epochs * per_epoch
    order = generator(seed)
    padded = np.zeros((ceil(steps / per_epoch), per_epoch * width), dtype=np.int64)
    for epoch in padded:
        epoch[:num] = order.permutation(num)
    sizes = np.full(per_epoch, width, dtype=np.int64)
    sizes[-1] = num - (per_epoch - 1) * width
    return indices[padded.reshape(-1, width)[:steps]], np.tile(sizes, len(padded))[:steps]


def train_cohort(
    trainer: Trainer, start: Mapping[str, Tensor], clients: Sequence[LocalClient], config: LocalConfig
) -> Iterator[LocalResult]:
    """Train every client from the same `start` tensors and yield their results, in the order of the chunks.

    `start` maps keys of the cohort model (`fc1.lora_b`, `fc1.bias`) to the values where training begins; frozen
    weights and factors must be loaded and bound before. A result's `position` is the client's place in `clients`.
    """
    batches = [local_batches(client.indices, client.seed, config) for client in clients]
    by_steps = sorted(range(len(clients)), key=lambda position: (-len(batches[position][1]), position))
    limit = _clients_per_chunk(trainer, start, max((b[0].shape[1] for b in batches), default=1))
    num_chunks = max(1, ceil(len(clients) / limit))
    size = max(1, ceil(len(clients) / num_chunks))  # even chunks: a small last one would pay a whole chunk's overhead
    for first in range(0, len(by_steps), size):
        positions = by_steps[first : first + size]
        chunk = _Chunk.assemble(trainer, [batches[position] for position in positions])
        optimizer = CohortOptimizer(config, start, [clients[position].moments for position in positions])
        losses = _train_chunk(trainer, chunk, optimizer)
        for row, position in enumerate(positions):
            yield LocalResult(
                position=position,
                tensors={key: values[row] for key, values in optimizer.values.items()},
                loss=losses[row],
                num_examples=len(clients[position].indices),
                num_steps=int(chunk.num_steps[row]),
                moments=optimizer.moments_of(row, int(chunk.num_steps[row])),
            )


def _clients_per_chunk(trainer: Trainer, start: Mapping[str, Tensor], width: int) -> int:
    """Return how many clients fit the byte budget: activations, their gradients, four copies of what is trained.

    The copies are the value, its gradient and up to two optimiser buffers.
    """
    sample = trainer.examples.inputs
    floats = 3 * width * trainer.model.activation_floats(start, sample)
    floats += 4 * sum(tensor.numel() for tensor in start.values())
    fitting = max(1, trainer.chunk_bytes // (floats * sample.element_size()))
    return min(fitting, trainer.chunk_clients) if trainer.chunk_clients else fitting


@dataclass(frozen=True)
class _Chunk:
    """Row numbers and row weights `[steps, clients, width]`; a row weighs `1 / batch size`, a padded one nothing."""

    rows: Tensor
    weights: Tensor
    num_steps: IndexArray
    widths: IndexArray

    @staticmethod
    def assemble(trainer: Trainer, batches: Sequence[tuple[IndexArray, IndexArray]]) -> "_Chunk":
        num_steps = np.array([len(sizes) for _, sizes in batches])
        shape = (int(num_steps.max()), len(batches), max(rows.shape[1] for rows, _ in batches))
        rows, sizes = np.zeros(shape, dtype=np.int64), np.zeros(shape[:2], dtype=np.int64)
        for client, (own_rows, own_sizes) in enumerate(batches):
            rows[: len(own_sizes), client, : own_rows.shape[1]] = own_rows
            rows[: len(own_sizes), client, own_rows.shape[1] :] = own_rows[0, 0]
            sizes[: len(own_sizes), client] = own_sizes
        inputs = trainer.examples.inputs
        is_real = np.arange(shape[2]) < sizes[..., None]
        weights = is_real / np.maximum(sizes, 1)[..., None]
        return _Chunk(
            rows=torch.from_numpy(rows).to(inputs.device),
            weights=torch.from_numpy(weights).to(inputs),
            num_steps=num_steps,
            widths=sizes.max(axis=1),
        )

    def batch(self, step: int, live: int) -> tuple[Tensor, Tensor]:
        """Return the row numbers and weights of one step for the first `live` clients, flat."""
        width = int(self.widths[step])
        return self.rows[step, :live, :width].reshape(-1), self.weights[step, :live, :width].reshape(-1)


def _train_chunk(trainer: Trainer, chunk: _Chunk, optimizer: CohortOptimizer) -> list[float]:
    """Take all steps of a chunk and return each client's mean loss over its steps."""
    total = torch.zeros(len(chunk.num_steps), dtype=torch.float64)
    examples, live, leaves = trainer.examples, 0, {}
    # One buffer for all batches: a new one of megabytes each step costs more in page faults than the copy itself.
    buffer = examples.inputs.new_empty(chunk.rows[0].numel(), *examples.inputs.shape[1:])
    for step in range(len(chunk.widths)):
        still_training = int((chunk.num_steps > step).sum())
        if still_training != live:
            live = still_training
            leaves = optimizer.live_leaves(live)
            trainer.model.bind(leaves, num_clients=live)
        rows, weights = chunk.batch(step, live)
        outputs = trainer.model(torch.index_select(examples.inputs, 0, rows, out=buffer[: len(rows)]))
        losses = trainer.row_loss(outputs, examples.targets.index_select(0, rows)) * weights
        optimizer.step(torch.autograd.grad(losses.sum(), list(leaves.values())))
        total[:live] += losses.detach().view(live, -1).sum(1).cpu()
    mean: list[float] = (total / torch.from_numpy(chunk.num_steps)).tolist()
    return mean
