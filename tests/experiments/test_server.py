"""The server's side of a run that another process serves."""

from dataclasses import replace

import pytest

from experiments.problem import prepare
from experiments.run import run
from experiments.server import interrupted
from fedraclora.files import read_json
from tests.helpers import Silent, settings


def test_an_interruption_here_leaves_a_summary_of_the_rounds_that_are_whole(tmp_path):
    chosen = settings(out=str(tmp_path / "run"), rounds=2)
    digest = run(chosen, Silent())["chain_digest"]
    (tmp_path / "run" / "summary.json").unlink()
    longer = replace(chosen, rounds=9)
    with pytest.raises(KeyboardInterrupt), interrupted(longer, prepare(longer), tmp_path / "run"):
        raise KeyboardInterrupt
    summary = read_json(tmp_path / "run" / "summary.json")
    assert (summary["status"], summary["num_rounds"], summary["chain_digest"]) == ("interrupted", 2, digest)


def test_an_interruption_before_the_first_round_leaves_nothing(tmp_path):
    chosen = settings()
    with pytest.raises(KeyboardInterrupt), interrupted(chosen, prepare(chosen), tmp_path / "run"):
        raise KeyboardInterrupt
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_summary_of_a_failed_run_says_why(tmp_path):
    chosen = settings(out=str(tmp_path / "run"), lr=1e30, rounds=6)
    with pytest.raises(RuntimeError, match="diverged"):
        run(chosen, Silent())
    assert "smaller" in read_json(tmp_path / "run" / "summary.json")["error"]
