"""Tests of fedraclora.robust."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora import robust
from fedraclora.robust import clip_norms, coordinate_median, krum, trimmed_mean

SEEDS = st.integers(0, 2**32)
HUGE = st.sampled_from([1e3, -1e9, 1e30, -1e30, float("inf"), float("-inf")])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])

Updates = dict[int, list[Tensor]]


def _updates(num_clients: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Updates:
    source = torch.Generator().manual_seed(seed)
    shapes = ((3, 2), (5,), ())
    return {
        client: [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for shape in shapes]
        for client in range(num_clients)
    }


def _rows(updates: Updates) -> np.ndarray:
    """Return all numbers of each client as a row, in float64."""
    return np.stack([np.concatenate([t.double().numpy().ravel() for t in updates[k]]) for k in sorted(updates)])


def _row(result: list[Tensor]) -> np.ndarray:
    return _rows({0: result})[0]


def _rounded(row: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(row).to(dtype).double().numpy()


def _constant(value: float) -> list[Tensor]:
    return [torch.full((3, 2), value), torch.full((5,), value), torch.tensor(value)]


@pytest.fixture(params=[1, 7, 2**21])
def _any_piece(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the coordinates into pieces of one, of a few (the last one smaller) and not at all."""
    monkeypatch.setattr(robust, "_PIECE_NUMBERS", request.param)


# ---- median and trimmed mean


@given(st.integers(1, 9), SEEDS, DTYPES)
@settings(max_examples=25)
def test_median_is_numpys(num_clients: int, seed: int, dtype: torch.dtype) -> None:
    updates = _updates(num_clients, seed, dtype)
    found = coordinate_median(updates)
    assert all(a.dtype == dtype and a.shape == b.shape for a, b in zip(found, updates[0], strict=True))
    np.testing.assert_array_equal(_row(found), _rounded(np.median(_rows(updates), axis=0), dtype))


@given(st.integers(1, 9), st.data(), SEEDS, DTYPES)
@settings(max_examples=25)
def test_trimmed_mean_is_the_exact_mean_of_what_is_left(
    num_clients: int, data: st.DataObject, seed: int, dtype: torch.dtype
) -> None:
    trim = data.draw(st.integers(0, (num_clients - 1) // 2))
    updates = _updates(num_clients, seed, dtype)
    found = _row(trimmed_mean(updates, trim=trim))
    for coordinate, column in enumerate(_rows(updates).T):
        kept = sorted(column)[trim : num_clients - trim]
        exact = sum(map(Fraction, kept), Fraction(0)) / len(kept)
        # A last rounding to the dtype, and at most ten in float64 of sums below 9 * 8.
        allowed = abs(exact) * Fraction(torch.finfo(dtype).eps) / 2 + Fraction(720, 2**53)
        assert abs(Fraction(found[coordinate]) - exact) <= allowed


@pytest.mark.parametrize("trim", [1, 2])
def test_trimming_all_but_the_middle_is_the_median(trim: int) -> None:
    for num_clients in (2 * trim + 1, 2 * trim + 2):
        updates = _updates(num_clients, dtype=torch.float64)
        pairs = zip(trimmed_mean(updates, trim=trim), coordinate_median(updates), strict=True)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-15) for a, b in pairs)


