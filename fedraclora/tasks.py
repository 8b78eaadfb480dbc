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
    if outputs.shape != targets.shape:
        # Shapes that broadcast would give a loss of something else.
        raise ValueError(f"the model puts out {tuple(outputs.shape)} for targets of shape {tuple(targets.shape)}")
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
    loss_of = row_loss(task)
    # Each module's own mode: a frozen BatchNorm must not come back in training mode.
    modes = {module: module.training for module in model.modules()}
    total, correct = 0.0, 0
    model.eval()
    try:
        for start in range(0, len(examples), batch_size):
            targets = examples.targets[start : start + batch_size]
            outputs = model(examples.inputs[start : start + batch_size])
            total += float(loss_of(outputs, targets).double().sum())
            correct += int((outputs.argmax(1) == targets).sum()) if task == "classification" else 0
    finally:
        for module, was_training in modes.items():
            module.training = was_training
    return total / len(examples), correct / len(examples) if task == "classification" else None
