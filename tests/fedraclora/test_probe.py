"""Tests of fedraclora.probe: a model whose forward pass mixes clients, or skips what is trained, is refused."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from fedraclora.layers import CohortModel
from fedraclora.models import cnn, mlp
from fedraclora.probe import check_clients_stay_apart
from fedraclora.targets import find_dense, find_targets

RANK, TOKENS, WIDTH, OUTPUTS = 2, 5, 8, 3
MIXES = "mixes the rows of different clients"


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _check(
    model: nn.Module, inputs: Tensor, *, targets: Sequence[str] | str = "all", dense: Sequence[str] = ()
) -> None:
    """Look at the model as it is at the start of a link of side b, with some of its parameters trained in full."""
    shapes = find_targets(model, targets)
    names = find_dense(model, dense, list(shapes))
    cohort = CohortModel(model, low_rank=list(shapes), dense=names)
    cohort.bind({f"{layer}.lora_a": torch.randn(RANK, shape.in_) for layer, shape in shapes.items()}, num_clients=1)
    start = {f"{layer}.lora_b": torch.zeros(shape.out, RANK) for layer, shape in shapes.items()}
    parameters = dict(model.named_parameters())
    check_clients_stay_apart(cohort, start | {name: parameters[name].detach() for name in names}, inputs)


class _SequenceFirst(nn.Module):
    """Swaps the batch and the sequence before a layer, and back after it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.fc1(x.transpose(0, 1)).relu().transpose(0, 1).mean(1))
        return outputs


class _PoolsOverBatch(nn.Module):
    """Takes the mean of the batch from every row."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc1(x - x.mean(0))
        return outputs


class _OneRow(_PoolsOverBatch):
    """Gives the first row alone for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc1(x)[:1]
        return outputs


class _ReadsWeight(nn.Module):
    """Reads the weight of a trained layer without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc2(nn.functional.linear(x, self.fc1.weight, self.fc1.bias))
        return outputs


class _Attends(nn.Module):
    """Attention of PyTorch's own between trained layers."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=dropout, batch_first=True)
        self.fc1 = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc1(self.attention(x, x, x)[0].mean(1))
        return outputs


class _Transformer(nn.Module):
    """One block with separate query, key and value layers, on inputs `[batch, tokens, width]`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fc1, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + nn.functional.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        outputs: Tensor = self.head((x + self.fc1(self.norm2(x)).relu()).mean(1))
        return outputs


TOKEN_ROWS = torch.randn(6, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
FLAT_ROWS = TOKEN_ROWS[:, 0]


@pytest.mark.parametrize("num_tokens", [2, 4, 5])
def test_a_sequence_first_layer_is_refused(num_tokens: int) -> None:
    with pytest.raises(ValueError, match=MIXES):
        _check(_SequenceFirst(), TOKEN_ROWS[:, :num_tokens])


@pytest.mark.parametrize("model", [_PoolsOverBatch, _OneRow])
def test_pooling_over_the_batch_is_refused(model: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=MIXES):
        _check(model(), FLAT_ROWS)


def test_a_trained_layer_whose_weight_is_read_directly_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"do not depend on \['fc1\.lora_b'\]: a layer must be called as a module"):
        _check(_ReadsWeight(), FLAT_ROWS)
    _check(_ReadsWeight(), FLAT_ROWS, targets=["fc2"])


def test_dropout_inside_attention_is_refused_and_attention_without_it_is_not() -> None:
    with pytest.raises(ValueError, match=MIXES):
        _check(_Attends(0.5), TOKEN_ROWS, targets=["fc1"])
    _check(_Attends(0.0), TOKEN_ROWS, targets=["fc1"])


class _DropsTokens(nn.Module):
    """Drops while the sequence is the first axis; its layers see the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.fc1 = nn.Dropout(0.5), nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.fc1(self.drop(x.transpose(0, 1)).transpose(0, 1).mean(1))
        return outputs


class _HidesPooling(_PoolsOverBatch):
    """Mixes the rows of the batch, and drops all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(1.0)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.drop(super().forward(x))
        return outputs


class _FunctionalDropout(_PoolsOverBatch):
    """Draws from the global generator."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.fc1(x), 0.5)


def test_dropout_layers_are_accepted() -> None:
    config = mlp.Config(hidden=[6, 6], dropout=0.5)
    _check(mlp.build(config, input_shape=(WIDTH,), num_outputs=OUTPUTS), FLAT_ROWS)


def test_dropout_over_another_axis_than_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=MIXES):
        _check(_DropsTokens(), TOKEN_ROWS[:, :4])
    with pytest.raises(ValueError, match="first axis must be the batch"):
        _check(_DropsTokens(), TOKEN_ROWS)


@pytest.mark.parametrize("model", [_HidesPooling, _FunctionalDropout])
def test_dropout_hides_nothing_and_must_be_a_layer(model: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=MIXES):
        _check(model(), FLAT_ROWS)


@pytest.mark.parametrize("dense", [[], ["*.bias"]], ids=["low-rank", "with-dense"])
def test_plain_models_are_accepted(dense: list[str]) -> None:
    _check(mlp.build(mlp.Config(hidden=[6]), input_shape=(WIDTH,), num_outputs=OUTPUTS), FLAT_ROWS, dense=dense)
    config = cnn.Config(channels=[4, 8], groups=2, hidden=6)
    _check(cnn.build(config, input_shape=(2, 8, 8), num_outputs=OUTPUTS), torch.randn(5, 2, 8, 8), dense=dense)


@pytest.mark.parametrize("dense", [[], ["norm*"], ["head.bias"]], ids=str)
def test_a_transformer_on_three_axes_is_accepted(dense: list[str]) -> None:
    _check(_Transformer(), TOKEN_ROWS, dense=dense)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_few_rows_are_enough_to_accept_a_model(num: int) -> None:
    _check(mlp.build(mlp.Config(hidden=[6]), input_shape=(WIDTH,), num_outputs=OUTPUTS), FLAT_ROWS[:num])
