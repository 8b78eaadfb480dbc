"""A comparison is paired, resumable, and says what a method could not afford."""

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

import experiments.compare
from experiments.cli import main
from experiments.compare import TUNING_SEED, compare, tune
from experiments.outcomes import Diverged
from experiments.settings import name_of
from fedraclora.files import read_json
from fedraclora.finished import load_run
from strategies.state import BudgetTooSmall
from tests.helpers import compare_settings, same_weights

METHODS = ["rac_lora", "full"]


def quiet():
    return Console(file=io.StringIO(), width=200)


def chosen(folder, **changes):
    return compare_settings(**{"methods": METHODS, "seeds": 2, "out": str(folder), "rounds": 3, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "out"
    compare(chosen(folder), quiet())
    return folder


def tables(finished, name):
    return {(m, s): pd.read_csv(finished / m / f"seed_{s}" / name) for m in METHODS for s in (0, 1)}


def test_all_files_of_the_contract_are_there(finished):
    for name in ("settings.yaml", "comparison.csv", "report.html"):
        assert (finished / name).stat().st_size > 0
    for method in METHODS:
        for seed in (0, 1):
            folder = finished / method / f"seed_{seed}"
            for name in ("settings.yaml", "rounds.csv", "ledger.csv", "summary.json", "chain/index.json"):
                assert (folder / name).stat().st_size > 0


def test_methods_share_the_split_the_cohorts_and_the_initial_weights_of_a_seed(finished):
    summaries = {(m, s): read_json(finished / m / f"seed_{s}" / "summary.json") for m in METHODS for s in (0, 1)}
    bases = {key: load_run(finished / key[0] / f"seed_{key[1]}").chain(0).hash for key in summaries}
    ledgers, rounds = tables(finished, "ledger.csv"), tables(finished, "rounds.csv")
    for seed in (0, 1):
        assert len({summaries[m, seed]["split_digest"] for m in METHODS}) == 1
        assert len({bases[m, seed] for m in METHODS}) == 1
        assert len({rounds[m, seed]["test_loss"].iloc[0] for m in METHODS}) == 1
        cohorts = [
            {(r, p) for r, p in zip(ledgers[m, seed]["round"], ledgers[m, seed]["partition"], strict=True)}
            for m in METHODS
        ]
        assert cohorts[0] == cohorts[1]
    assert summaries["full", 0]["split_digest"] != summaries["full", 1]["split_digest"]
    assert bases["full", 0] != bases["full", 1]


def test_the_table_has_a_row_a_method(finished):
    table = pd.read_csv(finished / "comparison.csv")
    assert sorted(table["method"]) == sorted(METHODS)
    assert (table["num_seeds"] == 2).all()


def test_a_finished_comparison_runs_nothing_when_it_is_resumed(finished, monkeypatch):
    def never(*arguments):
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(experiments.compare, "run", never)
    before = (finished / "comparison.csv").read_bytes()
    compare(chosen(finished, resume=True), quiet())
    assert (finished / "comparison.csv").read_bytes() == before


def test_an_interrupted_comparison_goes_on_where_it_stopped(finished, tmp_path, monkeypatch):
    real, calls = experiments.compare.run, []

    def counted(one, watcher):
        calls.append((one.method.name, one.seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(one, watcher)

    monkeypatch.setattr(experiments.compare, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(chosen(tmp_path / "out"), quiet())
    compare(chosen(tmp_path / "out", resume=True), quiet())
    assert calls[3:] == [calls[2], ("full", 1)]
    for method in METHODS:
        for seed in (0, 1):
            name = f"{method}/seed_{seed}/summary.json"
            digests = [read_json(folder / name)["chain_digest"] for folder in (finished, tmp_path / "out")]
            assert digests[0] == digests[1]


def test_a_method_that_affords_no_round_is_shown_and_the_others_go_on(tmp_path):
    """One round of full costs 3 clients at least 900 floats up; a budget of 0.008 MiB is 2,097 floats."""
    console = quiet()
    compare(chosen(tmp_path / "out", budget_mib=0.008, seeds=1), console)
    assert "full: no round affordable" in console.file.getvalue()
    assert (tmp_path / "out" / "rac_lora" / "seed_0" / "summary.json").exists()
    assert "no round affordable" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_larger_budget_goes_on_where_the_smaller_one_ended(finished, tmp_path):
    """Both kinds of end: full affords no round at first, and rac_lora not all of them."""

    def status(method):
        return read_json(tmp_path / "out" / method / "seed_0" / "summary.json")["status"]

    compare(chosen(tmp_path / "out", budget_mib=0.002, seeds=1), quiet())
    assert status("rac_lora") == "stopped at the budget"
    assert list(read_json(tmp_path / "out" / "refused.json")) == ["full"]
    compare(chosen(tmp_path / "out", budget_mib=10.0, seeds=1, resume=True), quiet())
    assert read_json(tmp_path / "out" / "refused.json") == {}
    for method in METHODS:
        assert status(method) == "finished"
        name = f"{method}/seed_0/summary.json"
        whole, resumed = (read_json(folder / name) for folder in (finished, tmp_path / "out"))
        assert (resumed["chain_digest"], resumed["num_rounds"]) == (whole["chain_digest"], 3)


def test_a_budget_that_no_method_affords_is_an_error(tmp_path):
    with pytest.raises(BudgetTooSmall, match="no method"):
        compare(chosen(tmp_path / "out", budget_mib=1e-6, seeds=1), quiet())


def test_a_method_that_diverges_does_not_end_the_comparison(tmp_path):
    one = chosen(tmp_path / "out", seeds=1, rounds=12, method_settings={"rac_lora": {"lr": 1e9}})
    compare(one, quiet())
    assert read_json(tmp_path / "out" / "rac_lora" / "seed_0" / "summary.json")["status"] == "diverged"
    assert read_json(tmp_path / "out" / "full" / "seed_0" / "summary.json")["status"] == "finished"


def test_a_run_that_diverged_is_not_run_again(tmp_path, monkeypatch):
    changes = {"methods": ["rac_lora"], "seeds": 1, "rounds": 12, "method_settings": {"rac_lora": {"lr": 1e9}}}
    compare(chosen(tmp_path / "out", **changes), quiet())
    calls = []
    monkeypatch.setattr(experiments.compare, "run", lambda *arguments: calls.append(arguments))
    compare(chosen(tmp_path / "out", resume=True, **changes), quiet())
    assert calls == []


@pytest.mark.parametrize(
    ("bad_seed", "changes"),
    [(1, {}), (2, {"seeds": 3}), (TUNING_SEED + 1, {"tune": [0.1, 0.2], "tune_seeds": 2})],
)
def test_a_seed_whose_split_fails_ends_the_comparison_before_any_training(tmp_path, monkeypatch, bad_seed, changes):
    real, calls = experiments.compare.prepare, []

    def prepared(one):
        if one.seed == bad_seed:
            raise ValueError("this seed leaves a client without data")
        return real(one)

    monkeypatch.setattr(experiments.compare, "prepare", prepared)
    monkeypatch.setattr(experiments.compare, "run", lambda *arguments: calls.append(arguments))
    with pytest.raises(ValueError, match="this seed leaves"):
        compare(chosen(tmp_path / "out", **changes), quiet())
    assert calls == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": []}, "methods"),
        ({"methods": ["full", "full"]}, "once"),
        ({"methods": ["ful"]}, "did you mean 'full'"),
        ({"seeds": 0}, "seeds"),
        ({"method_settings": {"fedit": {"lr": 0.1}}}, "fed_it"),
        ({"method_settings": {"full": {"lrr": 0.1}}}, "did you mean 'lr'"),
        ({"method_settings": {"full": {"lr": "fast"}}}, "lr"),
        ({"tune": [0.1]}, "two different"),
        ({"tune": {"rac_lora": [0.1, -0.2]}}, "positive"),
        ({"methods": ["full", "fed_it"], "rank": 11}, "rank 11"),
    ],
)
def test_a_comparison_that_cannot_be_run_is_refused_before_anything_is_written(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        compare(chosen(tmp_path / "out", **changes), quiet())
    assert not (tmp_path / "out").exists()


# ---- variants


VARIANTS = {
    "coarse": {"method": "full", "uplink": "int4"},
    "fine": {"method": {"name": "rac_lora", "side": "auto"}, "uplink": {"name": "top_k", "share": 0.5}},
}


def test_variants_go_by_their_labels_in_folders_tables_figures_and_in_a_report_made_afterwards(tmp_path):
    one = chosen(tmp_path / "out", methods=["full", "coarse", "fine"], variants=VARIANTS, seeds=1, rounds=1)
    console = quiet()
    compare(one, console)
    table = pd.read_csv(tmp_path / "out" / "comparison.csv").set_index("method")
    assert list(table.index) == ["full", "coarse", "fine"]
    assert table.loc["coarse", "uplink_mib_median"] < table.loc["full", "uplink_mib_median"] / 7
    assert "coarse" in console.file.getvalue()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What a compressor buys" in page
    assert "uplink.name=top_k" in page
    assert main(["report", str(tmp_path / "out"), f"out={tmp_path / 'again' / 'report.html'}"]) == 0
    again = pd.read_csv(tmp_path / "again" / "comparison.csv").set_index("method")
    pd.testing.assert_frame_equal(again, table)


def test_a_variant_keeps_what_it_does_not_say_of_the_comparisons_own_plug_ins():
    known = compare_settings(
        partition=("dirichlet", {"alpha": 0.7, "min_partition_size": 2}), uplink=("top_k", {"share": 0.3})
    )
    for said in ({"alpha": 0.2}, {"name": "dirichlet", "alpha": 0.2}):
        found = variant(known, {"method": "full", "partition": said})
        assert (found.partition.alpha, found.partition.min_partition_size) == (0.2, 2)
    assert variant(known, {"method": "full", "partition": "dirichlet"}).partition.alpha == 0.7
    assert variant(known, {"method": "full", "uplink": "top_k"}).uplink.share == 0.3
    assert variant(known, {"method": "full", "partition": "iid"}).partition.name == "iid"
    assert known.partition.alpha == 0.7


def variant(known, changes):
    return experiments.compare.one_run(replace(known, variants={"one": changes}), Path(), "one", 0, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": "ten"}, "variant sets rounds='ten'"),
        ({"sketch": {"shared": "perhaps"}}, "sketch=.*perhaps"),
        ({"method": {"lr": 0.1}}, "names none; add name"),
        ({"partition": {"alhpa": 0.1}}, "did you mean 'alpha'"),
    ],
)
def test_a_variant_of_the_wrong_type_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        variant(compare_settings(), {"method": "full", **changes})


# ---- a model for all to start from

PRETRAIN = {"method": "full", "num_clients": 1, "fraction": 1.0, "rounds": 2, "lr": 0.1, "partition": "iid"}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "out"
    tuning = {"tune": {"rac_lora": [0.1, 0.5]}, "tune_extensions": 0, "tune_rounds": 1}
    compare(chosen(folder, pretrain=PRETRAIN, budget_mib=1.0, **tuning), quiet())
    return folder


def test_every_run_of_a_seed_starts_from_the_one_model_trained_for_it(pretrained):
    seeds = {f"seed_{seed}" for seed in (0, 1, TUNING_SEED)}
    assert {path.name for path in (pretrained / "pretrain").iterdir()} == seeds
    ends = {seed: load_run(pretrained / "pretrain" / seed).chain() for seed in seeds}
    runs = [path.parent for path in pretrained.rglob("summary.json") if path.parent.parent.name != "pretrain"]
    assert {path.parent.name for path in runs} == {"rac_lora", "full"}
    assert len(runs) == 4 + 2
    for path in runs:
        assert same_weights(load_run(path).chain(0).weights(), ends[path.name].weights())
    assert not same_weights(ends["seed_0"].weights(), ends["seed_1"].weights())


def test_the_pretraining_run_is_what_was_asked_for_and_no_method_of_the_comparison(pretrained):
    for seed in (0, 1, TUNING_SEED):
        summary = read_json(pretrained / "pretrain" / f"seed_{seed}" / "summary.json")
        assert (summary["status"], summary["num_rounds"]) == ("finished", 2)
        known = OmegaConf.load(pretrained / "pretrain" / f"seed_{seed}" / "settings.yaml")
        assert (known.num_clients, known.method.name, known.partition.name) == (1, "full", "iid")
        # Budgets are for what is compared; what tuning holds out is held out here, too.
        assert known.budget_mib is None
        assert known.eval_split == ("validation" if seed == TUNING_SEED else "test")
    assert sorted(pd.read_csv(pretrained / "comparison.csv")["method"]) == sorted(METHODS)


def test_models_are_trained_once_and_a_comparison_that_was_interrupted_goes_on_from_them(
    pretrained, tmp_path, monkeypatch
):
    real, calls = experiments.compare.run, []

    def counted(one, watcher):
        calls.append((name_of(one), one.seed))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(one, watcher)

    monkeypatch.setattr(experiments.compare, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        compare(chosen(tmp_path / "out", pretrain=PRETRAIN), quiet())
    compare(chosen(tmp_path / "out", pretrain=PRETRAIN, resume=True), quiet())
    again = [("pretrain", 0), ("pretrain", 1), ("pretrain", 1)]
    assert calls == [*again, ("rac_lora", 0), ("full", 0), ("rac_lora", 1), ("full", 1)]
    name = "pretrain/seed_1/summary.json"
    assert read_json(tmp_path / "out" / name)["chain_digest"] == read_json(pretrained / name)["chain_digest"]
    # By another way to the same folder, nothing is done again.
    monkeypatch.chdir(tmp_path)
    compare(chosen("out", pretrain=PRETRAIN, resume=True), quiet())
    assert len(calls) == 7
    with pytest.raises(ValueError, match="pretrain was"):
        compare(chosen("out", pretrain={**PRETRAIN, "rounds": 3}, resume=True), quiet())


def test_a_variant_may_start_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variants = {"scratch": {"method": "full", "start_from": None}}
    compare(
        chosen("out", methods=["full", "scratch"], variants=variants, seeds=1, rounds=1, pretrain=PRETRAIN), quiet()
    )
    bases = [load_run(tmp_path / "out" / name / "seed_0").chain(0).hash for name in ("full", "scratch", "pretrain")]
    assert bases[1] == bases[2] != bases[0]
    # A full path, because the server of a runtime may run elsewhere.
    written = OmegaConf.load(tmp_path / "out" / "full" / "seed_0" / "settings.yaml").start_from
    assert written == str(tmp_path / "out" / "pretrain" / "seed_0")


def test_pretraining_that_diverges_ends_the_comparison_also_when_it_is_resumed(tmp_path):
    one = {"pretrain": {**PRETRAIN, "lr": 1e9, "rounds": 9, "method": {"name": "full"}}, "seeds": 1}
    for resume in (False, True):
        with pytest.raises(Diverged, match="no run can start from it"):
            compare(chosen(tmp_path / "out", resume=resume, **one), quiet())
    assert not (tmp_path / "out" / "full").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pretrain": {**PRETRAIN, "round": 3}}, "did you mean 'rounds'"),
        ({"pretrain": {**PRETRAIN, "rounds": "ten"}}, "rounds='ten'"),
        ({"pretrain": {"rounds": 3}}, "names no method"),
        ({"pretrain": {**PRETRAIN, "method": "ful"}}, "did you mean 'full'"),
        ({"pretrain": {**PRETRAIN, "seed": 3}}, r"sets \['seed'\]"),
        ({"pretrain": {**PRETRAIN, "fraction": 0.0}}, "fraction"),
        (
            {"pretrain": {**PRETRAIN, "model": {"hidden": [11]}}},
            r"pretrain for rac_lora do not fit .*fc1.weight \[11, 64\]",
        ),
        ({"pretrain": PRETRAIN, "methods": ["pretrain"], "variants": {"pretrain": {"method": "full"}}}, "rename it"),
    ],
)
def test_pretraining_that_cannot_be_run_is_refused_before_anything_is_written(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        compare(chosen(tmp_path / "out", **changes), quiet())
    assert not (tmp_path / "out").exists()


# ---- tuning


@given(
    peak=st.floats(-8, 8),
    lowest=st.integers(-3, 3),
    num=st.integers(2, 5),
    extensions=st.integers(0, 12),
)
def test_the_grid_grows_until_its_best_is_interior_or_the_limit_is_reached(peak, lowest, num, extensions):
    """Scores with one peak on a grid of powers of two."""
    tried = []

    def score(rate):
        tried.append(rate)
        return -abs(math.log2(rate) - peak)

    grid = [2.0 ** (lowest + step) for step in range(num)]
    tuned = tune(grid, score, extensions)
    assert len(tried) == len(set(tried)), "a rate was scored twice"
    assert set(grid) <= set(tuned.scores) == set(tried)
    rates = sorted(tuned.scores)
    assert tuned.scores[tuned.best] == max(tuned.scores.values())
    assert tuned.is_interior == (rates[0] < tuned.best < rates[-1])
    below, above = sum(rate < grid[0] for rate in rates), sum(rate > grid[-1] for rate in rates)
    assert max(below, above) <= extensions
    if not tuned.is_interior:
        assert (below if tuned.best == rates[0] else above) == extensions
    # Extensions keep the grid's ratio, to the three digits that a rate is written with.
    ratios = np.array(rates[1:]) / np.array(rates[:-1])
    np.testing.assert_allclose(ratios, 2.0, rtol=0.02)


@given(peak=st.floats(-3, 3), refinements=st.integers(0, 4))
def test_refining_halves_the_gap_around_the_best_each_time(peak, refinements):
    """On a grid of ratio 4 the neighbours end 4^(1 / 2^k) apart, and the best is no farther from the peak than that."""
    tuned = tune(
        [4.0**step for step in range(-4, 5)], lambda rate: -abs(math.log2(rate) - peak), 0, refinements=refinements
    )
    rates = sorted(tuned.scores)
    place = rates.index(tuned.best)
    ratio = 4 ** (0.5**refinements)
    np.testing.assert_allclose(np.divide(rates[place : place + 2], rates[place - 1 : place + 1]), ratio, rtol=0.02)
    assert abs(math.log2(tuned.best) - peak) <= math.log2(ratio) / 2 + 0.02
    assert tuned.is_interior


def test_one_refinement_tries_the_geometric_means_with_both_neighbours():
    tried = []

    def score(rate):
        tried.append(rate)
        return -abs(math.log2(rate / 0.5))

    tuned = tune([0.1, 0.4, 1.6], score, 0, refinements=1)
    assert tried == [0.1, 0.4, 1.6, 0.2, 0.8]
    assert sorted(tuned.scores) == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert tuned.best == 0.4
    # At the edge there is one neighbour.
    tried.clear()
    assert tune([0.4, 1.6], score, 0, refinements=1).best == 0.4
    assert tried == [0.4, 1.6, 0.8]


def test_of_equal_scores_the_smaller_rate_is_taken():
    assert tune([0.1, 0.2, 0.4, 0.8], lambda rate: 1.0 if rate in (0.2, 0.4) else 0.0, 3).best == 0.2


def test_tuning_uses_other_seeds_and_held_out_training_examples_and_sets_the_rate(tmp_path, monkeypatch):
    real, seen = experiments.compare.run, []

    def recorded(one, watcher):
        seen.append((one.seed, one.eval_split, one.lr))
        return real(one, watcher)

    monkeypatch.setattr(experiments.compare, "run", recorded)
    one = chosen(tmp_path / "out", methods=["rac_lora"], seeds=1, tune=[1e-4, 0.5], tune_seeds=2, tune_extensions=0)
    compare(one, quiet())
    tuning, final = seen[:4], seen[4:]
    assert {(seed, split) for seed, split, _ in tuning} == {
        (TUNING_SEED, "validation"),
        (TUNING_SEED + 1, "validation"),
    }
    assert final == [(0, "test", 0.5)]
    table = pd.read_csv(tmp_path / "out" / "tuning.csv")
    assert list(table["lr"]) == [1e-4, 0.5]
    assert list(table["is_best"]) == [False, True]
    assert not table["is_interior"].any()


def test_a_rate_that_diverges_scores_below_one_that_learns(tmp_path):
    learns = {"rounds": 8, "local_steps": 10, "rank": 4, "fraction": 1.0}
    one = chosen(tmp_path / "out", methods=["rac_lora"], seeds=1, tune=[0.5, 1e9], tune_extensions=0, **learns)
    compare(one, quiet())
    scores = pd.read_csv(tmp_path / "out" / "tuning.csv").set_index("lr")["score"]
    assert scores[0.5] > scores[1e9]


def test_one_label_for_several_methods_is_refused():
    with pytest.raises(ValueError, match="would give all methods one name"):
        compare(compare_settings(label="same", methods=["rac_lora", "full"]), Console(quiet=True))


def test_methods_may_leave_variants_of_a_preset_out(tmp_path):
    variants = {"one": {"method": "rac_lora"}, "two": {"method": "full"}}
    chosen = compare_settings(methods=["two"], variants=variants, seeds=1, rounds=1, out=str(tmp_path / "run"))
    compare(chosen, Console(file=io.StringIO()))
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["two"]


def test_a_pretraining_is_not_simulated_on_devices_and_has_to_train_something(tmp_path, monkeypatch):
    own = {"method": "full", "num_clients": 1, "rounds": 1, "local_steps": 100}
    chosen = compare_settings(
        methods=["full"], seeds=1, rounds=1, devices="lte", deadline_s=0.3, pretrain=own, out=str(tmp_path / "run")
    )
    compare(chosen, Console(file=io.StringIO()))
    rounds = pd.read_csv(tmp_path / "run" / "pretrain" / "seed_0" / "rounds.csv")
    assert rounds["is_updated"].tolist() == [False, True]
    monkeypatch.setitem(experiments.compare.NOT_PRETRAINED, "devices", "lte")
    monkeypatch.setitem(experiments.compare.NOT_PRETRAINED, "deadline_s", 0.01)
    with pytest.raises(ValueError, match="trained nothing"):
        compare(replace(chosen, out=str(tmp_path / "other")), Console(file=io.StringIO()))
