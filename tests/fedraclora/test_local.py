"""Tests of fedraclora.local: a cohort trains each of its clients as that client would train alone."""

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedraclora.data import Examples
from fedraclora.gradients import GradientRules
from fedraclora.layers import CohortModel
from fedraclora.local import LocalClient, LocalConfig, LocalResult, Trainer, local_batches, train_cohort
from fedraclora.optim import Member
from fedraclora.seeding import derive_seed
from fedraclora.targets import MatrixShape, find_targets
from fedraclora.tasks import row_loss

SCALE = 0.7
RANK = 2
P = 0.3
FACTOR_NAMES = {"b": ("lora_b",), "a": ("lora_a",), "ab": ("lora_a", "lora_b")}
# AdamW divides by a root that may be as small as its epsilon 1e-8: it magnifies the rounding errors of tiny gradients.
TOLERANCES = {"sgd": 1e-12, "adamw": 1e-11}
Tensors = dict[str, Tensor]


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _model(seed: int, dropout: nn.Module | None = None) -> nn.Module:
    bend = nn.Tanh() if dropout is None else nn.Sequential(nn.Tanh(), dropout)
    model = nn.Sequential(nn.Linear(5, 6), bend, nn.LayerNorm(6), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.copy_(0.5 * _numbers(seed + place, *parameter.shape))
    return model


class _ByHand(nn.Module):
    """Drops numbers with probability P by a generator of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=self.generator) >= P) / (1 - P)


class Problem:
    """A model, a fixed factor of each layer, tensors to train, examples and clients, all drawn from one seed."""

    def __init__(self, seed: int, sizes: Sequence[int], side: str = "b", dropout: nn.Module | None = None) -> None:
        self.plain = _model(seed, dropout)
        self.factors = self._factors(seed)
        self.trained = [f"{layer}.{name}" for layer in ("0", "3") for name in FACTOR_NAMES[side]] + [
            "2.weight",
            "3.bias",
        ]
        known = self.plain.state_dict() | self.factors
        self.start: Tensors = {key: known[key] for key in self.trained}
        self.frozen = {key: factor for key, factor in self.factors.items() if key not in self.start}
        self.correction: Tensors = {}
        targets = torch.randint(0, 3, (sum(sizes),), generator=torch.Generator().manual_seed(seed))
        self.examples = Examples(_numbers(seed + 50, sum(sizes), 5), targets)
        bounds = np.cumsum([0, *sizes])
        self.clients = [
            LocalClient(np.arange(first, last), seed=100 * seed + place)
            for place, (first, last) in enumerate(pairwise(bounds))
        ]

    @staticmethod
    def _factors(seed: int) -> Tensors:
        shapes = {"0": MatrixShape(6, 5), "3": MatrixShape(3, 6)}
        factors = {}
        for place, (layer, shape) in enumerate(shapes.items()):
            factors[f"{layer}.lora_a"] = _numbers(seed + 60 + place, RANK, shape.in_)
            factors[f"{layer}.lora_b"] = _numbers(seed + 70 + place, shape.out, RANK)
        return factors

    def trainer(
        self, *, dtype: torch.dtype = torch.float64, chunk_bytes: int = 2**26, chunk_clients: int = 0
    ) -> Trainer:
        cohort = CohortModel(self.plain.to(dtype), low_rank=["0", "3"], dense=["2.weight", "3.bias"])
        cohort.set_scales({"0": SCALE, "3": SCALE})
        cohort.bind({key: factor.to(dtype) for key, factor in self.frozen.items()}, num_clients=1)
        examples = Examples(self.examples.inputs.to(dtype), self.examples.targets)
        return Trainer(cohort, examples, row_loss("classification"), chunk_bytes, chunk_clients)

    def train(self, config: LocalConfig, **options: object) -> list[LocalResult]:
        """Return the results in the order of the clients."""
        return self.train_clients(self.clients, config, **options)

    def train_clients(
        self, clients: Sequence[LocalClient], config: LocalConfig, **options: object
    ) -> list[LocalResult]:
        trainer = self.trainer(**options)  # type: ignore[arg-type]
        start = {key: tensor.to(trainer.examples.inputs) for key, tensor in self.start.items()}
        results = list(train_cohort(trainer, start, clients, config))
        return sorted(results, key=lambda result: result.position)

    def train_alone(self, client: LocalClient, config: LocalConfig) -> tuple[Tensors, float]:
        """Return a client's tensors and mean loss by a plain loop: deepcopy, its own merge, torch.optim."""
        model, start = copy.deepcopy(self.plain), self.start
        if isinstance(model.get_submodule("1"), nn.Sequential):
            model.get_submodule("1").append(_ByHand(derive_seed(client.seed, "dropout")))
            model.get_submodule("1")[1].eval()
        leaves = {key: tensor.detach().clone().requires_grad_() for key, tensor in start.items()}
        optimizer: torch.optim.Optimizer
        if config.optimizer == "adamw":
            optimizer = torch.optim.AdamW(leaves.values(), config.lr, weight_decay=config.weight_decay)
        else:
            optimizer = torch.optim.SGD(leaves.values(), config.lr, config.momentum, weight_decay=config.weight_decay)
        losses = []
        for rows, size in zip(*local_batches(client.indices, client.seed, config), strict=True):
            batch = self.examples.select(rows[:size])
            outputs = torch.func.functional_call(model, self._merged(leaves), (batch.inputs,))
            loss = nn.functional.cross_entropy(outputs, batch.targets)
            losses.append(loss.item())
            distance = torch.stack([(leaf - start[key]).square().sum() for key, leaf in leaves.items()]).sum()
            optimizer.zero_grad()
            # The gradient of a linear term is its coefficients: a correction of the gradient.
            linear = sum((torch.sum(term * leaves[key]) for key, term in self.correction.items()), torch.zeros(()))
            (loss + 0.5 * config.proximal * distance + linear).backward()
            if config.clip_norm:
                nn.utils.clip_grad_norm_(leaves.values(), config.clip_norm)
            optimizer.step()
        return {key: leaf.detach() for key, leaf in leaves.items()}, float(np.mean(losses))

    def _merged(self, leaves: Tensors) -> Tensors:
        weights: Tensors = {name: tensor.detach() for name, tensor in self.plain.state_dict().items()}
        weights |= {key: leaf for key, leaf in leaves.items() if ".lora_" not in key}
        factors = self.factors | leaves
        for layer in ("0", "3"):
            weights[f"{layer}.weight"] = (
                weights[f"{layer}.weight"] + SCALE * factors[f"{layer}.lora_b"] @ factors[f"{layer}.lora_a"]
            )
        return weights


def _assert_same(found: LocalResult, expected: LocalResult, tolerance: float) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    assert (found.num_steps, found.num_examples) == (expected.num_steps, expected.num_examples)
    for key, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[key], tensor, rtol=tolerance, atol=tolerance)
    for key, moment in expected.moments.tensors.items():
        torch.testing.assert_close(found.moments.tensors[key], moment, rtol=tolerance, atol=tolerance)
    assert found.moments.num_steps == expected.moments.num_steps
    assert found.loss == pytest.approx(expected.loss, rel=1e-10)


