"""Tests of fedraclora.tasks against torch's own losses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedraclora.data import Examples
from fedraclora.tasks import evaluate, row_loss


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _classes(num: int) -> Examples:
    return Examples(_numbers(0, num, 4), torch.randint(0, 3, (num,), generator=torch.Generator().manual_seed(1)))


class _Noting(nn.Module):
    """A linear model that notes its mode and its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()
        self.seen: list[tuple[bool, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, len(x)))
        outputs: Tensor = self.linear(x)
        return outputs


def test_classification_rows_are_cross_entropies() -> None:
    outputs, targets = _numbers(0, 5, 3), torch.tensor([0, 2, 1, 1, 0])
    expected = [nn.functional.cross_entropy(outputs[row], targets[row]) for row in range(5)]
    torch.testing.assert_close(
        row_loss("classification")(outputs, targets), torch.stack(expected), rtol=1e-12, atol=1e-12
    )


def test_regression_rows_are_half_squared_distances() -> None:
    outputs, targets = _numbers(0, 5, 3), _numbers(1, 5, 3)
    expected = 0.5 * (outputs - targets).norm(dim=1) ** 2
    torch.testing.assert_close(row_loss("regression")(outputs, targets), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("outputs", "targets"), [((5, 1), (5,)), ((5, 1), (5, 3)), ((5,), (5, 1)), ((1, 3), (5, 3))])
def test_regression_refuses_shapes_that_only_broadcast(outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"puts out \(.*\) for targets of shape \("):
        row_loss("regression")(torch.zeros(outputs), torch.zeros(targets))


def test_an_unknown_task_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'clasification' is unknown; did you mean 'classification'"):
        row_loss("clasification")


@given(num=st.integers(1, 20), batch_size=st.integers(1, 25))
def test_evaluation_is_the_mean_over_all_examples_for_any_batch_size(num: int, batch_size: int) -> None:
    model, examples = _Noting(), _classes(num)
    loss, accuracy = evaluate(model, examples, "classification", batch_size=batch_size)
    outputs = model.linear(examples.inputs)
    assert loss == pytest.approx(nn.functional.cross_entropy(outputs, examples.targets).item(), rel=1e-12)
    assert accuracy == (outputs.argmax(1) == examples.targets).sum().item() / num
    assert [rows for _, rows in model.seen] == [min(batch_size, num - first) for first in range(0, num, batch_size)]


def test_regression_has_no_accuracy() -> None:
    model, targets = _Noting(), _numbers(3, 6, 3)
    inputs = _numbers(0, 6, 4)
    loss, accuracy = evaluate(model, Examples(inputs, targets), "regression")
    assert accuracy is None
    assert loss == pytest.approx(3 * 0.5 * nn.functional.mse_loss(model.linear(inputs), targets).item(), rel=1e-12)


@pytest.mark.parametrize("was_training", [True, False])
def test_evaluation_happens_in_evaluation_mode_and_puts_the_mode_back(was_training: bool) -> None:
    model = _Noting().train(was_training)
    evaluate(model, _classes(3), "classification")
    assert model.seen == [(False, 3)]
    assert model.training is was_training
    with pytest.raises(RuntimeError):
        evaluate(model, Examples(_numbers(0, 3, 5), torch.zeros(3, dtype=torch.int64)), "classification")
    assert model.training is was_training


def test_evaluation_leaves_each_module_in_its_own_mode() -> None:
    """A frozen norm inside a model in training mode stays frozen, and the other way round."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5))).double()
    for outer, inner in ((True, False), (False, True)):
        model.train(outer)
        model[1].train(inner)
        model[2][0].train(inner)
        before = {name: module.training for name, module in model.named_modules()}
        evaluate(model, _classes(5), "classification")
        assert {name: module.training for name, module in model.named_modules()} == before


def test_evaluation_needs_an_example() -> None:
    with pytest.raises(ValueError, match="no example to evaluate on"):
        evaluate(_Noting(), _classes(3).select(torch.arange(0).numpy()), "classification")
