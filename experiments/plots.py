"""Figures of finished runs: matplotlib figures without pyplot, and their forms as inline SVG and PNG."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.results import Runs
from experiments.styles import FOREGROUND, WIDTH_IN, drawing_style, legend_columns
from fedraclora.ledger import MIB

MAX_BAR_CLIENTS = 60
MAX_BAR_CLASSES = 20
# Name, direction, kinds (None: all the others), colour. Dark and light halves tell the directions apart without colour.
SEGMENTS = (
    ("up: update", "up", ("update",), "#3f2a78"),
    ("up: dense", "up", ("dense",), "#6d56a8"),
    ("up: other", "up", None, "#9d8bcc"),
    ("down: update", "down", ("update",), "#a8741a"),
    ("down: dense", "down", ("dense",), "#c99a45"),
    ("down: catch-up, snapshot", "down", ("catch_up", "snapshot"), "#e3c389"),
    ("down: other", "down", None, "#cfc6b4"),
)


def segment_table(runs: Runs) -> pd.DataFrame:
    """Return the tensor MiB of a run by direction and kind, the mean over seeds, one row a method.

    Segments that no method has are left out. Means, unlike medians, add up to the mean of the totals.
    """
    num_seeds = runs.rounds.groupby("method")["seed"].nunique()
    table = pd.DataFrame(index=pd.Index(runs.methods, name="method"))
    for name, direction, kinds, _ in SEGMENTS:
        named = [kind for _, way, group, _ in SEGMENTS if way == direction and group for kind in group]
        is_kind = runs.ledger["kind"].isin(kinds) if kinds else ~runs.ledger["kind"].isin(named)
        rows = runs.ledger[(runs.ledger["direction"] == direction) & is_kind]
        sums = rows.groupby("method")["tensor_bytes"].sum().reindex(runs.methods, fill_value=0)
        if sums.sum() > 0:
            table[name] = sums / num_seeds.reindex(runs.methods) / MIB
    return table


def bytes_figure(runs: Runs) -> Figure:
    """Return the bytes of each method by direction and kind as stacked bars."""
    table = segment_table(runs)
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 1.3 + 0.34 * len(table)), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(len(table))
        for name, direction, _, color in SEGMENTS:
            if name in table:
                width = table[name].to_numpy(np.float64)
                hatch = "////" if direction == "down" else None
                bars = axes.barh(range(len(table)), width, left=left, label=name, color=color, height=0.7)
                for bar in bars:
                    bar.set(edgecolor="#f4f1ea", linewidth=0.5, hatch=hatch)
                left += width
        for row, total in enumerate(left):
            axes.annotate(f"{total:.3g}", (total, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(table)), list(table.index))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.set_xlabel("MiB a run, mean over seeds")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def label_distribution_figure(counts: pd.DataFrame) -> Figure:
    """Return how many samples of each class each client holds.

    `counts` is `label_counts.csv`: a column `partition`, then one a class. Up to sixty clients (and twenty classes) are
    drawn as stacked bars, more as a heat map.
    """
    classes = counts.drop(columns="partition")
    with drawing_style():
        if len(counts) > MAX_BAR_CLIENTS or classes.shape[1] > MAX_BAR_CLASSES:
            return _label_heat_map(classes)
        return _label_bars(counts["partition"].astype(str).tolist(), classes)


def _label_bars(partitions: Sequence[str], classes: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, 1.5 + max(0.9, min(0.15 * len(classes), 4.5))), layout="constrained")
    axes = figure.add_subplot()
    colors = mpl.colormaps["tab10" if classes.shape[1] <= 10 else "tab20"]
    left = np.zeros(len(classes))
    for i, name in enumerate(classes.columns):
        width = classes[name].to_numpy(np.float64)
        axes.barh(range(len(classes)), width, left=left, color=colors(i), label=str(name), height=0.85)
        left += width
    step = -(-len(partitions) // 20)
    axes.set_yticks(range(0, len(partitions), step), list(partitions)[::step])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="samples", ylabel="client")
    columns = min(10, legend_columns([str(name) for name in classes.columns], handle=4))
    figure.legend(loc="outside lower center", ncols=columns, title="class", handlelength=0.9, columnspacing=1.2)
    return figure


def _label_heat_map(classes: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, 1.2 + min(0.2 * max(classes.shape[1], 6), 4.0)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(classes.to_numpy().T, aspect="auto", cmap="cividis", interpolation="nearest")
    axes.grid(visible=False)
    step = -(-classes.shape[1] // 20)
    axes.set_yticks(range(0, classes.shape[1], step), [str(name) for name in classes.columns[::step]])
    axes.set(xlabel="client", ylabel="class")
    figure.colorbar(image, ax=axes, label="samples")
    return figure


def inline_svg(figure: Figure, *, name: str, description: str) -> str:
    """Return a figure as an `<svg>` element that scales with its column and takes the page's text colour.

    `name` must be unique on the page: it prefixes the ids inside. `description` is read aloud and must be plain text.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?)="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(FOREGROUND, "currentColor")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    opening = f'<svg {view_box.group() if view_box else ""} role="img" aria-label="{label}">'
    return re.sub(r"^<svg[^>]*>", lambda _: opening, svg)


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG of 160 dots an inch on white."""
    figure.savefig(path, format="png", dpi=160, facecolor="white")
