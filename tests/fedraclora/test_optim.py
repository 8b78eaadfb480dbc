"""Tests of fedraclora.optim: a step on stacked tensors is torch.optim's step of each client on its own."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora.local import LocalConfig
from fedraclora.optim import CohortOptimizer, Member, Moments, clip_by_client

SHAPES = {"fc1.lora_b": (3, 2), "fc1.bias": (3,), "conv.weight": (2, 1, 2, 2)}


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _start() -> dict[str, Tensor]:
    return {key: _numbers(seed, *shape) for seed, (key, shape) in enumerate(SHAPES.items())}


def _gradients(step: int, clients: int) -> list[Tensor]:
    """Return the stacked gradients of a step; a client's numbers do not depend on how many clients there are."""
    return [
        torch.stack([_numbers(1000 * step + 10 * client + place, *shape) for client in range(clients)])
        for place, shape in enumerate(SHAPES.values())
    ]


def _named(gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(SHAPES, gradients, strict=True))


def _reference(config: LocalConfig, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def _train_alone(config: LocalConfig, client: int, num_steps: int) -> dict[str, Tensor]:
    """Return one client's tensors after steps of torch.optim, with FedProx' and the clipping's own formulas."""
    start = _start()
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in start.items()}
    optimizer = _reference(config, list(leaves.values()))
    for step in range(num_steps):
        for (key, leaf), stacked in zip(leaves.items(), _gradients(step, client + 1), strict=True):
            leaf.grad = stacked[client] + config.proximal * (leaf.detach() - start[key])
        if config.clip_norm:
            torch.nn.utils.clip_grad_norm_(leaves.values(), config.clip_norm)
        optimizer.step()
    return {key: leaf.detach() for key, leaf in leaves.items()}


def _train_together(config: LocalConfig, num_steps: Sequence[int]) -> CohortOptimizer:
    """`num_steps` of the clients, the most first."""
    optimizer = CohortOptimizer(config, _start(), [Member()] * len(num_steps))
    for step in range(num_steps[0]):
        live = sum(steps > step for steps in num_steps)
        optimizer.live_leaves(live)
        optimizer.step(_named(_gradients(step, live)))
    return optimizer


configs = st.builds(
    LocalConfig,
    optimizer=st.sampled_from(["sgd", "adamw"]),
    lr=st.sampled_from([0.01, 0.3]),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    proximal=st.sampled_from([0.0, 0.4]),
    clip_norm=st.sampled_from([0.0, 1.0, 100.0]),
)


@settings(max_examples=60)
@given(config=configs, num_steps=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_every_client_moves_as_torch_optim_would_move_it_alone(config: LocalConfig, num_steps: list[int]) -> None:
    num_steps = sorted(num_steps, reverse=True)
    together = _train_together(config, num_steps)
    for client, steps in enumerate(num_steps):
        for key, expected in _train_alone(config, client, steps).items():
            torch.testing.assert_close(together.values[key][client], expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=20)
@given(config=configs)
def test_nothing_moves_a_client_that_has_finished(config: LocalConfig) -> None:
    early = _train_together(config, [3, 3, 3])
    late = _train_together(config, [9, 3, 3])
    for key in SHAPES:
        assert torch.equal(late.values[key][1:], early.values[key][1:])
        assert not torch.equal(late.values[key][0], early.values[key][0])


def test_training_starts_at_the_given_tensors_and_leaves_them_alone() -> None:
    start = _start()
    optimizer = CohortOptimizer(LocalConfig(), start, [Member(), Member()])
    leaves = optimizer.live_leaves(2)
    assert list(leaves) == list(SHAPES)
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in leaves.values())
    assert all(torch.equal(leaf, start[key].expand(2, *SHAPES[key])) for key, leaf in leaves.items())
    optimizer.step(_named(_gradients(0, 2)))
    assert all(torch.equal(tensor, again) for tensor, again in zip(start.values(), _start().values(), strict=True))


@settings(max_examples=60)
@given(seed=st.integers(0, 999), clients=st.integers(1, 4), max_norm=st.floats(0.01, 20))
def test_clipping_equals_torch_client_by_client(seed: int, clients: int, max_norm: float) -> None:
    gradients = _gradients(seed, clients)
    clipped = clip_by_client(gradients, max_norm)
    for client in range(clients):
        leaves = [torch.zeros_like(gradient[client]).requires_grad_() for gradient in gradients]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient[client].clone()
        torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        for leaf, found in zip(leaves, clipped, strict=True):
            torch.testing.assert_close(found[client], leaf.grad, rtol=1e-12, atol=1e-12)


def test_clipping_leaves_a_client_with_a_small_gradient_unchanged_beside_a_large_one() -> None:
    gradients = [torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)]
    (clipped,) = clip_by_client(gradients, 1.0)
    torch.testing.assert_close(clipped[0], torch.tensor([0.6, 0.8]).double(), rtol=1e-6, atol=0)
    assert torch.equal(clipped[1], gradients[0][1])


