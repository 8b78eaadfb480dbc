"""The report of finished runs: one HTML file that needs no network, and `comparison.csv` beside it."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median

import pandas as pd
from matplotlib.figure import Figure

from experiments.captions import metric_caption, paired_caption, target_caption
from experiments.curves import (
    LEAST_GAP,
    ROUND,
    TOTAL,
    UPLINK,
    Axis,
    Guides,
    curve_figure,
    gap_figure,
    methods_with_gap,
    time_axis,
    timed,
)
from experiments.formats import NOT_MEASURED, format_number, reference_in
from experiments.headline import headline
from experiments.making import making_section
from experiments.outcomes import AT_BUDGET, FINISHED
from experiments.page import html_figure, html_list, html_page, html_table
from experiments.pareto import DIRECTION_NAMES, Trade, trade_of
from experiments.pareto_figure import pareto_caption, pareto_figure
from experiments.plots import bytes_figure, inline_svg, label_distribution_figure, segment_table
from experiments.results import Runs
from experiments.styles import PALETTE, is_by_compressor, run_styles, variants_of
from experiments.tables import comparison_table, paired_table, target_titles, text_table
from experiments.target_figure import reach_caption, reach_figure, reaches_of

# A title that would name more methods than this counts them.
MAX_NAMES = 6
# Columns of `rounds.csv` about what clients keep between rounds, and how a run is summed up in one number.
KEPT = {
    "lost_moments": ("moments lost, %", "mean"),
    "lost_feedback": ("feedback lost, %", "mean"),
    "lost_variates": ("variates lost, %", "mean"),
    "clip": ("last clip", "last"),
}
KEPT_CAPTION = (
    "Lost: the share of what clients remembered that a new link's basis could not express, the mean over rounds. Clip: "
    "the bound on the updates in the last round. Both are medians over seeds."
)


def main_report(runs: Runs, out: Path) -> None:
    """Write the report of finished runs to the file `out`, with the targets and the budget of the first run's settings.

    `refused.json` and `tuning.csv` are taken from the folder of `out` where they lie there.
    """
    first = runs.settings[0]
    refused_file = out.parent / "refused.json"
    refused = json.loads(refused_file.read_text(encoding="utf-8")) if refused_file.is_file() else {}
    targets, budget_mib = first.get("target_accuracies") or [], first.get("budget_mib")
    names = ", ".join(runs.methods) if len(runs.methods) <= MAX_NAMES else f"{len(runs.methods)} methods"
    title = f"{names}: accuracy by bytes"
    write_report(runs, out, title=title, targets=targets, budget_mib=budget_mib, refused=refused)


def write_report(  # noqa: PLR0913 - each is said by the caller, and none belongs to another
    runs: Runs,
    path: Path,
    *,
    title: str,
    targets: Sequence[float],
    budget_mib: float | None,
    refused: Mapping[str, str],
) -> None:
    """Write `path` (HTML) and `comparison.csv` beside it.

    `refused` gives the reason for each method that has no run. A `tuning.csv` beside `path` is shown as a table.
    """
    table = comparison_table(runs, targets=targets, budget_mib=budget_mib)
    trades = {direction: trade_of(table, direction) for direction in DIRECTION_NAMES}
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path.parent / "comparison.csv", index=False)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="answer">{escape(headline(table))}</p>',
        _comparison_section(runs, table, refused),
        _paired_section(runs, table),
        _front_section(runs, trades),
        _target_section(runs, table),
        _curves_section(runs, trades, Guides(targets=targets, budget_mib=budget_mib)),
        _gap_section(runs),
        _bytes_section(runs),
        _kept_section(runs),
        _tuning_section(path.parent / "tuning.csv"),
        making_section(runs),
    ]
    path.write_text(html_page(title, body), encoding="utf-8")


def _comparison_section(runs: Runs, table: pd.DataFrame, refused: Mapping[str, str]) -> str:
    """Return the numbers in two tables, since one with several targets is too wide to read."""
    text, titles = text_table(table), [title for title, _, _ in target_titles(table)]
    parts = [_numbers(runs, text.drop(columns=titles), metric_caption(table), refused)]
    if titles:
        parts.append("<h3>What the targets cost</h3>")
        parts.append(_numbers(runs, text[["method", "seeds", *titles]], target_caption(table), {}))
    cautions = _cautions(runs)
    return "".join(parts) + (f"<h3>Read with care</h3>{html_list(cautions)}" if cautions else "")


def _numbers(runs: Runs, text: pd.DataFrame, caption: str, refused: Mapping[str, str]) -> str:
    """Return a table of methods, each with its colour, and of those that have no run, with the reason."""
    rows = [[str(cell) for cell in row] for row in text.itertuples(index=False)]
    rows += [[method, reason] for method, reason in refused.items()]
    colors = {method: style.color for method, style in run_styles(runs).items()}
    return f'<div class="wide">{html_table(list(text.columns), rows, caption=caption, colors=colors)}</div>'


def _paired_section(runs: Runs, table: pd.DataFrame) -> str:
    pairs = paired_table(table)
    if pairs.empty:
        return ""
    title = f"<h2>Seed by seed, against {escape(reference_in(table))}</h2>"
    return title + _numbers(runs, pairs, paired_caption(table), {})


def _target_section(runs: Runs, table: pd.DataFrame) -> str:
    styles = run_styles(runs)
    figures = [
        _figure(reach_figure(reach, styles), f"reach-{reach.way}", reach_caption(reach))
        for reach in reaches_of(runs, table)
    ]
    return f'<h2>To the target, seed by seed</h2><div class="figures">{"".join(figures)}</div>' if figures else ""


def _cautions(runs: Runs) -> list[str]:
    """Return what makes a plain reading of these runs wrong."""
    cautions = [
        f"{summary['method']}, seed {summary['seed']}: {summary['status']} after round {summary['num_rounds']}."
        for summary in runs.summaries
        if summary["status"] not in (FINISHED, AT_BUDGET)
    ]
    cautions += [
        f"{method} makes no model for all clients: its {runs.metric.replace('_', ' ')} is that of the part "
        "which they share, and it has no place on the front. Read its personal accuracy."
        for method in runs.methods
        if not runs.is_global(method)
    ]
    lengths = {summary["num_rounds"] for summary in runs.summaries if summary["status"] in (FINISHED, AT_BUDGET)}
    if len(lengths) > 1:
        cautions.append(
            f"The runs have {min(lengths)} to {max(lengths)} rounds: a longer one has had more time to end well."
        )
    seeds = {method: sorted({s["seed"] for s in runs.summaries if s["method"] == method}) for method in runs.methods}
    if len({tuple(found) for found in seeds.values()}) > 1:
        found = "; ".join(f"{method} {', '.join(map(str, of))}" for method, of in seeds.items())
        cautions.append(f"The methods ran with different seeds: {found}.")
    cautions += [
        f"Seed {seed}: the methods did not train on the same split of the data."
        for seed in sorted({summary["seed"] for summary in runs.summaries})
        if len({summary["split_digest"] for summary in runs.summaries if summary["seed"] == seed}) > 1
    ]
    if len({json.dumps(summary["versions"], sort_keys=True) for summary in runs.summaries}) > 1:
        cautions.append("The runs used different versions of the software; the first run's are listed.")
    if len({summary.get("commit") for summary in runs.summaries}) > 1:
        cautions.append("The runs were made by different commits; the first run's is listed.")
    return cautions


def _front_section(runs: Runs, trades: Mapping[str, Trade]) -> str:
    styles, variants = run_styles(runs), variants_of(runs)
    figures = [
        _figure(pareto_figure(trade, styles, variants), f"front-{direction}", pareto_caption(trade))
        for direction, trade in trades.items()
        if len(trade.points) > 1
    ]
    title = "What a compressor buys" if is_by_compressor(variants) else "The front"
    return f'<h2>{title}</h2><div class="figures">{"".join(figures)}</div>' if figures else ""


def _curves_section(runs: Runs, trades: Mapping[str, Trade], guides: Guides) -> str:
    what = runs.metric.replace("_", " ").capitalize()
    spread = "Line: median over seeds; band: lowest to highest; thin lines: single seeds."
    if len(runs.methods) > len(PALETTE):
        spread += " Thick, with band and seeds: the methods on the front."
    zero = "The initial model costs no bytes and has no place on this axis."
    front = {direction: set(trade.front) for direction, trade in trades.items()}
    shown: list[tuple[str, Axis, str, set[str]]] = [
        ("uplink", UPLINK, f"{what} against the cumulative uplink. {spread} {zero}", front["uplink"]),
        ("total", TOTAL, f"{what} against all bytes, catch-up included.", front["total"]),
        ("rounds", ROUND, f"{what} against rounds, for which bytes do not count.", front["uplink"] | front["total"]),
    ]
    time = time_axis(runs)
    if time is not None:
        without = [method for method in runs.methods if method not in timed(runs)]
        rest = f" Without simulated devices: {', '.join(without)}." if without else ""
        caption = f"{what} against the simulated time of devices and links.{rest}"
        shown.append(("time", time, caption, front["uplink"] | front["total"]))
    figures = [
        _figure(curve_figure(runs, axis, guides, front=methods), name, caption)
        for name, axis, caption, methods in shown
    ]
    if runs.label_counts.shape[1] > 1 and len(runs.label_counts) > 0:
        caption = f"Samples of each class at each client, seed {runs.summaries[0]['seed']}."
        figures.append(_figure(label_distribution_figure(runs.label_counts), "labels", caption))
    return f'<h2>Curves and data</h2><div class="figures">{"".join(figures)}</div>'


def _gap_section(runs: Runs) -> str:
    if not methods_with_gap(runs):
        return ""
    caption = (
        "How far what each round merged is from the mean of the clients' own changes, relative to that mean (Frobenius "
        "norm, float64). Below the dashed line it is rounding: the method is exact. "
        f"Smaller than {LEAST_GAP:g} is drawn there."
    )
    return f'<h2>Exact or not</h2><div class="figures">{_figure(gap_figure(runs), "gap", caption)}</div>'


def _figure(figure: Figure, name: str, caption: str) -> str:
    return html_figure(inline_svg(figure, name=name, description=caption), caption)


def _bytes_section(runs: Runs) -> str:
    table = segment_table(runs)
    if table.empty:
        return ""
    caption = (
        "Where the bytes of a whole run went. Runs differ in length: compare the curves, not the bars, for efficiency."
    )
    figure = _figure(bytes_figure(runs), "bytes", caption)
    rows = [
        [str(method), *map(format_number, values)] for method, values in zip(table.index, table.to_numpy(), strict=True)
    ]
    numbers = html_table(["method", *table.columns], rows, caption="MiB a run, mean over seeds.")
    return f'<h2>Bytes by direction and kind</h2><div class="figures">{figure}<div>{numbers}</div></div>'


def _kept_section(runs: Runs) -> str:
    shown = [name for name in KEPT if any(runs.measured(method, name) for method in runs.methods)]
    rows = [[method, *(_kept_cell(runs, method, name) for name in shown)] for method in runs.methods]
    if not shown:
        return ""
    table = html_table(["method", *(KEPT[name][0] for name in shown)], rows, caption=KEPT_CAPTION)
    return f'<h2>What clients keep</h2><div class="narrow">{table}</div>'


def _kept_cell(runs: Runs, method: str, name: str) -> str:
    title, summary = KEPT[name]
    values = [
        float(rows[name].mean() if summary == "mean" else rows[name].iloc[-1]) for rows in runs.measured(method, name)
    ]
    return format_number(median(values) * (100 if title.endswith("%") else 1)) if values else NOT_MEASURED


def _tuning_section(path: Path) -> str:
    if not path.is_file():
        return ""
    tuning = pd.read_csv(path, dtype={"method": str})
    rows = [
        [
            str(row["method"]),
            f"{row['lr']:g}",
            format_number(float(row["score"])),
            _tick(row["is_best"]) + ("" if row["is_interior"] or not row["is_best"] else " (at the edge of the grid)"),
        ]
        for row in tuning.to_dict("records")
    ]
    caption = (
        "Score: mean test metric over all rounds and tuning seeds (accuracy, or minus the loss), on examples held out "
        "from training and with seeds that the comparison does not use."
    )
    table = html_table(["method", "learning rate", "score", "chosen"], rows, caption=caption)
    return f'<h2>Learning rates tried</h2><div class="narrow">{table}</div>'


def _tick(value: object) -> str:
    return "yes" if bool(value) else ""
