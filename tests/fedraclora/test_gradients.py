"""Tests of fedraclora.gradients, and of training by its rules: projection, blocks, privacy of examples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from fedraclora.data import Examples
from fedraclora.gradients import GradientRules, add_noise
from fedraclora.layers import CohortModel
from fedraclora.local import LocalClient, Trainer, local_batches, train_cohort
from fedraclora.local_config import LocalConfig
from fedraclora.seeding import derive_seed, generator
from fedraclora.tasks import row_loss

OUT, IN, RANK = 5, 7, 2


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30)
@given(seed=st.integers(0, 999), clients=st.integers(1, 3))
def test_a_gradient_is_projected_on_the_rows_of_a_or_the_columns_of_b(seed: int, clients: int) -> None:
    gradient, rows, columns = (
        _numbers(seed, clients, OUT, IN),
        _numbers(seed + 1, RANK, IN),
        _numbers(seed + 2, OUT, RANK),
    )
    rules = GradientRules({"fc1.weight": ("lora_a", rows), "fc2.weight": ("lora_b", columns)})
    found = rules.project({"fc1.weight": gradient, "fc2.weight": gradient, "fc1.bias": gradient[..., 0]})
    right = np.linalg.pinv(rows.numpy()) @ rows.numpy()
    left = columns.numpy() @ np.linalg.pinv(columns.numpy())
    np.testing.assert_allclose(found["fc1.weight"].numpy(), gradient.numpy() @ right, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found["fc2.weight"].numpy(), left @ gradient.numpy(), rtol=1e-9, atol=1e-9)
    assert torch.equal(found["fc1.bias"], gradient[..., 0])


def test_a_kernel_is_projected_as_the_matrix_that_it_is() -> None:
    gradient, rows = _numbers(0, 2, 4, 3, 2, 2), _numbers(1, RANK, 12)
    found = GradientRules({"conv.weight": ("lora_a", rows)}).project({"conv.weight": gradient})["conv.weight"]
    projector = np.linalg.pinv(rows.numpy()) @ rows.numpy()
    expected = (gradient.numpy().reshape(2, 4, 12) @ projector).reshape(gradient.shape)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=30)
@given(blocks=st.integers(1, 5), block_steps=st.integers(1, 3), seed=st.integers(0, 999))
def test_each_client_goes_through_all_blocks_in_its_own_order(blocks: int, block_steps: int, seed: int) -> None:
    rules = GradientRules(blocks=blocks, block_steps=block_steps)
    seeds = [seed, seed + 1]
    masks = np.stack([rules.block_masks(seeds, step, torch.zeros(1)) for step in range(blocks * block_steps)])
    assert (masks.sum(2) == 1).all(), "one at a time"
    assert (masks.sum(0) == block_steps).all(), "each for as long"
    for client, own in enumerate(seeds):
        order = generator(derive_seed(own, "blocks")).permutation(blocks)
        assert (masks[:, client].argmax(1) == np.repeat(order, block_steps)).all()


def test_only_the_block_of_the_rank_that_trains_keeps_its_gradient() -> None:
    rules, mask = GradientRules(blocks=2), torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    b, a = (
        rules.keep_block("x.lora_b", _numbers(0, 2, OUT, 4), mask),
        rules.keep_block("x.lora_a", _numbers(1, 2, 4, IN), mask),
    )
    assert b[0, :, :2].all()
    assert not b[0, :, 2:].any()
    assert not b[1, :, :2].any()
    assert not a[0, 2:].any()
    assert a[1, 2:].all()
    bias = _numbers(2, 2, OUT)
    assert torch.equal(rules.keep_block("x.bias", bias, mask), bias)


# ---- privacy of examples


CLIP, LR = 0.3, 0.5


def _trainer(**rules) -> tuple[Trainer, dict[str, Tensor], nn.Module, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(IN, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    examples = Examples(_numbers(1, 40, IN), torch.arange(40) % 3)
    model = CohortModel(module, low_rank=["0"], dense=["2.bias"])
    drawn = _numbers(2, RANK, IN)
    model.bind({"0.lora_a": drawn}, num_clients=1)
    start = {"0.lora_b": 0.1 * _numbers(3, 8, RANK), "2.bias": module[2].bias.detach().clone()}
    trainer = Trainer(model, examples, row_loss("classification"), rules=GradientRules(**rules))
    return trainer, start, module, drawn


def _by_hand(client: LocalClient, config: LocalConfig) -> dict[str, Tensor]:
    """Return one client's tensors after DP-SGD without noise, example by example with plain autograd."""
    trainer, start, module, drawn = _trainer()
    values = {key: tensor.clone() for key, tensor in start.items()}
    rows, sizes = local_batches(client.indices, client.seed, config, is_sampled=True)
    for batch, size in zip(rows, sizes, strict=True):
        total = {key: torch.zeros_like(tensor) for key, tensor in values.items()}
        for row in batch:
            leaves = {key: tensor.clone().requires_grad_() for key, tensor in values.items()}
            hidden = module[0](trainer.examples.inputs[row]) + leaves["0.lora_b"] @ (
                drawn @ trainer.examples.inputs[row]
            )
            outputs = torch.tanh(hidden) @ module[2].weight.T + leaves["2.bias"]
            loss = nn.functional.cross_entropy(outputs, trainer.examples.targets[row])
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
            for key, gradient in zip(leaves, gradients, strict=True):
                total[key] += gradient * min(1.0, CLIP / (norm + 1e-6))
        values = {key: tensor - config.lr * total[key] / int(size) for key, tensor in values.items()}
    return values