# ---- moments ----


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (LocalConfig(lr=0.1, momentum=0.9, weight_decay=0.1), 1e-12),
        (LocalConfig(optimizer="adamw", lr=0.1, weight_decay=0.1), 1e-12),
    ],
)
def test_carried_moments_continue_where_they_stopped(config: LocalConfig, tolerance: float) -> None:
    """For AdamW the first moment and its bias correction continue, the second moment starts anew."""
    first = CohortOptimizer(config, _start(), [Member()])
    for step in range(3):
        first.live_leaves(1)
        first.step(_named(_gradients(step, 1)))
    carried = replace(first.moments_of(0, 3), second={})
    assert carried.num_steps == 3
    middle = {key: values[0].clone() for key, values in first.values.items()}
    second = CohortOptimizer(config, middle, [Member(carried), Member()])
    for step in range(3, 5):
        second.live_leaves(2)
        second.step(_named(_gradients(step, 2)))

    leaves = {key: tensor.clone().requires_grad_() for key, tensor in _start().items()}
    optimizer = _reference(config, list(leaves.values()))
    for step in range(5):
        for place, leaf in enumerate(leaves.values()):
            leaf.grad = _gradients(step, 1)[place][0]
            if config.optimizer == "adamw" and step == 3:
                optimizer.state[leaf]["exp_avg_sq"].zero_()
        if config.optimizer == "adamw" and step >= 3:
            _adamw_with_new_second_moments(config, optimizer, leaves, step)
        else:
            optimizer.step()
    for key, leaf in leaves.items():
        torch.testing.assert_close(second.values[key][0], leaf.detach(), rtol=tolerance, atol=tolerance)


def _adamw_with_new_second_moments(
    config: LocalConfig, optimizer: torch.optim.Optimizer, leaves: dict[str, Tensor], step: int
) -> None:
    """Take AdamW's step by its definition; the first moments are those of all steps, the second those since step 3."""
    with torch.no_grad():
        for leaf in leaves.values():
            state, gradient = optimizer.state[leaf], leaf.grad
            assert gradient is not None
            state["exp_avg"] = 0.9 * state["exp_avg"] + 0.1 * gradient
            state["exp_avg_sq"] = 0.999 * state["exp_avg_sq"] + 0.001 * gradient**2
            mean = state["exp_avg"] / (1 - 0.9 ** (step + 1))
            spread = (state["exp_avg_sq"] / (1 - 0.999 ** (step - 2))).sqrt()
            leaf.sub_(config.lr * config.weight_decay * leaf + config.lr * mean / (spread + 1e-8))


