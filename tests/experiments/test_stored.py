"""A stored comparison says what its runs said, in small files without a machine's paths."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from experiments.figures import figures
from experiments.report import main_report
from experiments.results import load_runs
from experiments.run import run
from experiments.stored import ABOUT, LEDGER, ROUNDS, is_stored, load_stored, read_runs, store
from experiments.tables import comparison_table
from tests.helpers import Silent, settings


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    places = []
    for method in ("rac_lora", "full"):
        for seed in (0, 1):
            places.append(folder / method / str(seed))
            run(settings(method=method, seed=seed, out=str(places[-1]), target_accuracies=[0.2]), Silent())
    return load_runs(places)


def test_what_is_read_back_makes_the_same_tables(runs, tmp_path):
    store(runs, tmp_path / "kept")
    again = load_stored([tmp_path / "kept"])
    assert again.methods == runs.methods
    assert again.summaries == runs.summaries
    tables = [comparison_table(each, targets=[0.2], budget_mib=None) for each in (runs, again)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-5)
    pd.testing.assert_frame_equal(
        again.ledger.reset_index(drop=True), runs.ledger.reset_index(drop=True), check_dtype=False
    )
    whole = ["round", "cum_total_bytes", "uplink_bytes"]
    assert again.rounds[whole].to_numpy().tolist() == runs.rounds[whole].to_numpy().tolist()


def test_settings_are_those_of_the_runs_but_for_places(runs, tmp_path):
    moved = [
        each
        | {
            "dataset.path": str(tmp_path / "mnist.npz"),
            "start_from": str(tmp_path / "seed_3"),
            "devices": str(tmp_path / "d.csv"),
            "runtime.superlink": "host:9",
        }
        for each in runs.settings
    ]
    store(replace(runs, settings=moved), tmp_path)
    for before, after in zip(moved, load_stored([tmp_path]).settings, strict=True):
        assert after["dataset.path"] == "mnist.npz"
        assert after["start_from"] == "seed_3"
        assert after["devices"] == "d.csv"
        others = before.keys() - {"out", "resume", "dataset.path", "start_from", "devices", "runtime.superlink"}
        assert {key: after[key] for key in others} == {key: before[key] for key in others}
        assert "out" not in after
    assert not any(word in (tmp_path / ABOUT).read_text() for word in (str(tmp_path), "host:9"))


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    for name in ("a", "b"):
        store(runs, tmp_path / name)
    for file in (ROUNDS, LEDGER, ABOUT):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_several_stored_comparisons_are_read_as_one(runs, tmp_path):
    store(runs, tmp_path / "a")
    assert len(load_stored([tmp_path / "a", tmp_path / "a"]).summaries) == 8


def test_a_folder_without_one_is_named(tmp_path):
    assert not is_stored(tmp_path)
    with pytest.raises(FileNotFoundError, match="no stored comparison"):
        load_stored([tmp_path])
    (tmp_path / ABOUT).write_text(json.dumps({}))
    assert is_stored(tmp_path)


def test_runs_and_stored_comparisons_are_read_alike_but_not_together(runs, tmp_path):
    store(runs, tmp_path / "kept")
    assert read_runs([tmp_path / "kept"]).summaries == runs.summaries
    with pytest.raises(ValueError, match="not both"):
        read_runs([tmp_path / "kept", tmp_path])


def test_the_report_of_stored_runs_is_that_of_the_runs(runs, tmp_path):
    store(runs, tmp_path / "kept")
    for name, found in {"a": runs, "b": read_runs([tmp_path / "kept"])}.items():
        (tmp_path / name).mkdir()
        main_report(found, tmp_path / name / "report.html")
    tables = [pd.read_csv(tmp_path / name / "comparison.csv") for name in "ab"]
    pd.testing.assert_frame_equal(*tables, rtol=1e-5)


def test_every_figure_of_a_comparison_is_drawn_from_stored_runs(runs, tmp_path):
    store(runs, tmp_path / "kept")
    assert list(figures(read_runs([tmp_path / "kept"]))) == ["front_uplink", "front_total", "uplink", "total"]
