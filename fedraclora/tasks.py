"""The two tasks: what a row's loss is, and how a model is scored."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedraclora.data import Examples
from fedraclora.plugins import nearest

RowLoss = Callable[[Tensor, Tensor], Tensor]


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def _half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().flatten(1).sum(1)


_ROW_LOSSES: dict[str, RowLoss] = {"classification": _cross_entropy, "regression": _half_squared_error}


def row_loss(task: str) -> RowLoss:
    """Return the loss of each row: cross-entropy, or half the squared error summed over the outputs.

    Raises ValueError for an unknown task.
    """
    if task not in _ROW_LOSSES:
        raise ValueError(f"task {task!r} is unknown; {nearest(task, _ROW_LOSSES)}")
    return _ROW_LOSSES[task]


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, task: str, *, batch_size: int = 1000) -> tuple[float, float | None]:
    """Return the mean loss over the examples and, for classification, the share of them that the model gets right.

    The model is put in evaluation mode for the time of the call. Raises ValueError where there is no example.
    """
    if not len(examples):
        raise ValueError("there is no example to evaluate on")
    loss_of, was_training = row_loss(task), model.training
    total, correct = 0.0, 0
    model.eval()
    try:
        for start in range(0, len(examples), batch_size):
            targets = examples.targets[start : start + batch_size]
            outputs = model(examples.inputs[start : start + batch_size])
            total += float(loss_of(outputs, targets).double().sum())
            correct += int((outputs.argmax(1) == targets).sum()) if task == "classification" else 0
    finally:
        model.train(was_training)
    return total / len(examples), correct / len(examples) if task == "classification" else None