@settings(max_examples=30)
@given(config=configs, rounds=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_moments_that_are_kept_whole_make_rounds_one_training_of_torch_optim(
    config: LocalConfig, rounds: list[int]
) -> None:
    """Beside it trains a client that starts anew in each round, and each is as if alone."""
    config = replace(config, proximal=0.0)
    moments: Moments | None = None
    value, done = _start(), 0
    for steps in rounds:
        optimizer = CohortOptimizer(config, _start(), [Member(moments, own=value), Member()])
        for step in range(steps):
            optimizer.live_leaves(2)
            kept, new = _gradients(done + step, 1), _gradients(step, 2)
            optimizer.step(_named([torch.stack([a[0], b[1]]) for a, b in zip(kept, new, strict=True)]))
        for key, expected in _train_alone(config, 1, steps).items():
            torch.testing.assert_close(optimizer.values[key][1], expected, rtol=1e-12, atol=1e-12)
        moments, done = optimizer.moments_of(0, steps), done + steps
        value = {key: values[0].clone() for key, values in optimizer.values.items()}
    for key, expected in _train_alone(config, 0, done).items():
        torch.testing.assert_close(value[key], expected, rtol=1e-12, atol=1e-12)


def test_a_client_whose_second_moments_start_anew_does_so_beside_one_that_keeps_its_own() -> None:
    config = LocalConfig(optimizer="adamw", lr=0.1)
    first = {key: _numbers(7, *shape) for key, shape in SHAPES.items()}
    anew = Member(Moments(first, 11))
    kept = Member(Moments(first, 11, {key: tensor.square() for key, tensor in first.items()}))
    beside, alone = CohortOptimizer(config, _start(), [kept, anew]), CohortOptimizer(config, _start(), [anew, anew])
    for optimizer in (beside, alone):
        for step in range(2):
            optimizer.live_leaves(2)
            optimizer.step(_named(_gradients(step, 2)))
    for key, expected in alone.values.items():
        torch.testing.assert_close(beside.values[key][1], expected[1], rtol=1e-12, atol=1e-12)


def test_many_kept_steps_correct_a_bias_in_float32_as_in_float64() -> None:
    """The first steps' share of the second moments is a small difference to 1."""
    config, gradients = LocalConfig(optimizer="adamw", lr=0.1), _gradients(0, 1)
    found = {}
    for dtype in (torch.float32, torch.float64):
        second = {key: gradient[0].square().to(dtype) * 1e-3 for key, gradient in _named(gradients).items()}
        first = {key: gradient[0].to(dtype) * 0.1 for key, gradient in _named(gradients).items()}
        start = {key: tensor.to(dtype) for key, tensor in _start().items()}
        optimizer = CohortOptimizer(config, start, [Member(Moments(first, 1, second))])
        optimizer.live_leaves(1)
        optimizer.step({key: gradient.to(dtype) for key, gradient in _named(gradients).items()})
        found[dtype] = {key: (values[0] - start[key]).double() for key, values in optimizer.values.items()}
    for key, expected in found[torch.float64].items():
        torch.testing.assert_close(found[torch.float32][key], expected, rtol=0, atol=3e-7)


def test_a_client_without_moments_starts_at_zero_beside_one_that_carries_some() -> None:
    config = LocalConfig(optimizer="adamw", lr=0.1)
    carried = Moments({key: _numbers(7, *shape) for key, shape in SHAPES.items()}, num_steps=11)
    beside = CohortOptimizer(config, _start(), [Member(carried), Member()])
    beside.live_leaves(2)
    beside.step(_named(_gradients(0, 2)))
    for key, expected in _train_alone(config, 1, 1).items():
        torch.testing.assert_close(beside.values[key][1], expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(beside.values[key][0], _train_alone(config, 0, 1)[key])
    assert beside.moments_of(0, 1).num_steps == 12
    assert beside.moments_of(1, 1).num_steps == 1


def test_momentum_of_a_client_is_its_running_sum_of_gradients() -> None:
    optimizer = _train_together(LocalConfig(momentum=0.5), [2, 2])
    for place, key in enumerate(SHAPES):
        expected = 0.5 * _gradients(0, 2)[place] + _gradients(1, 2)[place]
        for client in range(2):
            found = optimizer.moments_of(client, 2).tensors[key]
            torch.testing.assert_close(found, expected[client], rtol=1e-12, atol=1e-12)


def test_plain_sgd_has_no_moments() -> None:
    assert _train_together(LocalConfig(), [2]).moments_of(0, 2) == Moments({}, 0)


# ---- what a client brings of its own ----


@settings(max_examples=30)
@given(config=configs, scale=st.sampled_from([0.25, 1.0, 3.0]))
def test_a_factor_on_the_learning_rate_is_that_learning_rate_alone(config: LocalConfig, scale: float) -> None:
    scaled = replace(config, lr=config.lr * scale)
    both = CohortOptimizer(config, _start(), [Member(), Member(lr_scale=scale)])
    for step in range(3):
        both.live_leaves(2)
        both.step(_named(_gradients(step, 2)))
    for client, alone in ((0, config), (1, scaled)):
        for key, expected in _train_alone(alone, client, 3).items():
            torch.testing.assert_close(both.values[key][client], expected, rtol=1e-10, atol=1e-10)


def test_an_own_start_is_where_a_client_begins_and_what_fedprox_pulls_to() -> None:
    own = {"fc1.bias": _numbers(99, 3)}
    optimizer = CohortOptimizer(LocalConfig(lr=0.1, proximal=0.5), _start(), [Member(), Member(own=own)])
    for step in range(2):
        optimizer.live_leaves(2)
        optimizer.step(_named(_gradients(step, 2)))
    for client, start in enumerate((_start()["fc1.bias"], own["fc1.bias"])):
        value = start.clone()
        for step in range(2):
            value -= 0.1 * (_gradients(step, 2)[1][client] + 0.5 * (value - start))
        torch.testing.assert_close(optimizer.values["fc1.bias"][client], value, rtol=1e-12, atol=1e-12)


def test_a_correction_is_added_to_each_gradient_of_its_own_client() -> None:
    correction = {"fc1.lora_b": _numbers(77, 3, 2)}
    optimizer = CohortOptimizer(LocalConfig(lr=0.1), _start(), [Member(), Member(correction=correction)])
    for step in range(2):
        optimizer.live_leaves(2)
        optimizer.step(_named(_gradients(step, 2)))
    plain = _train_together(LocalConfig(lr=0.1), [2, 2])
    moved = optimizer.values["fc1.lora_b"] - plain.values["fc1.lora_b"]
    assert torch.equal(moved[0], torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(moved[1], -0.2 * correction["fc1.lora_b"], rtol=1e-10, atol=1e-12)
    assert torch.equal(optimizer.values["fc1.bias"], plain.values["fc1.bias"])


def test_what_is_not_kept_does_not_move() -> None:
    optimizer = CohortOptimizer(LocalConfig(lr=0.1, clip_norm=1e-3), _start(), [Member()])
    optimizer.live_leaves(1)
    optimizer.step(_named(_gradients(0, 1)), lambda key, gradient: gradient * (key == "fc1.bias"))
    for key, start in _start().items():
        assert torch.equal(optimizer.values[key][0], start) == (key != "fc1.bias")
    step = (optimizer.values["fc1.bias"][0] - _start()["fc1.bias"]).norm()
    assert float(step) == pytest.approx(0.1 * 1e-3, rel=1e-4), "clipped is what is left"
