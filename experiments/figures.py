"""`make figures`: every figure of the README and of `docs` again, from the stored data of `experiments/results`.

python -m experiments.figures
"""

from pathlib import Path

from matplotlib.figure import Figure

from experiments.curves import TOTAL, UPLINK, Guides, curve_figure, gap_figure, methods_with_gap
from experiments.pareto import trade_of
from experiments.pareto_figure import pareto_figure
from experiments.plots import save_png
from experiments.results import Runs
from experiments.stored import load_stored
from experiments.styles import run_styles, variants_of
from experiments.tables import comparison_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "experiments" / "results", ROOT / "docs"
# Which figures of which stored comparison are shown somewhere.
SHOWN = {
    "all_methods": ("front_uplink", "front_total", "uplink", "total", "gap"),
    "paper_fedslop": ("front_uplink", "total"),
    "paper_mnist_dirichlet_100": ("uplink", "total"),
}


def main() -> None:
    """Draw the figures that are shown into folders of `docs` that have the comparisons' names."""
    for folder, names in SHOWN.items():
        drawn = figures(load_stored([RESULTS / folder]))
        for name in names:
            path = DOCS / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(drawn[name], path)
            print(path.relative_to(ROOT))  # noqa: T201


def figures(runs: Runs) -> dict[str, Figure]:
    """Return the figures of a comparison by name: accuracy against bytes, the fronts, and the aggregation's gap."""
    targets = runs.settings[0].get("target_accuracies") or []
    table = comparison_table(runs, targets=targets, budget_mib=None)
    styles, variants = run_styles(runs), variants_of(runs)
    trades = {way: trade_of(table, way) for way in ("uplink", "total")}
    drawn = {f"front_{way}": pareto_figure(trade, styles, variants) for way, trade in trades.items()}
    for name, axis in {"uplink": UPLINK, "total": TOTAL}.items():
        drawn[name] = curve_figure(runs, axis, Guides(targets=targets), front=trades[name].front)
    if methods_with_gap(runs):
        drawn["gap"] = gap_figure(runs)
    return drawn


if __name__ == "__main__":
    main()
