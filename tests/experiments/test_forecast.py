"""A forecast tells the bytes and the seconds of a run before it is run."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from experiments.forecast import Known, forecast, summary_row
from experiments.problem import prepare
from experiments.run import run
from fedraclora.ledger import MIB
from tests.helpers import Silent, settings


def known(chosen):
    """Return what `fedraclora budget` knows of the model and the data, without numbers."""
    problem = prepare(chosen)
    return Known(problem.model.to("meta"), [len(rows) for rows in problem.split.indices])


@pytest.mark.parametrize("method", ["rac_lora", "fed_it", "full"])
def test_the_rounds_of_a_run_cost_what_was_forecast(tmp_path, method):
    chosen = settings(method=method, rounds=4, out=str(tmp_path / "run"))
    told = forecast(chosen, known(chosen))
    run(chosen, Silent())
    rounds = pd.read_csv(tmp_path / "run" / "rounds.csv").query("round > 0")
    for name in ("uplink_bytes", "downlink_bytes", "catchup_bytes", "cum_uplink_bytes", "cum_downlink_bytes"):
        assert told.rounds()[name].tolist() == rounds[name].tolist()
    row = summary_row(method, told, 4)
    assert row["total_mib"] * MIB == rounds["cum_total_bytes"].iloc[-1]
    assert row["uplink_mib_a_round"] * 4 == pytest.approx(row["uplink_mib"])
    ledger = pd.read_csv(tmp_path / "run" / "ledger.csv")
    assert told.most_of_one_client == ledger.groupby("partition")["tensor_bytes"].sum().max()


@pytest.mark.parametrize("more", [{}, {"local_steps": 0, "local_epochs": 2}, {"deadline_s": 0.1}])
def test_seconds_are_those_of_the_run_but_for_the_headers_of_its_messages(tmp_path, more):
    chosen = settings(method="full", rounds=3, devices="mixed", out=str(tmp_path / "run"), **more)
    told = forecast(chosen, known(chosen))
    assert told.seconds is not None
    if "deadline_s" not in more:
        run(chosen, Silent())
        rounds = pd.read_csv(tmp_path / "run" / "rounds.csv").query("round > 0")
        assert told.seconds <= rounds["simulated_s"].sum() <= 1.2 * told.seconds
    else:
        assert told.seconds <= 3 * 0.1


def test_time_needs_the_steps_of_every_client():
    chosen = settings(devices="lte", local_steps=0, local_epochs=1)
    with pytest.raises(ValueError, match="set local_steps"):
        forecast(chosen, replace(known(chosen), num_examples=()))
    assert forecast(replace(chosen, devices="none"), replace(known(chosen), num_examples=())).seconds is None


def test_settings_that_cannot_be_run_are_refused():
    with pytest.raises(ValueError, match="rank"):
        forecast(settings(rank=1000), known(settings()))
    with pytest.raises(ValueError, match="no mean"):
        forecast(settings(method="flora", privacy=replace(settings().privacy, level="client")), known(settings()))


def test_a_budget_below_one_round_leaves_no_rounds():
    chosen = settings(budget_mib=1e-5)
    told = forecast(chosen, known(chosen))
    assert (told.reports, told.traffic.total_bytes, told.most_of_one_client) == ([], 0, 0)
    assert "budget_mib" in told.stop_reason
    assert not summary_row("x", told, 3)["is_whole"]


def test_the_model_needs_no_numbers():
    chosen = settings(method="fr_lora")
    assert all(tensor.is_meta for tensor in known(chosen).model.state_dict().values())
    real = Known(prepare(chosen).model)
    assert forecast(chosen, known(chosen)).traffic == forecast(chosen, real).traffic
    assert all(torch.isfinite(tensor).all() for tensor in real.model.state_dict().values())
