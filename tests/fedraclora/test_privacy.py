"""Tests of fedraclora.privacy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora.privacy import Privacy, clip_to, next_clip, noise_generator, noisy_mean, noisy_share

CLIPS = st.floats(1e-3, 1e3)
SIZES = st.floats(1e-6, 1e6)
SEEDS = st.integers(0, 2**32)
# A mean of so many independent numbers lies within 5 standard errors but for one time in 1.7 million.
WIDE = 5.0


def _privacy(**changes: Any) -> Privacy:
    return Privacy(**{"level": "client", "clip": 1.0, "noise": 1.0, "delta": 1e-5, **changes})


def _adaptive(**changes: Any) -> Privacy:
    return _privacy(**{"adaptive": True, "count_noise": 5.0, **changes})


def _update(seed: int, size: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return two tensors whose norm together is `size`."""
    source = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(3, 2, generator=source, dtype=torch.float64), torch.randn(4, generator=source).double()]
    return [(size / _norm(tensors) * tensor).to(dtype) for tensor in tensors]


def _norm(tensors: list[Tensor]) -> float:
    return math.hypot(*(value for tensor in tensors for value in tensor.double().flatten().tolist()))


def _sum(cohort: dict[int, list[Tensor]], clip: float, cohort_size: int) -> list[Tensor]:
    clipped = {client: clip_to(tensors, clip)[0] for client, tensors in cohort.items()}
    mean = noisy_mean(
        clipped, _privacy(noise=0.0), clip=clip, cohort_size=cohort_size, generator=noise_generator(seed=0)
    )
    return [cohort_size * tensor for tensor in mean]


def _noise(num_clients: int, *, seed: int = 1, cohort_size: int = 4, privacy: Privacy | None = None) -> np.ndarray:
    """Return what `noisy_mean` makes of the zeros of some clients, times the cohort's size."""
    zeros = {client: [torch.zeros(400, 250, dtype=torch.float64)] for client in range(num_clients)}
    generator = noise_generator(seed)
    mean = noisy_mean(zeros, privacy or _privacy(), clip=0.5, cohort_size=cohort_size, generator=generator)
    return cohort_size * mean[0].numpy().ravel()


# ---- clipping


@given(SEEDS, SIZES, CLIPS, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=30)
def test_clipped_norm_never_exceeds_the_clip_even_after_rounding(
    seed: int, size: float, clip: float, dtype: torch.dtype
) -> None:
    clipped, _ = clip_to(_update(seed, size, dtype), clip)
    assert all(tensor.dtype == dtype for tensor in clipped)
    assert _norm(clipped) <= clip * (1 + 1e-12)


@given(SEEDS, SIZES, CLIPS)
@settings(max_examples=30)
def test_clipping_multiplies_by_the_smaller_of_one_and_clip_over_norm(seed: int, size: float, clip: float) -> None:
    update = _update(seed, size)
    clipped, _ = clip_to(update, clip)
    factor = min(1.0, clip / _norm(update))
    for found, tensor in zip(clipped, update, strict=True):
        torch.testing.assert_close(found, factor * tensor, rtol=1e-12, atol=0)


def test_an_update_is_within_the_clip_up_to_a_norm_equal_to_it() -> None:
    update = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    assert clip_to(update, 5.0) == (update, True)
    assert clip_to(update, math.nextafter(5.0, 0.0))[1] is False


def test_a_zero_update_stays_zero() -> None:
    clipped, is_within = clip_to([torch.zeros(3), torch.zeros(2, 2)], 0.1)
    assert is_within
    assert [tensor.count_nonzero().item() for tensor in clipped] == [0, 0]


def test_clipping_leaves_its_argument_as_it_was_and_passes_no_gradient() -> None:
    update = [tensor.requires_grad_() for tensor in _update(0, 10.0)]
    clipped, _ = clip_to(update, 1.0)
    assert not any(tensor.requires_grad for tensor in clipped)
    assert all(torch.equal(a, b) for a, b in zip(update, _update(0, 10.0), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_no_factor_makes_small_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"the norm of an update is {value}; only finite ones"):
        clip_to([torch.tensor([value, 1.0])], 1.0)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_a_clip_that_is_not_positive_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match=f"clip={clip} must be positive"):
        clip_to([torch.zeros(1)], clip)


