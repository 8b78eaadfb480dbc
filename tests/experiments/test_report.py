"""Reports of made-up runs whose every byte and accuracy is written here."""

import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import accumulate, pairwise
from statistics import median

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.image import imread
from rich.console import Console

from experiments.captions import table_caption
from experiments.curves import (
    LEAST_GAP,
    ROUND,
    UPLINK,
    Curve,
    Guides,
    curve_figure,
    gap_figure,
    median_and_range,
    time_axis,
)
from experiments.headline import headline
from experiments.plots import label_distribution_figure, save_png
from experiments.report import main_report, write_report
from experiments.results import load_runs
from experiments.styles import run_styles
from experiments.tables import comparison_table, render_table, text_table
from experiments.target_figure import reach_caption, reach_figure, reaches_of
from tests.made_runs import MIB, Made, climb, make_runs, write_run

INT8 = {"method": {"name": "rac_lora"}, "uplink": {"name": "int8"}}


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


def test_headline_calls_variants_by_their_labels(tmp_path):
    mades = [Made("rac_lora", [0.1, 0.9], 4.0), Made("rac_lora, int8", [0.1, 0.9], settings=INT8)]
    text = headline(comparison_table(make_runs(tmp_path, *mades), targets=[0.9], budget_mib=None))
    assert text.startswith("rac_lora, int8 reaches 90 % test accuracy with 1 MiB of uplink (one seed), 4.0 times less")


def test_headline_leaves_out_methods_without_a_model_for_all(tmp_path):
    """The shared part of such a method may still score, and does not count for the method."""
    personal = Made("p", [0.1, 0.9], 0.1, summed={"is_global": False})
    table = comparison_table(make_runs(tmp_path, personal, Made("m", [0.1, 0.9])), targets=[0.9], budget_mib=None)
    assert headline(table) == "m reaches 90 % test accuracy with 1 MiB of uplink (one seed)."
    assert headline(table.iloc[:1]) == ("No method here makes a model for all clients; read their personal accuracies.")


