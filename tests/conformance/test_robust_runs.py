"""Attackers in a whole run: what takes the place of the mean withstands them, and the mean does not."""

from functools import cache

import pytest

from experiments.runtimes.in_process import InProcessGrid
from experiments.settings import RobustSettings
from fedraclora.tasks import evaluate
from tests.helpers import edit_array, federation, settings

ATTACKERS = {3, 8, 11, 17}
POINTS = 0.03
RULES = {
    "median": RobustSettings("median"),
    "trimmed_mean": RobustSettings("trimmed_mean", trim=4),
    "krum": RobustSettings("krum", num_attackers=4),
    "multi_krum": RobustSettings("multi_krum", num_attackers=4, num_chosen=10),
}


def attack(client, reply):
    """Four of the twenty clients send a hundred times their B with the other sign."""
    return edit_array(reply, lambda values: -100 * values) if client in ATTACKERS else reply


def accuracy(robust, *, fault=None):
    chosen = settings(
        model=("mlp", {"hidden": [32]}), partition="iid", num_clients=20, fraction=1.0, rank=8, rounds=80, lr=1.0,
        local_steps=2, batch_size=72, robust=robust,
    )  # fmt: skip
    parts = federation(chosen, grid=InProcessGrid, fault=fault)
    parts.run()
    model, dataset = parts.problem.model, parts.problem.dataset
    model.load_state_dict(parts.chain.weights())
    return evaluate(model, dataset.test, dataset.task)[1]


@cache
def clean_mean():
    return accuracy(RobustSettings())


@pytest.mark.parametrize("rule", RULES)
def test_with_four_attackers_of_twenty_it_stays_within_three_points_of_the_clean_mean(rule):
    assert accuracy(RULES[rule], fault=attack) >= clean_mean() - POINTS


def test_the_plain_mean_does_not():
    assert accuracy(RobustSettings(), fault=attack) < clean_mean() - 10 * POINTS