@pytest.mark.parametrize("chunk_clients", [0, 1])
def test_private_steps_are_those_of_a_loop_over_single_examples(chunk_clients: int) -> None:
    config = LocalConfig(lr=LR, steps=3, batch_size=6)
    trainer, start, _, _ = _trainer(example_clip=CLIP)
    trainer = Trainer(trainer.model, trainer.examples, trainer.row_loss, 2**20, chunk_clients, trainer.rules)
    clients = [LocalClient(np.arange(0, 20), 5), LocalClient(np.arange(20, 24), 6), LocalClient(np.arange(24, 40), 7)]
    for result in train_cohort(trainer, start, clients, config):
        for key, expected in _by_hand(clients[result.position], config).items():
            torch.testing.assert_close(result.tensors[key], expected, rtol=1e-9, atol=1e-10)


def test_batches_of_private_training_are_always_as_large_and_hold_no_row_twice() -> None:
    rows, sizes = local_batches(np.arange(100, 117), 3, LocalConfig(steps=50, batch_size=8), is_sampled=True)
    assert rows.shape == (50, 8)
    assert (sizes == 8).all()
    assert all(len(set(batch)) == 8 for batch in rows.tolist())
    assert len({tuple(batch) for batch in rows.tolist()}) == 50


def test_the_noise_of_a_private_step_has_the_stated_deviation() -> None:
    """With one step from the same batch the noise moves each number by N(0, (lr z C / b)^2): a chi-square sum."""
    config, noise = LocalConfig(lr=LR, steps=1, batch_size=4), 2.0
    moved = []
    for seed in range(200):
        trainer, start, _, _ = _trainer(example_clip=CLIP, example_noise=noise)
        quiet, _, _, _ = _trainer(example_clip=CLIP)
        (loud,) = train_cohort(trainer, start, [LocalClient(np.arange(20), 5, noise_seed=seed)], config)
        (still,) = train_cohort(quiet, start, [LocalClient(np.arange(20), 5)], config)
        moved += [(loud.tensors[key] - still.tensors[key]).reshape(-1) for key in start]
    scaled = torch.cat(moved).numpy() / (LR * noise * CLIP / 4)
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], len(scaled))
    assert low < np.square(scaled).sum() < high


@pytest.mark.parametrize("chunk_clients", [1, 2])
def test_noise_does_not_depend_on_who_trains_together(chunk_clients: int) -> None:
    config, results = LocalConfig(lr=LR, steps=3, batch_size=6), []
    clients = [
        LocalClient(np.arange(0, 20), 5, noise_seed=1),
        LocalClient(np.arange(20, 24), 6, noise_seed=2),
        LocalClient(np.arange(24, 40), 7, noise_seed=3),
    ]
    for limit in (0, chunk_clients):
        trainer, start, _, _ = _trainer(example_clip=CLIP, example_noise=1.0)
        trainer = replace(trainer, chunk_clients=limit)
        results.append(sorted(train_cohort(trainer, start, clients, config), key=lambda result: result.position))
    for whole, cut in zip(*results, strict=True):
        for key, tensor in whole.tensors.items():
            torch.testing.assert_close(cut.tensors[key], tensor, rtol=1e-9, atol=1e-10)


def test_noise_without_a_seed_is_never_the_same() -> None:
    config, found = LocalConfig(lr=LR, steps=1, batch_size=4), []
    for _ in range(2):
        trainer, start, _, _ = _trainer(example_clip=CLIP, example_noise=1.0)
        (result,) = train_cohort(trainer, start, [LocalClient(np.arange(20), 5)], config)
        found.append(result.tensors["0.lora_b"])
    assert not torch.equal(*found)


def test_each_clients_noise_is_its_own() -> None:
    zeros = [torch.zeros(2, 50, dtype=torch.float64)]
    (noisy,) = add_noise(zeros, 1.0, [np.random.default_rng(1), np.random.default_rng(2)])
    (alone,) = add_noise([zeros[0][1:]], 1.0, [np.random.default_rng(2)])
    assert torch.equal(noisy[1], alone[0])
    assert not torch.equal(noisy[0], noisy[1])