@given(st.integers(1, 9), SEEDS, st.data())
@settings(max_examples=25)
def test_a_minority_with_any_numbers_leaves_the_median_in_the_others_range(
    num_clients: int, seed: int, data: st.DataObject
) -> None:
    num_attackers = data.draw(st.integers(0, (num_clients - 1) // 2))
    honest = _updates(num_clients - num_attackers, seed)
    attackers = {100 + k: _constant(data.draw(HUGE)) for k in range(num_attackers)}
    found, rows = _row(coordinate_median(honest | attackers)), _rows(honest)
    assert (rows.min(axis=0) <= found).all()
    assert (found <= rows.max(axis=0)).all()


@given(st.integers(1, 9), SEEDS, st.data())
@settings(max_examples=25)
def test_as_many_attackers_as_are_trimmed_leave_the_mean_in_the_others_range(
    num_clients: int, seed: int, data: st.DataObject
) -> None:
    trim = data.draw(st.integers(0, (num_clients - 1) // 2))
    num_attackers = data.draw(st.integers(0, trim))
    honest = _updates(num_clients - num_attackers, seed, torch.float64)
    attackers = {100 + k: [t.double() for t in _constant(data.draw(HUGE))] for k in range(num_attackers)}
    found, rows = _row(trimmed_mean(honest | attackers, trim=trim)), _rows(honest)
    assert (rows.min(axis=0) - 1e-14 <= found).all()
    assert (found <= rows.max(axis=0) + 1e-14).all()


def test_half_of_the_clients_can_move_the_median_and_one_more_than_trimmed_the_mean() -> None:
    honest, attackers = _updates(2), {k: _constant(1e9) for k in (7, 8)}
    assert (_row(coordinate_median(honest | attackers)) > 1e8).all()
    assert (_row(trimmed_mean(_updates(3) | attackers, trim=1)) > 1e8).all()


@pytest.mark.usefixtures("_any_piece")
def test_results_do_not_depend_on_how_the_coordinates_are_cut() -> None:
    updates = _updates(6, dtype=torch.float64)
    np.testing.assert_array_equal(_row(coordinate_median(updates)), np.median(_rows(updates), axis=0))
    rows = np.sort(_rows(updates), axis=0)[1:-1]
    np.testing.assert_allclose(_row(trimmed_mean(updates, trim=1)), rows.mean(axis=0), rtol=0, atol=1e-15)
    assert krum(updates, num_attackers=1, num_chosen=6) == _krum_by_hand(_rows(updates), list(updates), 1)


@pytest.mark.parametrize("aggregate", [coordinate_median, lambda updates: trimmed_mean(updates, trim=2)])
def test_bits_depend_neither_on_the_order_of_arrival_nor_on_who_sent_what(aggregate: Any) -> None:
    updates = _updates(7)
    expected = aggregate(updates)
    shuffled = aggregate({client: updates[client] for client in (4, 0, 6, 2, 1, 5, 3)})
    renamed = aggregate({6 - client: tensors for client, tensors in updates.items()})
    for found in (shuffled, renamed):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("num_clients", "trim"), [(4, 2), (3, 2), (5, -1)])
def test_a_trim_that_leaves_nothing_or_is_negative_is_refused(num_clients: int, trim: int) -> None:
    with pytest.raises(ValueError, match=f"trim={trim} must be at least 0 and below half of the {num_clients} clients"):
        trimmed_mean(_updates(num_clients), trim=trim)


def test_an_empty_tensor_stays_empty_and_inputs_stay_as_they_were() -> None:
    updates = {client: [torch.zeros(0, 3), torch.tensor([2.0, 1.0])] for client in range(3)}
    found = coordinate_median(updates)
    assert found[0].shape == (0, 3)
    assert all(tensors[1].tolist() == [2.0, 1.0] for tensors in updates.values())


# ---- Krum


def _krum_by_hand(rows: np.ndarray, clients: list[int], num_attackers: int) -> list[int]:
    """Return all clients by their score, from the definition."""
    scored = []
    for place, client in enumerate(clients):
        others = [((rows[place] - row) ** 2).sum() for other, row in enumerate(rows) if other != place]
        scored.append((sum(sorted(others)[: len(clients) - num_attackers - 2]), client))
    return [client for _, client in sorted(scored)]


@given(st.integers(3, 9), SEEDS, st.data())
@settings(max_examples=25)
def test_krum_chooses_the_smallest_sums_of_squared_distances(num_clients: int, seed: int, data: st.DataObject) -> None:
    num_attackers = data.draw(st.integers(0, num_clients - 3))
    num_chosen = data.draw(st.integers(1, num_clients))
    updates = _updates(num_clients, seed, torch.float64)
    expected = _krum_by_hand(_rows(updates), sorted(updates), num_attackers)
    assert krum(updates, num_attackers=num_attackers, num_chosen=num_chosen) == expected[:num_chosen]


@given(st.integers(1, 3), st.integers(0, 3), SEEDS, st.data())
@settings(max_examples=25)
def test_krum_never_chooses_attackers_that_are_far_away(
    num_attackers: int, excess: int, seed: int, data: st.DataObject
) -> None:
    num_honest = num_attackers + 3 + excess
    honest = _updates(num_honest, seed)
    # Alike, they are at distance 0 from each other; NaN and infinities are far from everyone.
    value = data.draw(st.sampled_from([1e3, -1e6, 1e30, float("inf"), float("nan")]))
    attackers = {-1 - k: _constant(value) for k in range(num_attackers)}
    assert krum(honest | attackers, num_attackers=num_attackers)[0] in honest
    chosen = krum(honest | attackers, num_attackers=num_attackers, num_chosen=num_honest)
    assert sorted(chosen) == sorted(honest)


def test_krum_sees_small_distances_between_large_updates() -> None:
    # Squares of 1e8 have a spacing of 2 in float64: their differences would drown the distances.
    offsets = [0.01 * client**2 for client in range(30)]
    updates = {client: [torch.full((4,), 1e8 + offset, dtype=torch.float64)] for client, offset in enumerate(offsets)}
    expected = _krum_by_hand(np.array(offsets)[:, None], list(updates), 5)
    assert krum(updates, num_attackers=5, num_chosen=30) == expected


@given(st.permutations([3, 5, 8, 11, 20]), st.integers(1, 200))
@settings(max_examples=20)
def test_ties_go_to_the_smaller_number(order: list[int], size: int) -> None:
    same = torch.randn(size, generator=torch.Generator().manual_seed(size))
    far = torch.randn(size, generator=torch.Generator().manual_seed(size + 1))
    updates = {client: [far.clone() if client == 3 else same.clone()] for client in order}
    assert krum(updates, num_attackers=1, num_chosen=5) == [5, 8, 11, 20, 3]


def test_equally_good_clients_that_differ_tie_exactly() -> None:
    # The corners of a square: each has the same distances to the others.
    corners = {4: (0.1, 0.7), 2: (0.7, 0.1), 9: (0.1, 0.1), 1: (0.7, 0.7)}
    updates = {client: [torch.tensor(corner)] for client, corner in corners.items()}
    assert krum(updates, num_attackers=0, num_chosen=4) == [1, 2, 4, 9]


def test_krum_does_not_depend_on_the_order_of_arrival() -> None:
    updates = _updates(7)
    expected = krum(updates, num_attackers=2, num_chosen=7)
    assert krum({k: updates[k] for k in (5, 1, 6, 0, 2, 4, 3)}, num_attackers=2, num_chosen=7) == expected


def test_clients_that_send_no_tensors_are_all_alike() -> None:
    assert krum({2: [], 1: [], 0: []}, num_attackers=0, num_chosen=2) == [0, 1]
    assert coordinate_median({2: [], 1: []}) == []


@pytest.mark.parametrize(("num_clients", "num_attackers"), [(4, 2), (3, 1), (2, 0), (5, -1)])
def test_too_few_clients_for_their_attackers_are_refused(num_clients: int, num_attackers: int) -> None:
    with pytest.raises(ValueError, match=f"num_attackers={num_attackers} among {num_clients} clients"):
        krum(_updates(num_clients), num_attackers=num_attackers)


@pytest.mark.parametrize("num_chosen", [0, 6])
def test_a_number_of_chosen_outside_the_clients_is_refused(num_chosen: int) -> None:
    with pytest.raises(ValueError, match=f"num_chosen={num_chosen} must lie between 1 and the 5 clients"):
        krum(_updates(5), num_attackers=1, num_chosen=num_chosen)


# ---- norm clipping and what all refuse


@given(st.integers(1, 5), SEEDS, st.floats(1e-3, 1e3))
@settings(max_examples=25)
def test_each_client_is_scaled_as_a_whole_to_the_norm_allowed(num_clients: int, seed: int, max_norm: float) -> None:
    updates = _updates(num_clients, seed, torch.float64)
    before, after = _rows(updates), _rows(clip_norms(updates, max_norm=max_norm))
    norms = np.linalg.norm(before, axis=1)
    assert (np.linalg.norm(after, axis=1) <= max_norm * (1 + 1e-12)).all()
    np.testing.assert_allclose(after, before * np.minimum(1, max_norm / norms)[:, None], rtol=1e-12, atol=0)


def test_clipped_clients_come_in_the_order_of_their_numbers() -> None:
    assert list(clip_norms({2: _constant(1.0), 1: _constant(0.0)}, max_norm=1.0)) == [1, 2]


def test_an_update_that_cannot_be_clipped_names_its_client() -> None:
    with pytest.raises(ValueError, match="client 2: the norm of an update is inf"):
        clip_norms({1: _constant(1.0), 2: _constant(float("inf"))}, max_norm=1.0)


@pytest.mark.parametrize(
    "aggregate",
    [
        coordinate_median,
        lambda updates: trimmed_mean(updates, trim=0),
        lambda updates: krum(updates, num_attackers=0),
    ],
)
@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([torch.zeros(3)], r"client 9 sent \['float32 \[3\]'\], expected \['float32 \[3\]', 'float32 \[1\]'\]"),
        ([torch.zeros(3), torch.zeros(3)], r"client 9 sent .*'float32 \[3\]'\], expected"),
        ([torch.zeros(3), torch.zeros(1).double()], r"client 9 sent .*'float64 \[1\]'\], expected"),
    ],
)
def test_tensors_unlike_those_of_the_others_name_their_client(aggregate: Any, sent: list[Tensor], message: str) -> None:
    others = {client: [torch.zeros(3), torch.zeros(1)] for client in range(3)}
    with pytest.raises(ValueError, match=message):
        aggregate(others | {9: sent})


def test_integers_are_refused_rather_than_truncated() -> None:
    with pytest.raises(ValueError, match=r"client 1 sent \['int64 \[1\]'\]; only floating-point tensors"):
        coordinate_median({1: [torch.tensor([1])]})


def test_nothing_to_aggregate_is_refused() -> None:
    with pytest.raises(ValueError, match="no client sent anything"):
        coordinate_median({})
