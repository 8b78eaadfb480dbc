"""Tests of fedraclora.aggregate."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora.aggregate import normalized, weighted_mean

WEIGHTS = st.dictionaries(st.integers(0, 1000), st.floats(0.001, 1e6), min_size=1, max_size=8)


def _random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _replies(clients: Sequence[int], dtype: torch.dtype = torch.float32) -> dict[int, list[Tensor]]:
    return {k: [_random(2 * k, 3, 2, dtype=dtype), _random(2 * k + 1, 5, dtype=dtype)] for k in clients}


@given(WEIGHTS, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_bits_do_not_depend_on_the_order_of_arrival(weights: dict[int, float], random: object) -> None:
    replies = _replies(list(weights), torch.float64)
    expected = weighted_mean(replies, weights)
    order = list(weights)
    random.shuffle(order)  # type: ignore[attr-defined]  # hypothesis's random.Random
    found = weighted_mean({k: replies[k] for k in order}, {k: weights[k] for k in reversed(order)})
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_mean_equals_exact_rational_arithmetic() -> None:
    weights = {3: 0.1, 1: 7.0, 2: 1e-3}
    replies = _replies([1, 2, 3], torch.float64)
    total = sum(Fraction(w) for w in weights.values())
    for position, found in enumerate(weighted_mean(replies, weights)):
        for index, value in enumerate(found.flatten().tolist()):
            terms = [Fraction(w) * Fraction(replies[k][position].flatten()[index].item()) for k, w in weights.items()]
            # Three products of three roundings each and two additions, of numbers below 8.
            exact = sum(terms, Fraction(0)) / total
            assert abs(Fraction(value) - exact) <= Fraction(8 * 11, 2**53)


def test_float32_mean_is_the_rounded_exact_mean_even_when_the_sum_cancels() -> None:
    values = {0: 1e8, 1: 1.0, 2: -1e8, 3: 2.0}  # a float32 sum loses the 1
    mean = weighted_mean({k: [torch.tensor([v])] for k, v in values.items()}, dict.fromkeys(values, 1.0))
    assert mean[0].dtype == torch.float32
    assert mean[0].tolist() == [0.75]


@given(WEIGHTS, st.sampled_from([2.0**-10, 2.0, 2.0**20]))
@settings(deadline=None)
def test_only_the_ratio_of_weights_counts(weights: dict[int, float], factor: float) -> None:
    replies = _replies(list(weights))
    scaled = weighted_mean(replies, {k: factor * w for k, w in weights.items()})
    assert all(torch.equal(a, b) for a, b in zip(scaled, weighted_mean(replies, weights), strict=True))


def test_mean_of_one_client_is_a_copy_of_its_tensors() -> None:
    replies = _replies([4], torch.float64)
    mean = weighted_mean(replies, {4: 0.3})
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(mean, replies[4], strict=True))


def test_inputs_are_left_as_they_were_and_no_gradient_flows() -> None:
    replies = {k: [tensor.requires_grad_() for tensor in sent] for k, sent in _replies([0, 1], torch.float64).items()}
    mean = weighted_mean(replies, {0: 1.0, 1: 3.0})
    assert not any(tensor.requires_grad for tensor in mean)
    untouched = _replies([0, 1], torch.float64)
    assert all(torch.equal(a, b) for k in replies for a, b in zip(replies[k], untouched[k], strict=True))


def test_clients_of_weight_zero_do_not_move_the_mean() -> None:
    replies = _replies([0, 1])
    assert torch.equal(weighted_mean(replies, {0: 2.0, 1: 0.0})[0], replies[0][0])


def test_clients_without_tensors_have_an_empty_mean() -> None:
    assert weighted_mean({0: [], 1: []}, {0: 1.0, 1: 1.0}) == []


class _LoadedOnAccess(Mapping[int, Sequence[Tensor]]):
    """Make each client's tensor when it is asked for, and record how many earlier ones are still alive then."""

    def __init__(self, num_clients: int) -> None:
        self.num_clients = num_clients
        self.loaded: list[weakref.ref[Tensor]] = []
        self.num_alive: list[int] = []

    def __getitem__(self, client: int) -> Sequence[Tensor]:
        self.num_alive.append(sum(ref() is not None for ref in self.loaded))
        tensor = torch.full((4,), float(client))
        self.loaded.append(weakref.ref(tensor))
        return [tensor]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.num_clients))

    def __len__(self) -> int:
        return self.num_clients


