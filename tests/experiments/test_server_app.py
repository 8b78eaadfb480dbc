"""The ServerApp runs what its run config says, as `fedraclora run` would, over the grid that it is given."""

import shlex
from pathlib import Path

import pandas as pd
import pytest
from flwr.app import Context, RecordDict

from clients.state_store import ClientStore
from experiments.groups import to_overrides
from experiments.problem import prepare
from experiments.run import run
from experiments.runtimes.in_process import InProcessGrid
from experiments.server_app import app
from fedraclora.files import read_json
from tests.helpers import Silent, settings


def start(chosen, text=None):
    """Run the ServerApp as Flower does, over clients in this process."""
    problem = prepare(chosen)
    replica = problem.replica(problem.new_chain(), ClientStore(None))
    hydra = shlex.join(to_overrides(chosen)) if text is None else text
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"hydra": hydra})
    app(InProcessGrid(replica, chosen.num_clients), context)


def test_it_writes_what_a_run_writes(tmp_path):
    chosen = settings(out=str(tmp_path / "app"))
    start(chosen)
    run(settings(out=str(tmp_path / "run")), Silent())
    first, second = (read_json(tmp_path / name / "summary.json") for name in ("app", "run"))
    assert first["chain_digest"] == second["chain_digest"]
    tables = [pd.read_csv(tmp_path / name / "ledger.csv") for name in ("app", "run")]
    pd.testing.assert_frame_equal(*tables)


def test_without_overrides_it_runs_the_defaults_into_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(settings(num_clients=50, dataset="mnist_5k", model="mlp", fraction=0.2), "rounds=1")
    (folder,) = Path("runs/run").iterdir()
    assert read_json(folder / "summary.json")["num_rounds"] == 1


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    chosen = settings(out=str(tmp_path / "app"), rounds=1)
    start(chosen)
    with pytest.raises(ValueError, match="resume=true"):
        start(chosen)
