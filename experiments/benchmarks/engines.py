"""Four ways to do the local training of one round, on the same clients, weights, factors and batches.

`cohort` is this project's engine through its public function; `reused` is a loop over clients that resets one module,
as a fast simulator does; `copied` is the same loop with a deep copy of the model for each client. `floor` trains
nothing: it is the products with the frozen weights alone (forward, and the input gradients of all layers but the
first), for the rows of the whole cohort.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedraclora import sketch
from fedraclora.data import Examples
from fedraclora.layers import CohortModel
from fedraclora.local import LocalClient, Trainer, local_batches, train_cohort
from fedraclora.local_config import LocalConfig
from fedraclora.models import mlp
from fedraclora.seeding import derive_seed, generator
from fedraclora.sketch import SketchKey
from fedraclora.targets import MatrixShape, find_targets
from fedraclora.tasks import row_loss

INPUT_SHAPE, NUM_CLASSES, HIDDEN = (28, 28), 10, [200, 200]

Factors = dict[str, Tensor]
Engine = Callable[[], list[Factors] | None]


@dataclass(frozen=True)
class Workload:
    """One round: `clients` take `steps` steps of plain SGD on batches of `batch` rows, each row seen once."""

    clients: int = 100
    steps: int = 5
    batch: int = 32
    rank: int = 4
    seed: int = 0

    @property
    def local(self) -> LocalConfig:
        """Return how each client trains."""
        return LocalConfig(lr=0.1, steps=self.steps, batch_size=self.batch)


class LoraLinear(nn.Module):
    """`y = x W^T + b + x A^T B^T` for one client: what a loop over clients trains; the scale is 1."""

    def __init__(self, frozen: nn.Linear, lora_a: Tensor) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.register_buffer("lora_a", lora_a)
        self.lora_b = nn.Parameter(lora_a.new_zeros(frozen.out_features, len(lora_a)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs `[batch, out]` of inputs `[batch, in]`."""
        assert isinstance(self.lora_a, Tensor)
        y: Tensor = self.frozen(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)
        return y


class Bench:
    """A workload made concrete: synthetic examples of MNIST's shape, an MLP adapted in every layer, and its engines."""

    def __init__(self, workload: Workload) -> None:
        torch.manual_seed(workload.seed)
        self.workload = workload
        self.model = mlp.build(mlp.Config(hidden=HIDDEN), input_shape=INPUT_SHAPE, num_outputs=NUM_CLASSES)
        shapes = find_targets(self.model, "all")
        self.lora_a = {layer: _drawn(workload, layer, shape) for layer, shape in shapes.items()}
        rows = workload.clients * workload.steps * workload.batch
        self.examples = Examples(torch.randn(rows, *INPUT_SHAPE), torch.randint(NUM_CLASSES, (rows,)))
        shuffled = generator(workload.seed).permutation(rows).reshape(workload.clients, -1)
        self.clients = [LocalClient(own, derive_seed(workload.seed, place)) for place, own in enumerate(shuffled)]
        self.start = {f"{layer}.lora_b": torch.zeros(shape.out, workload.rank) for layer, shape in shapes.items()}

    def engines(self) -> dict[str, Engine]:
        """Return the engines by name; a call does one round and returns each client's trained factors, by key."""
        return {"cohort": self._cohort(), "reused": self._reused(), "copied": self._copied, "floor": self._floor()}

    def _cohort(self) -> Engine:
        model = CohortModel(self.model, low_rank=list(self.lora_a), dense=[])
        model.bind({f"{layer}.lora_a": lora_a for layer, lora_a in self.lora_a.items()}, num_clients=1)
        trainer = Trainer(model, self.examples, row_loss("classification"))

        def train() -> list[Factors]:
            results = train_cohort(trainer, self.start, self.clients, self.workload.local)
            return [result.tensors for result in sorted(results, key=lambda result: result.position)]

        return train

    def _lora_model(self) -> nn.Module:
        """Return a copy of the model with a single client's adapters in it."""
        model = copy.deepcopy(self.model)
        for layer, lora_a in self.lora_a.items():
            frozen = model.get_submodule(layer)
            assert isinstance(frozen, nn.Linear)
            setattr(model, layer, LoraLinear(frozen, lora_a))
        return model

    def _reused(self) -> Engine:
        model = self._lora_model()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def train() -> list[Factors]:
            found = []
            for client in self.clients:
                with torch.no_grad():
                    for parameter in trained:
                        parameter.zero_()
                self._steps(model, trained, client)
                found.append({key: tensor.detach().clone() for key, tensor in zip(self.start, trained, strict=True)})
            return found

        return train

    def _copied(self) -> list[Factors]:
        prototype, found = self._lora_model(), []
        for client in self.clients:
            model = copy.deepcopy(prototype)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._steps(model, trained, client)
            found.append({key: tensor.detach() for key, tensor in zip(self.start, trained, strict=True)})
        return found

    def _steps(self, model: nn.Module, trained: list[nn.Parameter], client: LocalClient) -> None:
        """Take one client's steps, written as anyone would write them, on the batches that the cohort takes."""
        config = self.workload.local
        optimizer = torch.optim.SGD(trained, lr=config.lr)
        batches, _ = local_batches(client.indices, client.seed, config)
        for rows in torch.from_numpy(batches):
            optimizer.zero_grad()
            outputs = model(self.examples.inputs.index_select(0, rows))
            F.cross_entropy(outputs, self.examples.targets.index_select(0, rows)).backward()
            optimizer.step()

    def _floor(self) -> Engine:
        weights = [self.model.get_submodule(layer).get_parameter("weight").detach() for layer in self.lora_a]
        rows = self.workload.clients * self.workload.batch
        inputs = [torch.randn(rows, weight.shape[1]) for weight in weights]
        outputs = [torch.randn(rows, weight.shape[0]) for weight in weights]

        def multiply() -> None:
            for _ in range(self.workload.steps):
                for x, y, weight in zip(inputs, outputs, weights, strict=True):
                    torch.mm(x, weight.t(), out=y)
                for x, y, weight in list(zip(inputs, outputs, weights, strict=True))[:0:-1]:
                    torch.mm(y, weight, out=x)

        return multiply


def _drawn(workload: Workload, layer: str, shape: MatrixShape) -> Tensor:
    return sketch.draw(
        SketchKey("orthonormal", workload.seed, link=0, layer=layer, side="b", rank=workload.rank, dim=shape.in_)
    )


def largest_difference(found: list[Factors], expected: list[Factors]) -> float:
    """Return the largest distance of a client's factor from the expected one, relative to its norm."""
    return max(
        float((mine[key] - theirs[key]).norm() / theirs[key].norm())
        for mine, theirs in zip(found, expected, strict=True)
        for key in theirs
    )
