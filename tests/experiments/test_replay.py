"""Replaying a log gives the model that the run ended with."""

import pytest
import safetensors.torch

from experiments.replay import replay
from experiments.run import run
from fedraclora.files import read_json, write_json
from fedraclora.finished import load_run
from tests.helpers import METHODS, Silent, final_weights, same_weights, settings, without_figures


@pytest.mark.parametrize("name", METHODS)
def test_the_exported_weights_are_those_of_the_server_in_memory(tmp_path, monkeypatch, name):
    without_figures(monkeypatch)
    chosen = settings(method=name, out=str(tmp_path / "run"), snapshot_every=2)
    run(chosen, Silent())
    lines = replay(tmp_path / "run", export=str(tmp_path / "model.safetensors"))
    exported = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert same_weights(exported, final_weights(chosen))
    assert any("verified" in line for line in lines)


def test_an_early_version_is_the_run_that_ended_there(tmp_path):
    run(settings(out=str(tmp_path / "run")), Silent())
    shorter = final_weights(settings(rounds=2))
    assert same_weights(load_run(tmp_path / "run").chain(2).weights(), shorter)


def test_a_log_that_ends_elsewhere_than_the_summary_is_refused(tmp_path):
    run(settings(out=str(tmp_path / "run")), Silent())
    summary = read_json(tmp_path / "run" / "summary.json")
    write_json(tmp_path / "run" / "summary.json", {**summary, "chain_digest": "0" * 64})
    with pytest.raises(ValueError, match="by its summary"):
        replay(tmp_path / "run")
