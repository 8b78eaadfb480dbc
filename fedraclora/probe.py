"""One look at a model before it is trained: do its clients stay apart, and does every trained tensor matter?

Batched training is right only if a client's outputs depend on its own rows and its own tensors. Layers can be checked
by their type, a forward pass cannot: one that swaps axes, pools over the batch or reads a weight without calling its
layer is found by running two clients together and alone.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedraclora.layers import CohortModel, Draws

ROWS = 2
TOLERANCE = 1e-3
ADVICE = "keep the batch as the first axis in every layer, do not pool over it, and drop by nn.Dropout layers alone"


def check_clients_stay_apart(model: CohortModel, start: Mapping[str, Tensor], inputs: Tensor) -> None:
    """Raise ValueError where two clients together do not compute what each computes alone.

    `start` are the tensors that one client trains, `inputs` `[num, *input_shape]` any real rows. The model's shared
    weights and frozen factors must be in place. A model with dropout is looked at without it, because what is dropped
    hides what is mixed, and with it, because a mask may fall on the rows of another client.
    """
    for is_dropping in (False, True) if model.has_dropout else (False,):
        _check(model, start, inputs, is_dropping=is_dropping)


def _check(model: CohortModel, start: Mapping[str, Tensor], inputs: Tensor, *, is_dropping: bool) -> None:
    rows = inputs[torch.arange(2 * ROWS, device=inputs.device) % len(inputs)]
    noise = torch.Generator().manual_seed(0)
    both = {
        key: tensor + 0.1 * torch.randn((2, *tensor.shape), generator=noise).to(tensor) for key, tensor in start.items()
    }
    leaves = {key: tensor.requires_grad_() for key, tensor in both.items()}
    model.bind(leaves, num_clients=2)
    try:
        together = model(rows, _draws(0, 1) if is_dropping else None)
    except RuntimeError as error:
        raise ValueError(f"the model cannot train two clients together; {ADVICE} ({error})") from error
    if not is_dropping:
        _check_all_used(leaves, together)
    with torch.no_grad():
        for client in range(2):
            own = slice(client * ROWS, (client + 1) * ROWS)
            model.bind({key: tensor[client : client + 1] for key, tensor in both.items()}, num_clients=1)
            alone = model(rows[own], _draws(client) if is_dropping else None)
            if alone.shape[0] != ROWS or not _close(alone, together[own]):
                raise ValueError(
                    "the model mixes the rows of different clients, or draws noise: two clients together do not "
                    f"compute what each computes alone; {ADVICE}"
                )


def _draws(*clients: int) -> Draws:
    """Return the first draws of some clients; a client's own are the same in any company."""
    return Draws([torch.Generator().manual_seed(client) for client in clients], [ROWS] * len(clients), ROWS)


def _close(alone: Tensor, together: Tensor) -> bool:
    return bool((alone - together).norm() <= TOLERANCE * (1 + alone.norm()))


def _check_all_used(leaves: Mapping[str, Tensor], outputs: Tensor) -> None:
    gradients: Sequence[Tensor | None] = torch.autograd.grad(outputs.sum(), list(leaves.values()), allow_unused=True)
    unused = [key for key, gradient in zip(leaves, gradients, strict=True) if gradient is None]
    if unused:
        raise ValueError(
            f"the model's outputs do not depend on {unused}: a layer must be called as a module, not through its weight"
        )
