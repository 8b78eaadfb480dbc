"""Reports of made-up runs whose every byte and accuracy is written here."""

import io
import json
import re
from html.parser import HTMLParser
from itertools import accumulate
from statistics import median

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console

from experiments.curves import Curve, median_and_range
from experiments.headline import headline
from experiments.plots import label_distribution_figure, save_png
from experiments.report import main_report, write_report
from experiments.results import load_runs
from experiments.styles import method_styles
from experiments.tables import _is_median_lower_bound, comparison_table, render_table, text_table
from tests.made_runs import MIB, Made, climb, make_runs, write_run


def comparison() -> list[Made]:
    """Make four methods with three seeds: one is stopped by the budget, one never gets near the target."""
    mades = []
    for seed in range(3):
        mades.append(Made("rac_lora", climb(0.94, 0.10, 60, seed), 0.06, 0.11, seed, settings={"lr": 0.5}))
        mades.append(Made("fed_it", climb(0.93, 0.09, 60, seed), 0.21, 0.21, seed, settings={"lr": 0.2}))
        mades.append(Made("ffa_lora", climb(0.80, 0.12, 60, seed), 0.05, 0.06, seed, settings={"lr": 0.5}))
        full = Made("full", climb(0.97, 0.20, 9, seed), 1.9, 1.9, seed, "stopped at the budget", {"lr": 0.1})
        mades.append(full)
    for made in mades:
        made.accuracies[1::2] = [None] * len(made.accuracies[1::2])
        made.accuracies[-1] = made.accuracies[-1] or made.accuracies[-2] or 0.5
    return mades


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Give the runs of the comparison and the folder of their report."""
    folder = tmp_path_factory.mktemp("compared")
    runs = make_runs(folder, *comparison())
    write_report(runs, folder / "r.html", title="t", targets=[0.85], budget_mib=8.0, refused={"x": "too dear"})
    return runs, folder


def test_accuracy_at_budget_is_that_of_the_last_evaluated_round_within_it(tmp_path):
    # Three MiB a round: 9 MiB pay for rounds 1 to 3 exactly, and round 3 was not evaluated.
    runs = make_runs(tmp_path, Made("m", [0.1, 0.5, 0.7, None, 0.9]))
    assert comparison_table(runs, targets=[], budget_mib=9.0)["accuracy_at_budget_median"].item() == 0.7
    assert comparison_table(runs, targets=[], budget_mib=11.999)["accuracy_at_budget_median"].item() == 0.7
    assert comparison_table(runs, targets=[], budget_mib=12.0)["accuracy_at_budget_median"].item() == 0.9


def test_without_a_budget_methods_meet_at_the_smallest_total_of_any_run(tmp_path):
    runs = make_runs(tmp_path, Made("long", [0.1, 0.2, 0.3, 0.4]), Made("short", [0.1, 0.6, 0.5]))
    table = comparison_table(runs, targets=[], budget_mib=None)
    assert table["budget_mib"].tolist() == [6.0, 6.0]
    assert table["accuracy_at_budget_median"].tolist() == [0.3, 0.5]
    assert "smallest total" in render_table(table).caption


def test_bytes_to_target_are_those_of_the_first_crossing_even_if_accuracy_falls_again(tmp_path):
    runs = make_runs(tmp_path, Made("m", [0.1, 0.85, 0.2, 0.9, 0.3]))
    table = comparison_table(runs, targets=[0.85, 0.9], budget_mib=None)
    assert table["uplink_mib_to_0.85_median"].item() == 1
    assert table["total_mib_to_0.85_median"].item() == 3
    assert table["uplink_mib_to_0.9_median"].item() == 3


def test_table_agrees_with_a_plain_loop_over_the_rounds(compared):
    mades = comparison()
    table = comparison_table(compared[0], targets=[0.85], budget_mib=8.0).set_index("method")
    for method in ("rac_lora", "fed_it", "ffa_lora", "full"):
        at_budget, needed, num_reached = [], [], 0
        for made in (made for made in mades if made.method == method):
            up, total = int(made.up * MIB), int(made.up * MIB) + int(made.down * MIB)
            known = [(i, value) for i, value in enumerate(made.accuracies) if value is not None]
            at_budget.append([value for i, value in known if i * total <= 8 * MIB][-1])
            crossings = [i for i, value in known if value >= 0.85]
            num_reached += bool(crossings)
            needed.append((crossings[0] if crossings else known[-1][0]) * up / MIB)
        assert table.loc[method, "accuracy_at_budget_median"] == median(at_budget)
        assert table.loc[method, "accuracy_at_budget_min"] == min(at_budget)
        assert table.loc[method, "accuracy_at_budget_max"] == max(at_budget)
        assert table.loc[method, "uplink_mib_to_0.85_median"] == pytest.approx(median(needed), rel=1e-12)
        assert table.loc[method, "num_reached_0.85"] == num_reached
    assert table["num_reached_0.85"].to_dict() == {"rac_lora": 3, "fed_it": 3, "ffa_lora": 0, "full": 0}


def test_runs_that_miss_the_target_make_the_median_a_lower_bound_only_where_they_can_move_it(tmp_path):
    late = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    mades = [
        Made("settled", [0.1, 0.9], seed=0),
        Made("settled", [0.1, 0.2, 0.9], seed=1),
        Made("settled", late, seed=2),
    ]
    mades += [Made("open", [0.1, 0.9], seed=0), Made("open", [0.1, 0.2], seed=1), Made("open", late, seed=2)]
    # Two needs are known (1 and 2), the third is above 5: the median is 2. With 1, above 1, above 5 it is at least 1.
    text = text_table(comparison_table(make_runs(tmp_path, *mades), targets=[0.8], budget_mib=None))
    assert text["uplink MiB to 80 %"].tolist() == ["2 (2/3 reached)", "> 1 (1/3 reached)"]


def test_missed_target_is_bounded_by_the_last_evaluation_not_by_unevaluated_rounds(tmp_path):
    table = comparison_table(make_runs(tmp_path, Made("m", [0.1, 0.2, None, None])), targets=[0.8], budget_mib=None)
    assert table["uplink_mib_to_0.8_median"].item() == 1


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), min_size=1, max_size=6), st.floats(0, 1000))
def test_censored_median_never_exceeds_what_longer_runs_would_show(needs, extra):
    known = [need for need, _ in needs]
    truth = [need if reached else need + extra for need, reached in needs]
    is_lower_bound = _is_median_lower_bound(known, [reached for _, reached in needs])
    assert median(known) <= median(truth)
    assert is_lower_bound or median(known) == median(truth)


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=2, max_size=8), min_size=1, max_size=4)
)
def test_median_line_is_the_median_of_the_last_evaluations_by_each_byte(seeds):
    paths = [(list(accumulate(step for step, _ in seed)), [value for _, value in seed]) for seed in seeds]
    grid, (low, middle, high) = median_and_range(
        [Curve(np.array(x, float), np.array(y)) for x, y in paths], is_log=True
    )
    for i, point in enumerate(grid):
        values = [[value for at, value in zip(x, y, strict=True) if at <= point][-1] for x, y in paths]
        assert (low[i], middle[i], high[i]) == (min(values), pytest.approx(median(values)), max(values))


def test_headline_names_the_cheapest_uplink_and_how_much_less_it_is(tmp_path):
    cheap = [Made("cheap", [0.1, 0.5, 0.9], 1.0, 2.0, seed) for seed in range(3)]
    dear = [Made("dear", [0.1, 0.5, 0.9], 5.0, 0.5, seed) for seed in range(3)]
    table = comparison_table(make_runs(tmp_path, *dear, *cheap), targets=[0.5, 0.9, 0.95], budget_mib=None)
    assert headline(table) == (
        "cheap reaches 90 % test accuracy with 2 MiB of uplink (median of 3 seeds, 2 to 2), 5.0 times less than dear."
    )


def test_headline_tells_when_the_downlink_turns_the_order(tmp_path):
    runs = make_runs(tmp_path, Made("a", [0.1, 0.9], 1.0, 9.0), Made("b", [0.1, 0.9], 2.0, 2.0))
    text = headline(comparison_table(runs, targets=[0.9], budget_mib=None))
    assert text.startswith("a reaches 90 % test accuracy with 1 MiB of uplink (one seed), 2.0 times less than b.")
    assert text.endswith("With the downlink counted, b needs least: 4 MiB in total (one seed).")


def test_headline_does_not_rank_a_method_that_stopped_earlier(tmp_path):
    runs = make_runs(tmp_path, Made("a", [0.1, 0.2, 0.3, 0.9]), Made("b", [0.1, 0.8]), Made("c", [0.1] * 13))
    text = headline(comparison_table(runs, targets=[0.9], budget_mib=None))
    assert "; not reached by: c (after 12 MiB); ended too early to be ranked: b (after 1 MiB)" in text


def test_headline_falls_back_to_the_budget_when_no_method_reaches_a_target(tmp_path):
    runs = make_runs(tmp_path, Made("a", [0.1, 0.5]), Made("b", [0.1, 0.6]))
    assert headline(comparison_table(runs, targets=[0.9], budget_mib=3.0)) == (
        "No method reached 90 % test accuracy in the median of its seeds; within 3 MiB in total, "
        "b reaches 60.0 % test accuracy (one seed), ahead of a at 50.0 %."
    )


def test_regression_is_compared_by_loss_and_has_no_accuracy_targets(tmp_path):
    runs = make_runs(tmp_path, Made("a", [], losses=[9.0, 0.5, 0.25]), Made("b", [], losses=[9.0, 3.0, 1.0]))
    table = comparison_table(runs, targets=[0.9], budget_mib=None)
    assert table["loss_at_budget_median"].tolist() == [0.25, 1.0]
    assert not [column for column in table if "0.9" in column]
    write_report(runs, tmp_path / "r.html", title="t", targets=[0.9], budget_mib=None, refused={})
    page = (tmp_path / "r.html").read_text()
    assert "a reaches 0.25 test loss" in page
    assert "accuracy targets do not apply" in page


def test_comparison_csv_is_numeric_but_for_the_method_and_equals_the_table(compared):
    runs, folder = compared
    table = pd.read_csv(folder / "comparison.csv")
    pd.testing.assert_frame_equal(table, comparison_table(runs, targets=[0.85], budget_mib=8.0))
    assert [column for column in table if table[column].dtype not in (float, int, bool)] == ["method"]


class Links(HTMLParser):
    """Collect what a page would fetch, its ids, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]
        self.ids += [value for name, value in attrs if name == "id"]


