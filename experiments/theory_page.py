"""`fedraclora theory`: what is proved of RAC-LoRA beside what small problems show, as one self-contained HTML page.

    python -m experiments.theory_page OUT

writes `OUT/theory.html`, and each figure as `OUT/figures/*.png` with its numbers in `OUT/data/*.csv`.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.page import html_figure, html_list, html_page, html_table
from experiments.paper import convergence, counterexample, floats, laws, participation
from experiments.paper import seeds as sketch_seeds
from experiments.plots import inline_svg, save_png

TITLE = "The theory of RAC-LoRA, measured"
SEEDS = 40
INTRO = (
    "RAC-LoRA (Malinovsky et al., 2024, arXiv 2410.08305) adapts a matrix W by a chain of links. In each link one "
    "factor is drawn at random and frozen and the other one is trained from zero, which is a gradient step through a "
    "random projector: W - gamma G H, or W - gamma H G, with H of rank r and, for the usual laws, E[H] = (r/n) I."
)
READING = (
    (
        "Solid lines and markers are measured, as means over seeds; bands and bars go from 10% to 90% of seeds. The "
        "exception is the counterexample, whose runs may diverge: medians and quartiles."
    ),
    (
        "Dashed lines are theory. The caption says whether they are a bound on the mean (single seeds may exceed it), "
        "exact for the problem, or only “about” right."
    ),
    (
        "“Paper, as quoted in reviews” means that the statement was read in reviews that quote it, as the paper's full "
        "text was not available; “derived here” that the project proves it; the paper's own constants may differ."
    ),
    (
        "The numbers of each figure lie in data/ beside this page, the figures as PNG in figures/. This page: "
        "fedraclora theory."
    ),
)


@dataclass(frozen=True)
class Plot:
    """A figure, the name of its files, its caption in plain text, and the numbers that it shows."""

    name: str
    figure: Figure
    caption: str
    data: pd.DataFrame


@dataclass(frozen=True)
class Part:
    """A section of the page: plain sentences, figures, and finished tables; `finding` is its answer in one sentence."""

    title: str
    finding: str
    text: Sequence[str]
    plots: Sequence[Plot]
    tables: Sequence[str] = ()
    more_data: Mapping[str, pd.DataFrame] = field(default_factory=dict)


def write_theory(folder: Path, console: Console, *, seeds: int = SEEDS) -> Path:
    """Measure everything, write page, figures and numbers into `folder`, and return the page's path.

    `seeds` is how many repeats the means are over; the parts that need fewer scale it down. Takes some minutes.
    """
    parts, took = [], time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(PARTS))
        for name, measure in PARTS.items():
            progress.update(task, description=name)
            began = time.monotonic()
            parts.append(measure(seeds))
            console.print(f"{name}: {time.monotonic() - began:.1f} s")
            progress.advance(task)
        progress.update(task, description="writing")
        page = _write(folder, parts)
    console.print(f"wrote {page} after {time.monotonic() - took:.0f} s", soft_wrap=True)
    return page


def _write(folder: Path, parts: Sequence[Part]) -> Path:
    for name in ("data", "figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for part in parts:
        for plot in part.plots:
            save_png(plot.figure, folder / "figures" / f"{plot.name}.png")
        for name, data in ({plot.name: plot.data for plot in part.plots} | dict(part.more_data)).items():
            data.to_csv(folder / "data" / f"{name}.csv", index=False, float_format="%.6g")
    page = folder / "theory.html"
    page.write_text(html_page(TITLE, _body(parts)), encoding="utf-8")
    return page


def _body(parts: Sequence[Part]) -> list[str]:
    findings = html_list(f"{part.title}: {part.finding}" for part in parts)
    head = [f"<h1>{escape(TITLE)}</h1><p>{escape(INTRO)}</p>", f"<h2>In short</h2>{findings}"]
    return [*head, f"<h2>How to read the figures</h2>{html_list(READING)}", *map(_section, parts)]


def _section(part: Part) -> str:
    text = "".join(f"<p>{escape(sentence)}</p>" for sentence in part.text)
    figures = "".join(
        html_figure(inline_svg(plot.figure, name=plot.name, description=plot.caption), plot.caption)
        for plot in part.plots
    )
    # A lone figure leaves room for a table beside it.
    beside, below = (part.tables[:1], part.tables[1:]) if len(part.plots) == 1 else ((), part.tables)
    front = f'<div class="figures">{figures}{"".join(f"<div>{table}</div>" for table in beside)}</div>'
    tables = "".join(f'<div class="wide">{table}</div>' for table in below)
    return f"<h2>{escape(part.title)}</h2>{text}{front}{tables}"


def counterexample_part(seeds: int) -> Part:
    """Return the part on the paper's counterexample, as reconstructed."""
    frame, floor = counterexample.gaps(seeds), counterexample.rank_one_floor(seeds)
    table, lines = counterexample.outcomes(frame), counterexample.curves(frame)
    claims = counterexample.claims(table, floor)
    caption = (
        "Reconstruction: measured f - f* (median and quartiles) against gradient steps on a 3 x 3 quadratic with L = "
        f"20, rank 1, over {seeds} seeds for each of four pairs of linear term and start. No bound is drawn: the step "
        "1/L is the one that the theory allows, and runs whose gap exceeds 1e6 are drawn as diverged."
    )
    missing = [claim[0] for claim in claims if claim[2].startswith("not reproduced")]
    count = sum(claim[2].startswith("reproduced") for claim in claims)
    return Part(
        title="The counterexample (reconstruction)",
        finding=(
            f"{count} of {count + len(missing)} claims that reviews quote appear in our reconstruction, not so "
            f"“{'” and “'.join(missing)}”; at 1/L it is the projector that saves RAC-LoRA, not the frozen factor."
        ),
        text=(
            (
                "The paper's Section 3 gives a quadratic on which LoRA and its chains fail. Its linear term, start and "
                "initial factors could not be read, so this is a reconstruction, and its numbers are not the paper's."
            ),
        ),
        plots=(Plot("counterexample", counterexample.gap_figure(lines), caption, lines),),
        tables=(
            html_table(
                ["claim of the paper, as quoted in reviews", "measured here", "verdict"],
                claims,
                caption="Reconstruction. Shares are over all seeds and problems.",
            ),
            html_table(
                ["method and step", "diverged", "median gap of the others", "worst", "earlier reconstruction"],
                counterexample.outcome_rows(table),
                caption=(
                    f"Reconstruction, after 4000 steps; ranges are over the four problems, {seeds} seeds each. The "
                    "last column is an independent earlier run of the same reconstruction, from the project's notes."
                ),
            ),
        ),
        more_data={"counterexample_outcomes": table, "counterexample_rank_one_floor": floor},
    )


