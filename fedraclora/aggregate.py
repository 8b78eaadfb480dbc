"""Weighted means over clients that do not depend on the order in which the clients answer.

With a shared sketch A the mean of the trained factors is the whole aggregation of Fed-RAC-LoRA (arXiv 2410.08305):
mean(B_k) A = mean(B_k A). What is left out: everything a method does with the mean afterwards.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_Kind = tuple[torch.Size, torch.dtype]


def weighted_mean(tensors: Mapping[int, Sequence[Tensor]], weights: Mapping[int, float]) -> list[Tensor]:
    """Return, position by position, the mean of the clients' tensors under weights that are normalised to sum to 1.

    Both mappings are keyed by partition. Clients are added in the order of their keys, in float64, each multiplied and
    then added, so that the bits of the result are the same for any order of arrival; it has the dtypes of the inputs
    and the devices of the first client's. Beside the sums, one client's tensors are held at a time when a mapping
    loads them on access. Raises ValueError, naming the client, for weights that are negative, not finite or all zero,
    for keys that differ, and for tensors whose count, shapes or dtypes differ or are not floating point.
    """
    shares = normalized(weights)
    _check_same_clients(tensors, shares)
    first, *others = shares
    sums, expected = _start(first, tensors[first], shares[first])
    for client in others:
        _add_(sums, _checked(client, tensors[client], expected), shares[client])
    return [total.to(dtype) for total, (_, dtype) in zip(sums, expected, strict=True)]


def normalized(weights: Mapping[int, float]) -> dict[int, float]:
    """Return the weights, in the order of their keys, divided by their sum.

    Raises ValueError for no weights, for a weight that is negative or not finite, and when all are zero.
    """
    if not weights:
        raise ValueError("there is nothing to average: no client has a weight")
    for client, weight in sorted(weights.items()):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"client {client} has weight {weight}; a weight is finite and at least 0")
    total = math.fsum(weights.values())  # exactly rounded, so the order does not matter
    if total == 0:
        raise ValueError(f"the weights of clients {sorted(weights)} are all zero; at least one must be positive")
    return {client: weights[client] / total for client in sorted(weights)}


def _check_same_clients(tensors: Mapping[int, Sequence[Tensor]], shares: Mapping[int, float]) -> None:
    without_weight = sorted(tensors.keys() - shares.keys())
    without_tensors = sorted(shares.keys() - tensors.keys())
    if without_weight or without_tensors:
        raise ValueError(
            "tensors and weights must name the same clients; "
            f"without a weight: {without_weight}, without tensors: {without_tensors}"
        )


def _start(client: int, tensors: Sequence[Tensor], share: float) -> tuple[list[Tensor], list[_Kind]]:
    expected = [(tensor.shape, tensor.dtype) for tensor in tensors]
    for position, (_, dtype) in enumerate(expected):
        if not dtype.is_floating_point:
            raise ValueError(f"tensor {position} of client {client} is {dtype}; a mean needs a floating-point dtype")
    sums = [torch.zeros_like(tensor, dtype=torch.float64, requires_grad=False) for tensor in tensors]
    _add_(sums, tensors, share)
    return sums, expected


def _add_(sums: list[Tensor], tensors: Sequence[Tensor], share: float) -> None:
    for total, tensor in zip(sums, tensors, strict=True):
        # Two roundings, never a fused multiply-add, which not every machine and vector width would use alike.
        total.add_(tensor.detach().to(total) * share)


def _checked(client: int, tensors: Sequence[Tensor], expected: list[_Kind]) -> Sequence[Tensor]:
    if len(tensors) != len(expected):
        raise ValueError(f"client {client} sent {len(tensors)} tensors, expected {len(expected)} as from the others")
    for position, (tensor, (shape, dtype)) in enumerate(zip(tensors, expected, strict=True)):
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"tensor {position} of client {client} is {found}, expected {dtype} {list(shape)}")
    return tensors
