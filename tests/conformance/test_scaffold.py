"""SCAFFOLD on the trained factor, through the whole stack, against its algorithm in NumPy."""

import numpy as np
import pytest

from fedraclora import sketch
from fedraclora.local import local_batches
from fedraclora.seeding import derive_seed, stream
from strategies.rounds import sample_cohort
from tests.conformance.oracle import gradient
from tests.helpers import federation, settings

LR, STEPS, ROUNDS = 0.5, 4, 5


def plain(tensor):
    return tensor.numpy().astype(np.float64)


class Numpy:
    """Algorithm 1 of Karimireddy et al. (2020, arXiv 1910.06378), option II, for B of softmax regression W + s B A."""

    def __init__(self, parts):
        self.parts, self.chosen = parts, parts.settings
        weights = parts.problem.new_chain().weights()
        self.weight, self.bias = plain(weights["fc1.weight"]), plain(weights["fc1.bias"])
        self.b = np.zeros((self.weight.shape[0], self.chosen.rank))
        self.server = np.zeros_like(self.b)
        self.own = {client: np.zeros_like(self.b) for client in range(self.chosen.num_clients)}

    def batches(self, round, client):
        problem = self.parts.problem
        seed = derive_seed(derive_seed(stream(self.chosen.seed, "batches"), "round", round), "client", client)
        rows, sizes = local_batches(problem.split.indices[client], seed, problem.rounds.local)
        for row, size in zip(rows, sizes, strict=True):
            examples = problem.dataset.train
            yield plain(examples.inputs[row[:size]]).reshape(size, -1), examples.targets[row[:size]].numpy()

    def train(self, round, client, drawn):
        b = self.b.copy()
        for inputs, labels in self.batches(round, client):
            (by_weight,), _ = gradient([self.weight + b @ drawn], [self.bias], inputs, labels)
            b = b - LR * (by_weight @ drawn.T - self.own[client] + self.server)
        return b, self.own[client] - self.server + (self.b - b) / (STEPS * LR)

    def round(self, round, drawn):
        cohort = sample_cohort(self.chosen.seed, round, self.parts.problem.rounds)
        sizes = {client: len(self.parts.problem.split.indices[client]) for client in cohort}
        ended = {client: self.train(round, client, drawn) for client in cohort}
        self.b = sum(sizes[client] / sum(sizes.values()) * b for client, (b, _) in ended.items())
        change = sum(new - self.own[client] for client, (_, new) in ended.items())
        self.server = self.server + change / self.chosen.num_clients
        self.own |= {client: new for client, (_, new) in ended.items()}


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_it_ends_where_numpy_does(fraction):
    chosen = settings(
        method="ffa_lora", model="softmax_regression", scaffold=True, lr=LR, local_steps=STEPS, rounds=ROUNDS,
        fraction=fraction, dtype="float64",
    )  # fmt: skip
    parts = federation(chosen)
    oracle = Numpy(parts)
    (key,) = parts.problem.method.open_link(0, parts.chain.merged).drawn
    for report in parts.iterate():
        if report.round:
            oracle.round(report.round, plain(sketch.draw(key)))
            np.testing.assert_allclose(plain(parts.chain.open.factors["fc1.lora_b"]), oracle.b, rtol=1e-9, atol=1e-11)
    assert np.abs(oracle.server).max() > 1e-3


def test_variates_cost_as_much_as_the_factor_each_way():
    with_, without = (
        federation(settings(method="ffa_lora", scaffold=scaffold, fraction=1.0, rounds=3)).run()
        for scaffold in (True, False)
    )
    assert [report.traffic.uplink_bytes for report in with_] == [2 * r.traffic.uplink_bytes for r in without]
    # Before the first round there is nothing to send but seeds.
    assert [r.traffic.downlink_bytes for r in with_][1:] == [2 * r.traffic.downlink_bytes for r in without][1:]