def laws_part(seeds: int) -> Part:
    """Return the part on the sketch laws; the number of draws follows `seeds`."""
    draws = 40 * seeds
    table = laws.law_table(draws)
    control = table[(table["law"] == laws.UNCENTRED) & (table["rank"] == 1)].iloc[0]
    kept = control["low"] * laws.DIM
    return Part(
        title="Sketch laws",
        finding=(
            f"the project's laws reach lambda_min = r/n, up to sampling error; an uncentred law keeps {kept:.0%} "
            "of it at rank 1, and plain N(0, 1) factors need steps about n times smaller."
        ),
        text=(
            (
                "The rate of every theorem is the smallest eigenvalue of E[H], at most r/n for rank r. Where A does "
                "not have orthonormal rows, a plain gradient step on B multiplies by A^T A and not by the projector, "
                "and 1/L is then no safe step."
            ),
        ),
        plots=(
            Plot(
                "law_eigenvalues",
                laws.eigenvalue_figure(table),
                f"Measured eigenvalues of the mean of H over {draws} draws a law and rank, n = {laws.DIM} (bar: "
                "smallest to largest, marker: smallest); a draw is a seed. The dashed lines are r/n, the "
                "exact value for all laws but Uniform(0, 1), and random signs at r near n (paper, as quoted in "
                "reviews, for isotropic laws; derived here by the trace): the bars are sampling error.",
                table,
            ),
            Plot(
                "law_steps",
                laws.step_figure(table),
                f"Measured largest steps, in units of 1/L, of plain gradient descent on B over {draws} draws (seeds) a "
                "law and rank: above, the step at which 99% of draws must descend, below, the one that minimises the "
                "mean majorant. The dotted line is the projected step, gamma = 1/L for every law (derived here), and "
                "the dashed one 1/(r+n+1) for N(0, 1) entries (derived here).",
                table,
            ),
        ),
    )


