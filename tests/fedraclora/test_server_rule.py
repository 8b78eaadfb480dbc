"""Tests of fedraclora.server_rule: each rule against its formula in NumPy, step by step."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora.server_rule import RULES, ServerRule, step_

rules = st.builds(
    ServerRule,
    name=st.sampled_from(RULES),
    lr=st.sampled_from([0.1, 1.0, 3.0]),
    beta1=st.sampled_from([0.0, 0.5, 0.9]),
    beta2=st.sampled_from([0.0, 0.9, 0.99]),
    tau=st.sampled_from([1e-3, 0.1]),
)


def _updates(seed: int, count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def steps_by_hand(rule: ServerRule, updates: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the steps of Algorithm 2 of arXiv 2003.00295, and of FedAvgM for momentum."""
    m, v, steps = 0.0, rule.tau**2, []
    for u in updates:
        if rule.name == "sgd":
            steps.append(rule.lr * u)
        elif rule.name == "momentum":
            m = rule.beta1 * m + u
            steps.append(rule.lr * m)
        else:
            m = rule.beta1 * m + (1 - rule.beta1) * u
            if rule.name == "adagrad":
                v = v + u**2
            elif rule.name == "yogi":
                v = v - (1 - rule.beta2) * u**2 * np.sign(v - u**2)
            else:
                v = rule.beta2 * v + (1 - rule.beta2) * u**2
            steps.append(rule.lr * m / (np.sqrt(v) + rule.tau))
    return steps


@settings(max_examples=60)
@given(rule=rules, seed=st.integers(0, 999), count=st.integers(1, 6))
def test_the_steps_are_those_of_the_published_algorithm(rule: ServerRule, seed: int, count: int) -> None:
    slots: dict[str, Tensor] = {}
    updates = _updates(seed, count)
    found = [step_(rule, slots, "fc1.weight", update) for update in updates]
    for step, expected in zip(found, steps_by_hand(rule, [update.numpy() for update in updates]), strict=True):
        torch.testing.assert_close(step, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_the_first_adam_step_is_not_corrected_for_bias() -> None:
    """With v starting at tau^2: (1 - beta1) u / (sqrt(beta2 tau^2 + (1 - beta2) u^2) + tau)."""
    rule, update = ServerRule("adam", beta1=0.9, beta2=0.99, tau=0.1), torch.tensor([2.0, -0.5], dtype=torch.float64)
    expected = 0.1 * update / ((0.99 * 0.01 + 0.01 * update**2).sqrt() + 0.1)
    torch.testing.assert_close(step_(rule, {}, "w", update), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_tensors_have_moments_of_their_own(name: str) -> None:
    rule, (first, second) = ServerRule(name), _updates(0, 2)
    together: dict[str, Tensor] = {}
    for _ in range(3):
        found = step_(rule, together, "a", first), step_(rule, together, "b", second)
    alone: list[dict[str, Tensor]] = [{}, {}]
    for _ in range(3):
        expected = step_(rule, alone[0], "a", first), step_(rule, alone[1], "b", second)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert together.keys() == alone[0].keys() | alone[1].keys()
    assert bool(together) == rule.has_state


@pytest.mark.parametrize("name", RULES)
def test_a_step_changes_neither_the_update_nor_moments_that_others_hold(name: str) -> None:
    """A snapshot of the moments stays what it was."""
    rule, slots, (first, second) = ServerRule(name), {}, _updates(0, 2)
    step_(rule, slots, "w", first)
    held, copies = dict(slots), {key: tensor.clone() for key, tensor in slots.items()}
    step_(rule, slots, "w", second)
    assert all(torch.equal(held[key], tensor) for key, tensor in copies.items())
    assert torch.equal(first, _updates(0, 2)[0])


@pytest.mark.parametrize("name", RULES)
def test_float32_steps_are_single_rounded_operations_so_all_machines_agree(name: str) -> None:
    """The same elementwise operations in NumPy's float32, one after the other, give the same bits."""
    rule, slots = ServerRule(name, lr=0.3, beta1=0.9, beta2=0.99, tau=0.01), {}
    f = np.float32
    m, v = f(0), None
    for update in _updates(1, 4, torch.float32):
        u = update.numpy()
        found = step_(rule, slots, "w", update).numpy()
        if name == "sgd":
            expected = u * f(0.3)
        elif name == "momentum":
            m = m * f(0.9) + u
            expected = m * f(0.3)
        else:
            m = m * f(0.9) + u * f(1 - 0.9)
            v = np.full_like(u, 0.01**2) if v is None else v
            square = u * u
            if name == "adam":
                v = v * f(0.99) + square * f(1 - 0.99)
            elif name == "yogi":
                v = v - square * f(1 - 0.99) * np.sign(v - square)
            else:
                v = v + square
            expected = m * f(0.3) / (np.sqrt(v) + f(0.01))
        assert found.dtype == expected.dtype == np.float32
        assert np.array_equal(found, expected)


def test_only_sgd_at_rate_one_is_plain_and_only_sgd_forgets() -> None:
    assert [rule for name in RULES if (rule := ServerRule(name)).is_plain] == [ServerRule("sgd")]
    assert not ServerRule("sgd", lr=0.5).is_plain
    assert [name for name in RULES if not ServerRule(name).has_state] == ["sgd"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "adamw"}, r"server\.rule='adamw' is unknown; valid: sgd, momentum, adam, yogi, adagrad"),
        ({"lr": 0.0}, r"server\.lr=0\.0 and server\.tau=0\.001 must be positive"),
        ({"lr": float("nan")}, r"server\.lr=nan"),
        ({"tau": -1.0}, r"server\.tau=-1\.0 must be positive"),
        ({"beta1": 1.0}, r"server\.beta1=1\.0 must lie in \[0, 1\)"),
        ({"beta2": -0.1}, r"server\.beta2=-0\.1 must lie in \[0, 1\)"),
        ({"beta2": float("nan")}, r"server\.beta2=nan"),
    ],
)
def test_values_that_are_no_optimiser_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerRule(**values)  # type: ignore[arg-type]