# ---- the noisy mean


@given(SEEDS, SIZES, SIZES, CLIPS, st.integers(1, 5))
@settings(max_examples=30)
def test_replacing_one_client_moves_the_sum_by_at_most_twice_the_clip(
    seed: int, size: float, other_size: float, clip: float, num_clients: int
) -> None:
    cohort = {client: _update(seed + client, size) for client in range(num_clients)}
    neighbour = cohort | {0: _update(seed + 99, other_size)}
    pairs = zip(_sum(cohort, clip, 6), _sum(neighbour, clip, 6), strict=True)
    assert _norm([a - b for a, b in pairs]) <= 2 * clip * (1 + 1e-9)


def test_an_opposite_update_moves_the_sum_by_twice_the_clip() -> None:
    update = _update(0, 7.0)
    opposite = [-tensor for tensor in update]
    pairs = zip(_sum({0: update, 1: update}, 0.5, 2), _sum({0: opposite, 1: update}, 0.5, 2), strict=True)
    assert _norm([a - b for a, b in pairs]) == pytest.approx(1.0, rel=1e-9)


@given(SEEDS, SIZES, CLIPS)
@settings(max_examples=30)
def test_a_client_that_failed_is_a_zero_update(seed: int, size: float, clip: float) -> None:
    cohort = {client: _update(seed + client, size) for client in range(3)}
    zeros = {3: [torch.zeros_like(tensor) for tensor in cohort[0]]}
    for found, expected in zip(_sum(cohort, clip, 4), _sum(cohort | zeros, clip, 4), strict=True):
        assert torch.equal(found, expected)
    moved = [a - b for a, b in zip(_sum(cohort, clip, 4), _sum({0: cohort[0], 1: cohort[1]}, clip, 4), strict=True)]
    assert _norm(moved) <= clip * (1 + 1e-9)


def test_without_noise_it_is_the_sum_over_the_cohorts_size() -> None:
    cohort = {client: _update(client, 0.5) for client in range(3)}
    mean = noisy_mean(cohort, _privacy(noise=0.0), clip=1.0, cohort_size=5, generator=noise_generator(0))
    for position, found in enumerate(mean):
        expected = sum(np.asarray(cohort[client][position]) for client in cohort) / 5
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-15, atol=1e-16)


def test_noise_on_the_sum_has_mean_zero_and_the_standard_deviation_noise_times_clip() -> None:
    noise = _noise(1, privacy=_privacy(noise=3.0)) / (3.0 * 0.5)
    num = len(noise)
    assert abs(noise.mean()) <= WIDE / math.sqrt(num)
    # The squares have mean 1 and variance 2 (a chi-square of one degree of freedom).
    assert abs((noise**2).mean() - 1) <= WIDE * math.sqrt(2 / num)


def test_noise_is_normal() -> None:
    noise = _noise(1) / 0.5
    for threshold in (0.5, 1.0, 2.0, 3.0):
        share = math.erfc(threshold / math.sqrt(2))
        found = float((np.abs(noise) > threshold).mean())
        assert abs(found - share) <= WIDE * math.sqrt(share * (1 - share) / len(noise))


def test_noise_differs_between_coordinates_positions_and_draws() -> None:
    zeros = {0: [torch.zeros(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)]}
    generator = noise_generator(3)
    drawn = [noisy_mean(zeros, _privacy(), clip=1.0, cohort_size=1, generator=generator) for _ in range(2)]
    values = [value for mean in drawn for tensor in mean for value in tensor.tolist()]
    assert len(set(values)) == 200


def test_noise_does_not_depend_on_how_many_clients_answered() -> None:
    assert np.array_equal(_noise(1), _noise(4))
    assert np.array_equal(_noise(1, cohort_size=8), _noise(1, cohort_size=4))  # the sum's; the mean's is half


