"""`fedraclora budget`: what is fitted is the largest that fits, by trying all."""

import io
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from rich.console import Console

from experiments.budget import budget, budget_table, largest, plan, remarks, render
from experiments.forecast import Known, forecast
from experiments.problem import prepare
from experiments.settings import BudgetSettings
from fedraclora.ledger import MIB
from tests.helpers import settings

MODEL = Known(prepare(settings()).model.to("meta"), [30] * 6)


@given(st.integers(1, 300), st.integers(0, 300))
def test_the_largest_number_that_holds_is_found(least, more):
    for end in {least, least + more // 2, least + more}:
        assert largest(lambda number, end=end: number <= end, least, least + more) == end


def fits(chosen, **changes):
    return len(forecast(replace(chosen, **changes), MODEL).reports) == chosen.rounds


@examples(max_examples=15, deadline=None)
@given(
    st.sampled_from(["rac_lora", "fed_it", "flora", "fedex_lora", "fed_sb", "ro_lora"]),
    st.floats(0.001, 0.12),
    st.sampled_from(["budget_mib", "uplink_mib", "per_client_mib"]),
)
def test_the_fitted_rank_is_the_largest_that_fits(method, mib, limit):
    chosen = settings(method=method, rounds=4, **{limit: mib})
    # fc2 is 10 x 12: no factor of these methods has more than 12 rows, and two that train have 10.
    most = 12 if method == "rac_lora" else 10
    affordable = [rank for rank in range(1, most + 1) if fits(chosen, rank=rank)]
    found = plan(chosen, MODEL, fit="rank")
    assert found.fitted == (max(affordable) if affordable else None)
    if affordable:
        assert len(found.told.reports) == 4


def test_a_method_without_rank_is_not_fitted():
    found = plan(settings(method="full", budget_mib=0.01), MODEL, fit="rank")
    assert found.fitted is None
    assert "do not depend on the rank" in found.remark


def test_the_fitted_link_length_is_the_shortest_that_fits():
    chosen = settings(method="rac_lora", rounds=6, num_clients=6, fraction=0.34, rank=2)
    totals = {}
    for length in (1, 2, 3, 4, 5, 6, 0):
        changed = replace(chosen, method=replace(chosen.method, rounds_per_link=length))
        totals[length] = forecast(changed, MODEL).traffic.total_bytes
    wanted = totals[3] / MIB
    found = plan(replace(chosen, budget_mib=wanted), MODEL, fit="rounds_per_link")
    assert found.fitted == next(length for length, total in totals.items() if total <= totals[3])
    assert plan(replace(chosen, budget_mib=1e-4), MODEL, fit="rounds_per_link").fitted is None
    assert "no link length" in plan(settings(method="full", budget_mib=1.0), MODEL, fit="rounds_per_link").remark


def test_the_fitted_local_steps_are_the_most_that_meet_the_deadline():
    chosen = settings(method="full", rounds=3, devices="lte", deadline_s=0.25)
    found = plan(chosen, MODEL, fit="local_steps")
    in_time = [steps for steps in range(1, 40) if forecast(replace(chosen, local_steps=steps), MODEL).slowest_s <= 0.25]
    assert found.fitted == max(in_time) > 1
    late = plan(replace(chosen, deadline_s=0.01), MODEL, fit="local_steps")
    assert (late.fitted, late.remark) == (None, "not even one local step fits the deadline")


def budget_settings(**changes):
    return settings(BudgetSettings, methods=["rac_lora", "full"], **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fit": "ranks"}, "did you mean 'rank'|nearest|valid"),
        ({"fit": "rank"}, "needs a limit"),
        ({"fit": "rounds_per_link"}, "needs a limit"),
        ({"fit": "local_steps", "budget_mib": 1.0}, "no bytes"),
        ({"fit": "rank", "budget_mib": 1.0, "ranks": {"fc1": 2}}, "leave ranks"),
    ],
)
def test_a_fit_that_means_nothing_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        budget(budget_settings(**changes), MODEL, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"methods": []}, "must name methods"),
        ({"methods": ["full", "full"]}, "each once"),
        ({"method_settings": {"rac_lorra": {"side": "a"}}}, "rac_lora"),
        ({"rounds": -2}, "rounds"),
        ({"budget_mib": 0.0}, "budget_mib"),
        ({"variants": {"v": {"method": "rac_lora", "ranks": {"fc1": 4}}}, "methods": ["v"], "fit": "rank",
          "budget_mib": 1.0}, "leave ranks"),
    ],
)  # fmt: skip
def test_what_no_comparison_would_run_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        budget(replace(budget_settings(), **changes), MODEL, Console(file=io.StringIO()))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "settings.yaml").write_text("methods: [full]\n")
    with pytest.raises(ValueError, match="no budget"):
        budget(budget_settings(out=str(tmp_path)), MODEL, Console(file=io.StringIO()))
    assert (tmp_path / "settings.yaml").read_text() == "methods: [full]\n"


