"""What a running program shows of a round."""

import io
import logging

import pytest
from rich.console import Console

from experiments.progress import Display, beside, start_logging

NAN = float("nan")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, []),
        ({"personal_accuracy": NAN, "epsilon": None}, []),
        ({"personal_accuracy": 0.5, "epsilon": NAN}, ["personal accuracy 0.500"]),
        ({"personal_accuracy": 0.5, "epsilon": 3.25}, ["personal accuracy 0.500", "epsilon 3.25"]),
        ({"epsilon": float("inf")}, ["epsilon inf"]),
    ],
)
def test_only_what_was_measured_is_said(row, words):
    assert beside(row, "personal_accuracy", "epsilon") == words


def test_a_rounds_line_names_every_score_it_has():
    console, log = Console(file=io.StringIO(), width=200), logging.getLogger("fedraclora")
    before = log.handlers, log.level, log.propagate
    start_logging(console)
    try:
        with Display(console, logs_rounds=True) as display:
            display.start_run("m")
            row = {"round": 2, "test_accuracy": 0.25, "personal_accuracy": 0.75, "epsilon": 1.5}
            display.on_round({**row, "cum_uplink_bytes": 2**20}, 5)
    finally:
        log.handlers, log.level, log.propagate = before
    assert console.file.getvalue() == (
        "m: round 2/5  accuracy 0.250  personal accuracy 0.750  epsilon 1.5  up 1.000 MiB\n"
    )
