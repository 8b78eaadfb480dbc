"""The paper's table beside made runs, of which every accuracy is written here."""

import pandas as pd
import pytest

from experiments.paper.mnist import TABLE, beside, main, verdict
from tests.made_runs import Made, write_run

WIDTHS = [784, 64, 64, 5]


def write_comparison(folder, finals, **changes):
    """Write a run a cell and seed that ends at an accuracy, in per cent; its clients send 3 MiB a round."""
    for cell, values in finals.items():
        for seed, value in enumerate(values):
            made = Made(cell, [0.1, None, value / 100], up=3.0, seed=seed, **changes.get(cell, {}))
            write_run(made, folder / cell / f"seed_{seed}")
    return folder


@pytest.fixture
def finals():
    """Runs that are just what was published, a little more, and a little less."""
    return {name: [cell.accuracy - 0.5, cell.accuracy + 0.5, cell.accuracy] for name, cell in TABLE.items()}


def test_the_published_parameters_are_those_of_the_models_layers():
    """Rank 1 trains the outputs of each layer (B), its inputs (A), both, or all weights and biases."""
    ins, outs = WIDTHS[:-1], WIDTHS[1:]
    counts = {"b": sum(outs), "a": sum(ins), "ab": sum(ins) + sum(outs)}
    counts["all"] = sum(n * m + m for n, m in zip(ins, outs, strict=True))
    trained = {"lora": ("ab", "ab"), "cola": ("ab", "ab"), "asym": ("b", "a"), "rac": ("b", "a")}
    for method, (gz, zg) in trained.items():
        assert TABLE[f"{method}_gz"].trained == counts[gz]
        assert TABLE[f"{method}_zg"].trained == counts[zg]
    assert TABLE["fpft"].trained == counts["all"]


def test_a_cell_has_the_published_number_and_the_median_and_range_of_our_seeds(tmp_path, finals):
    finals["rac_zg"] = [95.0, 96.0, 91.0, 94.0, 90.0]
    frame = beside(write_comparison(tmp_path, finals)).set_index("cell")
    assert list(frame.index) == list(TABLE)
    row = frame.loc["rac_zg"]
    found = [row["paper"], row["median"], row["min"], row["max"], row["num_seeds"]]
    assert found == pytest.approx([96.1, 94.0, 90.0, 96.0, 5], abs=1e-9)
    assert row["verdict"] == "within 3 points of our median"
    assert set(frame["verdict"].drop("rac_zg")) == {"inside our range"}
    # Half of 3 MiB as factors and half as dense tensors, four bytes a number.
    assert set(frame["trained_parameters"]) == {3 * 2**20 // 4}


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ((90.0, 91.0, 92.0), "inside our range"),
        ((92.0, 93.0, 99.0), "inside our range"),
        ((80.0, 89.0, 91.9), "within 3 points of our median"),
        ((92.1, 95.0, 96.0), "within 3 points of our median"),
        ((80.0, 88.9, 91.9), "differs by 3.1 points"),
        ((99.0, 99.5, 99.9), "differs by 7.5 points"),
    ],
)
def test_the_verdict_says_how_far_the_published_number_is(ours, words):
    assert verdict(92.0, *ours) == words


def test_runs_that_did_not_finish_do_not_count_and_a_cell_without_any_is_named(tmp_path, finals):
    write_comparison(tmp_path, finals)
    write_run(Made("fpft", [0.1, 0.2], seed=7, status="diverged"), tmp_path / "fpft" / "seed_7")
    frame = beside(tmp_path).set_index("cell")
    assert frame.loc["fpft", "num_seeds"] == 3
    with pytest.raises(ValueError, match=r"lora_gz holds no finished run; .*experiment=paper/mnist"):
        beside(tmp_path / "elsewhere")


def test_the_command_prints_the_table_and_writes_it_beside_the_runs(tmp_path, finals, capsys):
    write_comparison(tmp_path, finals)
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in TABLE)
    written = pd.read_csv(tmp_path / "paper.csv")
    pd.testing.assert_frame_equal(written, beside(tmp_path))


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["nowhere"]])
def test_the_command_says_how_it_is_used(arguments, capsys):
    assert main(arguments) == 2
    assert "folder" in capsys.readouterr().err
