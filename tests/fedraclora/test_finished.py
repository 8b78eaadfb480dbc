"""A finished run from Python."""

import pytest
import torch

from experiments.problem import prepare
from experiments.run import run
from fedraclora.finished import load_run
from tests.helpers import Silent, federation, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    run(settings(out=str(path)), Silent())
    return path


def test_predictions_are_those_of_the_model_at_that_version(folder):
    finished, problem = load_run(folder), prepare(settings())
    inputs = problem.dataset.test.inputs[:7]
    parts = federation(settings())
    for report in parts.iterate():
        problem.model.load_state_dict(parts.chain.weights())
        with torch.no_grad():
            expected = problem.model(inputs)
        assert torch.equal(finished.predict(inputs, version=report.round), expected)
    assert torch.equal(finished.predict(inputs), expected)


def test_it_knows_its_versions_and_its_summary(folder):
    finished = load_run(str(folder))
    assert finished.versions == (0, 1, 2, 3)
    assert finished.summary["method"] == "rac_lora"
    assert finished.chain(0).num_links == 0
    assert not finished.model().training


def test_an_unknown_version_names_the_known_ones(folder):
    with pytest.raises(ValueError, match=r"\[0, 1, 2, 3\]"):
        load_run(folder).model(9)


def test_inputs_of_another_dtype_are_taken(folder):
    assert load_run(folder).predict(torch.zeros(2, 1, 8, 8, dtype=torch.float64)).shape == (2, 10)


def test_a_folder_that_holds_no_finished_run_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"summary\.json is missing"):
        load_run(tmp_path)


def test_building_the_model_again_leaves_the_global_generator_alone(folder):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load_run(folder).model()
    assert torch.equal(torch.rand(1), expected)