def test_an_adaptive_clip_takes_the_larger_noise_on_the_updates() -> None:
    privacy = _adaptive(noise=1.0, count_noise=0.6)
    ratio = _noise(1, privacy=privacy) / _noise(1)
    assert ratio == pytest.approx(privacy.update_noise, rel=1e-12)
    assert privacy.update_noise > 1.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bits_do_not_depend_on_the_order_of_arrival_and_the_dtype_is_the_clients(dtype: torch.dtype) -> None:
    cohort = {client: _update(client, 0.9, dtype) for client in range(5)}
    found = [
        noisy_mean(
            {k: cohort[k] for k in order}, _privacy(noise=1e-9), clip=1.0, cohort_size=5, generator=noise_generator(1)
        )
        for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2])
    ]
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(*found, strict=True))


def test_an_update_beyond_the_clip_is_refused_by_name() -> None:
    cohort = {3: _update(0, 0.5), 7: _update(1, 1.1)}
    with pytest.raises(ValueError, match=r"update of client 7 has norm 1\.1\d*, more than the clip 1\.0; .* clip_to"):
        noisy_mean(cohort, _privacy(), clip=1.0, cohort_size=2, generator=noise_generator(0))


def test_an_update_that_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="update of client 3 has norm nan"):
        noisy_mean({3: [torch.tensor([math.nan])]}, _privacy(), clip=1.0, cohort_size=1, generator=noise_generator(0))


@pytest.mark.parametrize("num_clients", [0, 3])
def test_no_clients_and_more_than_the_cohort_are_refused(num_clients: int) -> None:
    cohort = {client: _update(client, 0.5) for client in range(num_clients)}
    with pytest.raises(ValueError, match=f"{num_clients} clients sent something; it must be 1 to cohort_size=2"):
        noisy_mean(cohort, _privacy(), clip=1.0, cohort_size=2, generator=noise_generator(0))


@pytest.mark.parametrize("sent", [[torch.zeros(1)], [torch.zeros(3), torch.zeros(1)]])
def test_tensors_unlike_the_first_clients_are_refused_even_where_they_would_broadcast(sent: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"client 1 sent tensors of shapes .*, expected \[\[3\]\]"):
        noisy_mean({0: [torch.zeros(3)], 1: sent}, _privacy(), clip=1.0, cohort_size=2, generator=noise_generator(0))


# ---- the generator


def test_noise_from_the_systems_entropy_differs_between_calls() -> None:
    first, second = (noise_generator(None).normal(size=4).tolist() for _ in range(2))
    assert not set(first) & set(second)


def test_noise_from_a_seed_is_the_same_each_time_and_another_for_another_seed() -> None:
    drawn = [noise_generator(seed).normal(size=4).tolist() for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])


def test_entropy_is_taken_where_none_is_given_whatever_numpys_global_seed() -> None:
    drawn = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002
        drawn.append(noise_generator(None).normal())
    assert drawn[0] != drawn[1]


# ---- adaptive clipping


@given(st.floats(1e-3, 1e3), st.floats(1.001, 1e3))
def test_the_two_noises_together_hide_as_much_as_the_noise_alone(noise: float, excess: float) -> None:
    privacy = _adaptive(noise=noise, count_noise=excess * noise / 2)
    # In units of the noise's deviations, replacing a client moves the sum by 2 C / (z_update C), the count by 1.
    distance = math.hypot(2 / privacy.update_noise, 1 / privacy.count_noise)
    assert distance == pytest.approx(2 / noise, rel=1e-9)


def test_the_noise_on_updates_equals_the_papers_formula() -> None:
    assert _adaptive(noise=2.0, count_noise=5.0).update_noise == pytest.approx((2.0**-2 - 10.0**-2) ** -0.5)
    assert _privacy(noise=2.0).update_noise == 2.0
    assert _adaptive(noise=0.0, count_noise=0.0).update_noise == 0.0


def test_a_count_noise_barely_large_enough_makes_the_updates_noise_large_but_finite() -> None:
    assert 1e7 < _adaptive(noise=2.0, count_noise=math.nextafter(1.0, 2.0)).update_noise < math.inf