def test_a_method_that_can_afford_no_round_has_an_empty_row(tmp_path):
    budget(budget_settings(out=str(tmp_path / "b"), budget_mib=0.01), MODEL, Console(file=io.StringIO()))
    table = pd.read_csv(tmp_path / "b" / "budget.csv")
    assert (table["rounds"] > 0).tolist() == [True, False]


def test_fitted_local_steps_are_those_that_are_forecast():
    chosen = settings(method="full", rounds=2, devices="lte", deadline_s=0.25, local_steps=0, local_epochs=2)
    found = plan(chosen, MODEL, fit="local_steps")
    wanted = forecast(replace(chosen, local_steps=found.fitted, local_epochs=0), MODEL)
    assert found.told.seconds == wanted.seconds
    broke = plan(replace(chosen, budget_mib=1e-5), MODEL, fit="local_steps")
    assert (broke.fitted, broke.remark) == (None, "no round is affordable")


def test_clients_that_will_be_late_are_told_of():
    late = plan(settings(method="full", rounds=2, devices="lte", deadline_s=0.01), MODEL)
    assert not late.told.all_answer
    assert any("not all clients will answer" in line for line in remarks([late], MODEL))
    assert plan(settings(method="full", rounds=2, devices="lte", deadline_s=60.0), MODEL).told.all_answer


def test_the_command_prints_and_writes_what_it_found(tmp_path):
    text = io.StringIO()
    chosen = budget_settings(out=str(tmp_path / "b"), rounds=3, downlink="int8", budget_mib=0.02)
    plans = budget(chosen, MODEL, Console(file=text, width=200))
    assert [each.method for each in plans] == ["rac_lora", "full"]
    table = pd.read_csv(tmp_path / "b" / "budget.csv")
    assert table["method"].tolist() == ["rac_lora", "full"]
    assert table["is_exact"].tolist() == [True, False]
    assert table["is_whole"].tolist() == [True, False]
    rounds = pd.read_csv(tmp_path / "b" / "budget_rounds.csv")
    sums = rounds.groupby("method")["uplink_bytes"].sum() / MIB
    assert sums["rac_lora"] == pytest.approx(table.set_index("method")["uplink_mib"]["rac_lora"])
    printed = text.getvalue()
    assert "full" in printed
    assert "budget_mib" in printed
    assert "<= " in printed


def test_the_table_marks_bounds_and_what_was_fitted():
    plans = [plan(settings(uplink="lossless", budget_mib=0.1), MODEL, fit="rank")]
    table = budget_table(plans, fit="rank")
    text = io.StringIO()
    Console(file=text, width=200).print(render(table, fit="rank"))
    assert table["rank"].tolist() == [plans[0].fitted]
    assert "<= " in text.getvalue()
    assert any("parameters" in line for line in remarks(plans, MODEL))
