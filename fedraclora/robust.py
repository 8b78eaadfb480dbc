"""Aggregates that a minority of wrong or hostile clients cannot carry away, and the choice of the clients to trust.

Coordinate-wise median and trimmed mean: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", 2018, arXiv 1803.01498. Krum and multi-Krum: Blanchard et al., "Machine Learning with Adversaries:
Byzantine Tolerant Gradient Descent", 2017, arXiv 1703.02757. Norm clipping: Sun et al., "Can You Really Backdoor
Federated Learning?", 2019, arXiv 1911.07963. What is left out: weights, because a client states its own.

A client's tensors come in one order, the same for all, and clients are taken in the order of their numbers, so that
no result depends on the order of the mapping.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fedraclora.privacy import clip_to

# Coordinates are taken in pieces: all clients' numbers of a piece are in memory in float64 (16 MB).
_PIECE_NUMBERS = 2**21

_Rows = npt.NDArray[np.float64]


def coordinate_median(tensors: Mapping[int, Sequence[Tensor]]) -> list[Tensor]:
    """Return, position by position, the median over the clients of each coordinate.

    For an even number of clients it is the mean of the two middle ones, in float64. The result has the dtypes and
    devices of the first client's tensors; NaN sorts as the largest number. While fewer than half of the clients are
    wrong it lies within the others' range. Raises ValueError, naming the client, for tensors whose count, shapes or
    dtypes differ or are not floating point, and for no clients.
    """
    lower, upper = (len(tensors) - 1) // 2, len(tensors) // 2
    return _of_sorted(tensors, lambda rows: 0.5 * rows[lower] + 0.5 * rows[upper])


def trimmed_mean(tensors: Mapping[int, Sequence[Tensor]], *, trim: int) -> list[Tensor]:
    """Return, position by position, the mean of each coordinate without its `trim` largest and `trim` smallest numbers.

    The mean is taken in float64; otherwise as `coordinate_median`. While at most `trim` clients are wrong it lies
    within the others' range. Raises ValueError also for a `trim` that is negative or leaves nothing.
    """
    num_clients = len(tensors)
    if trim < 0 or 2 * trim >= num_clients:
        raise ValueError(f"trim={trim} must be at least 0 and below half of the {num_clients} clients")
    return _of_sorted(tensors, lambda rows: rows[trim : num_clients - trim].mean(axis=0))


def krum(tensors: Mapping[int, Sequence[Tensor]], *, num_attackers: int, num_chosen: int = 1) -> list[int]:
    """Return the `num_chosen` clients with the smallest Krum scores, best first: Krum for 1, multi-Krum for more.

    The score of one of n clients is the sum of its squared Euclidean distances to the n - num_attackers - 2 others that
    are nearest to it; ties go to the smaller client number. A distance that is no number counts as infinite. The paper
    proves resilience for n >= 2 num_attackers + 3. Raises ValueError for fewer than num_attackers + 3 clients, for a
    `num_chosen` outside [1, n], and for tensors as `coordinate_median`.
    """
    num_near = len(tensors) - num_attackers - 2
    if num_attackers < 0 or num_near < 1:
        raise ValueError(
            f"num_attackers={num_attackers} among {len(tensors)} clients leaves {num_near} neighbours to compare with; "
            "it must be at least 0, and there must be at least 3 more clients"
        )
    if not 1 <= num_chosen <= len(tensors):
        raise ValueError(f"num_chosen={num_chosen} must lie between 1 and the {len(tensors)} clients")
    distances = _squared_distances(_in_order(tensors)).tolist()
    # Sorted and added one by one, so that clients who sent the same have the same score to the last bit.
    scores = [sum(sorted(row)[:num_near]) for row in distances]
    ranked = sorted(zip(scores, sorted(tensors), strict=True))
    return [client for _, client in ranked[:num_chosen]]


def clip_norms(tensors: Mapping[int, Sequence[Tensor]], *, max_norm: float) -> dict[int, list[Tensor]]:
    """Return each client's tensors, scaled as a whole to a Euclidean norm of at most `max_norm`.

    Raises ValueError, naming the client, for a norm that is not finite, and for a `max_norm` that is not positive.
    """
    clipped: dict[int, list[Tensor]] = {}
    for client in sorted(tensors):
        try:
            clipped[client], _ = clip_to(tensors[client], max_norm)
        except ValueError as error:
            raise ValueError(f"client {client}: {error}") from error
    return clipped


def _of_sorted(tensors: Mapping[int, Sequence[Tensor]], reduce: Callable[[_Rows], _Rows]) -> list[Tensor]:
    """Return `reduce` of each coordinate's sorted numbers; it maps `[clients, coordinates]` to `[coordinates]`."""
    sent = _in_order(tensors)
    results = []
    for position, like in enumerate(sent[0]):
        # NumPy sorts columns ten times as fast as torch does on the CPU.
        pieces = [reduce(np.sort(piece.numpy(), axis=0)) for piece in _pieces(sent, position)]
        results.append(torch.from_numpy(np.concatenate(pieces)).to(like).view(like.shape))
    return results


def _squared_distances(sent: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the clients' squared distances `[clients, clients]`, infinite on the diagonal: none is its own neighbour.

    They are sums of squared differences: a Gram matrix would lose small distances between large tensors.
    """
    num_clients = len(sent)
    pairs = torch.zeros(num_clients * (num_clients - 1) // 2, dtype=torch.float64)
    for position in range(len(sent[0])):
        for piece in _pieces(sent, position):
            pairs += F.pdist(piece).square()
    rows, columns = torch.triu_indices(num_clients, num_clients, offset=1)
    distances = torch.full((num_clients, num_clients), math.inf, dtype=torch.float64)
    distances[rows, columns] = distances[columns, rows] = pairs.nan_to_num(nan=math.inf, posinf=math.inf)
    return distances


def _pieces(sent: Sequence[Sequence[Tensor]], position: int) -> Iterator[Tensor]:
    """Yield all clients' numbers of one position, some coordinates at a time: `[clients, coordinates]` in float64."""
    flat = [tensors[position].detach().reshape(-1) for tensors in sent]
    width = max(1, _PIECE_NUMBERS // len(flat))
    for start in range(0, max(1, flat[0].numel()), width):
        yield torch.stack([row[start : start + width].to("cpu", torch.float64) for row in flat])


def _in_order(tensors: Mapping[int, Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """Return the clients' tensors in the order of their numbers. Raises ValueError where they are not alike."""
    if not tensors:
        raise ValueError("there is nothing to aggregate: no client sent anything")
    sent = {client: tensors[client] for client in sorted(tensors)}
    expected = [_kind(tensor) for tensor in next(iter(sent.values()))]
    for client, own in sent.items():
        found = [_kind(tensor) for tensor in own]
        if found != expected:
            raise ValueError(f"client {client} sent {found}, expected {expected} as from the first")
        if not all(tensor.is_floating_point() for tensor in own):
            raise ValueError(f"client {client} sent {found}; only floating-point tensors can be aggregated")
    return list(sent.values())


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