def test_page_fetches_nothing_and_keeps_the_ids_of_its_figures_apart(compared):
    page = (compared[1] / "r.html").read_text()
    found = Links()
    found.feed(page)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in found.links)
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert not found.tags & {"script", "link", "iframe", "img"}
    assert len(set(found.ids)) == len(found.ids)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert "too dear" in page


def test_special_characters_are_shown_not_obeyed(tmp_path):
    name = '<i>"$a_b$ & [red]'
    other = Made("b", [0.1, 0.9], settings={"note": "<em>y</em> (<em>", "<u>": "<u>"})
    runs = make_runs(tmp_path, Made(name, [0.1, 0.9], settings={"note": "<u>x</u>", "<u>": "<u>"}), other)
    write_report(runs, tmp_path / "r.html", title="<s>t", targets=[0.8], budget_mib=None, refused={"<q>": "<b>why"})
    found = Links()
    found.feed((tmp_path / "r.html").read_text())
    assert not found.tags & {"i", "u", "s", "q", "b", "em"}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_table(comparison_table(runs, targets=[0.8], budget_mib=None)))
    assert name in console.export_text()


def test_main_report_takes_targets_budget_refusals_and_tuning_from_beside_the_runs(tmp_path):
    folder = write_run(
        Made("m", [0.1, 0.9], settings={"target_accuracies": [0.75], "budget_mib": 4.0}), tmp_path / "run"
    )
    (tmp_path / "refused.json").write_text(json.dumps({"dear": "no round affordable"}))
    (tmp_path / "tuning.csv").write_text(
        "method,lr,score,is_best,is_interior\nm,0.125,0.9,True,True\nm,8,,False,True\n"
    )
    main_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for shown in ("75 %", "accuracy at 4 MiB", "no round affordable", "0.125", "not known"):
        assert shown in page


