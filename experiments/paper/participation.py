"""Partial participation: what a sampled cohort costs in accuracy, and what a client that was away must be sent.

Of M clients, S are drawn a round without replacement; their mean gradient has (M - S) / (S (M - 1)) of the clients'
variance zeta^2, and so does, about, the floor at which f - f* stalls, whatever the rank.

A client that was away lacks a link a round. It is sent those links, m r floats each, or the whole m x n weight,
whichever is less: the break-even is at n/r missed links, so at about the participation p = r/n.
The floats are those that the project's own rules send: a dry run of its server on a model of one layer.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from experiments.paper.descent import Budget, Sketching, federated
from experiments.paper.problems import Made, geometric_spectrum, spread_quadratic
from experiments.scales import label_log_scale
from experiments.styles import FOREGROUND, GRID, WIDTH_IN, drawing_style, method_styles
from fedraclora.ledger import DOWN
from fedraclora.local_config import LocalConfig
from fedraclora.seeding import derive_seed
from fedraclora.targets import MatrixShape
from fedraclora.theory import (
    Steps,
    break_even_links,
    cohort_variance,
    expected_catch_up,
    expected_range,
    participation_floor,
    reshuffling_step,
)
from strategies.dry_run import DryRun
from strategies.method import Adapter
from strategies.rac_lora import Config, build
from strategies.rounds import RoundSettings

SHAPE, RANKS = (4, 8), (1, 2, 4, 8)
CLIENTS, COHORTS = 8, (1, 2, 4, 6, 8)
LINKS = 400
LAYER = MatrixShape(out=64, in_=64)
DOWN_RANKS, FRACTIONS = (1, 4, 16), (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
# Rounds before a client can lack all that it may, n / r of them, and rounds that are measured.
NUM_CLIENTS, WINDOW, FLOAT_BYTES = 40, 80, 4


def floor_table(seeds: int = 20, *, links: int = LINKS) -> pd.DataFrame:
    """Return where runs stall: columns rank, cohort, variance, seed, floor, about.

    `floor` is the mean of f - f* over the last half of the rounds, `variance` (M - S) / (S (M - 1)), and `about` what
    `fedraclora.theory.participation_floor` says. Local steps are small, so that the clients' drift adds little.
    """
    made = Made(clients=CLIENTS, samples=2, heterogeneity=0.5, noise=0.1)
    problem = spread_quadratic(SHAPE, geometric_spectrum(SHAPE[1], 3), made)
    steps = Steps(0.1 * reshuffling_step(problem.component_smoothness, made.samples), made.samples, server=0.5)
    rows = []
    for rank in RANKS:
        for cohort in COHORTS:
            trace = federated(problem, Sketching(rank=rank), Budget(links, seeds), steps=steps, cohort=cohort)
            eigenvalues = expected_range("orthonormal", rank, SHAPE[1])
            about = participation_floor(problem.constants(), steps.server, (cohort, CLIENTS), eigenvalues)
            floors = trace.gaps[:, links // 2 :].mean(1)
            variance = cohort_variance(cohort, CLIENTS)
            rows += [(rank, cohort, variance, seed, floor, float(about.values)) for seed, floor in enumerate(floors)]
    return pd.DataFrame(rows, columns=["rank", "cohort", "variance", "seed", "floor", "about"])


def floor_figure(table: pd.DataFrame) -> Figure:
    """Return the floor against the variance of a cohort's mean, a marker a rank, from `floor_table`."""
    part = table[table["variance"] > 0]
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 4.2), layout="constrained")
        axes = figure.add_subplot()
        ranks = sorted(part["rank"].unique())
        for place, (rank, style) in enumerate(
            zip(ranks, method_styles([str(rank) for rank in ranks]).values(), strict=True)
        ):
            groups = part[part["rank"] == rank].groupby("variance")["floor"]
            mean, low, high = groups.mean(), groups.quantile(0.1), groups.quantile(0.9)
            # The ranks' markers stand beside each other.
            x = mean.index.to_numpy() * 1.05 ** (place - (len(ranks) - 1) / 2)
            error = [(mean - low).clip(0), (high - mean).clip(0)]
            axes.errorbar(
                x, mean, yerr=error, color=style.color, marker=style.marker, linestyle="none", label=f"r = {rank}"
            )
        about = part.groupby("variance")[["about", "floor"]].mean()
        axes.plot(about.index, about["about"], color=FOREGROUND, linestyle="--", linewidth=1, label="about (theory)")
        law = about.index.to_numpy() * float(about["floor"].iloc[-1] / about.index[-1])
        axes.plot(about.index, law, color=GRID, linewidth=1, linestyle=":", label="proportional to the variance")
        axes.set(xscale="log", yscale="log", ylabel="floor of f - f*")
        cohorts = part.groupby("variance")["cohort"].first()
        axes.set_xticks(list(cohorts.index), [f"{value:.2g}\nS = {cohort}" for value, cohort in cohorts.items()])
        axes.xaxis.minorticks_off()
        axes.set_xlabel("(M - S) / (S (M - 1))")
        figure.legend(loc="outside lower center", ncols=3)
    return figure


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
            axes.plot(
                p,
                formula,
                color=style.color,
                linewidth=1.2,
                label=f"r = {rank}, n/r = {break_even_links(shape.in_, rank):g}",
            )
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
