"""The report of finished runs: one HTML file that needs no network, and `comparison.csv` beside it."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import pandas as pd

from experiments.curves import ROUND, TOTAL, UPLINK, Axis, Guides, curve_figure
from experiments.headline import headline
from experiments.page import html_details, html_figure, html_list, html_page, html_pairs, html_table
from experiments.plots import bytes_figure, inline_svg, label_distribution_figure, method_styles, segment_table
from experiments.results import Runs, load_runs
from experiments.tables import comparison_table, format_metric, format_number, table_caption, text_table

AGAIN = (
    "<p>To repeat a run: <code>fedraclora run</code> with the settings below. To rebuild its model from its log and "
    "check the digest: <code>fedraclora replay RUN</code>. This page: <code>fedraclora report RUN...</code>.</p>"
)
DEFINITIONS = (
    "Uplink and downlink bytes are the encoded arrays that all clients sent and were sent, catch-up (the links or the "
    "snapshot that a late client lacked) included in the downlink, and the total is their sum. Record bytes are the "
    "same messages as serialised for the wire, names and containers included; one MiB is 2^20 bytes."
)


def main_report(folders: Sequence[Path], out: Path) -> None:
    """Write the report of finished runs to the file `out`, with the targets and the budget of the first run's settings.

    `refused.json` and `tuning.csv` are taken from the folder of `out` where they lie there.
    """
    runs = load_runs(folders)
    first = runs.settings[0]
    refused_file = out.parent / "refused.json"
    refused = json.loads(refused_file.read_text(encoding="utf-8")) if refused_file.is_file() else {}
    targets, budget_mib = first.get("target_accuracies") or [], first.get("budget_mib")
    title = f"{', '.join(runs.methods)}: accuracy by bytes"
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
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path.parent / "comparison.csv", index=False)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="answer">{escape(headline(table))}</p>',
        _comparison_section(runs, table, refused),
        _figures_section(runs, Guides(targets=targets, budget_mib=budget_mib)),
        _bytes_section(runs),
        _tuning_section(path.parent / "tuning.csv"),
        _making_section(runs),
    ]
    path.write_text(html_page(title, body), encoding="utf-8")


def _comparison_section(runs: Runs, table: pd.DataFrame, refused: Mapping[str, str]) -> str:
    text = text_table(table)
    rows = [[str(cell) for cell in row] for row in text.itertuples(index=False)]
    rows += [[method, reason] for method, reason in refused.items()]
    colors = {method: style.color for method, style in method_styles(runs.methods).items()}
    cautions = _cautions(runs)
    notes = f"<h3>Read with care</h3>{html_list(cautions)}" if cautions else ""
    return html_table(list(text.columns), rows, caption=table_caption(table), colors=colors) + notes


def _cautions(runs: Runs) -> list[str]:
    """Return what makes a plain reading of these runs wrong."""
    cautions = [
        f"{summary['method']}, seed {summary['seed']}: interrupted after round {summary['num_rounds']}."
        for summary in runs.summaries
        if summary["status"] == "interrupted"
    ]
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
    return cautions


def _figures_section(runs: Runs, guides: Guides) -> str:
    what = runs.metric.replace("_", " ")
    spread = "Line: median over seeds; band: lowest to highest; thin lines: single seeds."
    zero = "The initial model costs no bytes and has no place on this axis."
    shown: list[tuple[str, Axis, str]] = [
        ("uplink", UPLINK, f"{what.capitalize()} against the cumulative uplink. {spread} {zero}"),
        ("total", TOTAL, f"{what.capitalize()} against all bytes, catch-up included."),
        ("rounds", ROUND, f"{what.capitalize()} against rounds, for which bytes do not count."),
    ]
    figures = [
        html_figure(inline_svg(curve_figure(runs, axis, guides), name=name, description=caption), caption)
        for name, axis, caption in shown
    ]
    if runs.label_counts.shape[1] > 1 and len(runs.label_counts) > 0:
        caption = f"Samples of each class at each client, seed {runs.summaries[0]['seed']}."
        svg = inline_svg(label_distribution_figure(runs.label_counts), name="labels", description=caption)
        figures.append(html_figure(svg, caption))
    return f'<h2>Curves and data</h2><div class="figures">{"".join(figures)}</div>'


def _bytes_section(runs: Runs) -> str:
    table = segment_table(runs)
    if table.empty:
        return ""
    caption = (
        "Where the bytes of a whole run went. Runs differ in length: compare the curves, not the bars, for efficiency."
    )
    figure = html_figure(inline_svg(bytes_figure(runs), name="bytes", description=caption), caption)
    rows = [
        [str(method), *map(format_number, values)] for method, values in zip(table.index, table.to_numpy(), strict=True)
    ]
    numbers = html_table(["method", *table.columns], rows, caption="MiB a run, mean over seeds.")
    return f'<h2>Bytes by direction and kind</h2><div class="figures">{figure}<div>{numbers}</div></div>'


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


def _making_section(runs: Runs) -> str:
    shared, by_method = _split_settings(runs)
    plain = {name: value for name, value in shared.items() if "." not in name}
    nested = {name: value for name, value in shared.items() if "." in name}
    seeds = ", ".join(str(seed) for seed in sorted({summary["seed"] for summary in runs.summaries}))
    versions = ", ".join(f"{package} {version}" for package, version in runs.summaries[0]["versions"].items())
    parts = [
        f"<h2>How these numbers were made</h2><p>{escape(DEFINITIONS)}</p>",
        f"<p>Seeds: {escape(seeds)}. Versions: {escape(versions)}.</p>",
        AGAIN,
        f"<h3>Settings that all runs share</h3>{html_pairs(plain)}",
        html_details(f"{len(nested)} more shared settings", html_pairs(nested)) if nested else "",
        _settings_by_method(runs, by_method),
        html_details("Chain digests and run totals", _digests(runs)),
    ]
    return "\n".join(parts)


def _split_settings(runs: Runs) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """Return the settings that all runs share, and by name those that tell methods apart but not the seeds of one."""
    shared: dict[str, object] = {}
    by_method: dict[str, dict[str, object]] = {}
    for name in dict.fromkeys(name for settings in runs.settings for name in settings if name not in ("seed", "out")):
        values: dict[str, set[str]] = {method: set() for method in runs.methods}
        for summary, settings in zip(runs.summaries, runs.settings, strict=True):
            values[str(summary["method"])].add(str(settings.get(name, "")))
        if len(set().union(*values.values())) == 1:
            shared[name] = runs.settings[0][name]
        elif all(len(found) == 1 for found in values.values()):
            by_method[name] = {method: next(iter(found)) for method, found in values.items()}
    return shared, by_method


def _settings_by_method(runs: Runs, by_method: Mapping[str, Mapping[str, object]]) -> str:
    rows = [[name, *(str(values[method]) for method in runs.methods)] for name, values in by_method.items()]
    if not rows:
        return ""
    return f"<h3>Settings that differ between methods</h3>{html_table(['setting', *runs.methods], rows)}"


def _digests(runs: Runs) -> str:
    name = runs.metric.removeprefix("test_")
    rows = [
        [
            str(summary["method"]),
            str(summary["seed"]),
            str(summary["status"]),
            format_metric(_number(summary[f"final_{runs.metric}"]), name),
            f"{summary['total_bytes']:,}",
            f"{summary['uplink_record_bytes'] + summary['downlink_record_bytes']:,}",
            str(summary["chain_digest"]),
        ]
        for summary in runs.summaries
    ]
    unit = ", %" if name == "accuracy" else ""
    headers = ["method", "seed", "status", f"final {name}{unit}", "total bytes", "total record bytes", "chain digest"]
    return html_table(headers, rows)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
