"""Partial participation: what a sampled cohort costs in accuracy, and what a client that was away must be sent.

FLOOR_DOC
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from experiments.scales import label_log_scale
from experiments.styles import FOREGROUND, WIDTH_IN, drawing_style, method_styles
from fedraclora.ledger import DOWN
from fedraclora.local_config import LocalConfig
from fedraclora.seeding import derive_seed
from fedraclora.targets import MatrixShape
from fedraclora.theory import break_even_links, expected_catch_up
from strategies.dry_run import DryRun
from strategies.method import Adapter
from strategies.rac_lora import Config, build
from strategies.rounds import RoundSettings

LAYER = MatrixShape(out=64, in_=64)
DOWN_RANKS, FRACTIONS = (1, 4, 16), (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
# Rounds before a client can lack all that it may, n / r of them, and rounds that are measured.
NUM_CLIENTS, WINDOW, FLOAT_BYTES = 40, 80, 4


def downlink_table(
    *,
    shape: MatrixShape = LAYER,
    ranks: Sequence[int] = DOWN_RANKS,
    fractions: Sequence[float] = FRACTIONS,
    seeds: int = 2,
) -> pd.DataFrame:
    """Return the floats that a participating client is sent a round: columns rank, fraction, seed, measured, formula.

    `measured` is the mean over the second half of the rounds, when all that a client can lack has been closed, by the
    project's own rules and byte counts (`DryRun`); `formula` is `fedraclora.theory.expected_catch_up`.
    """
    rows = [
        (rank, fraction, seed, _downlink(shape, rank, fraction, seed), _expected(shape, rank, fraction))
        for rank in ranks
        for fraction in fractions
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["rank", "fraction", "seed", "measured", "formula"])


def _downlink(shape: MatrixShape, rank: int, fraction: float, seed: int) -> float:
    weights = {"layer.weight": torch.empty(shape.out, shape.in_, device="meta")}
    adapter = Adapter(
        {"layer": shape}, {"layer": rank}, {"layer": 1.0}, (), ("layer.weight",), law="orthonormal", seed=0
    )
    rules = RoundSettings(NUM_CLIENTS, fraction, LocalConfig(), derive_seed(seed, "participation"))
    reports = list(DryRun(build(Config(), adapter), weights, rules).rounds_to(2 * WINDOW))[WINDOW:]
    sent = sum(row.tensor_bytes for report in reports for row in report.rows if row.direction == DOWN)
    return sent / FLOAT_BYTES / sum(report.num_clients for report in reports)


def _expected(shape: MatrixShape, rank: int, fraction: float) -> float:
    return expected_catch_up((shape.out, shape.in_), rank, fraction)


def downlink_figure(table: pd.DataFrame, *, shape: MatrixShape = LAYER) -> Figure:
    """Return the downlink of a participant against the participation, a line a rank, from `downlink_table`."""
    ranks = sorted(table["rank"].unique())
    p = np.geomspace(table["fraction"].min(), 1, 200)
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for rank, style in zip(ranks, method_styles([str(rank) for rank in ranks]).values(), strict=True):
            rows = table[table["rank"] == rank]
            formula = [_expected(shape, rank, value) for value in p]
            axes.plot(p, formula, color=style.color, linewidth=1.2, label=f"r = {rank}, n/r = {break_even_links(shape.in_, rank):g}")
            axes.plot(rows["fraction"], rows["measured"], style.marker, color=style.color, markersize=5, alpha=0.8)
            axes.axhline(shape.out * rank, color=style.color, linewidth=0.9, linestyle=":")
            even = 1 / break_even_links(shape.in_, rank)
            if even >= p[0]:
                place = _expected(shape, rank, even)
                axes.plot([even, even], [place / 1.6, place * 1.6], color=style.color, linewidth=1.2)
        whole = shape.out * shape.in_
        axes.axhline(whole, color=FOREGROUND, linewidth=0.9, linestyle="--")
        axes.annotate("the whole weight, m n", (1, whole), (0, 3), textcoords="offset points", ha="right", fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel="participation p", ylabel="floats down, a participant and round")
        label_log_scale(axes.xaxis, p[0], 1)
        label_log_scale(axes.yaxis, float(table["measured"].min()), whole)
        axes.set_ylim(top=1.7 * whole)
        figure.legend(loc="outside lower center", ncols=3)
    return figure