def _build_config(optimizer: str, lengths: tuple[int, int], **values: float) -> LocalConfig:
    # Small enough that training is stable: where it is not, it amplifies the rounding that these tests bound.
    lr = 0.01 if optimizer == "adamw" else 0.02
    return LocalConfig(optimizer=optimizer, lr=lr, steps=lengths[0], epochs=lengths[1], **values)  # type: ignore[arg-type]


configs = st.builds(
    _build_config,
    optimizer=st.sampled_from(["sgd", "adamw"]),
    lengths=st.sampled_from([(1, 0), (4, 0), (0, 1), (0, 2)]),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    batch_size=st.integers(1, 6),
    proximal=st.sampled_from([0.0, 0.5]),
    clip_norm=st.sampled_from([0.0, 0.3]),
)
sizes_of_clients = st.lists(st.integers(1, 11), min_size=1, max_size=5)
sides = st.sampled_from(["b", "a", "ab"])


# ---- a cohort is its clients ----


@settings(max_examples=40)
@given(config=configs, sizes=sizes_of_clients, side=sides, seed=st.integers(0, 99))
def test_a_cohort_equals_cohorts_of_one(config: LocalConfig, sizes: list[int], side: str, seed: int) -> None:
    problem = Problem(seed, sizes, side)
    together = problem.train(config)
    assert [result.position for result in together] == list(range(len(sizes)))
    assert [result.num_examples for result in together] == sizes
    for result, client in zip(together, problem.clients, strict=True):
        (alone,) = problem.train_clients([client], config)
        _assert_same(result, replace(alone, position=result.position), TOLERANCES[config.optimizer])