def test_page_warns_of_interrupted_runs_unequal_seeds_and_unequal_splits(tmp_path):
    folders = [
        write_run(made, tmp_path / str(i))
        for i, made in enumerate(
            [Made("a", [0.1, 0.9], status="interrupted"), Made("a", [0.1, 0.9], seed=1), Made("b", [0.1, 0.9])]
        )
    ]
    summary = json.loads((folders[2] / "summary.json").read_text())
    (folders[2] / "summary.json").write_text(json.dumps(summary | {"split_digest": "other"}))
    main_report(folders, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "a, seed 0: interrupted after round 1." in page
    assert "The methods ran with different seeds: a 0, 1; b 0." in page
    assert "Seed 0: the methods did not train on the same split of the data." in page


def test_equal_runs_give_equal_pages(compared, tmp_path):
    runs, folder = compared
    write_report(runs, tmp_path / "r.html", title="t", targets=[0.85], budget_mib=8.0, refused={"x": "too dear"})
    assert (tmp_path / "r.html").read_bytes() == (folder / "r.html").read_bytes()


def test_folder_without_a_file_is_refused_by_the_files_name(tmp_path):
    folder = write_run(Made("m", [0.1, 0.9]), tmp_path / "run")
    (folder / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run is no finished run: summary\.json is missing"):
        load_runs([folder])


def test_two_runs_of_one_method_and_seed_are_refused(tmp_path):
    with pytest.raises(ValueError, match="both hold method m with seed 0"):
        make_runs(tmp_path, Made("m", [0.1]), Made("m", [0.2]))


def test_run_that_was_never_evaluated_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"method b, seed 0: rounds\.csv has no test_accuracy"):
        make_runs(tmp_path, Made("a", [0.1]), Made("b", [None, None]))


def test_run_of_the_first_round_only_still_has_a_page(tmp_path):
    runs = make_runs(tmp_path, Made("m", [0.1]))
    write_report(runs, tmp_path / "r.html", title="t", targets=[0.9], budget_mib=None, refused={})
    assert "m reaches 10.0 %" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(("num_clients", "num_classes"), [(1, 1), (10, 10), (60, 20), (61, 10), (500, 100)])
def test_label_distribution_is_drawn_for_any_number_of_clients(num_clients, num_classes):
    counts = pd.DataFrame(np.ones((num_clients, num_classes), int), columns=[str(i) for i in range(num_classes)])
    figure = label_distribution_figure(counts.assign(partition=range(num_clients)))
    is_heat_map = num_clients > 60 or num_classes > 20
    assert len(figure.axes[0].images) == is_heat_map
    assert sum(bar.get_width() for bar in figure.axes[0].patches) == (0 if is_heat_map else num_clients * num_classes)


def test_png_of_a_figure_is_white_behind_the_bars(tmp_path):
    figure = label_distribution_figure(pd.DataFrame({"partition": [0, 1], "cat": [3, 0], "dog": [1, 2]}))
    save_png(figure, tmp_path / "labels.png")
    assert imread(tmp_path / "labels.png")[0, 0].tolist() == [1, 1, 1, 1]


def test_styles_of_many_methods_all_differ():
    styles = method_styles([str(i) for i in range(14)])
    assert len({(style.color, style.dashes) for style in styles.values()}) == 14
