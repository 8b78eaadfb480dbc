"""A run from Python: what it returns, writes and keeps."""

import json
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from torch import nn

from experiments.outcomes import Diverged, NothingTrained
from experiments.problem import prepare
from experiments.run import run
from experiments.runtimes import in_process
from experiments.runtimes.in_process import InProcessGrid
from fedraclora.files import read_json
from fedraclora.finished import load_run
from fedraclora.tasks import evaluate
from tests.helpers import METHODS, Silent, error_reply, plug_in, settings, without_figures


def test_the_summary_is_what_is_written_and_agrees_with_the_tables(tmp_path):
    watcher = Silent()
    summary = run(settings(rounds=5, out=str(tmp_path / "run"), target_accuracies=[0.05, 0.999]), watcher)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    rounds = pd.read_csv(tmp_path / "run" / "rounds.csv")
    assert [row["round"] for row in watcher.rows] == list(rounds["round"]) == [0, 1, 2, 3, 4, 5]
    assert summary["status"] == "finished"
    assert summary["targets"]["0.999"] is None
    first = rounds[rounds["test_accuracy"] >= 0.05].iloc[0]
    assert summary["targets"]["0.05"] == {
        "round": first["round"],
        "uplink_bytes": first["cum_uplink_bytes"],
        "total_bytes": first["cum_total_bytes"],
    }


def test_the_evaluated_model_is_the_logged_one(tmp_path):
    chosen = settings(rounds=3, out=str(tmp_path / "run"), method="fed_it")
    run(chosen, Silent())
    rounds = pd.read_csv(tmp_path / "run" / "rounds.csv")
    dataset, finished = prepare(chosen).dataset, load_run(tmp_path / "run")
    for version in finished.versions:
        loss, accuracy = evaluate(finished.model(version), dataset.test, dataset.task)
        assert rounds["test_loss"][version] == pytest.approx(loss, rel=1e-12)
        assert rounds["test_accuracy"][version] == pytest.approx(accuracy, rel=1e-12)


def test_training_helps(tmp_path):
    summary = run(settings(rounds=25, fraction=1.0, local_steps=10, rank=4, out=str(tmp_path / "run")), Silent())
    assert summary["final_test_accuracy"] > 0.6


@pytest.mark.parametrize("every", [2, 3])
def test_evaluation_is_done_every_so_often_and_at_the_end(tmp_path, every):
    run(settings(rounds=5, out=str(tmp_path / "run"), eval_every=every), Silent())
    rounds = pd.read_csv(tmp_path / "run" / "rounds.csv")
    evaluated = rounds[rounds["test_loss"].notna()]["round"]
    assert list(evaluated) == [round for round in range(6) if round % every == 0 or round == 5]


def test_regression_has_a_loss_and_no_accuracy(tmp_path):
    chosen = settings(
        dataset=("quadratic", {"num_inputs": 8, "num_outputs": 5, "num_samples": 60}),
        model=("softmax_regression", {"bias": False}), partition="iid", lr=0.5, out=str(tmp_path / "run"),
    )  # fmt: skip
    summary = run(chosen, Silent())
    assert summary["final_test_accuracy"] is None
    rounds = pd.read_csv(tmp_path / "run" / "rounds.csv")
    assert rounds["test_accuracy"].isna().all()
    assert rounds["test_loss"].iloc[-1] < rounds["test_loss"].iloc[0]


def test_keeping_the_last_versions_leaves_the_digest_and_fewer_files(tmp_path):
    def go(keep):
        one = settings(method="fed_it", rounds=5, keep_versions=keep, out=str(tmp_path / keep))
        digest = run(one, Silent())["chain_digest"]
        return digest, load_run(tmp_path / keep).versions

    everything, last = go("all"), go("last")
    assert everything[0] == last[0]
    assert (everything[1], last[1]) == ((0, 1, 2, 3, 4, 5), (0, 5))


def test_divergence_keeps_the_rounds_before(tmp_path):
    with pytest.raises(Diverged, match="smaller"):
        run(settings(rounds=30, lr=1e9, out=str(tmp_path / "run")), Silent())
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["status"] == "diverged"
    assert load_run(tmp_path / "run").chain().digest == summary["chain_digest"]


def test_a_run_that_diverged_is_at_its_end(tmp_path):
    chosen = {"lr": 1e9, "out": str(tmp_path / "run")}
    with pytest.raises(Diverged):
        run(settings(rounds=30, **chosen), Silent())
    names = ("rounds.csv", "ledger.csv", "state.json", "chain/index.json")
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    last = read_json(tmp_path / "run" / "summary.json")["num_rounds"]
    watcher = Silent()
    with pytest.raises(Diverged, match=f"this run diverged in round {last}; nothing can be added"):
        run(settings(rounds=60, resume=True, **chosen), watcher)
    assert watcher.rows == []
    assert [(tmp_path / "run" / name).read_bytes() for name in names] == before
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "diverged"