def floats_part(seeds: int) -> Part:
    """Return the part on floats to accuracy."""
    seeds = max(2, seeds // 2)
    regimes, tasks = floats.regime_table(seeds), floats.task_table(seeds)
    at_step, exact = (floats.mean_floats(regimes, name, 8) for name in ("1/L", floats.EXACT))
    spread = floats.spread_over_ranks(regimes, "1/L")
    setting = f"{floats.OUT} x {floats.DIM} quadratics with L = 1"
    return Part(
        title="Floats to accuracy",
        finding=(
            f"at the step 1/L the rank changes the floats to {floats.ACCURACY:g} by a factor of {spread:.2f} at most, "
            f"so it saves nothing; an exact link of rank 8 needs {exact / at_step:.0%} of them, and a link of the "
            "task's own rank is enough."
        ),
        text=(
            (
                "The theorem needs n/r times as many links at rank r, each of r/n times the floats: a low rank does "
                "not lower what is sent up to an accuracy. What lowers it is work inside the subspace, a server step "
                "that small ranks bear, or a task of low rank."
            ),
        ),
        plots=(
            Plot(
                "floats_regimes",
                floats.regime_figure(regimes),
                (
                    f"Measured uplink floats until f - f* is {floats.ACCURACY:g} of its start, mean and 10-90% of "
                    f"{seeds} seeds, on {setting} and mu = 1/{floats.CONDITION:g}; side b (A drawn) unless it says "
                    "side a, and 4/L diverges at the ranks that it lacks. The dashed line is the bound m n (L/mu) "
                    "log(1/eps) at 1/L, the same for all ranks (derived here), and r = 24 is full gradient descent."
                ),
                regimes,
            ),
            Plot(
                "floats_tasks",
                floats.task_figure(tasks),
                (
                    f"Measured uplink floats to {floats.ACCURACY:g}, mean and 10-90% of {seeds} seeds, on {setting} "
                    "that depend on W in as many input directions as the task's rank says. No bound is drawn: dotted "
                    "lines take steps 1/L and full ones solve each link exactly, which ends at once from the task's "
                    "rank on."
                ),
                tasks,
            ),
        ),
    )


def seeds_part(seeds: int) -> Part:
    """Return the part on shared and private sketches."""
    seeds = max(2, seeds // 2)
    table, curves = sketch_seeds.seed_tables(seeds)
    most = max(sketch_seeds.CLIENTS)
    alike = table[(table["clients"] == most) & (table["shift"] == 0)].groupby("is_shared")["rounds"].mean()
    apart = table[(table["clients"] == most) & (table["shift"] == 0.3) & ~table["is_shared"]]["end"].mean()
    problem = (
        f"f_k(W) = ||W - W*_k||^2 / 2, {sketch_seeds.OUT} x {sketch_seeds.DIM}, rank {sketch_seeds.RANK}, {seeds} seeds"
    )
    return Part(
        title="Shared or private sketches",
        finding=(
            f"with {most} clients that are alike, private sketches need {alike[False]:.0f} rounds in place of "
            f"{alike[True]:.0f}; with shifts of 0.3 they stall at {apart:.1%} of the initial loss, and the shared "
            "sketch does not notice."
        ),
        text=(
            (
                "With one sketch for all, the mean of the updates is the projected mean gradient, whatever the "
                "clients' differences. With a sketch for each, K clients average the sketch's noise, which allows a "
                "larger step, but their differences no longer cancel."
            ),
        ),
        plots=(
            Plot(
                "seeds_curves",
                sketch_seeds.curve_figure(curves),
                (
                    f"Measured f - f* over its start against rounds, mean and 10-90%, K = {most} clients: {problem}. "
                    "No bound is drawn: each kind has the step that is best without shifts, 1 for the shared sketch "
                    "and 1 / (1/K + (1 - 1/K) r/n) for private ones (derived here)."
                ),
                curves,
            ),
            Plot(
                "seeds_summary",
                sketch_seeds.summary_figure(table),
                (
                    f"Measured rounds to {sketch_seeds.ACCURACY:g} of clients that are alike (above) and stall of "
                    f"private sketches against the shift (below), mean and 10-90%: {problem}. The dashed lines are "
                    "exact for this problem (derived here), and the dotted one is the accuracy that the upper panel "
                    "asks for."
                ),
                table,
            ),
        ),
    )


def convergence_part(seeds: int) -> Part:
    """Return the part on bounds and measurements."""
    seeds = max(2, seeds // 2)
    tables = {name: convergence.convergence_table(cases(), seeds) for name, (cases, _) in CONVERGENCE.items()}
    speed = convergence.speed_table(seeds)
    points = sum(len(table) for table in tables.values())
    above = sum(convergence.violations(table) for table in tables.values())
    slow = speed[speed["rank"] == 1].assign(law=lambda rows: rows["ratio"] / rows["dim"])["law"].mean()
    plots = [
        Plot(f"convergence_{name}", convergence.bound_figure(table), CONVERGENCE[name][1].format(seeds=seeds), table)
        for name, table in tables.items()
    ]
    caption = (
        f"Measured links to f - f* of {convergence.ACCURACY:g} of its start, over those of full gradient descent, mean "
        f"and 10-90% of {seeds} seeds, at 1/L on 6 x 8 problems. The dashed line is about what the theorems say, a "
        "speed in proportion to r/n or r/m (paper, as quoted in reviews, for linear regression); they bound the links "
        "by a multiple of it and not by the line itself."
    )
    return Part(
        title="Bounds and measurements",
        finding=(
            f"at {above} of {points} points the mean over seeds lies above its bound; with rank 1 the links grow "
            f"{slow:.2f} times as much as n (or m) over those of full gradients, and r = n is full gradient descent "
            f"to {convergence.full_rank_error():.0e}."
        ),
        text=(
            (
                "Bounds hold for the mean over draws and are loose by design: they must hold for the worst problem "
                "with the same constants. Read them as “not above”, never as “equal”. Floors of the bounds do not "
                "depend on the rank, only the speed does."
            ),
        ),
        plots=(Plot("convergence_speed", convergence.speed_figure(speed), caption, speed), *plots),
    )


MEASURED = (
    "Measured f - f* against links, mean over {seeds} seeds (lines, markers) and 10-90% (bands), one colour a rank"
)
CONVERGENCE: dict[str, tuple[Callable[[], Sequence[convergence.Case]], str]] = {
    "gradient": (
        convergence.gradient_cases,
        MEASURED
        + ", of full gradients at 1/L on a 6 x 8 quadratic with L/mu = 10. Dashed: (1 - gamma mu lambda_min)^T D0 "
        "(paper, Theorem 5.5, as quoted in reviews).",
    ),
    "nonconvex": (
        convergence.nonconvex_cases,
        (
            "Measured mean of ||grad f||^2 over the points so far, mean over {seeds} seeds and 10-90%, of full "
            "gradients at 1/L on a quadratic with the penalty w^2 / (1 + w^2), which is not convex. Dashed: 2 D0 / "
            "(lambda_min gamma T) (paper, Theorem 5.3, as quoted in reviews), with a lower bound in place of the "
            "unknown minimum."
        ),
    ),
    "regression": (
        convergence.regression_cases,
        MEASURED
        + ", of full gradients at 1/L on ridge regression and on multinomial logistic regression of 120 samples. "
        "Dashed: (1 - gamma mu lambda_min)^T D0 (paper, Theorem 5.5, as quoted in reviews).",
    ),
    "stochastic": (
        convergence.stochastic_cases,
        MEASURED + ", of single samples (SGD) and of shuffled passes over 20 samples at one sketch a pass (random "
        "reshuffling). Dashed: the bounds for both under PL (derived here; the paper's own constants may differ), "
        "whose floors are free of the rank.",
    ),
    "federated": (
        convergence.federated_cases,
        MEASURED
        + ", of 5 clients that pass once over their own shuffled samples in a shared subspace, with a local step "
        "of 1/(8 L N). Dashed: the federated bound under PL (derived here; Fed-RAC-LoRA's own theorem could not be "
        "read), for plain averaging and for a server step of 1/L.",
    ),
}


def participation_part(seeds: int) -> Part:
    """Return the part on sampled cohorts and late clients."""
    seeds, repeats = max(2, seeds // 2), max(1, seeds // 20)
    floors, down = participation.floor_table(seeds), participation.downlink_table(seeds=repeats)
    part = floors[floors["variance"] > 0]
    constant = part["floor"] / part["variance"]
    by_rank = constant.groupby(part["rank"]).mean()
    off = (down.groupby(["rank", "fraction"])[["measured", "formula"]].mean().pipe(_relative)).max()
    layer = participation.LAYER
    return Part(
        title="Partial participation",
        finding=(
            "the floor follows (M - S) / (S (M - 1)) and not the rank "
            f"(over ranks it differs by a factor of {by_rank.max() / by_rank.min():.2f}); the downlink of late clients "
            f"is within {off:.1%} of m r (1 - (1-p)^(n/r)) / p."
        ),
        text=(
            (
                "A cohort is a sample of the clients, so its mean update carries their variance. And every client must "
                "be sent, sooner or later, all links that were merged while it was away: counting m r floats down a "
                "round flatters the method at small participation."
            ),
        ),
        plots=(
            Plot(
                "participation_floor",
                participation.floor_figure(floors),
                (
                    f"Measured floor of f - f* against the variance of the mean of S of M = {participation.CLIENTS} "
                    f"clients, mean and 10-90% of {seeds} seeds, on a quadratic with shifted clients and server step "
                    "0.5/L. The dashed line is about (2 L eta / (3 mu)) (M-S)/(S(M-1)) zeta^2, an approximation "
                    "(derived here), and the dotted one has the same slope through the measurement at S = 1."
                ),
                floors,
            ),
            Plot(
                "participation_downlink",
                participation.downlink_figure(down),
                (
                    f"Measured floats that a participant is sent a round against the participation p (markers, "
                    f"{repeats} seeds of {participation.NUM_CLIENTS} clients), as the project's own server sends them "
                    f"for one {layer.out} x {layer.in_} layer. Lines: m r (1 - (1-p)^(n/r)) / p, exact for cohorts "
                    "drawn at random (derived here); dotted: the m r floats of one link; bars: p = r/n, where on "
                    "average as many links are missed as cost a whole weight."
                ),
                down,
            ),
        ),
    )


def _relative(means: pd.DataFrame) -> "pd.Series[float]":
    return (means["measured"] / means["formula"] - 1).abs()


PARTS: dict[str, Callable[[int], Part]] = {
    "counterexample": counterexample_part,
    "convergence": convergence_part,
    "floats": floats_part,
    "shared or private sketches": seeds_part,
    "participation": participation_part,
    "sketch laws": laws_part,
}


def main(arguments: Sequence[str]) -> None:
    """Write the page into the folder that is named."""
    if len(arguments) != 1:
        raise SystemExit("usage: python -m experiments.theory_page OUT")
    write_theory(Path(arguments[0]), Console(stderr=True))


if __name__ == "__main__":
    main(sys.argv[1:])
