"""The doctor says what works, and one thing that does not work hides no other."""

import pytest
from rich.console import Console

from experiments import doctor
from experiments.cli import main


def examine(monkeypatch, **checks):
    monkeypatch.setattr(doctor, "_checks", lambda: checks)
    console = Console(record=True, width=120)
    return doctor.examine(console), console.export_text()


def broken():
    raise RuntimeError("no such port")


def test_what_does_not_work_is_named_with_its_reason_and_the_rest_is_shown(monkeypatch):
    is_fine, text = examine(monkeypatch, first=broken, second=lambda: "all well")
    assert not is_fine
    assert "no such port" in text
    assert "all well" in text


def test_a_simulation_that_is_not_installed_is_no_failure(monkeypatch):
    is_fine, text = examine(monkeypatch, **{doctor.SIMULATION: broken})
    assert is_fine
    assert "does not" in text


def test_it_takes_no_arguments():
    assert main(["doctor", "now"]) == 2


@pytest.mark.slow
def test_here_everything_works(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().err
    assert "does not" not in said
    assert all(f"runtime={name}" in said for name in ("in_process", "simulation", "deployment"))
