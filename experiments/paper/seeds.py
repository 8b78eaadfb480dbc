"""One sketch for all clients, or one for each: rounds to accuracy, and where a private sketch stalls.

Client k has f_k(W) = (1/2) ||W - W*_k||^2, and the W*_k differ by shifts Z_k whose mean is zero, so that L = mu = 1 and
zeta^2 = mean ||Z_k||^2. A round is one projected step of each client and the mean of the updates:

    W+ = W - gamma (1/K) sum_k (W - W*_k) H_k,      H_k the same for all k (shared) or independent (per client).

For independent isotropic H_k of rank r, with q = 1/K + (1 - 1/K) r/n, both of these hold exactly (derived here): the
mean of f - f* contracts by 1 - (2 gamma - gamma^2 q) r/n a round, best at gamma = 1/q, by 1 - (r/n)/q; and at that step
it ends at (1/2) (1 - r/n) zeta^2 / (q K). A shared H gives q = 1 and no such floor, whatever the shifts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.paper.laws import orthonormal_rows
from experiments.scales import label_log_scale
from experiments.styles import FOREGROUND, GRID, PALETTE, WIDTH_IN, drawing_style
from fedraclora.seeding import derive_seed, generator

Array = NDArray[np.float64]

OUT, DIM, RANK = 6, 24, 1
CLIENTS, SHIFTS = (1, 2, 4, 8, 16), (0.0, 0.1, 0.3, 1.0)
# The accuracy that is asked for, and what is drawn for less than the last, both relative to the initial loss.
ACCURACY, LEAST = 1e-3, 1e-12
ROUNDS = 500


@dataclass(frozen=True)
class Setting:
    """A number of clients, the size of their shifts relative to that of W*, and whether they share the sketch."""

    clients: int
    shift: float
    is_shared: bool

    @property
    def noise(self) -> float:
        """Return q, by which the mean of the updates is larger in square than what it is the mean of."""
        return 1.0 if self.is_shared else 1 / self.clients + (1 - 1 / self.clients) * RANK / DIM

    @property
    def rounds(self) -> float:
        """Return the rounds to the accuracy that the exact contraction gives where there is no shift."""
        return float(np.log(ACCURACY) / np.log1p(-RANK / DIM / self.noise))

    @property
    def floor(self) -> float:
        """Return where f - f* ends relative to its initial mean, exactly, for shifts of mean square `shift`^2."""
        if self.is_shared:
            return 0.0
        return (1 - RANK / DIM) * self.shift**2 * (1 - 1 / self.clients) / (self.noise * self.clients)


def losses(setting: Setting, seeds: int, rounds: int = ROUNDS) -> Array:
    """Return (f - f*) over its initial value, `[seeds, rounds + 1]`; all settings share W* and the shifts' directions.

    W starts at zero and the entries of W* are N(0, 1); those of the shifts are N(0, shift^2) before their mean is
    taken away.
    """
    draws = generator(derive_seed(0, "seeds", setting.clients))
    optimum = draws.normal(size=(seeds, OUT, DIM))
    shifts = setting.shift * draws.normal(size=(seeds, setting.clients, OUT, DIM))
    shifts = shifts - shifts.mean(1, keepdims=True)
    error = -optimum
    kept = [_square(error)]
    for _ in range(rounds):
        A = orthonormal_rows(draws, (seeds, 1 if setting.is_shared else setting.clients), RANK, DIM)
        update = ((error[:, None] - shifts) @ A.swapaxes(-1, -2)) @ A
        error = error - update.mean(1) / setting.noise
        kept.append(_square(error))
    return np.array(kept).T / kept[0][:, None]


def _square(error: Array) -> Array:
    square: Array = (error * error).sum((-1, -2))
    return square


def settings() -> list[Setting]:
    """Return all settings; one client has nothing to share."""
    return [
        Setting(clients, shift, is_shared)
        for clients in CLIENTS
        for shift in SHIFTS
        for is_shared in (True, False)
        if clients > 1 or (is_shared and shift == 0)
    ]


def seed_tables(seeds: int = 20, rounds: int = ROUNDS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row a setting and seed (rounds to accuracy and end), and curves of the largest number of clients.

    Columns of the first: clients, shift, is_shared, seed, rounds (NaN: never), end (the mean of the last fifth of the
    rounds, relative), predicted_rounds, predicted_end; of the second: shift, is_shared, round, mean, low, high (10% and
    90% of seeds).
    """
    rows, curves = [], []
    for setting in settings():
        values = losses(setting, seeds, rounds)
        reached = np.where((values <= ACCURACY).any(1), (values <= ACCURACY).argmax(1), np.nan)
        end = values[:, -max(1, rounds // 5) :].mean(1)
        key = (setting.clients, setting.shift, setting.is_shared)
        rows += [(*key, seed, reached[seed], end[seed], setting.rounds, setting.floor) for seed in range(seeds)]
        if setting.clients == max(CLIENTS):
            curves.append(_curve(setting, values))
    columns = ["clients", "shift", "is_shared", "seed", "rounds", "end", "predicted_rounds", "predicted_end"]
    return pd.DataFrame(rows, columns=columns), pd.concat(curves, ignore_index=True)


def _curve(setting: Setting, values: Array) -> pd.DataFrame:
    low, high = np.quantile(values, [0.1, 0.9], axis=0)
    curve = pd.DataFrame({"round": range(values.shape[1]), "mean": values.mean(0), "low": low, "high": high})
    curve.insert(0, "shift", setting.shift)
    curve.insert(1, "is_shared", setting.is_shared)
    return curve


def curve_figure(curves: pd.DataFrame) -> Figure:
    """Return the loss against rounds, a line a shift and kind of sketch, from `seed_tables`."""
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for place, shift in enumerate(sorted(curves["shift"].unique())):
            rows = curves[(curves["shift"] == shift) & ~curves["is_shared"]]
            color = PALETTE[1 + place]
            axes.plot(rows["round"], rows["mean"], color=color, linewidth=1.6, label=f"per client, shift {shift:g}")
            axes.fill_between(rows["round"], rows["low"], rows["high"], color=color, alpha=0.15, linewidth=0)
        shared = curves[curves["is_shared"]]
        # The shared sketch does not see the shifts: its curves are one, which a test asserts.
        rows = shared[shared["shift"] == shared["shift"].max()]
        axes.plot(rows["round"], rows["mean"], color=PALETTE[0], linewidth=2, linestyle=":", label="shared, any shift")
        axes.axhline(ACCURACY, color=GRID, linewidth=0.9, linestyle="--")
        axes.annotate("accuracy asked for", (ROUNDS, ACCURACY), (-4, 3), textcoords="offset points", ha="right")
        axes.set(
            yscale="log", xlabel="round", ylabel="f - f*, relative", ylim=(1e-9, 3), xlim=(0, curves["round"].max())
        )
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def summary_figure(table: pd.DataFrame) -> Figure:
    """Return rounds to accuracy against clients, and stall against shift, beside the exact values."""
    with drawing_style():
        figure = Figure(figsize=(WIDTH_IN, 5.2), layout="constrained")
        above, below = figure.subplots(2, 1)
        _rounds_panel(above, table[table["shift"] == 0])
        _stall_panel(below, table[(table["shift"] > 0) & ~table["is_shared"]], [4, max(CLIENTS)])
    return figure


def _rounds_panel(axes: Axes, table: pd.DataFrame) -> None:
    for is_shared, color, marker, name in ((True, PALETTE[0], "o", "shared"), (False, PALETTE[1], "s", "per client")):
        rows = table[(table["is_shared"] == is_shared) | (table["clients"] == 1)].groupby("clients")
        mean, low, high = rows["rounds"].mean(), rows["rounds"].quantile(0.1), rows["rounds"].quantile(0.9)
        axes.errorbar(
            mean.index, mean, yerr=[mean - low, high - mean], color=color, marker=marker, linestyle="none", label=name
        )
        exact = [Setting(clients, 0, is_shared).rounds for clients in mean.index]
        axes.plot(mean.index, exact, color=color, linestyle="--", linewidth=1, label=f"{name}, exact rate")
    axes.set(xscale="log", yscale="log", xlabel="clients, all alike", ylabel=f"rounds to {ACCURACY:g}")
    axes.set_xticks(CLIENTS, [str(clients) for clients in CLIENTS])
    axes.xaxis.minorticks_off()
    label_log_scale(axes.yaxis, 5, 300)
    axes.legend(loc="lower left")


def _stall_panel(axes: Axes, table: pd.DataFrame, clients: Sequence[int]) -> None:
    for place, number in enumerate(clients):
        rows = table[table["clients"] == number].groupby("shift")
        mean, low, high = rows["end"].mean(), rows["end"].quantile(0.1), rows["end"].quantile(0.9)
        color = PALETTE[2 + place]
        marker = "^D"[place % 2]
        error = [mean - low, high - mean]
        axes.errorbar(mean.index, mean, yerr=error, color=color, marker=marker, linestyle="none", label=f"K = {number}")
        exact = [Setting(number, shift, False).floor for shift in mean.index]
        axes.plot(mean.index, exact, color=color, linestyle="--", linewidth=1, label=f"K = {number}, exact")
    axes.axhline(ACCURACY, color=FOREGROUND, linewidth=0.9, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="shift between clients", ylabel="stall, per client")
    axes.set_xticks(SHIFTS[1:], [f"{shift:g}" for shift in SHIFTS[1:]])
    axes.xaxis.minorticks_off()
    axes.legend(loc="upper left")