def test_what_only_some_runs_measure_has_columns_only_then(tmp_path):
    plain = text_table(comparison_table(make_runs(tmp_path / "a", Made("m", [0.1, 0.9])), targets=[], budget_mib=None))
    assert not {"personal accuracy, %", "aggregation gap", "epsilon", "catch-up MiB"} & set(plain)
    runs = make_runs(
        tmp_path / "b",
        *(
            Made("m", [0.1, 0.9], 1.0, 4.0, seed, summed={"mean_aggregation_gap": gap, "final_personal_accuracy": own})
            for seed, (gap, own) in enumerate([(2e-8, 0.7), (3e-8, 0.8), (9e-8, 0.75)])
        ),
        Made("private", [0.1, 0.5], summed={"epsilon": 3.25}, measured={"catchup_bytes": [0, MIB // 2]}),
    )
    table = comparison_table(runs, targets=[], budget_mib=None)
    assert table["aggregation_gap_median"].tolist() == pytest.approx([3e-8, math.nan], nan_ok=True)
    text = text_table(table).set_index("method")
    assert text["personal accuracy, %"].tolist() == ["75.0 (70.0 to 80.0)", "-"]
    assert text["aggregation gap"].tolist() == ["3e-08 (2e-08 to 9e-08)", "-"]
    assert text["epsilon"].tolist() == ["-", "3.25"]
    assert text["uplink MiB"].tolist() == ["1", "1"]
    assert text["downlink MiB"].tolist() == ["4", "2"]
    assert text["catch-up MiB"].tolist() == ["0", "0.5"]


def test_the_page_explains_what_it_shows_of_gaps_privacy_and_memory(tmp_path):
    measured = {"aggregation_gap": [None, 0.0, 0.25], "lost_feedback": [None, 0.5, 0.25], "clip": [None, 1.0, 0.5]}
    summed = {"mean_aggregation_gap": 0.125, "epsilon": 3.25, "commit": "abc-dirty"}
    runs = make_runs(tmp_path, Made("a", [0.1, 0.5, 0.9], measured=measured, summed=summed), Made("b", [0.1, 0.2, 0.3]))
    write_report(runs, tmp_path / "r.html", title="t", targets=[0.9], budget_mib=None, refused={})
    page = (tmp_path / "r.html").read_text()
    for shown in ("The aggregation gap is", "Epsilon is", "feedback lost", "37.5", "last clip", "abc-dirty"):
        assert shown in page
    assert "The runs were made by different commits" in page
    assert 'id="gap-' in page
    assert "moments lost" not in page


def test_gaps_are_drawn_where_they_were_measured_and_zero_at_the_bottom(tmp_path):
    exact = Made("exact", [0.1, 0.5, 0.9], measured={"aggregation_gap": [None, 0.0, 3e-8]})
    off = Made("off", [0.1, 0.5, 0.9], measured={"aggregation_gap": [None, 0.5, 0.25]})
    runs = make_runs(tmp_path, exact, off, Made("silent", [0.1, 0.5, 0.9]))
    axes = gap_figure(runs).axes[0]
    lines = {tuple(line.get_ydata()) for line in axes.get_lines() if line.get_drawstyle() == "steps-post"}
    assert lines == {(LEAST_GAP, 3e-8), (0.5, 0.25)}
    assert axes.get_yscale() == "log"
    assert {text.get_text() for text in axes.texts} == {"exact", "off", "rounding in float32"}


def many(num: int) -> list[Made]:
    return [Made(f"method_{i}", climb(0.5 + i / 50, 0.3, 12, i), 0.1 * (1 + i), 0.2) for i in range(num)]


def test_of_many_methods_those_on_the_front_stand_out_and_all_have_their_names_at_their_lines(tmp_path):
    runs = make_runs(tmp_path, *many(18))
    axes = curve_figure(runs, UPLINK, Guides(), front={"method_3", "method_17"}).axes[0]
    widths = sorted(line.get_linewidth() for line in axes.get_lines() if line.get_drawstyle() == "steps-post")
    assert widths == [0.8] * 16 + [1.8] * 2
    bold = {text.get_text(): text.get_fontweight() == "bold" for text in axes.texts}
    assert bold == {f"method_{i}": i in (3, 17) for i in range(18)}
    places = sorted(text.get_position()[1] for text in axes.texts)
    # Eight points of type in a figure of 3.6 inches.
    assert min(b - a for a, b in pairwise(places)) > 8 / 72 / 3.6


def test_of_few_methods_all_stand_out(tmp_path):
    axes = curve_figure(make_runs(tmp_path, *many(7)), ROUND, Guides(), front=()).axes[0]
    assert {line.get_linewidth() for line in axes.get_lines() if line.get_drawstyle() == "steps-post"} == {1.8}


def test_the_terminal_shows_few_methods_side_by_side_and_many_below_one_another(tmp_path):
    table = comparison_table(make_runs(tmp_path, *many(7)), targets=[0.55], budget_mib=None)
    few, long = render_table(table.iloc[:6]), render_table(table)
    assert [column.header for column in few.columns[1:]] == [f"method_{i}" for i in range(6)]
    assert list(long.columns[0].cells) == [f"method_{i}" for i in range(7)]
    assert not any("(" in cell for column in long.columns for cell in column.cells)


def test_settings_of_single_methods_are_shown_as_a_command_line_would_have_them(tmp_path):
    mades = [Made("m", [0.1, 0.9]), Made("m, int8", [0.1, 0.9], settings={**INT8, "label": "m, int8"})]
    write_report(make_runs(tmp_path, *mades), tmp_path / "r.html", title="t", targets=[], budget_mib=None, refused={})
    page = (tmp_path / "r.html").read_text()
    assert "<code>method.name=rac_lora uplink.name=int8</code>" in page
    assert " label=" not in re.sub("<[^>]*>", " ", page)


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
    main_report(load_runs([folder]), tmp_path / "report.html")
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
    main_report(load_runs(folders), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "a, seed 0: interrupted after round 1." in page
    assert "The methods ran with different seeds: a 0, 1; b 0." in page
    assert "Seed 0: the methods did not train on the same split of the data." in page


def test_page_warns_of_runs_that_diverged_differ_in_length_or_score_a_part_of_a_model(tmp_path):
    mades = [
        Made("a", [0.1, 0.2, 0.3], status="diverged"),
        Made("b", [0.1, 0.9]),
        Made("c", [0.1, 0.8, 0.9], summed={"is_global": False}),
    ]
    write_report(make_runs(tmp_path, *mades), tmp_path / "r.html", title="t", targets=[], budget_mib=None, refused={})
    page = (tmp_path / "r.html").read_text()
    assert "a, seed 0: diverged after round 2." in page
    assert "The runs have 1 to 2 rounds" in page
    assert "c makes no model for all clients" in page


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


def test_nothing_takes_the_best_round(tmp_path):
    """A run that was good for one round, and is bad at its end, is bad: only the first crossing of a target saw it."""
    runs = make_runs(tmp_path, Made("m", [0.1, 0.9, 0.2, 0.3]), Made("n", [0.1, 0.2, 0.2, 0.3]))
    table = comparison_table(runs, targets=[0.85], budget_mib=None).set_index("method")
    assert table.loc["m", "final_accuracy_max"] == table.loc["m", "accuracy_at_budget_max"] == 0.3
    assert table.loc["n", "final_accuracy_difference_max"] == 0.0
    of_targets = [column for column in table if "_to_" in column or column.startswith("num_reached")]
    assert 0.9 not in table.drop(columns=of_targets).loc["m"].tolist()


def test_quartiles_stand_beside_the_range_where_there_are_seeds_enough_for_them(tmp_path):
    ends = [0.5, 0.9, 0.6, 0.8]
    mades = [Made("m", [0.1, end, end], seed=seed) for seed, end in enumerate(ends)]
    table = comparison_table(make_runs(tmp_path / "four", *mades), targets=[0.55], budget_mib=None)
    # Linear between neighbours: 0.5, 0.6, 0.8, 0.9 at 0, 1/3, 2/3 and 1.
    parts = [table[f"final_accuracy_{part}"].item() for part in ("min", "q25", "median", "q75", "max")]
    assert parts == pytest.approx([0.5, 0.575, 0.7, 0.825, 0.9])
    text = text_table(table)
    assert text["final accuracy, %"].item() == "70.0 (50.0 to 90.0; IQR 57.5 to 82.5)"
    # One MiB where it was reached, and at least two where not: a quarter of the seeds needs more than 1.25.
    assert text["uplink MiB to 55 %"].item() == "1 (3/4 reached; IQR 1 to > 1.25)"
    assert "IQR" in table_caption(table)
    three = comparison_table(make_runs(tmp_path / "three", *mades[:3]), targets=[0.55], budget_mib=None)
    assert not any("IQR" in cell for cell in text_table(three).iloc[0])
    assert "IQR" not in table_caption(three)


def test_a_median_that_is_only_bounded_is_shown_with_its_bounds(tmp_path):
    # One MiB a round: 1, at least 2, and 4, so the median lies between 2 and 4.
    mades = [Made("m", [0.1, 0.9]), Made("m", [0.1, 0.2, 0.2], seed=1), Made("m", [0.1, 0.2, 0.2, 0.2, 0.9], seed=2)]
    table = comparison_table(make_runs(tmp_path, *mades), targets=[0.8], budget_mib=None)
    assert table[["uplink_mib_to_0.8_median", "uplink_mib_to_0.8_median_at_most"]].iloc[0].tolist() == [2.0, 4.0]
    assert bool(table["uplink_mib_to_0.8_is_lower_bound"].item())
    assert text_table(table)["uplink MiB to 80 %"].item() == "> 2 (2/3 reached; at most 4)"


def test_the_terminal_says_of_many_methods_how_many_seeds_reached_a_target(tmp_path):
    mades = [*many(6), Made("m", [0.1, 0.9, 0.9], seed=0), Made("m", [0.1, 0.2], seed=1)]
    rendered = render_table(comparison_table(make_runs(tmp_path, *mades), targets=[0.8], budget_mib=None))
    columns = {str(column.header): list(column.cells) for column in rendered.columns}
    assert columns["uplink MiB to 80 %"][-1] == "> 1, 1/2"


def test_time_to_a_target_is_counted_and_censored_as_bytes_are_where_time_is_simulated(tmp_path):
    # Round 0 takes its time, too: half an hour a round, and the target in the second and the third round.
    mades = [
        Made("m", [0.1, 0.2, 0.9], seed=0, seconds=1800.0),
        Made("m", [0.1, 0.2, 0.2, 0.9], seed=1, seconds=1800.0),
    ]
    mades += [
        Made("m", [0.1] * 9, seed=2, seconds=1800.0),
        Made("n", [0.1] * 3, seconds=1800.0),
        Made("old", [0.1, 0.9]),
    ]
    table = comparison_table(make_runs(tmp_path, *mades), targets=[0.8], budget_mib=None).set_index("method")
    assert table.loc["m", "simulated_s_to_0.8_median"] == 4 * 1800.0
    assert (table.loc["m", "simulated_s_to_0.8_max"], table.loc["m", "num_reached_0.8"]) == (9 * 1800.0, 2)
    assert table["simulated_s_to_0.8_is_lower_bound"].tolist() == [False, True, False]
    cells = text_table(table.reset_index())["simulated hours to 80 %"].tolist()
    assert cells == ["2 (2/3 reached)", "> 1.5 (0/1 reached)", "-"]


@pytest.mark.parametrize(
    ("seconds", "unit"), [(0.5, "seconds"), (59.0, "seconds"), (60.0, "minutes"), (3600.0, "hours")]
)
def test_the_axis_of_time_has_the_largest_unit_of_which_the_longest_run_took_two(tmp_path, seconds, unit):
    runs = make_runs(tmp_path, Made("m", [0.1, 0.9], seconds=seconds), Made("old", [0.1, 0.9]))
    axis = time_axis(runs)
    assert axis.label == f"simulated time, {unit}"
    axes = curve_figure(runs, axis, Guides(), front=()).axes[0]
    assert {text.get_text() for text in axes.texts} == {"m"}
    drawn = [line for line in axes.get_lines() if line.get_drawstyle() == "steps-post"]
    assert drawn[0].get_xdata().tolist() == pytest.approx([seconds / axis.unit, 2 * seconds / axis.unit])


def test_the_page_has_time_only_where_some_run_simulates_it(tmp_path, compared):
    assert "simulated" not in (compared[1] / "r.html").read_text()
    assert time_axis(compared[0]) is None
    runs = make_runs(tmp_path, Made("m", [0.1, 0.9], seconds=60.0), Made("old", [0.1, 0.9]))
    write_report(runs, tmp_path / "r.html", title="t", targets=[0.8], budget_mib=None, refused={})
    page = (tmp_path / "r.html").read_text()
    for shown in ("simulated minutes to 80", 'id="time-', 'id="reach-time-', "Without simulated devices: old."):
        assert shown in page


def test_the_page_pairs_the_methods_with_full_and_says_so(compared):
    page = (compared[1] / "r.html").read_text()
    for shown in ("Seed by seed, against full", "uplink to 85&nbsp;% over that of full", "ahead in 3 of 3; p 0.25"):
        assert shown in page


def test_of_every_target_there_is_a_dot_for_each_seed_hollow_and_with_an_arrow_where_it_was_not_reached(tmp_path):
    mades = [
        Made("a", [0.1, 0.9]),
        Made("a", [0.1, 0.2, 0.2], seed=1),
        Made("b", [0.1, 0.2, 0.9]),
        Made("c", [0.1, 0.9]),
    ]
    runs = make_runs(tmp_path, *mades)
    table = comparison_table(runs, targets=[0.8, 0.95], budget_mib=None)
    uplink, total = reaches_of(runs, table)
    assert (uplink.target, total.way) == ("0.8", "total")
    axes = reach_figure(uplink, run_styles(runs)).axes[0]
    dots = [line for line in axes.get_lines() if line.get_marker() not in ("None", "", None)]
    shown = sorted((float(dot.get_xdata()[0]), to_rgba(dot.get_markerfacecolor())[3] == 0) for dot in dots)
    assert shown == [(1.0, False), (1.0, False), (2.0, False), (2.0, True)]
    medians = [line for line in axes.get_lines() if line not in dots]
    assert [line.get_xdata()[0] for line in medians] == [1.5, 2.0, 1.0]
    assert [line.get_linestyle() == "-" for line in medians] == [False, True, True]
    # One of the seed, and one of the median, which it may push.
    assert sum(getattr(text, "arrow_patch", None) is not None for text in axes.texts) == 2
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a, 1/2", "b", "c"]
    assert "Hollow" in reach_caption(uplink)


def test_a_target_that_no_seed_reached_has_no_figure_and_a_free_one_has_a_place(tmp_path):
    runs = make_runs(tmp_path, Made("a", [0.5, 0.6]), Made("b", [0.1, 0.6]))
    assert reaches_of(runs, comparison_table(runs, targets=[0.9], budget_mib=None)) == []
    reach = reaches_of(runs, comparison_table(runs, targets=[0.5], budget_mib=None))[0]
    assert reach_figure(reach, run_styles(runs)).axes[0].get_xscale() == "linear"
    assert "Hollow" not in reach_caption(reach)