@settings(max_examples=25)
@given(config=configs, sizes=sizes_of_clients, side=sides, seed=st.integers(0, 99))
def test_a_plain_loop_over_torch_modules_and_optimisers_gives_the_same(
    config: LocalConfig, sizes: list[int], side: str, seed: int
) -> None:
    problem = Problem(seed, sizes, side)
    tolerance = TOLERANCES[config.optimizer]
    for result, client in zip(problem.train(config), problem.clients, strict=True):
        tensors, loss = problem.train_alone(client, config)
        assert list(result.tensors) == list(tensors)
        for key, expected in tensors.items():
            torch.testing.assert_close(result.tensors[key], expected, rtol=tolerance, atol=tolerance)
        assert result.loss == pytest.approx(loss, rel=1e-10)


@settings(max_examples=25)
@given(
    config=configs, sizes=sizes_of_clients, chunk_clients=st.integers(1, 5), chunk_bytes=st.sampled_from([1, 20_000])
)
def test_results_do_not_depend_on_the_chunks(
    config: LocalConfig, sizes: list[int], chunk_clients: int, chunk_bytes: int
) -> None:
    problem = Problem(3, sizes)
    whole = problem.train(config)
    for options in ({"chunk_clients": chunk_clients}, {"chunk_bytes": chunk_bytes}):
        for cut, expected in zip(problem.train(config, **options), whole, strict=True):
            _assert_same(cut, expected, TOLERANCES[config.optimizer])


# ---- what a client brings of its own ----


def _member(problem: Problem, client: int, side: str) -> Member:
    """Each client has other frozen factors, and some start elsewhere, at another rate, or are corrected."""
    own = {key: _numbers(900 + client, *factor.shape) for key, factor in problem.frozen.items()}
    if client % 2:
        own |= {f"0.lora_{side}": _numbers(800 + client, *problem.start[f"0.lora_{side}"].shape)}
    correction = {"3.bias": 0.1 * _numbers(700 + client, 3)} if client % 3 == 2 else {}
    return Member(own=own, lr_scale=(1.0, 0.5, 2.0)[client % 3], correction=correction)


@settings(max_examples=25)
@given(config=configs, sizes=sizes_of_clients, side=st.sampled_from(["b", "a"]), chunk_clients=st.integers(0, 3))
def test_clients_with_tensors_of_their_own_train_as_if_all_had_those(
    config: LocalConfig, sizes: list[int], side: str, chunk_clients: int
) -> None:
    problem = Problem(4, sizes, side)
    members = [_member(problem, place, side) for place in range(len(sizes))]
    clients = [replace(client, member=member) for client, member in zip(problem.clients, members, strict=True)]
    results = problem.train_clients(clients, config, chunk_clients=chunk_clients)
    for result, client in zip(results, clients, strict=True):
        alone, own = copy.copy(problem), client.member.own
        alone.factors = problem.factors | {key: own[key] for key in problem.frozen}
        alone.start = {key: own.get(key, tensor) for key, tensor in problem.start.items()}
        alone.correction = dict(client.member.correction)
        tensors, loss = alone.train_alone(client, replace(config, lr=config.lr * client.member.lr_scale))
        for key, expected in tensors.items():
            tolerance = 10 * TOLERANCES[config.optimizer]
            torch.testing.assert_close(result.tensors[key], expected, rtol=tolerance, atol=tolerance)
        assert result.loss == pytest.approx(loss, rel=1e-9)


@settings(max_examples=25)
@given(
    sizes=sizes_of_clients,
    side=sides,
    held_out=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    chunk_clients=st.integers(0, 2),
)
def test_a_client_is_scored_by_its_own_model_on_the_rows_that_it_holds_out(
    sizes: list[int], side: str, held_out: list[int], chunk_clients: int
) -> None:
    """The first rows of a client are held out, and it trains on the others; its score is counted here by hand."""
    problem = Problem(6, [size + more for size, more in zip(sizes, held_out, strict=False)], side)
    clients = [
        replace(client, indices=client.indices[more:], held_out=client.indices[:more])
        for client, more in zip(problem.clients, held_out, strict=False)
    ]
    config = LocalConfig(lr=0.3, steps=4, batch_size=3)
    for result, client in zip(
        problem.train_clients(clients, config, chunk_clients=chunk_clients), clients, strict=True
    ):
        rows = problem.examples.select(client.held_out)
        tensors, _ = problem.train_alone(client, config)
        outputs = torch.func.functional_call(problem.plain, problem._merged(tensors), (rows.inputs,))
        expected = sum(int(row.argmax()) == int(target) for row, target in zip(outputs, rows.targets, strict=True))
        assert result.num_held_out == len(client.held_out)
        assert result.num_correct == (expected if len(client.held_out) else None)
        assert result.num_examples == len(client.indices)


