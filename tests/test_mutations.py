"""The mutations of `mutate.py`: each makes a test fail, and each still names a place that is there."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def mutate():
    spec = importlib.util.spec_from_file_location("mutate", ROOT / "tests" / "mutate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutate"]


def test_every_mutation_names_one_place_and_tests_that_exist(mutate):
    for mutation in mutate.MUTATIONS:
        for edit in mutation.edits:
            assert (ROOT / edit.file).read_text().count(edit.old) == 1, (mutation.name, edit.old)
        assert all((ROOT / test).exists() for test in mutation.tests), mutation.name


@pytest.mark.slow
def test_every_mutation_is_caught(mutate):
    assert mutate.main() == 0
