"""Table 3 of the RAC-LoRA paper beside a finished comparison of the preset `paper/mnist`.

    python -m experiments.paper.mnist RUNFOLDER

Source: G. Malinovsky et al., "Randomized Asymmetric Chain of LoRA", 2024, arXiv 2410.08305, Table 3: test accuracy in
per cent on the digits 5 to 9 of an MLP trained on 0 to 4 and adapted with rank 1, one run a cell and no error bars. The
cells are by the start of A, then that of B: g for Gaussian, z for zero.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.outcomes import FINISHED
from fedraclora.files import read_json, write_atomically


@dataclass(frozen=True)
class Cell:
    """A cell of the published table: the accuracy in per cent, and the numbers that train."""

    accuracy: float
    trained: int


TABLE = MappingProxyType(
    {
        "lora_gz": Cell(83.8, 1_045),
        "lora_zg": Cell(87.0, 1_045),
        "cola_gz": Cell(92.6, 1_045),
        "cola_zg": Cell(96.2, 1_045),
        "asym_gz": Cell(62.3, 133),
        "asym_zg": Cell(81.6, 912),
        "rac_gz": Cell(92.0, 133),
        "rac_zg": Cell(96.1, 912),
        "fpft": Cell(98.0, 54_725),
    }
)
# A median this near, in per cent of the test images, is as near as one run without an error bar can be expected to be.
NEAR = 3.0


def beside(folder: Path) -> pd.DataFrame:
    """Return a row a cell: the paper's accuracy and ours, in per cent, over the seeds that finished.

    `trained_parameters` are those that a client sends each round, `published_parameters` the paper's. Raises ValueError
    where a cell has no finished run.
    """
    rows = []
    for cell, published in TABLE.items():
        runs = _finished(folder, cell)
        ours = pd.Series([100 * summary["final_test_accuracy"] for _, summary in runs])
        low, median, high = float(ours.min()), float(ours.median()), float(ours.max())
        row = {"cell": cell, "paper": published.accuracy, "median": median, "min": low, "max": high}
        row |= {"num_seeds": len(runs), "trained_parameters": _trained(runs[0][0])}
        row |= {"published_parameters": published.trained, "verdict": verdict(published.accuracy, low, median, high)}
        rows.append(row)
    return pd.DataFrame(rows)


def verdict(published: float, low: float, median: float, high: float) -> str:
    """Return in words how far a published accuracy is from ours, whose range over seeds is `low` to `high`."""
    if low <= published <= high:
        return "inside our range"
    gap = abs(published - median)
    return f"within {NEAR:g} points of our median" if gap <= NEAR else f"differs by {gap:.1f} points"


def _finished(folder: Path, cell: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return the cell's runs that came to their end, with their summaries."""
    runs = [(path.parent, read_json(path)) for path in sorted((folder / cell).glob("seed_*/summary.json"))]
    finished = [(path, summary) for path, summary in runs if summary["status"] == FINISHED]
    if not finished:
        raise ValueError(
            f"{folder / cell} holds no finished run; give the folder of `fedraclora run experiment=paper/mnist`"
        )
    return finished


def _trained(run: Path) -> int:
    """Return the numbers that a client sends in a round, which are those it trains."""
    ledger = pd.read_csv(run / "ledger.csv")
    sent = ledger[(ledger["direction"] == "up") & ledger["kind"].isin(["update", "dense"]) & (ledger["round"] > 0)]
    return int(sent.groupby(["round", "partition"])["parameters"].sum().max())


def render(frame: pd.DataFrame) -> Table:
    """Return the frame as a table for the terminal."""
    table = Table(box=SIMPLE_HEAD, title="Test accuracy in %, digits 5 to 9: the paper's Table 3 and ours")
    for name in ("cell", "paper", "ours", "range", "seeds", "trained", "verdict"):
        table.add_column(name, justify="left" if name in ("cell", "verdict") else "right")
    for row in frame.to_dict("records"):
        span = f"{row['min']:.1f} - {row['max']:.1f}"
        numbers = (f"{row['paper']:.1f}", f"{row['median']:.1f}", span, f"{row['num_seeds']}")
        table.add_row(row["cell"], *numbers, f"{row['trained_parameters']:,}", row["verdict"])
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table for a finished comparison, write `paper.csv` into its folder, and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(stderr=True)
    try:
        if len(given) != 1:
            raise ValueError("name the folder of one finished comparison: python -m experiments.paper.mnist RUNFOLDER")
        frame = beside(Path(given[0]))
    except ValueError as error:
        console.print(str(error), style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 2
    write_atomically(Path(given[0]) / "paper.csv", frame.to_csv(index=False).encode())
    Console().print(render(frame))
    return 0


if __name__ == "__main__":
    sys.exit(main())