def test_scoring_changes_nothing_that_is_trained() -> None:
    problem, config = Problem(6, [6, 9], "ab"), LocalConfig(lr=0.3, steps=4, batch_size=3)
    scored = [replace(client, held_out=np.arange(15)) for client in problem.clients]
    for found, expected in zip(problem.train_clients(scored, config), problem.train(config), strict=True):
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.tensors.items())


def test_float32_results_agree_to_1e_5_in_relative_frobenius_norm() -> None:
    problem, config = Problem(1, [9, 4, 30, 1], "ab"), LocalConfig(lr=0.2, steps=10, batch_size=8)
    together = problem.train(config, dtype=torch.float32)
    for result, client in zip(together, problem.clients, strict=True):
        (alone,) = problem.train_clients([client], config, dtype=torch.float32)
        for key, tensor in alone.tensors.items():
            assert tensor.dtype == torch.float32
            assert (result.tensors[key] - tensor).norm() <= 1e-5 * tensor.norm()


def test_chunks_of_one_client_give_the_same_bits_in_any_company() -> None:
    problem, config = Problem(1, [9, 4, 30, 1], "ab"), LocalConfig(lr=0.2, steps=5, batch_size=8)
    together = problem.train(config, dtype=torch.float32, chunk_clients=1)
    for result, client in zip(together, problem.clients, strict=True):
        (alone,) = problem.train_clients([client], config, dtype=torch.float32, chunk_clients=1)
        assert all(torch.equal(result.tensors[key], tensor) for key, tensor in alone.tensors.items())


def test_regression_trains_like_classification() -> None:
    inputs, weight, targets = _numbers(0, 6, 4), _numbers(1, 2, 4), _numbers(2, 6, 2)
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
    model.load_state_dict({"0.weight": weight})
    cohort = CohortModel(model, low_rank=list(find_targets(model, "all")), dense=[])
    lora_a = _numbers(3, 2, 4)
    cohort.bind({"0.lora_a": lora_a}, num_clients=1)
    trainer = Trainer(cohort, Examples(inputs, targets), row_loss("regression"))
    config = LocalConfig(lr=0.1, steps=1, batch_size=6)
    client = LocalClient(np.arange(6), 0, held_out=np.arange(2))
    (result,) = train_cohort(trainer, {"0.lora_b": torch.zeros(2, 2).double()}, [client], config)
    assert result.num_correct is None, "there is nothing to count"
    # One gradient step from B = 0 on the mean of |W x - y|^2 / 2 is B = -lr * G A^T with G the gradient in W.
    gradient = (inputs @ weight.T - targets).T @ inputs / 6
    torch.testing.assert_close(result.tensors["0.lora_b"], -0.1 * gradient @ lora_a.T, rtol=1e-12, atol=1e-12)


def test_no_clients_give_no_results() -> None:
    assert Problem(0, [3]).train_clients([], LocalConfig()) == []


# ---- dropout ----


@settings(max_examples=40)
@given(
    config=configs,
    sizes=sizes_of_clients,
    side=sides,
    seed=st.integers(0, 99),
    chunk_clients=st.integers(0, 3),
    order=st.randoms(use_true_random=False),
)
def test_a_clients_masks_are_the_same_alone_in_any_cohort_chunk_and_order(  # noqa: PLR0913 - what may not matter
    config: LocalConfig, sizes: list[int], side: str, seed: int, chunk_clients: int, order: random.Random
) -> None:
    problem = Problem(seed, sizes, side, nn.Dropout(P))
    clients = order.sample(problem.clients, len(problem.clients))
    together = problem.train_clients(clients, config, chunk_clients=chunk_clients)
    for result, client in zip(together, clients, strict=True):
        (alone,) = problem.train_clients([client], config)
        _assert_same(result, replace(alone, position=result.position), TOLERANCES[config.optimizer])


@settings(max_examples=25)
@given(config=configs, sizes=sizes_of_clients, side=sides, seed=st.integers(0, 99))
def test_a_plain_loop_that_drops_by_hand_gives_the_same(
    config: LocalConfig, sizes: list[int], side: str, seed: int
) -> None:
    problem = Problem(seed, sizes, side, nn.Dropout(P))
    tolerance = TOLERANCES[config.optimizer]
    for result, client in zip(problem.train(config), problem.clients, strict=True):
        tensors, loss = problem.train_alone(client, config)
        for key, expected in tensors.items():
            torch.testing.assert_close(result.tensors[key], expected, rtol=tolerance, atol=tolerance)
        assert result.loss == pytest.approx(loss, rel=1e-10)


