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
from experiments.paper import counterexample, laws
from experiments.plots import inline_svg, save_png

TITLE = "The theory of RAC-LoRA, measured"
SEEDS = 40
INTRO = (
    "RAC-LoRA (Malinovsky et al., 2024, arXiv 2410.08305) adapts a matrix W by a chain of links. In each link one factor "
    "is drawn at random and frozen and the other one is trained from zero, which is a gradient step through a random "
    "projector: W - gamma G H, or W - gamma H G, with H of rank r and, for the usual laws, E[H] = (r/n) I."
)
READING = (
    "Markers and solid lines are measured, as means over seeds; bands are the spread over seeds.",
    (
        "Dashed lines are bounds. “Paper, as quoted in reviews” means that the theorem was read in reviews that quote it "
        "(Theorems 5.3 and 5.5); the paper's full text was not available. “Derived here” means that the project "
        "proves it; the paper's own constants may differ."
    ),
    "“About” marks a statement that is an approximation, not a bound.",
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
    tables = "".join(f'<div class="wide">{table}</div>' for table in part.tables)
    return f'<h2>{escape(part.title)}</h2>{text}<div class="figures">{figures}</div>{tables}'


def counterexample_part(seeds: int) -> Part:
    """Return the part on the paper's counterexample, as reconstructed."""
    frame, floor = counterexample.gaps(seeds), counterexample.rank_one_floor(seeds)
    table, lines = counterexample.outcomes(frame), counterexample.curves(frame)
    claims = counterexample.claims(table, floor)
    caption = (
        "Reconstruction: measured f - f* (median and quartiles) against gradient steps on a 3 x 3 quadratic with L = 20, "
        f"rank 1, over {seeds} seeds for each of four pairs of linear term and start. No bound is drawn: the step 1/L is "
        "the one that the theory allows, and runs whose gap exceeds 1e6 are drawn as diverged."
    )
    count = sum(claim[2].startswith("reproduced") for claim in claims)
    return Part(
        title="The counterexample (reconstruction)",
        finding=(
            f"{count} of 6 claims that reviews quote appear in our reconstruction; COLA's wrong limit and the general "
            "divergence of LoRA at 1/L do not, and what saves RAC-LoRA at 1/L is the projector."
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
                    f"Reconstruction, after 4000 steps; ranges are over the four problems, {seeds} seeds each. The last "
                    "column is an independent earlier run of the same reconstruction, from the project's notes."
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
    return Part(
        title="Sketch laws",
        finding=(
            f"All laws of the project reach lambda_min = r/n; an uncentred law keeps {control['low'] * laws.DIM:.0%} "
            "of it at rank 1, and plain N(0, 1) factors need steps about n times smaller."
        ),
        text=(
            (
                "The rate of every theorem is the smallest eigenvalue of E[H], at most r/n for rank r. Where A does not "
                "have orthonormal rows, a plain gradient step on B multiplies by A^T A and not by the projector, and "
                "1/L is then no safe step."
            ),
        ),
        plots=(
            Plot(
                "law_eigenvalues",
                laws.eigenvalue_figure(table),
                f"Measured eigenvalues of the mean of H over {draws} draws a law and rank, n = {laws.DIM} (bar: smallest "
                "to largest, marker: smallest), where one draw is one seed. The dashed lines are r/n, the exact value "
                "for all laws but Uniform(0, 1) (paper, as quoted in reviews, for isotropic laws; derived here by the "
                "trace), so that the bars around them are sampling error.",
                table,
            ),
            Plot(
                "law_steps",
                laws.step_figure(table),
                f"Measured largest steps, in units of 1/L, of plain gradient descent on B over {draws} draws a law and "
                "rank: above, the step at which 99% of draws must descend, below, the one that minimises the mean "
                "majorant. The dotted line is the projected step, gamma = 1/L for every law (derived here), and the "
                "dashed one 1/(r+n+1) for N(0, 1) entries (derived here).",
                table,
            ),
        ),
    )


PARTS: dict[str, Callable[[int], Part]] = {
    "counterexample": counterexample_part,
    "laws": laws_part,
}


def main(arguments: Sequence[str]) -> None:
    """Write the page into the folder that is named."""
    if len(arguments) != 1:
        raise SystemExit("usage: python -m experiments.theory_page OUT")
    write_theory(Path(arguments[0]), Console(stderr=True))


if __name__ == "__main__":
    main(sys.argv[1:])
