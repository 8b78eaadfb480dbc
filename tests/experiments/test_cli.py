"""The console command: what it says and leaves behind when something is wrong, and what it makes when nothing is."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import experiments.cli
import experiments.compare
from experiments.cli import main
from experiments.groups import preset_names
from experiments.settings import CompareSettings
from fedraclora.files import read_json
from fedraclora.plugins import names

TINY = ("dataset=digits", "model.hidden=[12]", "num_clients=6", "fraction=0.5", "rank=2", "rounds=2", "local_steps=2")
BAD_USE, FAILED = 2, 1


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def command(capsys):
    """Return a function that runs the command and gives its exit code and what it printed on standard error."""

    def run(*arguments):
        code = main(list(arguments))
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err + printed.out
        return code, printed.err + printed.out

    return run


def nothing_written(tmp_path):
    return not list((tmp_path / "here").iterdir())


# ---- bad input, each: the arguments, and what the message must say.
MISTAKES = {
    "method": (["method=rac_lore"], ["rac_lore", "did you mean 'rac_lora'"]),
    "data set": (["dataset=digit"], ["digit", "did you mean 'digits'"]),
    "model": (["model=mpl"], ["mpl", "did you mean 'mlp'"]),
    "partition": (["partition=dirichelet"], ["did you mean 'dirichlet'"]),
    "key": (["local_step=3"], ["local_step", "did you mean 'local_steps'"]),
    "group key": (["method=rac_lora", "method.rounds_per_lnk=3"], ["rounds_per_lnk", "did you mean 'rounds_per_link'"]),
    "key of the default group": (["method.sides=a"], ["sides", "side"]),
    "nested key": (["sketch.lw=raw"], ["lw"]),
    "value of a method": (["method.side=c"], ["side='c'"]),
    "law": (["sketch.law=gausian"], ["did you mean 'gaussian'"]),
    "type": (["rounds=many"], ["rounds", "many"]),
    "dtype": (["dtype=float16"], ["float16", "float32"]),
    "runtime": (["runtime=inprocess"], ["did you mean 'in_process'"]),
    "rank for the drawn side": (["method.side=a", "rank=11"], ["rank 11", "10 outputs", "fc2"]),
    "rank for both sides": (["method=fed_it", "rank=11"], ["rank 11", "min(in, out) = 10", "fc2"]),
    "rank zero": (["rank=0"], ["rank"]),
    "ranks of no layer": (["ranks={fc9: 2}"], ["fc9", "fc1"]),
    "no layer matched": (["targets=[query]"], ["query", "fc1"]),
    "dense matches nothing": (["dense=[head]"], ["head", "fc1.bias"]),
    "client without data": (["num_clients=2000", "partition=iid"], ["2000"]),
    "missing file": (["dataset=mnist", "dataset.path=nowhere.npz"], ["nowhere.npz"]),
    "no rounds": (["rounds=-1"], ["rounds=-1"]),
    "fraction": (["fraction=0"], ["fraction=0"]),
    "learning rate": (["lr=-1"], ["lr=-1"]),
    "dotted path": (["method=no_such_package.method"], ["no_such_package"]),
    "dotted path to no plug-in": (["method=json.decoder"], ["json.decoder", "Config"]),
    "experiment": (["experiment=dmo"], ["dmo"]),
    "too few replies": (["min_replies=5"], ["min_replies=5"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_its_remedy_before_anything_is_written(command, tmp_path, name):
    arguments, words = MISTAKES[name]
    code, message = command("run", *TINY, *arguments)
    assert code in (BAD_USE, FAILED), message
    for word in words:
        assert word in message
    assert nothing_written(tmp_path)


def test_an_unknown_command_names_the_nearest(command):
    code, message = command("comapre")
    assert code == BAD_USE
    assert "did you mean 'compare'" in message


@pytest.mark.parametrize("kind", ["npz", "idx"])
def test_a_corrupt_data_file_is_named(command, tmp_path, kind):
    if kind == "npz":
        path = tmp_path / "mnist.npz"
        path.write_bytes(b"this is no archive")
    else:
        path = tmp_path / "mnist"
        path.mkdir()
        for name in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
            middle = "idx3" if "images" in name else "idx1"
            (path / f"{name}-{middle}-ubyte.gz").write_bytes(gzip.compress(b"\0\0\0"))
    code, message = command("run", "dataset=mnist", f"dataset.path={path}", *TINY[1:])
    assert code in (BAD_USE, FAILED)
    assert path.name in message
    assert nothing_written(tmp_path)


def test_a_client_that_owns_nothing_is_named(command, tmp_path):
    mistake = ["num_clients=900", "partition.min_partition_size=0", "partition.alpha=0.02", "fraction=0.01"]
    code, message = command("run", *TINY, *mistake)
    if code == 0:
        assert "no data" in message or "empty" in message
    else:
        assert "client" in message
        assert nothing_written(tmp_path)


def test_a_budget_below_one_round_is_an_error(command, tmp_path):
    code, message = command("run", *TINY, "uplink_mib=0.0001", "out=run")
    assert code == BAD_USE
    assert "no round affordable" in message
    assert "uplink_mib" in message
    # A larger budget goes on from there.
    assert command("run", *TINY, "uplink_mib=1", "out=run", "resume=true")[0] == 0
    assert read_json(tmp_path / "here" / "run" / "summary.json")["num_rounds"] == 2


def test_a_budget_for_some_rounds_is_no_error(command):
    code, message = command("run", *TINY, "rounds=50", "budget_mib=0.02", "out=run")
    assert code == 0
    assert "budget_mib" in message
    assert read_json_here("run/summary.json")["status"] == "stopped at the budget"
    assert command("replay", "run")[0] == 0


def read_json_here(path):
    return read_json(Path(path))


def test_training_that_diverges_says_so_and_keeps_the_rounds_before(command):
    code, message = command("run", *TINY, "rounds=30", "lr=1e9", "out=run")
    assert code == FAILED
    assert "diverged" in message
    assert "lr=1e+09" in message or "1000000000.0" in message
    rounds = pd.read_csv("run/rounds.csv")
    assert len(rounds) >= 2
    assert len(rounds) < 31
    summary = read_json_here("run/summary.json")
    assert summary["status"] == "diverged"
    assert summary["num_rounds"] == rounds["round"].iloc[-1]
    assert command("replay", "run")[0] == 0


def test_resuming_with_other_settings_is_refused(command):
    assert command("run", *TINY, "out=run")[0] == 0
    before = {path: Path(path).read_bytes() for path in ("run/rounds.csv", "run/settings.yaml", "run/ledger.csv")}
    code, message = command("run", *TINY, "out=run", "resume=true", "lr=0.123")
    assert code == BAD_USE
    assert "lr was None" in message
    assert "0.123" in message
    code, message = command("run", *TINY, "out=run", "resume=true", "method.side=a")
    assert code == BAD_USE
    assert "method" in message
    assert before == {path: Path(path).read_bytes() for path in before}


@pytest.mark.parametrize("override", ["ranks={fc1: 4}", "ranks.fc1=4"])
def test_a_layer_gets_a_rank_of_its_own(command, override):
    """fc1 has 12 outputs and fc2 has 10, so with ranks 4 and 2 a client sends 12 * 4 + 10 * 2 numbers."""
    assert command("run", *TINY, override, "out=run")[0] == 0
    ledger = pd.read_csv("run/ledger.csv")
    sent = ledger[(ledger["direction"] == "up") & (ledger["kind"] == "update")]
    assert set(sent["parameters"]) == {12 * 4 + 10 * 2}


def test_a_folder_that_is_not_empty_is_not_overwritten(command, tmp_path):
    folder = tmp_path / "here" / "precious"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    code, message = command("run", *TINY, "out=precious")
    assert code == BAD_USE
    assert "not empty" in message
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_nothing_to_resume_is_an_error(command, tmp_path):
    code, message = command("run", *TINY, "resume=true")
    assert code == BAD_USE
    assert "found no run" in message
    assert nothing_written(tmp_path)


# ---- what a run leaves, and what replay and report make of it


@pytest.fixture
def finished(command):
    assert command("run", *TINY, "rounds=4", "out=run")[0] == 0
    return "run"


def test_replay_verifies_and_exports(command, finished, tmp_path):
    code, message = command("replay", finished, "export=model.safetensors")
    assert code == 0
    assert read_json_here("run/summary.json")["chain_digest"] in message
    assert "verified" in message
    assert (tmp_path / "here" / "model.safetensors").exists()
    code, message = command("replay", finished, "version=2")
    assert code == 0
    assert "version 2 of 4" in message


DAMAGES = {
    "a bit of a link": lambda folder: flip(folder / "chain" / "version_000002.safetensors"),
    "a bit of the base": lambda folder: flip(folder / "chain" / "base.safetensors"),
    "a link cut short": lambda folder: cut(folder / "chain" / "version_000003.safetensors"),
    "a link missing": lambda folder: (folder / "chain" / "version_000001.safetensors").unlink(),
    "the index cut short": lambda folder: cut(folder / "chain" / "index.json"),
    "the index missing": lambda folder: (folder / "chain" / "index.json").unlink(),
    "a version dropped from the index": lambda folder: drop_version(folder / "chain" / "index.json"),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def drop_version(path):
    index = json.loads(path.read_text())
    index["versions"].pop()
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("name", DAMAGES)
def test_replay_of_a_damaged_log_fails_and_says_where(command, finished, tmp_path, name):
    DAMAGES[name](tmp_path / "here" / "run")
    code, message = command("replay", finished, "export=model.safetensors")
    assert code == BAD_USE
    assert "run" in message
    assert not (tmp_path / "here" / "model.safetensors").exists()


def test_report_of_a_run(command, finished, tmp_path):
    code, message = command("report", finished, "out=page.html")
    assert code == 0
    assert "page.html" in message
    assert "<html" in (tmp_path / "here" / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["replay"], "name the folder"),
        (["replay", "nowhere"], "nowhere"),
        (["replay", "a", "b"], "name the folder"),
        (["replay", "nowhere", "exprot=x"], "did you mean 'export'"),
        (["report"], "name the folder"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_replay_and_report_say_how_they_are_used(command, tmp_path, arguments, word):
    code, message = command(*arguments)
    assert code in (BAD_USE, FAILED)
    assert word in message
    assert nothing_written(tmp_path)


def test_help_names_every_command(command):
    code, message = command("--help")
    assert code == 0
    assert all(name in message for name in ("run", "compare", "report", "replay"))


def test_cfg_job_prints_the_settings_and_runs_nothing(command, tmp_path):
    code, message = command("run", *TINY, "--cfg", "job")
    assert code == 0
    assert "num_clients: 6" in message
    assert nothing_written(tmp_path)


def test_a_sweep_makes_one_run_a_value(command, tmp_path):
    code, _ = command("run", "-m", *TINY, "seed=0,1", "rounds=1", "out=sweep/${seed}")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "here" / "sweep").iterdir()) == ["0", "1"]


@pytest.mark.parametrize(("flag", "place"), [("-m", 1), ("-m", 99), ("--multirun", 3)])
def test_the_flag_of_a_sweep_may_stand_anywhere(command, tmp_path, flag, place):
    arguments = [*TINY, "rounds=1", "rank=1,2", "out=sweep/${rank}"]
    arguments.insert(place, flag)
    assert command("run", *arguments)[0] == 0
    assert sorted(path.name for path in (tmp_path / "here" / "sweep").iterdir()) == ["1", "2"]
    ranks = [pd.read_csv(tmp_path / "here" / "sweep" / rank / "ledger.csv")["tensor_bytes"].sum() for rank in "12"]
    assert ranks[0] < ranks[1]


def test_a_sweep_leaves_no_file_of_hydra_in_the_current_folder(command, tmp_path):
    assert command("run", "-m", *TINY, "rounds=1", "rank=1,2", "out=sweep/${rank}")[0] == 0
    assert {path.name for path in (tmp_path / "here").iterdir()} <= {"sweep", "runs"}
    assert not list((tmp_path / "here").glob("*.yaml"))


def test_a_sweep_ends_at_the_first_run_that_fails(command, tmp_path):
    code, message = command("run", *TINY, "rounds=1", "-m", "rank=1,99,2", "out=sweep/${rank}")
    assert code == BAD_USE
    assert "rank 99" in message
    assert [path.name for path in (tmp_path / "here" / "sweep").iterdir()] == ["1"]


SMALL = ("num_clients=4", "fraction=0.5", "rank=2", "rounds=1", "local_steps=2", "seeds=1", "dataset=digits")


def test_run_with_a_preset_does_what_compare_does_with_it(command, tmp_path):
    for name in ("run", "compare"):
        code, message = command(name, "experiment=demo", *SMALL, "methods=[rac_lora,full]", f"out={name}")
        assert code == 0, message
    tables = [pd.read_csv(tmp_path / "here" / name / "comparison.csv") for name in ("run", "compare")]
    assert list(tables[0]["method"]) == ["rac_lora", "full"]
    numbers = [column for column in tables[0] if column.endswith(("_median", "_min", "_max")) and "_s_" not in column]
    pd.testing.assert_frame_equal(tables[0][numbers], tables[1][numbers])


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_composes_and_all_that_its_variants_name_exists(command, name):
    """Its runs, its pretraining and its learning-rate grids are read as before any training; the data are not."""
    code, shown = command("compare", f"experiment={name}", "--cfg", "job")
    assert code == 0, shown
    chosen = compare_of(name)
    assert set(chosen.variants) <= set(chosen.methods)
    for method in chosen.methods:
        one = experiments.compare.one_run(chosen, Path(), method, 0, None)
        assert one.method.name in names("strategies")
        experiments.compare._grid(chosen, method)
    assert set(chosen.tune if isinstance(chosen.tune, dict) else {}) <= set(chosen.methods)
    if chosen.pretrain:
        first = experiments.compare._pretraining(chosen, Path(), 0)
        assert first.dataset.name == chosen.dataset.name
        assert first.model == chosen.model


def compare_of(preset, *more):
    """Return the settings of a preset."""
    kept = []
    experiments.cli._hydra("compare", [f"experiment={preset}", *more], CompareSettings, kept.append)
    return kept[0]


def test_a_path_that_is_given_once_reaches_the_pretraining_run():
    chosen = compare_of("paper/mnist", "dataset.path=somewhere.npz")
    first = experiments.compare._pretraining(chosen, Path(), 0)
    assert (first.dataset.path, list(first.dataset.digits)) == ("somewhere.npz", [0, 1, 2, 3, 4])
    assert list(chosen.dataset.digits) == [5, 6, 7, 8, 9]


def test_a_comparison_on_a_regression_ends_with_a_report(command, tmp_path):
    """No accuracy anywhere, so the tables and curves are of the loss."""
    code, message = command(
        *("compare", "dataset=quadratic", "model=softmax_regression", "partition=iid", "methods=[rac_lora,full]"),
        *("num_clients=6", "fraction=0.5", "rank=2", "rounds=2", "local_steps=2", "seeds=2", "out=comparison"),
    )
    assert code == 0, message
    folder = tmp_path / "here" / "comparison"
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    assert sorted(pd.read_csv(folder / "comparison.csv")["method"]) == ["full", "rac_lora"]
    summary = read_json(folder / "rac_lora" / "seed_1" / "summary.json")
    assert summary["status"] == "finished"
    assert summary["final_test_accuracy"] is None
    assert command("report", "comparison", "out=again.html")[0] == 0


def test_a_run_without_out_gets_a_folder_of_its_own(command, tmp_path):
    for _ in range(2):
        assert command("run", *TINY, "rounds=1", "name=mine")[0] == 0
    folders = list((tmp_path / "here" / "runs" / "mine").iterdir())
    assert len(folders) == 2
    assert all((folder / "summary.json").exists() for folder in folders)


def test_the_tables_hold_what_the_contract_promises(command, finished):
    rounds, ledger = pd.read_csv("run/rounds.csv"), pd.read_csv("run/ledger.csv")
    promised = {
        *("method", "seed", "round", "link", "num_clients", "num_failed", "num_missing", "train_loss", "test_loss"),
        *("test_accuracy", "round_s", "simulated_s"),
    }
    byte_columns = {"uplink_bytes", "downlink_bytes", "catchup_bytes", "total_bytes"} | {
        "uplink_record_bytes",
        "downlink_record_bytes",
    }
    assert promised | byte_columns | {f"cum_{name}" for name in byte_columns} <= set(rounds.columns)
    assert list(rounds["round"]) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(rounds["total_bytes"], rounds["uplink_bytes"] + rounds["downlink_bytes"])
    for name in byte_columns:
        np.testing.assert_array_equal(rounds[f"cum_{name}"], rounds[name].cumsum())
    by_round = ledger.groupby(["round", "direction"])["tensor_bytes"].sum().unstack(fill_value=0)
    np.testing.assert_array_equal(by_round["up"], rounds["uplink_bytes"])
    np.testing.assert_array_equal(by_round["down"], rounds["downlink_bytes"])
    summary = read_json_here("run/summary.json")
    assert summary["final_test_accuracy"] == pytest.approx(rounds["test_accuracy"].iloc[-1], abs=1e-12)
    assert summary["total_bytes"] == rounds["cum_total_bytes"].iloc[-1]
