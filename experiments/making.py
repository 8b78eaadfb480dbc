"""The part of a report that says how its numbers were made: definitions, versions, settings, digests."""

from collections.abc import Mapping
from html import escape

from experiments.page import html_details, html_pairs, html_settings, html_table
from experiments.results import Runs
from experiments.tables import format_metric

AGAIN = (
    "<p>To repeat a run: <code>fedraclora run</code> with the settings below. To rebuild its model from its log and "
    "check the digest: <code>fedraclora replay RUN</code>. This page: <code>fedraclora report RUN...</code>.</p>"
)
DEFINITIONS = (
    "Uplink and downlink bytes are the encoded arrays that all clients sent and were sent, catch-up (the links or the "
    "snapshot that a late client lacked) included in the downlink, and the total is their sum. Record bytes are the "
    "same messages as serialised for the wire, names and containers included; one MiB is 2^20 bytes."
)
# Settings that name a run and decide nothing.
NAMING = ("seed", "out", "label")


def making_section(runs: Runs) -> str:
    """Return the section as finished HTML: definitions, versions, settings, and the digest of each run's chain."""
    shared, by_method = _split_settings(runs)
    plain = {name: value for name, value in shared.items() if "." not in name}
    nested = {name: value for name, value in shared.items() if "." in name}
    seeds = ", ".join(str(seed) for seed in sorted({summary["seed"] for summary in runs.summaries}))
    versions = ", ".join(f"{package} {version}" for package, version in runs.summaries[0]["versions"].items())
    commit = runs.summaries[0].get("commit")
    parts = [
        f"<h2>How these numbers were made</h2><p>{escape(DEFINITIONS)}</p>",
        f"<p>Seeds: {escape(seeds)}. Versions: {escape(versions)}.</p>",
        f"<p>Commit: <code>{escape(commit)}</code>.</p>" if commit else "",
        AGAIN,
        f"<h3>Settings that all runs share</h3>{html_pairs(plain)}",
        html_details(f"{len(nested)} more shared settings", html_pairs(nested)) if nested else "",
        _settings_by_method(by_method),
        html_details("Chain digests and run totals", _digests(runs)),
    ]
    return "\n".join(part for part in parts if part)


def _split_settings(runs: Runs) -> tuple[dict[str, object], dict[str, dict[str, object]]]:
    """Return the settings that all runs share, and by name those that tell methods apart but not the seeds of one."""
    shared: dict[str, object] = {}
    by_method: dict[str, dict[str, object]] = {}
    for name in dict.fromkeys(name for settings in runs.settings for name in settings if name not in NAMING):
        values: dict[str, set[str]] = {method: set() for method in runs.methods}
        for summary, settings in zip(runs.summaries, runs.settings, strict=True):
            values[str(summary["method"])].add(str(settings.get(name, "")))
        if len(set().union(*values.values())) == 1:
            shared[name] = runs.settings[0].get(name, "")
        elif all(len(found) == 1 for found in values.values()):
            by_method[name] = {method: next(iter(found)) for method, found in values.items()}
    return shared, by_method


def _settings_by_method(by_method: Mapping[str, Mapping[str, object]]) -> str:
    rows: dict[str, list[str]] = {}
    for name, values in by_method.items():
        for method, value in values.items():
            rows.setdefault(method, []).extend([f"{name}={value}"] if value != "" else [])
    if not rows:
        return ""
    pairs = {method: " ".join(settings) for method, settings in rows.items()}
    return f"<h3>Settings that differ between methods</h3>{html_settings(pairs)}"


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