def test_masks_change_with_the_clients_seed_and_from_step_to_step() -> None:
    """One row, so that the batches are the same whatever the seed: the masks alone can differ."""
    problem, config = Problem(0, [1, 1, 1], dropout=nn.Dropout(P)), LocalConfig(steps=1)
    one = replace(problem.clients[0], seed=1), replace(problem.clients[0], seed=2)
    first, second = problem.train_clients(one, config)
    assert not torch.equal(first.tensors["0.lora_b"], second.tensors["0.lora_b"])
    gradients = []
    for steps in (1, 2):
        (result,) = problem.train_clients(one[:1], LocalConfig(lr=1e-9, momentum=0.5, steps=steps))
        gradients.append(result.moments.tensors["0.lora_b"])
    assert not torch.allclose(gradients[1], 1.5 * gradients[0], rtol=1e-3)


def test_a_dropout_of_nothing_changes_not_one_bit() -> None:
    config = LocalConfig(lr=0.3, steps=4, batch_size=3)
    plain, zero = (Problem(6, [6, 9], dropout=own).train(config) for own in (None, nn.Dropout(0.0)))
    for found, expected in zip(zero, plain, strict=True):
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.tensors.items())


def test_a_client_is_scored_without_dropout() -> None:
    problem, config = Problem(6, [6, 9], dropout=nn.Dropout(0.9)), LocalConfig(lr=0.3, steps=4, batch_size=3)
    everything = np.arange(15)
    for result in problem.train_clients([replace(c, held_out=everything) for c in problem.clients], config):
        model = copy.deepcopy(problem.plain).eval()
        outputs = torch.func.functional_call(model, problem._merged(result.tensors), (problem.examples.inputs,))
        assert result.num_correct == int((outputs.argmax(1) == problem.examples.targets).sum())


def test_gradients_of_single_examples_are_those_of_the_same_masks() -> None:
    """A bound that binds nobody and whole batches: privacy of examples must then train as if there were none."""
    problem, config = Problem(6, [6, 9, 4], "ab", nn.Dropout(P)), LocalConfig(lr=0.1, steps=4, batch_size=9)
    private = replace(problem.trainer(), rules=GradientRules(example_clip=1e6))
    start = {key: tensor.clone() for key, tensor in problem.start.items()}
    for result in train_cohort(private, start, problem.clients, config):
        (plain,) = problem.train_clients([problem.clients[result.position]], config)
        for key, tensor in plain.tensors.items():
            torch.testing.assert_close(result.tensors[key], tensor, rtol=1e-12, atol=1e-12)


# ---- batches ----


