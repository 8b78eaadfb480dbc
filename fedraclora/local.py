"""Local training: the steps of one client or of a whole cohort, in one pass.

Every client minimises the mean loss of its own batches over its own trained tensors. The loss that is differentiated
is the sum over clients of each client's mean loss, so the gradients separate exactly and client `c` takes the very
steps that it would take alone. Clients are sorted by the number of their steps; those still training are a prefix of
the stacked tensors, and nothing touches a client that has finished. The cohort is cut into chunks that fit a byte
budget.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np
import torch
from torch import Tensor

from fedraclora.data import Examples, IndexArray
from fedraclora.gradients import GradientRules, add_noise
from fedraclora.layers import CohortModel, Draws
from fedraclora.ledger import MIB
from fedraclora.local_config import LocalConfig
from fedraclora.optim import CohortOptimizer, Member, Moments, clip_by_client
from fedraclora.privacy import noise_generator
from fedraclora.seeding import derive_seed, generator
from fedraclora.tasks import RowLoss


@dataclass(frozen=True)
class LocalClient:
    """One client of a cohort: its rows of the examples, the seed of its batches, and what it brings of its own.

    `seed` is that of the batches' order, and of the masks of dropout.

    `member.own` may hold frozen factors too. `held_out` are rows that it does not train on but is scored on at the end;
    `noise_seed` is that of the noise for the privacy of its examples, None for the operating system's entropy.
    """

    indices: IndexArray
    seed: int
    member: Member = field(default_factory=Member)
    held_out: IndexArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    noise_seed: int | None = None


@dataclass(frozen=True)
class LocalResult:
    """What one client has after its steps: its trained tensors (views), its mean training loss and its moments.

    `num_correct` counts those of its `num_held_out` examples that its own model gets right, None where there is nothing
    to count.
    """

    position: int
    tensors: dict[str, Tensor]
    loss: float
    num_examples: int
    num_steps: int
    moments: Moments
    num_correct: int | None = None
    num_held_out: int = 0


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
    rules: GradientRules = field(default_factory=GradientRules)


def local_batches(
    indices: IndexArray, seed: int, config: LocalConfig, *, is_sampled: bool = False
) -> tuple[IndexArray, IndexArray]:
    """Return a client's batches `[steps, width]` (row numbers, padded with its first row) and their sizes `[steps]`.

    Each pass goes through the client's rows in a fresh random order; its last batch may be smaller. Where `is_sampled`
    each batch is drawn afresh, without replacement and always as large, as accounting for privacy supposes. The order
    depends on the seed and the client's rows alone. Raises ValueError for a client without rows.
    """
    num = len(indices)
    if num == 0:
        raise ValueError("a client has no data to train on")
    width = min(config.batch_size, num)
    per_epoch = ceil(num / width)
    steps = config.num_steps(num)
    order = generator(seed)
    if is_sampled:
        drawn = [order.permutation(num)[:width] for _ in range(steps)]
        return indices[np.stack(drawn)], np.full(steps, width, dtype=np.int64)
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
    is_sampled = trainer.rules.example_clip > 0
    batches = [local_batches(client.indices, client.seed, config, is_sampled=is_sampled) for client in clients]
    by_steps = sorted(range(len(clients)), key=lambda position: (-len(batches[position][1]), position))
    limit = _clients_per_chunk(trainer, start, max((b[0].shape[1] for b in batches), default=1))
    num_chunks = max(1, ceil(len(clients) / limit))
    size = max(1, ceil(len(clients) / num_chunks))  # even chunks: a small last one would pay a whole chunk's overhead
    for first in range(0, len(by_steps), size):
        positions = by_steps[first : first + size]
        chunk = _Chunk.assemble(trainer, [batches[position] for position in positions])
        optimizer = CohortOptimizer(config, start, [clients[position].member for position in positions])
        training = _ChunkTraining(trainer, chunk, optimizer, [clients[position] for position in positions])
        losses = training.run()
        for row, position in enumerate(positions):
            yield LocalResult(
                position=position,
                tensors={key: values[row] for key, values in optimizer.values.items()},
                loss=losses[row],
                num_examples=len(clients[position].indices),
                num_steps=int(chunk.num_steps[row]),
                moments=optimizer.moments_of(row, int(chunk.num_steps[row])),
                num_correct=training.num_correct(row),
                num_held_out=len(clients[position].held_out),
            )


def _clients_per_chunk(trainer: Trainer, start: Mapping[str, Tensor], width: int) -> int:
    """Return how many clients fit the byte budget: activations, their gradients, four copies of what is trained.

    The copies are the value, its gradient and up to two optimiser buffers.
    """
    sample = trainer.examples.inputs
    floats = 3 * width * trainer.model.activation_floats(start, sample)
    floats += 4 * sum(tensor.numel() for tensor in start.values())
    if trainer.rules.example_clip > 0:
        floats += 2 * width * sum(tensor.numel() for tensor in start.values())
    fitting = max(1, trainer.chunk_bytes // (floats * sample.element_size()))
    return min(fitting, trainer.chunk_clients) if trainer.chunk_clients else fitting


@dataclass(frozen=True)
class _Chunk:
    """Row numbers and row weights `[steps, clients, width]`; a row weighs `1 / batch size`, a padded one nothing.

    `sizes` `[steps, clients]` are those of the batches, 0 for a client that has finished.
    """

    rows: Tensor
    weights: Tensor
    sizes: IndexArray
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
            sizes=sizes,
            num_steps=num_steps,
            widths=sizes.max(axis=1),
        )

    def batch(self, step: int, live: int) -> tuple[Tensor, Tensor]:
        """Return the row numbers and weights of one step for the first `live` clients, flat."""
        width = int(self.widths[step])
        return self.rows[step, :live, :width].reshape(-1), self.weights[step, :live, :width].reshape(-1)


class _ChunkTraining:
    """The training of one chunk of a cohort."""

    def __init__(
        self, trainer: Trainer, chunk: _Chunk, optimizer: CohortOptimizer, clients: Sequence[LocalClient]
    ) -> None:
        self.trainer, self.chunk, self.optimizer, self.clients = trainer, chunk, optimizer, clients
        names = dict.fromkeys(key for client in clients for key in client.member.own if key not in optimizer.values)
        # Frozen factors that every client has of its own.
        self._frozen = {key: torch.stack([client.member.own[key] for client in clients]) for key in names}
        self._leaves: dict[str, Tensor] = {}
        self._live = 0
        dropping = clients if trainer.model.has_dropout else []
        # Each client's masks are its own, whoever trains beside it.
        self._masks = [torch.Generator().manual_seed(derive_seed(client.seed, "dropout")) for client in dropping]
        is_noisy = trainer.rules.example_noise > 0
        self._noise = [noise_generator(client.noise_seed) for client in clients] if is_noisy else []

    def run(self) -> list[float]:
        """Take all steps of the chunk and return each client's mean loss over its steps."""
        chunk, examples = self.chunk, self.trainer.examples
        total = torch.zeros(len(chunk.num_steps), dtype=torch.float64)
        # One buffer for all batches: a new one of megabytes each step costs more in page faults than the copy itself.
        buffer = examples.inputs.new_empty(chunk.rows[0].numel(), *examples.inputs.shape[1:])
        take_step = self._private_step if self.trainer.rules.example_clip > 0 else self._step
        for step in range(len(chunk.widths)):
            self._use(int((chunk.num_steps > step).sum()))
            rows, weights = chunk.batch(step, self._live)
            inputs = torch.index_select(examples.inputs, 0, rows, out=buffer[: len(rows)])
            losses = take_step(step, inputs, examples.targets.index_select(0, rows), weights)
            total[: self._live] += losses.view(self._live, -1).sum(1).cpu()
        mean: list[float] = (total / torch.from_numpy(chunk.num_steps)).tolist()
        return mean

    def _use(self, live: int) -> None:
        """Bind the tensors of the clients that still train, which are the first ones."""
        if live != self._live:
            self._live = live
            self._leaves = self.optimizer.live_leaves(live)
            frozen = {key: tensor[:live] for key, tensor in self._frozen.items()}
            self.trainer.model.bind(self._leaves | frozen, num_clients=live)

    def _step(self, step: int, inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Take one step and return the weighted losses of the rows."""
        losses = self.trainer.row_loss(self.trainer.model(inputs, self._draws(step)), targets) * weights
        gradients = torch.autograd.grad(losses.sum(), list(self._leaves.values()))
        self._move(step, gradients)
        return losses.detach()

    def _private_step(self, step: int, inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Take one step of DP-SGD; each example is a member of the cohort for the time of its gradient."""
        rules, width = self.trainer.rules, len(weights) // self._live
        leaves = {key: leaf.detach().repeat_interleave(width, 0).requires_grad_() for key, leaf in self._leaves.items()}
        frozen = {key: tensor[: self._live].repeat_interleave(width, 0) for key, tensor in self._frozen.items()}
        self.trainer.model.bind(leaves | frozen, num_clients=len(weights))
        losses = self.trainer.row_loss(self.trainer.model(inputs, self._draws(step)), targets)
        each = torch.autograd.grad((losses * (weights > 0)).sum(), list(leaves.values()))
        clipped = clip_by_client(each, rules.example_clip)
        sums = [gradient.unflatten(0, (self._live, width)).sum(1) for gradient in clipped]
        if self._noise:
            sums = add_noise(sums, rules.example_noise * rules.example_clip, self._noise)
        # Each row weighs one over its client's batch, whose size is not secret: it is always the same.
        shares = weights.view(self._live, width).amax(1)
        self._move(step, [gradient * shares.view(-1, *[1] * (gradient.ndim - 1)) for gradient in sums])
        return losses.detach() * weights

    def _draws(self, step: int) -> Draws | None:
        """Return where the masks of a step come from; None for a model without dropout."""
        if not self._masks:
            return None
        sizes = self.chunk.sizes[step, : self._live].tolist()
        return Draws(self._masks[: self._live], sizes, int(self.chunk.widths[step]))

    def _move(self, step: int, gradients: Sequence[Tensor]) -> None:
        rules = self.trainer.rules
        named = rules.project(dict(zip(self._leaves, gradients, strict=True)))
        if rules.blocks == 1:
            self.optimizer.step(named)
            return
        mask = rules.block_masks([client.seed for client in self.clients[: self._live]], step, gradients[0])
        self.optimizer.step(named, lambda key, gradient: rules.keep_block(key, gradient, mask))

    @torch.no_grad()
    def num_correct(self, row: int) -> int | None:
        """Return how many of a client's held-out examples its own model gets right; None where it has none."""
        held_out, targets = self.clients[row].held_out, self.trainer.examples.targets
        if not len(held_out) or targets.is_floating_point():
            return None
        own = {key: values[row : row + 1] for key, values in (self.optimizer.values | self._frozen).items()}
        self.trainer.model.bind(own, num_clients=1)
        rows = torch.from_numpy(held_out).to(targets.device)
        outputs = self.trainer.model(self.trainer.examples.inputs.index_select(0, rows))
        return int((outputs.argmax(1) == targets.index_select(0, rows)).sum())