@pytest.mark.parametrize("count_noise", [0.0, 0.5, 1.0])
def test_a_count_that_gives_away_more_than_allowed_is_refused(count_noise: float) -> None:
    with pytest.raises(ValueError, match=rf"count_noise={count_noise} must exceed noise / 2 = 1.0"):
        _adaptive(noise=2.0, count_noise=count_noise)


@given(CLIPS, st.floats(-0.5, 1.5), st.floats(0, 1), st.floats(0.01, 2))
def test_the_next_clip_follows_the_geometric_rule(clip: float, share: float, quantile: float, lr: float) -> None:
    found = next_clip(clip, share, _adaptive(quantile=quantile, clip_lr=lr))
    assert math.log(found / clip) == pytest.approx(-lr * (share - quantile), abs=1e-12)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.01, 1000.0])
def test_without_noise_the_clip_settles_at_the_quantile_of_the_norms(quantile: float, start: float) -> None:
    norms = np.linspace(1.0, 3.0, 100)
    privacy, clip = _adaptive(noise=0.0, count_noise=0.0, quantile=quantile), start
    for _ in range(300):
        within = [bool(norm <= clip) for norm in norms]
        clip = next_clip(clip, noisy_share(within, privacy, cohort_size=100, generator=noise_generator(0)), privacy)
    # A step near the quantile is a few hundredths of the clip's rate.
    assert clip == pytest.approx(np.quantile(norms, quantile), rel=0.02)


def test_the_share_is_the_count_over_the_cohort_and_its_noise_that_of_the_count() -> None:
    privacy, generator = _adaptive(noise=1.0, count_noise=3.0), noise_generator(4)
    within = [True] * 6 + [False] * 4
    shares = np.array([noisy_share(within, privacy, cohort_size=10, generator=generator) for _ in range(20_000)])
    noise = (shares - 0.6) * 10 / 3.0
    assert abs(noise.mean()) <= WIDE / math.sqrt(len(noise))
    assert abs((noise**2).mean() - 1) <= WIDE * math.sqrt(2 / len(noise))


@given(st.lists(st.booleans(), max_size=8), st.integers(8, 12), st.floats(0, 1))
def test_clients_that_did_not_answer_leave_the_clip_alone_and_replacing_one_moves_the_count_by_one_at_most(
    within: list[bool], cohort_size: int, quantile: float
) -> None:
    privacy = _adaptive(noise=0.0, count_noise=0.0, quantile=quantile)
    share = noisy_share(within, privacy, cohort_size=cohort_size, generator=noise_generator(0))
    # Only those who answered pull at the clip, each with its answer less the quantile.
    assert cohort_size * (share - quantile) == pytest.approx(sum(bit - quantile for bit in within), abs=1e-9)
    for neighbour in (within[1:], [not bit for bit in within[:1]] + within[1:]):
        other = noisy_share(neighbour, privacy, cohort_size=cohort_size, generator=noise_generator(0))
        assert cohort_size * abs(share - other) <= 1 + 1e-9


def test_more_answers_than_the_cohort_are_refused() -> None:
    with pytest.raises(ValueError, match="3 clients answered; it must be at most cohort_size=2"):
        noisy_share([True] * 3, _adaptive(), cohort_size=2, generator=noise_generator(0))


# ---- the settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": "user"}, "level='user' is unknown; valid: client, example"),
        ({"clip": 0.0}, "clip=0.0 must be positive and finite"),
        ({"clip": math.inf}, "clip=inf must be positive and finite"),
        ({"clip_lr": -1.0}, "clip_lr=-1.0 must be positive and finite"),
        ({"noise": -1.0}, "noise=-1.0 must be at least 0 and finite"),
        ({"noise": math.nan}, "noise=nan must be at least 0 and finite"),
        ({"count_noise": math.inf}, "count_noise=inf must be at least 0 and finite"),
        ({"delta": 0.0}, "delta=0.0 must lie between 0 and 1"),
        ({"delta": 1.0}, "delta=1.0 must lie between 0 and 1"),
        ({"quantile": 1.5}, r"quantile=1.5 in \[0, 1\]"),
        ({"level": "example", "adaptive": True, "count_noise": 9.0}, "with level='example' it must be fixed"),
    ],
)
def test_settings_without_privacy_or_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _privacy(**changes)
