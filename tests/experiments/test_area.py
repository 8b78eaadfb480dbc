"""The mean over bytes is that of looking at every single byte."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.area import mean_up_to
from experiments.tables import comparison_table, table_caption
from tests.made_runs import Made, make_runs

STEPS = st.lists(st.tuples(st.integers(0, 5), st.integers(-9, 9)), min_size=1, max_size=8)


def byte_by_byte(budget, costs, values, beyond):
    """Look at each byte up to the budget: the last value that was paid for when it was sent, at first the initial."""
    total = 0
    for byte in range(budget):
        held = values[0]
        for cost, value in zip(costs, values, strict=True):
            held = value if cost <= byte else held
        if beyond is not None and byte >= costs[-1]:
            held = beyond
        total += held
    return total / budget


@given(STEPS, st.integers(1, 40), st.none() | st.integers(-9, 9))
def test_the_mean_is_that_of_looking_at_every_byte(steps, budget, beyond):
    costs, values = list(accumulate(step for step, _ in steps)), [value for _, value in steps]
    found = mean_up_to(budget, costs, values, beyond=beyond)
    assert found == pytest.approx(byte_by_byte(budget, costs, values, beyond), abs=1e-12)


@given(STEPS)
def test_without_a_budget_it_is_what_costs_nothing(steps):
    costs, values = list(accumulate(step for step, _ in steps)), [value for _, value in steps]
    free = [value for cost, value in zip(costs, values, strict=True) if cost == 0]
    assert mean_up_to(0, costs, values) == [values[0], *free][-1]


@given(STEPS, st.integers(1, 40), st.integers(1, 7))
def test_the_mean_does_not_depend_on_the_unit_of_bytes(steps, budget, unit):
    costs, values = list(accumulate(step for step, _ in steps)), [value for _, value in steps]
    scaled = mean_up_to(budget * unit, [cost * unit for cost in costs], values)
    assert scaled == pytest.approx(mean_up_to(budget, costs, values), abs=1e-12)


def test_methods_are_compared_on_one_interval_each_in_its_own_unit(tmp_path):
    # Three MiB a round, of which one is uplink: `short` spent 6 MiB in all and 2 up.
    runs = make_runs(tmp_path, Made("long", [0.1, 0.4, 0.7, 0.9]), Made("short", [0.1, 0.6, 0.5]))
    table = comparison_table(runs, targets=[], budget_mib=None)
    assert table[["budget_mib", "uplink_budget_mib"]].to_numpy().tolist() == [[6.0, 2.0]] * 2
    assert table["mean_accuracy_over_total_median"].tolist() == pytest.approx([0.25, 0.35])
    assert table["mean_accuracy_over_uplink_median"].tolist() == pytest.approx([0.25, 0.35])
    assert "from 0 to 6 MiB of the total and from 0 to 2 MiB of the uplink" in table_caption(table)


def test_a_given_budget_is_the_interval_and_a_run_that_ended_before_it_keeps_its_last_value(tmp_path):
    mades = [Made("m", [0.1, 0.5, 0.4], settings={"uplink_mib": 4.0})]
    table = comparison_table(make_runs(tmp_path, *mades), targets=[], budget_mib=12.0)
    assert table["mean_accuracy_over_total_median"].item() == pytest.approx((0.1 * 3 + 0.5 * 3 + 0.4 * 6) / 12)
    assert table["mean_accuracy_over_uplink_median"].item() == pytest.approx((0.1 + 0.5 + 0.4 * 2) / 4)
    assert table["is_uplink_budget_given"].item()


def test_a_run_that_diverged_has_its_worst_value_from_its_last_evaluation_on_and_cuts_no_other_short(tmp_path):
    broken = Made("broken", [0.2, 0.6, 0.3], status="diverged")
    runs = make_runs(tmp_path, Made("sound", [0.1, 0.2, 0.3, 0.4, 0.5]), broken)
    table = comparison_table(runs, targets=[], budget_mib=None).set_index("method")
    assert set(table["budget_mib"]) == {12.0}
    assert table.loc["broken", "mean_accuracy_over_total_median"] == pytest.approx((0.2 + 0.6 + 0.2 + 0.2) / 4)
    assert table.loc["sound", "mean_accuracy_over_total_median"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.4) / 4)


def test_of_losses_the_worst_is_the_largest_and_one_that_is_not_reached_does_not_count(tmp_path):
    broken = Made("broken", [], losses=[2.0, 1.0, 8.0], status="diverged")
    runs = make_runs(tmp_path, Made("sound", [], losses=[2.0, 1.0, 1.0, float("inf")]), broken)
    table = comparison_table(runs, targets=[], budget_mib=None).set_index("method")
    assert table.loc["broken", "mean_loss_over_total_median"] == pytest.approx((2.0 + 1.0 + 8.0) / 3)
    assert table.loc["sound", "mean_loss_over_total_median"] == pytest.approx((2.0 + 1.0 + 1.0) / 3)
