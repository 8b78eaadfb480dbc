"""How the runs of a comparison are drawn, the same in every figure: colour, dashes and marker, and their meaning."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

from experiments.results import Runs

FOREGROUND = "#23262b"
GRID = "#8a8f98"
WIDTH_IN = 5.2
# Okabe and Ito's colours that stay apart for colour-blind readers, without the yellow that vanishes on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a8f98")
LINE_STYLES: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0, ()),
    (0, (5, 1.5)),
    (0, (1.5, 1.2)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (10, 2)),
    (0, (3, 1.2, 1, 1.2, 1, 1.2)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
PLAIN = "none"


@dataclass(frozen=True)
class MethodStyle:
    """How one method is drawn in every figure; shape repeats what colour says."""

    color: str
    dashes: tuple[float, tuple[float, ...]]
    marker: str


@dataclass(frozen=True)
class Variant:
    """What the name of a run in tables and curves stands for: a method, and what compresses what it sends."""

    method: str
    compressor: str


def drawing_style() -> AbstractContextManager[None]:
    """Return a context in which figures are made in the look of the report."""
    return mpl.rc_context(
        {
            "font.size": 9.0,
            "text.color": FOREGROUND,
            "text.parse_math": False,
            "axes.edgecolor": FOREGROUND,
            "axes.labelcolor": FOREGROUND,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": GRID,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.6,
            "hatch.linewidth": 0.5,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "svg.fonttype": "none",
            "xtick.color": FOREGROUND,
            "ytick.color": FOREGROUND,
        }
    )


def variants_of(runs: Runs) -> dict[str, Variant]:
    """Return what each name stands for, by the settings of its first run."""
    settings: dict[str, Mapping[str, Any]] = {}
    for summary, flat in zip(runs.summaries, runs.settings, strict=True):
        settings.setdefault(str(summary["method"]), flat)
    telling = _telling_settings(list(settings.values()))
    return {
        name: Variant(str(flat.get("method.name", name)), _compressor(flat, telling)) for name, flat in settings.items()
    }


def _telling_settings(every: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the settings of compressors (`uplink.share`) in which runs with the same compressor differ."""
    values: dict[tuple[str, Any], set[str]] = {}
    for flat in every:
        for key, value in flat.items():
            group, _, own = key.partition(".")
            if group in ("uplink", "downlink") and own != "name":
                values.setdefault((key, flat.get(f"{group}.name")), set()).add(str(value))
    return {key for (key, _), found in values.items() if len(found) > 1}


def _compressor(flat: Mapping[str, Any], telling: set[str]) -> str:
    """Return how a run's messages are compressed, in words: `int8`, `top_k share=0.1 + ef`, `none, down int8`."""
    ways = {}
    for group in ("uplink", "downlink"):
        own = [f"{key.partition('.')[2]}={flat[key]}" for key in flat if key in telling and key.startswith(f"{group}.")]
        ways[group] = " ".join([str(flat.get(f"{group}.name", PLAIN)), *own])
    feedback = flat.get("memory.feedback", PLAIN)
    up = ways["uplink"] if feedback == PLAIN else f"{ways['uplink']} + {feedback}"
    return up if ways["downlink"] == PLAIN else f"{up}, down {ways['downlink']}"


def run_styles(runs: Runs) -> dict[str, MethodStyle]:
    """Return a style for each name in a comparison, in order.

    Where compressors are compared, colours are methods, and dashes and markers are compressors, as long as that tells
    all names apart; otherwise each name has a style of its own.
    """
    variants = variants_of(runs)
    methods = list(dict.fromkeys(variant.method for variant in variants.values()))
    compressors = list(dict.fromkeys(variant.compressor for variant in variants.values()))
    if not is_by_compressor(variants):
        return method_styles(list(variants))
    return {
        name: MethodStyle(
            color=PALETTE[methods.index(variant.method)],
            dashes=LINE_STYLES[compressors.index(variant.compressor) % len(LINE_STYLES)],
            marker=MARKERS[compressors.index(variant.compressor)],
        )
        for name, variant in variants.items()
    }


def is_by_compressor(variants: Mapping[str, Variant]) -> bool:
    """Return whether compressors are compared, and a colour a method and a marker a compressor tell all names apart."""
    methods = {variant.method for variant in variants.values()}
    compressors = {variant.compressor for variant in variants.values()}
    is_told = len(set(variants.values())) == len(variants)
    return is_told and len(methods) <= len(PALETTE) and 1 < len(compressors) <= len(MARKERS)


def method_styles(methods: Sequence[str]) -> dict[str, MethodStyle]:
    """Return a style for each method, in order; colours repeat after seven with other dashes and another marker."""
    return {
        method: MethodStyle(
            color=PALETTE[i % len(PALETTE)],
            dashes=LINE_STYLES[i // len(PALETTE) % len(LINE_STYLES)],
            marker=MARKERS[(i % len(PALETTE) + i // len(PALETTE)) % len(MARKERS)],
        )
        for i, method in enumerate(methods)
    }


def legend_columns(labels: Sequence[str], *, handle: int = 8) -> int:
    """Return how many of `labels` stand side by side in a legend under a figure, `handle` being the room before each.

    Both are in characters, of which about 75 fit.
    """
    return max(1, min(len(labels), 75 // (handle + max(map(len, labels), default=0))))