def fail_in(monkeypatch, *rounds):
    """Let every client fail in these rounds."""

    def fault(who, reply):
        return error_reply(reply) if int(reply.metadata.group_id) in rounds else reply

    monkeypatch.setattr(in_process, "InProcessGrid", partial(InProcessGrid, fault=fault))


def test_a_first_round_in_which_every_client_fails_ends_the_run_with_the_reason(tmp_path, monkeypatch):
    fail_in(monkeypatch, 1)
    watcher = Silent()
    with pytest.raises(NothingTrained, match=r"all clients of the first round failed; client \d: client error 2"):
        run(settings(out=str(tmp_path / "run")), watcher)
    assert [(row["round"], row["num_ok"]) for row in watcher.rows] == [(0, 0), (1, 0)]
    summary = read_json(tmp_path / "run" / "summary.json")
    assert (summary["status"], summary["num_rounds"]) == ("nothing trained", 1)
    assert load_run(tmp_path / "run").chain().digest == summary["chain_digest"]


def test_later_rounds_may_fail_whole(tmp_path, monkeypatch):
    fail_in(monkeypatch, 2, 3)
    assert run(settings(rounds=4, out=str(tmp_path / "run")), Silent())["status"] == "finished"


@pytest.mark.parametrize("method", METHODS)
def test_a_model_whose_first_tensor_holds_integers_trains(tmp_path, monkeypatch, method):
    without_figures(monkeypatch)

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("num_calls", torch.tensor(3))
            self.flatten, self.fc1, self.fc2 = nn.Flatten(), nn.Linear(64, 12), nn.Linear(12, 10)

        def forward(self, x):
            return self.fc2(self.fc1(self.flatten(x)).relu())

    class Config:
        pass

    name = plug_in(monkeypatch, "counting", Config, lambda config, *, input_shape, num_outputs: Counting())
    gentle = settings(method=method).method.lr / 2
    chosen = settings(model=name, method=method, lr=gentle, momentum=0.5, out=str(tmp_path / "run"))
    problem = prepare(chosen)
    assert next(iter(problem.model.state_dict())) == "num_calls"
    run(chosen, Silent())
    rounds = pd.read_csv(tmp_path / "run" / "rounds.csv")
    assert list(rounds["num_ok"]) == [0, 3, 3, 3]
    chain = load_run(tmp_path / "run").chain()
    if problem.method.traits.is_global:
        assert rounds["test_loss"].iloc[-1] < rounds["test_loss"].iloc[0]
    else:
        assert chain.open.explicit_factors, "the model of all is that of the start"
    assert chain.weights()["num_calls"].item() == 3


def test_a_failure_in_the_middle_leaves_a_run_that_can_be_resumed(tmp_path):
    class Fails(Silent):
        def on_round(self, row, num_rounds):
            if row["round"] == 2:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(settings(out=str(tmp_path / "run")), Fails())
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "failed"
    again = run(settings(out=str(tmp_path / "run"), resume=True), Silent())
    assert again["chain_digest"] == run(settings(out=str(tmp_path / "whole")), Silent())["chain_digest"]


def test_a_run_leaves_torch_as_it_was(tmp_path):
    torch.set_num_threads(2)
    torch.manual_seed(5)
    expected = torch.Generator().manual_seed(5)
    run(settings(rounds=1, out=str(tmp_path / "run")), Silent())
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rank", 3), ("seed", 1), ("method", "full"), ("dtype", "float64"), ("threads", 2), ("chunk_mib", 1.0)],
)
def test_another_run_is_not_continued(tmp_path, key, value):
    run(settings(rounds=1, out=str(tmp_path / "run")), Silent())
    with pytest.raises(ValueError, match=f"{key} was"):
        run(settings(rounds=2, out=str(tmp_path / "run"), resume=True, **{key: value}), Silent())


@pytest.mark.parametrize("changes", [{"budget_mib": 100.0}, {"name": "other"}])
def test_what_decides_no_result_may_change(tmp_path, changes):
    run(settings(rounds=1, out=str(tmp_path / "run")), Silent())
    run(settings(rounds=2, out=str(tmp_path / "run"), resume=True, **changes), Silent())


def test_the_settings_on_disk_are_those_of_the_last_resume(tmp_path):
    def written():
        return OmegaConf.load(tmp_path / "run" / "settings.yaml").rounds

    run(settings(rounds=1, out=str(tmp_path / "run")), Silent())
    assert written() == 1
    run(settings(rounds=2, out=str(tmp_path / "run"), resume=True), Silent())
    assert written() == 2
    with pytest.raises(ValueError, match="rank was"):
        run(settings(rounds=3, rank=1, out=str(tmp_path / "run"), resume=True), Silent())
    assert written() == 2


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path):
    chosen = settings(out=str(tmp_path / "run"), rounds=1)
    run(chosen, Silent())
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(ValueError, match="another process is writing"):
        run(replace(chosen, resume=True, rounds=2), Silent())
    assert run(replace(chosen, resume=True, rounds=2), Silent())["num_rounds"] == 2
