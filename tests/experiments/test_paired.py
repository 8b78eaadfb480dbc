"""Paired numbers are those of single seeds, and say no more than the seeds that reached a target tell."""

import json
import math
from itertools import product
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.captions import paired_caption
from experiments.censoring import Need
from experiments.paired import is_less, pairs_of, ratio_bounds, reference_of, sign_test
from experiments.results import load_runs
from experiments.tables import comparison_table, paired_table
from tests.made_runs import Made, make_runs, write_run

NEED = st.builds(Need, st.integers(0, 4), st.booleans())


@given(st.integers(0, 6), st.integers(0, 6))
def test_the_sign_test_counts_the_throws_of_a_coin_that_are_at_least_as_uneven(num_ahead, num_behind):
    throws = list(product((0, 1), repeat=num_ahead + num_behind))
    gap = abs(num_ahead - num_behind)
    as_uneven = [throw for throw in throws if abs(2 * sum(throw) - len(throw)) >= gap]
    assert sign_test(num_ahead, num_behind) == pytest.approx(len(as_uneven) / len(throws))


def later(need):
    """What a need can turn out to be: a seed that was below the target after x needs more than x, or never gets there.

    `ratio_bounds` takes the end of that, x itself, for the sake of one number.
    """
    return [need.amount] if need.is_reached else [need.amount + more for more in (1e-9, 0.5, 1, 9)] + [math.inf]


@given(NEED, NEED)
def test_a_need_is_less_iff_it_is_so_however_the_censored_ones_end(need, other):
    assert is_less(need, other) == all(one < two for one, two in product(later(need), later(other)))


@given(NEED.filter(lambda need: need.amount > 0), NEED.filter(lambda need: need.amount > 0))
def test_a_ratio_is_bounded_by_what_it_can_turn_out_to_be(need, other):
    ratios = [one / two for one, two in product(later(need), later(other)) if not (math.isinf(one) and math.isinf(two))]
    bounds = ratio_bounds(need, other)
    assert (bounds.low, bounds.high) == pytest.approx((min(ratios), max(ratios)), abs=1e-6)


def test_what_both_have_before_the_first_byte_is_equal():
    nothing, something = Need(0.0, is_reached=True), Need(2.0, is_reached=True)
    assert (ratio_bounds(nothing, nothing).low, ratio_bounds(something, nothing).low) == (1.0, math.inf)
    assert ratio_bounds(nothing, something).high == 0.0


def test_full_is_the_reference_and_the_first_method_where_it_is_missing(tmp_path):
    assert reference_of(["a", "full"]) == "full"
    assert reference_of(["a", "b"]) == "a"
    mades = [Made("a", [0.1, 0.9]), Made("b", [0.1, 0.8])]
    table = comparison_table(make_runs(tmp_path, *mades), targets=[], budget_mib=None)
    assert table["is_reference"].tolist() == [True, False]
    assert "full is not among the methods" in paired_caption(table)


def test_one_method_alone_is_held_against_nothing(tmp_path):
    table = comparison_table(make_runs(tmp_path, Made("full", [0.1, 0.9])), targets=[0.8], budget_mib=None)
    assert paired_table(table).empty
    assert not [column for column in table if "difference" in column or "ratio" in column]


def test_pairs_are_seeds_of_both_methods_on_the_same_split(tmp_path):
    mades = [Made(m, [0.1, 0.9], seed=s) for m, s in [("a", 0), ("a", 1), ("a", 2), ("b", 2), ("b", 1), ("b", 5)]]
    folders = [write_run(made, tmp_path / str(i)) for i, made in enumerate(mades)]
    summary = json.loads((folders[4] / "summary.json").read_text())
    (folders[4] / "summary.json").write_text(json.dumps(summary | {"split_digest": "other"}))
    assert pairs_of(load_runs(folders), "a", "b") == [2]


def test_differences_are_those_of_single_seeds_not_of_medians(tmp_path):
    """Seeds differ more than methods do: the median of the differences is not the difference of the medians."""
    ends = {"full": [0.9, 0.5, 0.7], "m": [0.8, 0.51, 0.4]}
    mades = [Made(m, [0.1, end], seed=s) for m, found in ends.items() for s, end in enumerate(found)]
    table = comparison_table(make_runs(tmp_path, *mades), targets=[], budget_mib=None).set_index("method")
    row = table.loc["m"]
    differences = [one - two for one, two in zip(ends["m"], ends["full"], strict=True)]
    name = "final_accuracy_difference"
    assert row[f"{name}_median"] == pytest.approx(median(differences)) == pytest.approx(-0.1)
    assert (row[f"{name}_min"], row[f"{name}_max"]) == pytest.approx((-0.3, 0.01))
    assert (row[f"{name}_num_ahead"], row[f"{name}_num_behind"], row[f"{name}_sign_test_p"]) == (1, 2, 1.0)
    text = paired_table(table.reset_index()).set_index("method").loc["m"]
    cell = text["final accuracy minus that of full, points"]
    assert cell == "-10.0 (-30.0 to +1.0; ahead in 1 of 3; p 1)"


def test_ratios_to_a_target_are_those_of_single_seeds_and_bounds_where_one_did_not_get_there(tmp_path):
    # Uplink to 80 %, by seed: full 4, 8 and more than 8; m 1, more than 3 and 2.
    full = [[0.1, 0.8, 0.9], [0.1, 0.2, 0.8], [0.1, 0.2, 0.3]]
    own = [[0.1, 0.8, 0.9, 0.9], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.8, 0.8]]
    mades = [Made("full", curve, 4.0, 4.0, seed) for seed, curve in enumerate(full)]
    mades += [Made("m", curve, 1.0, 7.0, seed) for seed, curve in enumerate(own)]
    table = comparison_table(make_runs(tmp_path, *mades), targets=[0.8], budget_mib=None)
    row = table.set_index("method").loc["m"]
    # 1/4; at least 3/8; at most 2/8.
    name = "uplink_mib_ratio_to_0.8"
    assert (row[f"{name}_median"], row[f"{name}_median_at_most"]) == (0.25, 0.25)
    assert (row[f"{name}_min"], row[f"{name}_max"]) == (0.0, math.inf)
    assert (row[f"{name}_num_ahead"], row[f"{name}_num_behind"]) == (2, 0)
    text = paired_table(table).set_index("method").loc["m"]
    assert text["uplink to 80 % over that of full"] == "0.25 (ahead in 2 of 3; p 0.5)"


def test_of_losses_ahead_is_less(tmp_path):
    runs = make_runs(tmp_path, Made("full", [], losses=[9.0, 2.0]), Made("m", [], losses=[9.0, 1.5]))
    row = comparison_table(runs, targets=[], budget_mib=None).set_index("method").loc["m"]
    assert (row["final_loss_difference_median"], row["final_loss_difference_num_ahead"]) == (-0.5, 1)


def test_without_a_common_seed_nothing_is_known(tmp_path):
    runs = make_runs(tmp_path, Made("full", [0.1, 0.9], seed=0), Made("m", [0.1, 0.9], seed=1))
    text = paired_table(comparison_table(runs, targets=[0.8], budget_mib=None)).set_index("method").loc["m"]
    assert text.tolist() == ["0", "-", "-", "-"]
