"""What one round of local training costs: `python -m experiments.benchmarks.round_time`.

Prints the seconds of a round for the cohort engine, for two plain loops over the clients and for the bare matrix
products, which no engine can undercut, then how that depends on the batch size: the gain is overhead removed, so it
shrinks as batches grow. With one thread the seconds are CPU time, which other processes disturb little; with more they
are wall time of quiet repetitions only, or of all where none was quiet. `--memory` measures the peak memory and the
overhead of a round with 10,000 clients instead.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.engines import Bench, Engine, Workload, largest_difference
from experiments.benchmarks.measure import Timing, time_in_turns
from experiments.benchmarks.round_memory import measure_memory

RANKS, BATCHES = (1, 4, 16), (1, 2, 4, 8, 16, 32, 64, 128)
TITLES = {
    "cohort": "cohort engine",
    "reused": "loop, one module reused",
    "copied": "loop, a copy for each client",
    "floor": "frozen weights' products alone",
}
TOLERANCE = 1e-5
QUICK = Workload(clients=5, steps=2, batch=4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line asks for, print it, and write `--out`."""
    options = _parse(arguments)
    console = Console()
    torch.set_num_threads(options.threads)
    if options.memory:
        results = {"memory": measure_memory(200 if options.quick else 10_000)}
        console.print(_plain_table("One round of rac_lora, rank 4, in process", results["memory"]))
    else:
        results = _time_all(options, console)
    if options.out is not None:
        settings = {**vars(options), "out": str(options.out)}
        options.out.write_text(json.dumps({"settings": settings, "versions": _versions(), **results}, indent=2) + "\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.round_time", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="1: CPU time; more: wall time, quiet repetitions only")
    parser.add_argument("--repeats", type=int, default=9, help="repetitions of every workload")
    parser.add_argument("--quick", action="store_true", help="tiny workloads, to see that everything runs")
    parser.add_argument("--memory", action="store_true", help="measure memory and overhead of a large round instead")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args(arguments)


def _time_all(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    base = QUICK if options.quick else Workload()
    workloads = [replace(base, rank=rank) for rank in RANKS]
    curve = [replace(base, batch=batch) for batch in (BATCHES[:2] if options.quick else BATCHES)]
    found: dict[str, list[dict[str, Any]]] = {"ranks": [], "batch_sizes": []}
    for name, group in (("ranks", workloads), ("batch_sizes", curve)):
        for workload in group:
            found[name].append(measure(workload, options.repeats, options.threads))
            console.print(_timing_table(found[name][-1]))
    console.print(_curve_table(found["batch_sizes"]))
    return found


def measure(workload: Workload, repeats: int, threads: int) -> dict[str, Any]:
    """Return the seconds and ratios of every engine on a workload, after checking that they do equal work.

    Raises RuntimeError where an engine ends in factors that differ from the loop's by more than `TOLERANCE`.
    """
    engines = Bench(workload).engines()
    difference = check_equal_work(engines)
    timing = time_in_turns(engines, repeats, time.process_time if threads == 1 else time.perf_counter)
    kept = timing if threads == 1 or not timing.quiet.repetitions else timing.quiet
    return {
        "workload": asdict(workload),
        "difference": difference,
        "clock": "CPU" if threads == 1 else "wall",
        **_load(timing),
        "repetitions_used": len(kept.repetitions),
        "engines": {name: _figures(kept, name) for name in engines},
    }


def check_equal_work(engines: dict[str, Engine]) -> float:
    """Return the largest relative difference of any client's factor from the reused module's."""
    found = {name: train() for name, train in engines.items()}
    expected = found["reused"]
    assert expected is not None
    worst = {name: largest_difference(factors, expected) for name, factors in found.items() if factors is not None}
    for name, difference in worst.items():
        if not difference <= TOLERANCE:
            raise RuntimeError(f"engine {name!r} differs from the loop by {difference:.1e}, allowed is {TOLERANCE:.0e}")
    return max(worst.values())


def _load(timing: Timing) -> dict[str, Any]:
    loads = [round(item.foreign_cores, 3) for item in timing.repetitions]
    return {"foreign_cores": loads, "quiet_repetitions": len(timing.quiet.repetitions)}


def _figures(timing: Timing, engine: str) -> dict[str, float]:
    return {
        "seconds": timing.seconds(engine),
        "times_faster_than_loop": timing.ratio("reused", engine),
        "percent_of_floor": 100 * timing.ratio("floor", engine),
    }


def _timing_table(result: dict[str, Any]) -> Table:
    size, total = result["workload"], len(result["foreign_cores"])
    noise = "" if result["quiet_repetitions"] == total else f"; NOISY: {result['quiet_repetitions']} of {total} quiet"
    title = f"rank {size['rank']}: {size['clients']} clients x {size['steps']} steps x batch {size['batch']}{noise}"
    table = Table(title=title, title_justify="left")
    for column in ("engine", f"{result['clock']} s a round", "x the reused loop", "% of the floor"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name, row in result["engines"].items():
        speed, share = row["times_faster_than_loop"], row["percent_of_floor"]
        table.add_row(TITLES[name], f"{row['seconds']:.4f}", f"{speed:.2f}", f"{share:.0f}")
    return table


def _curve_table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="the cohort engine by batch size", title_justify="left")
    for column in ("batch", "x the reused loop", "% of the floor"):
        table.add_column(column, justify="right")
    for result in results:
        row = result["engines"]["cohort"]
        speed, share = row["times_faster_than_loop"], row["percent_of_floor"]
        table.add_row(str(result["workload"]["batch"]), f"{speed:.1f}", f"{share:.0f}")
    return table


def _plain_table(title: str, values: dict[str, Any]) -> Table:
    table = Table("what", "value", title=title, title_justify="left")
    for name, value in values.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("fedraclora", "flwr", "numpy", "torch")}
    return {**packages, "python": platform.python_version(), "machine": platform.machine()}


if __name__ == "__main__":
    main()
