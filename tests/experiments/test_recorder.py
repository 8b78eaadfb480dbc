"""A run's folder says what happened, and what lies beyond the last whole round is cut off."""

import json
from dataclasses import asdict

import pandas as pd
import pytest

from experiments.recorder import Recorder, round_row
from fedraclora.files import read_json
from tests.helpers import federation, settings


def record(folder, num_rounds, **options):
    recorder = Recorder(folder, **{"keep_versions": "all", "snapshot_every": 0, **options})
    parts = federation(settings(rounds=num_rounds))
    recorder.start(parts.chain)
    for report in parts.iterate():
        row = round_row(report, parts.strategy.state.traffic, method="rac_lora", seed=0)
        recorder.commit(row, report, parts.chain, parts.strategy.state, has_diverged=False)
    return recorder, parts


def test_the_ledger_on_disk_is_the_ledger(tmp_path):
    _, parts = record(tmp_path, 3)
    again = federation(settings(rounds=3))
    rows = [asdict(row) for report in again.run() for row in report.rows]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "ledger.csv"), pd.DataFrame(rows))
    assert parts.chain.digest == again.chain.digest


def test_a_resumed_recorder_hands_out_the_chain_and_the_state_of_the_last_round(tmp_path):
    _, parts = record(tmp_path, 3)
    recorder = Recorder(tmp_path, keep_versions="all", snapshot_every=0)
    assert recorder.can_resume
    chain, state = recorder.resume()
    assert chain.digest == parts.chain.digest == recorder.digest
    assert (chain.version, chain.num_links, chain.num_links_before) == (3, 3, 2)
    assert state == parts.strategy.state


def test_what_was_written_after_the_last_whole_round_is_cut_off(tmp_path):
    """As a crash leaves it: the next round's ledger, half its row and its link are there, its state is not."""
    record(tmp_path, 3)
    state = read_json(tmp_path / "state.json")
    whole = {name: (tmp_path / name).read_bytes() for name in ("rounds.csv", "ledger.csv")}
    shorter = tmp_path / "shorter"
    record(shorter, 2)
    expected = {name: (shorter / name).read_text() for name in whole}
    (tmp_path / "state.json").write_text((shorter / "state.json").read_text())
    (tmp_path / "rounds.csv").write_bytes(whole["rounds.csv"][:-7])
    recorder = Recorder(tmp_path, keep_versions="all", snapshot_every=0)
    chain, again = recorder.resume()
    assert (chain.version, again.round) == (2, 2)
    assert (tmp_path / "ledger.csv").read_text() == expected["ledger.csv"]
    assert len((tmp_path / "rounds.csv").read_text().splitlines()) == 1 + 3
    assert state["version"] == 3


def test_the_simulated_clock_goes_on_where_the_last_whole_round_ended(tmp_path):
    recorder, parts = Recorder(tmp_path, keep_versions="all", snapshot_every=0), federation(settings(rounds=3))
    recorder.start(parts.chain)
    for report in parts.iterate():
        row = round_row(report, parts.strategy.state.traffic, method="rac_lora", seed=0)
        recorder.commit(row | {"simulated_s": 0.1}, report, parts.chain, parts.strategy.state, has_diverged=False)
    again = Recorder(tmp_path, keep_versions="all", snapshot_every=0)
    assert again.simulated_s == 0.0
    again.resume()
    assert again.simulated_s == recorder.simulated_s == 0.1 + 0.1 + 0.1 + 0.1


def test_a_folder_without_a_whole_round_cannot_be_resumed(tmp_path):
    assert not Recorder(tmp_path, keep_versions="all", snapshot_every=0).can_resume


@pytest.mark.parametrize("snapshot_every", [0, 1, 2])
def test_snapshots_do_not_change_what_is_read(tmp_path, snapshot_every):
    recorder, parts = record(tmp_path, 4, snapshot_every=snapshot_every)
    index = json.loads((tmp_path / "chain" / "index.json").read_text())
    assert index["snapshots"] == ([] if not snapshot_every else list(range(snapshot_every, 5, snapshot_every)))
    assert recorder.resume()[0].digest == parts.chain.digest


def test_the_row_of_a_round_adds_up():
    parts = federation(settings())
    total = 0
    for report in parts.iterate():
        row = round_row(report, parts.strategy.state.traffic, method="m", seed=4)
        total += row["uplink_bytes"] + row["downlink_bytes"]
        assert row["total_bytes"] == row["uplink_bytes"] + row["downlink_bytes"]
        assert row["cum_total_bytes"] == total
        assert (row["method"], row["seed"], row["round"]) == ("m", 4, report.round)
