"""What is written for Flower's command line, and what is read of a run in another process."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.outcomes import Diverged, NothingTrained, status_of
from experiments.runtimes import app_folder as app_folders
from experiments.runtimes.app_folder import FOLDERS, app_folder
from experiments.runtimes.flower import (
    COMPLETED,
    Address,
    follow,
    last_round,
    outcome,
    rows_after,
    summary_stamp,
    toml_string,
    toml_value,
    with_folder,
    write_connection,
)
from fedraclora.files import read_json, write_json
from strategies.state import BudgetTooSmall
from tests.helpers import Silent, settings


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30))
def test_any_text_survives_toml(text):
    assert tomllib.loads(f"key = {toml_string(text)}")["key"] == text


def test_numbers_stay_numbers():
    assert tomllib.loads(f"key = {toml_value(7)}\nname = {toml_value('7')}") == {"key": 7, "name": "7"}


def test_a_connection_is_encrypted_where_there_is_a_certificate(tmp_path):
    write_connection(tmp_path, Address("127.0.0.1:1"))
    plain = tomllib.loads((tmp_path / "config.toml").read_text())["superlink"]
    assert plain[plain["default"]] == {"address": "127.0.0.1:1", "insecure": True}
    write_connection(tmp_path, Address("127.0.0.1:1", str(tmp_path / "ca.crt")))
    secure = tomllib.loads((tmp_path / "config.toml").read_text())["superlink"]
    assert secure[secure["default"]] == {"address": "127.0.0.1:1", "root-certificates": str(tmp_path / "ca.crt")}


def table(folder, text):
    (folder / "rounds.csv").write_text(text)


def test_rows_are_shown_once_they_are_whole_and_once_only(tmp_path):
    assert last_round(tmp_path) == -1
    table(tmp_path, "round,test_accuracy,is_updated\n")
    assert rows_after(tmp_path, -1) == []
    table(tmp_path, "round,test_accuracy,is_updated\n0,,False\n1,0.5,True\n2,0.")
    first, second = rows_after(tmp_path, -1)
    assert first == {"round": 0, "is_updated": False}
    assert second == {"round": 1, "test_accuracy": 0.5, "is_updated": True}
    assert rows_after(tmp_path, 1) == []
    assert last_round(tmp_path) == 1


@pytest.mark.parametrize("error", [Diverged("too fast"), NothingTrained("no data"), BudgetTooSmall("poor")])
def test_what_ended_a_run_elsewhere_is_raised_here(tmp_path, error):
    write_json(tmp_path / "summary.json", {"status": status_of(error), "error": str(error)})
    with pytest.raises(type(error), match=str(error)):
        outcome(tmp_path, "finished:failed", "log", before=0)


def test_a_run_that_ended_well_gives_its_summary(tmp_path):
    write_json(tmp_path / "summary.json", {"status": "stopped at the budget"})
    assert outcome(tmp_path, COMPLETED, "log", before=0) == {"status": "stopped at the budget"}


def test_a_run_that_ended_without_a_word_gives_the_end_of_its_log(tmp_path):
    with pytest.raises(RuntimeError, match=r"finished:failed; the end of its log:\nlast words"):
        outcome(tmp_path, "finished:failed", "last words", before=0)
    assert outcome(tmp_path, COMPLETED, "", before=0) == {}, "the results are on another machine"


def test_the_summary_of_an_earlier_attempt_says_nothing_of_this_one(tmp_path):
    write_json(tmp_path / "summary.json", {"status": "diverged", "error": "too fast"})
    with pytest.raises(RuntimeError, match="last words"):
        outcome(tmp_path, "finished:failed", "last words", before=summary_stamp(tmp_path))


class Answers:
    """Stands in for the programs: the run has ended, and its last row is written while that is being asked."""

    def __init__(self, folder):
        self._folder = folder

    def check(self, name):
        assert name == "superlink"

    def run(self, command):
        table(self._folder, "round\n0\n1\n")
        write_json(self._folder / "summary.json", {"status": "finished"})
        return '{"runs": [{"status": "finished:completed"}]}'

    def tail(self, name):
        return ""


def test_the_last_row_is_shown_even_if_it_comes_with_the_end(tmp_path):
    table(tmp_path, "round\n0\n")
    watcher = Silent()
    assert follow(Answers(tmp_path), 7, settings(), tmp_path, watcher) == {"status": "finished"}
    assert [row["round"] for row in watcher.rows] == [1]
    assert read_json(tmp_path / "flower" / "run.json")["status"] == "finished:completed"


def test_the_server_is_told_the_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_folder(settings(out="run"), tmp_path / "run").out == str(tmp_path / "run")


def test_the_app_is_the_checkout(tmp_path):
    folder = app_folder(tmp_path / "app")
    assert (folder / "pyproject.toml").exists()
    assert not (tmp_path / "app").exists()


def test_an_installed_package_is_put_together_to_an_app(tmp_path, monkeypatch):
    package = tmp_path / "site" / "fedraclora"
    for name in FOLDERS:
        (package / "_app" / name).mkdir(parents=True)
        (package / "_app" / name / "module.py").write_text(name)
    (package / "_app" / "pyproject.toml").write_text("[tool.flwr.app]")
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(app_folders.fedraclora, "__file__", str(package / "__init__.py"))
    folder = app_folder(tmp_path / "app")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"pyproject.toml", "fedraclora/__init__.py", *(f"{name}/module.py" for name in FOLDERS)}