@given(num=st.integers(1, 40), batch_size=st.integers(1, 50), epochs=st.integers(1, 4), seed=st.integers(0, 2**63 - 1))
def test_each_epoch_visits_every_row_once(num: int, batch_size: int, epochs: int, seed: int) -> None:
    indices = np.arange(num) * 3 + 100
    rows, sizes = local_batches(indices, seed, LocalConfig(steps=0, epochs=epochs, batch_size=batch_size))
    per_epoch = -(-num // min(batch_size, num))
    assert len(rows) == len(sizes) == epochs * per_epoch
    visited = [row[:size] for row, size in zip(rows, sizes, strict=True)]
    for epoch in range(epochs):
        batches = visited[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(np.concatenate(batches).tolist()) == indices.tolist()
        assert all(len(batch) == min(batch_size, num) for batch in batches[:-1])


@given(num=st.integers(1, 20), batch_size=st.integers(1, 25), steps=st.integers(1, 30), seed=st.integers(0, 99))
def test_steps_are_the_first_steps_of_enough_epochs(num: int, batch_size: int, steps: int, seed: int) -> None:
    config = LocalConfig(steps=steps, batch_size=batch_size)
    rows, sizes = local_batches(np.arange(num), seed, config)
    all_rows, all_sizes = local_batches(np.arange(num), seed, replace(config, steps=0, epochs=steps))
    assert len(rows) == steps
    assert np.array_equal(sizes, all_sizes[:steps])
    assert np.array_equal(rows, all_rows[:steps])


def test_batches_depend_on_the_seed_and_the_rows_alone() -> None:
    config = LocalConfig(steps=6, batch_size=4)
    rows, _ = local_batches(np.arange(10), 1, config)
    assert np.array_equal(rows, local_batches(np.arange(10), 1, config)[0])
    assert not np.array_equal(rows, local_batches(np.arange(10), 2, config)[0])
    elsewhere, _ = local_batches(np.arange(10) + 50, 1, config)
    assert np.array_equal(elsewhere, rows + 50)


def test_epochs_have_different_orders() -> None:
    rows, _ = local_batches(np.arange(50), 0, LocalConfig(steps=0, epochs=2, batch_size=50))
    assert not np.array_equal(rows[0], rows[1])


def test_training_uses_a_clients_own_rows_only() -> None:
    problem, config = Problem(2, [6, 7]), LocalConfig(steps=3, batch_size=4)
    before = problem.train(config)[0]
    problem.examples.inputs[problem.clients[1].indices] += 1
    after = problem.train(config)[0]
    _assert_same(after, before, 1e-12)


# ---- memory ----


class _Counting(nn.Module):
    """Notes how many rows each forward pass has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.num_rows = inner, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.num_rows.append(len(x))
        outputs: Tensor = self.inner(x)
        return outputs


def _largest_chunk(chunk_bytes: int, *, width: int = 4, chunk_clients: int = 0) -> int:
    """Return the clients of the largest forward pass over 40 clients with batches of `width` rows."""
    model = _Counting(_model(0))
    examples = Examples(_numbers(0, 40 * width, 5), torch.zeros(40 * width, dtype=torch.int64))
    cohort = CohortModel(model, low_rank=[], dense=["inner.3.bias"])
    clients = [LocalClient(np.arange(width * place, width * (place + 1)), place) for place in range(40)]
    trainer = Trainer(cohort, examples, row_loss("classification"), chunk_bytes, chunk_clients)
    list(
        train_cohort(
            trainer, {"inner.3.bias": torch.zeros(3).double()}, clients, LocalConfig(steps=1, batch_size=width)
        )
    )
    assert isinstance(cohort.module, _Counting)
    return max(cohort.module.num_rows) // width


def test_chunks_shrink_with_the_byte_budget_and_hold_at_least_one_client() -> None:
    chunks = [_largest_chunk(num_bytes) for num_bytes in (2**24, 2**15, 2**14, 2**13, 1)]
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] == 40
    assert 1 < chunks[2] < chunks[1] < 40
    assert chunks[-1] == 1


def test_chunks_shrink_as_batches_grow() -> None:
    assert _largest_chunk(2**15, width=8) < _largest_chunk(2**15, width=4)


def test_chunk_clients_is_a_limit_beside_the_bytes() -> None:
    assert _largest_chunk(2**24, chunk_clients=7) == 7
    assert _largest_chunk(1, chunk_clients=7) == 1


# ---- trouble stays where it is ----


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_nan_in_one_clients_data_stays_in_that_client(optimizer: str, clip_norm: float) -> None:
    config = LocalConfig(optimizer=optimizer, lr=0.01, steps=4, batch_size=3, clip_norm=clip_norm)
    problem = Problem(5, [6, 8, 5], "ab")
    clean = problem.train(config)
    problem.examples.inputs[problem.clients[1].indices] = float("nan")
    dirty = problem.train(config)
    assert np.isnan(dirty[1].loss)
    for client in (0, 2):
        _assert_same(dirty[client], clean[client], TOLERANCES[optimizer])


def test_a_client_without_data_is_refused() -> None:
    problem = Problem(0, [3, 0])
    with pytest.raises(ValueError, match="no data"):
        problem.train(LocalConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adam"}, r"optimizer='adam' is unknown; valid: sgd, adamw"),
        ({"steps": 3, "epochs": 2}, r"local_steps=3 and local_epochs=2: one must be positive"),
        ({"steps": 0}, r"local_steps=0 and local_epochs=0"),
        ({"steps": -1, "epochs": 1}, r"local_steps=-1"),
        ({"lr": 0.0}, r"lr=0\.0 must be positive"),
        ({"lr": float("nan")}, r"lr=nan must be positive"),
        ({"batch_size": 0}, r"batch_size=0 at least 1"),
        ({"momentum": 1.0}, r"momentum=1\.0 in \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum=-0\.1"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0 must not be negative"),
        ({"proximal": -0.5}, r"proximal=-0\.5 must not be negative"),
        ({"clip_norm": float("nan")}, r"clip_norm=nan must not be negative"),
    ],
)
def test_settings_that_cannot_train_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalConfig(**values)  # type: ignore[arg-type]
