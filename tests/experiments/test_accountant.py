"""Tests of experiments.accountant."""

import math

import dp_accounting
import pytest
from dp_accounting import rdp

from experiments import accountant
from experiments.accountant import client_epsilon, example_epsilon

DELTA = 1e-5
CASES = [(1000, 100, 1.0, 20), (1000, 100, 4.0, 300), (50, 1, 2.0, 5), (100, 90, 2.0, 10), (100, 99, 0.5, 3)]


def _composed(event: dp_accounting.DpEvent, count: int) -> float:
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(event, count)
    return float(accountant.get_epsilon(DELTA))


def _delta_of_worst_pair(epsilon: float, share: float, noise: float) -> float:
    """Return the delta of one release for two inputs that can occur, by the definition of (epsilon, delta)-privacy.

    All clients but one send -C in one direction. If the one sends -C too, the sum is -K C; if it sends C, the sum is
    2 C higher where the one was drawn, which has probability `share`. In units of 2 C, from -K C on:
    P = (1 - share) N(0, s^2) + share N(1, s^2) against Q = N(0, s^2), with s = noise / 2. The ratio P / Q grows with
    the sum, so the best set to tell them apart is a half line, from where the ratio is e^epsilon.
    """
    s = noise / 2
    threshold = s * s * math.log1p(math.expm1(epsilon) / share) + 0.5
    far, near = _above(threshold / s), _above((threshold - 1) / s)
    return (1 - share) * far + share * near - math.exp(epsilon) * far


def _above(z: float) -> float:
    return math.erfc(z / math.sqrt(2)) / 2


@pytest.mark.parametrize(("num_clients", "cohort_size", "noise", "num_rounds"), CASES)
def test_epsilon_is_that_of_dp_accounting_with_half_the_noise_per_sensitivity(
    num_clients: int, cohort_size: int, noise: float, num_rounds: int
) -> None:
    whole = dp_accounting.GaussianDpEvent(noise / 2)
    sample = dp_accounting.SampledWithoutReplacementDpEvent(num_clients, cohort_size, whole)
    expected = min(_composed(sample, num_rounds), _composed(whole, num_rounds))
    assert client_epsilon(num_clients, cohort_size, noise, num_rounds, DELTA) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("cohort_size", [1, 10, 50, 100])
def test_one_round_is_never_said_to_hide_more_than_it_does_for_a_worst_pair(cohort_size: int, noise: float) -> None:
    epsilon = client_epsilon(100, cohort_size, noise, 1, DELTA)
    assert _delta_of_worst_pair(epsilon, cohort_size / 100, noise) <= DELTA


def test_a_noise_multiplier_of_z_would_promise_more_than_holds() -> None:
    # What the accountant says if it is told z instead of z / 2: the same pair has a far larger delta.
    promised = client_epsilon(100, 10, 2 * 1.0, 1, DELTA)
    assert _delta_of_worst_pair(promised, 0.1, 1.0) > 100 * DELTA


@pytest.mark.parametrize(("noise", "num_rounds"), [(2.0, 1), (8.0, 10), (40.0, 1000)])
def test_with_all_clients_in_each_round_it_is_a_normal_mechanism_composed(noise: float, num_rounds: int) -> None:
    found = client_epsilon(30, 30, noise, num_rounds, DELTA)
    assert found == pytest.approx(_composed(dp_accounting.GaussianDpEvent(noise / 2), num_rounds), rel=1e-12)
    # Composed, the rounds are one whose means are sqrt(rounds) times as far apart: never above the bound, and near it.
    assert _delta_of_worst_pair(found, 1.0, noise / math.sqrt(num_rounds)) <= DELTA
    assert _delta_of_worst_pair(0.85 * found, 1.0, noise / math.sqrt(num_rounds)) > DELTA


def test_more_rounds_give_away_more() -> None:
    spent = [client_epsilon(200, 20, 2.0, rounds, DELTA) for rounds in (0, 1, 2, 10, 100, 1000)]
    assert spent == sorted(set(spent))


def test_more_noise_gives_away_less() -> None:
    spent = [client_epsilon(200, 20, noise, 50, DELTA) for noise in (0.5, 1.0, 2.0, 8.0)]
    assert spent == sorted(set(spent), reverse=True)


def test_drawing_more_clients_gives_away_more_up_to_all_of_them() -> None:
    spent = [client_epsilon(100, cohort_size, 1.0, 10, DELTA) for cohort_size in (1, 10, 50, 100)]
    assert spent == sorted(set(spent))
    nearly_all = [client_epsilon(100, cohort_size, 1.0, 10, DELTA) for cohort_size in (95, 99)]
    assert all(epsilon <= spent[-1] for epsilon in nearly_all)


def test_a_smaller_delta_costs_a_larger_epsilon() -> None:
    assert client_epsilon(200, 20, 2.0, 50, 1e-9) > client_epsilon(200, 20, 2.0, 50, 1e-3)


def test_an_example_among_a_clients_is_as_a_client_among_clients() -> None:
    assert example_epsilon(200, 20, 2.0, 50, DELTA) == client_epsilon(200, 20, 2.0, 50, DELTA)


def test_a_client_with_fewer_examples_than_a_batch_uses_all_of_them() -> None:
    assert example_epsilon(5, 32, 4.0, 10, DELTA) == client_epsilon(5, 5, 4.0, 10, DELTA)


def test_the_client_with_the_fewest_examples_is_the_worst_off() -> None:
    spent = [example_epsilon(num_examples, 32, 4.0, 10, DELTA) for num_examples in (20, 100, 400)]
    assert spent == sorted(set(spent), reverse=True)


def test_nothing_released_costs_nothing_and_a_release_without_noise_everything() -> None:
    assert client_epsilon(100, 10, 1.0, 0, DELTA) == 0.0
    assert client_epsilon(100, 10, 0.0, 0, DELTA) == 0.0
    assert client_epsilon(100, 10, 0.0, 1, DELTA) == math.inf
    assert example_epsilon(100, 10, 0.0, 1, DELTA) == math.inf


def test_the_slow_part_is_done_once_a_run() -> None:
    client_epsilon(77, 7, 1.5, 1, DELTA)
    before = accountant._renyi.cache_info().misses
    for num_rounds in range(2, 50):
        client_epsilon(77, 7, 1.5, num_rounds, DELTA)
    assert accountant._renyi.cache_info().misses == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11, 1.0, 1, DELTA), "cohort_size=11 must lie between 1 and num_clients=10"),
        ((10, 0, 1.0, 1, DELTA), "cohort_size=0 must lie between 1 and num_clients=10"),
        ((10, 1, -1.0, 1, DELTA), "noise=-1.0 must be at least 0"),
        ((10, 1, math.nan, 1, DELTA), "noise=nan must be at least 0"),
        ((10, 1, 1.0, -1, DELTA), r"number of releases \(-1\) at least 0"),
        ((10, 1, 1.0, 1, 0.0), "delta=0.0 between 0 and 1"),
        ((10, 1, 1.0, 1, 1.0), "delta=1.0 between 0 and 1"),
    ],
)
def test_values_out_of_range_are_refused(arguments: tuple[int, int, float, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client_epsilon(*arguments)


@pytest.mark.parametrize(("num_examples", "batch_size"), [(0, 8), (8, 0)])
def test_no_examples_are_refused(num_examples: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"num_examples={num_examples} and batch_size={batch_size} must be at least 1"):
        example_epsilon(num_examples, batch_size, 1.0, 1, DELTA)