def test_clients_are_streamed_one_at_a_time() -> None:
    replies = _LoadedOnAccess(20)
    (mean,) = weighted_mean(replies, dict.fromkeys(range(20), 1.0))
    torch.testing.assert_close(mean, torch.full((4,), 9.5))
    assert len(replies.num_alive) == 20
    assert max(replies.num_alive) <= 1


def test_c7_mean_of_b_times_shared_a_is_the_mean_of_the_products() -> None:
    a = _random(0, 3, 9, dtype=torch.float64)
    factors = {k: [_random(k + 1, 7, 3, dtype=torch.float64)] for k in range(5)}
    weights = {k: float(k + 1) for k in factors}
    products = {k: [b @ a] for k, (b,) in factors.items()}
    torch.testing.assert_close(
        weighted_mean(factors, weights)[0] @ a, weighted_mean(products, weights)[0], rtol=0, atol=1e-14
    )


def test_c8_mean_of_products_less_product_of_means_is_the_covariance_of_the_factors() -> None:
    num_clients, rank = 3, 2
    weights = {k: float(k + 1) for k in range(num_clients)}
    factors = {
        k: [_random(k, 12, rank, dtype=torch.float64), _random(k + 50, rank, 10, dtype=torch.float64)] for k in weights
    }
    mean_b, mean_a = weighted_mean(factors, weights)
    (mean_product,) = weighted_mean({k: [b @ a] for k, (b, a) in factors.items()}, weights)
    shares = [Fraction(k + 1, 6) for k in range(num_clients)]
    covariance = sum(
        float(share) * (b - mean_b) @ (a - mean_a) for share, (b, a) in zip(shares, factors.values(), strict=True)
    )
    error = mean_product - mean_b @ mean_a
    torch.testing.assert_close(error, covariance, rtol=0, atol=1e-14)
    assert torch.linalg.matrix_rank(error, rtol=1e-10).item() == (num_clients - 1) * rank


@given(WEIGHTS)
def test_normalized_weights_are_sorted_and_sum_to_one(weights: dict[int, float]) -> None:
    shares = normalized(weights)
    total = sum(Fraction(w) for w in weights.values())
    assert list(shares) == sorted(weights)
    # One rounding for the sum and one for the quotient.
    assert all(abs(Fraction(share) - Fraction(weights[k]) / total) <= 2**-51 for k, share in shares.items())


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), float("-inf")])
def test_bad_weight_names_its_client(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"client 7 has weight {weight}; a weight is finite and at least 0"):
        normalized({3: 1.0, 7: weight})


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clients \[3, 7\] are all zero"):
        normalized({7: 0.0, 3: 0.0})


def test_nothing_to_average_is_refused() -> None:
    with pytest.raises(ValueError, match="no client has a weight"):
        weighted_mean({}, {})


def test_tensors_and_weights_of_other_clients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"without a weight: \[2\], without tensors: \[3\]"):
        weighted_mean(_replies([1, 2]), {1: 1.0, 3: 1.0})


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([torch.zeros(3, 2)], "client 2 sent 1 tensors, expected 2"),
        ([torch.zeros(3, 2), torch.zeros(5, 1)], r"tensor 1 of client 2 is torch.float32 \[5, 1\], .* \[5\]"),
        ([torch.zeros(3, 2).double(), torch.zeros(5)], "tensor 0 of client 2 is torch.float64 .* torch.float32"),
    ],
)
def test_tensors_unlike_those_of_the_others_name_their_client(sent: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_mean(_replies([1]) | {2: sent}, {1: 1.0, 2: 1.0})


def test_integers_are_refused_rather_than_truncated() -> None:
    with pytest.raises(ValueError, match=r"tensor 0 of client 1 is torch.int64; a mean needs a floating-point dtype"):
        weighted_mean({1: [torch.tensor([1])]}, {1: 1.0})
