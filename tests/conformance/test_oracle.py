"""Every method, through server, messages and clients, is what a few dozen lines of NumPy say it is."""

import numpy as np
import pytest
import torch

from fedraclora import sketch
from fedraclora.local import local_batches
from fedraclora.seeding import derive_seed, stream
from fedraclora.sketch import SketchKey
from strategies.rounds import sample_cohort
from tests.conformance import oracle
from tests.helpers import METHODS, federation, settings

RANK, ALPHA, LR, ROUNDS = 3, 4.5, 0.4, 3

# What trains, and after how many rounds a link closes.
CASES = {
    "rac_lora": [
        ({"side": side, "rounds_per_link": length}, side, length) for side in ("b", "a") for length in (1, 2, 0)
    ],
    "ffa_lora": [({}, "b", 0)],
    "fed_it": [({}, "ab", 0)],
    "chain_of_lora": [({}, "ab", 1), ({"rounds_per_link": 2}, "ab", 2)],
    "full": [({}, "full", 0)],
}
ALL_CASES = [(name, *case) for name, cases in CASES.items() for case in cases]


def plain(tensor):
    return tensor.numpy().astype(np.float64)


def described(chosen, federated):
    """Return the run of these settings as the oracle wants it described, and the names of its layers."""
    problem = federated.problem
    layers = [name for name, module in problem.model.named_modules() if isinstance(module, torch.nn.Linear)]
    base = problem.new_chain().weights()
    examples = problem.dataset.train

    def draw(link, layer, trained):
        shape = base[f"{layers[layer]}.weight"].shape
        key = SketchKey(
            law=chosen.sketch.law, seed=stream(chosen.seed, "sketch"), link=link, layer=layers[layer], side=trained,
            rank=chosen.rank, dim=shape[0] if trained == "a" else shape[1],
        )  # fmt: skip
        return plain(sketch.draw(key))

    def batches(round, client):
        seed = derive_seed(derive_seed(stream(chosen.seed, "batches"), "round", round), "client", client)
        rows, sizes = local_batches(problem.split.indices[client], seed, problem.rounds.local)
        for row, size in zip(rows, sizes, strict=True):
            yield plain(examples.inputs[row[:size]]).reshape(size, -1), examples.targets[row[:size]].numpy()

    run = oracle.Run(
        weights=[plain(base[f"{layer}.weight"]) for layer in layers],
        biases=[plain(base[f"{layer}.bias"]) for layer in layers],
        cohorts=[sample_cohort(chosen.seed, round, problem.rounds) for round in range(1, chosen.rounds + 1)],
        batches=batches, sizes={client: len(rows) for client, rows in enumerate(problem.split.indices)},
        lr=chosen.lr, scale=chosen.alpha / chosen.rank, draw=draw,
    )  # fmt: skip
    return run, layers


def expected(run, parts, length):
    if parts == "full":
        return oracle.full(run)
    if parts != "ab" and length == 1:
        return oracle.rac_lora(run, parts)
    return oracle.chain(run, parts, length)


def run_both(chosen, parts, length):
    """Return the weights and biases that the project ends with, those of the oracle, and the weights at the start."""
    federated = federation(chosen)
    run, layers = described(chosen, federated)
    weights, biases = expected(run, parts, length)
    federated.run()
    found = federated.chain.weights()
    return (
        [plain(found[f"{layer}.weight"]) for layer in layers] + [plain(found[f"{layer}.bias"]) for layer in layers],
        weights + biases,
        run.weights,
    )


def check(chosen, parts, length):
    found, expected, base = run_both(chosen, parts, length)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-10)
    assert all(np.abs(mine - before).max() > 1e-3 for mine, before in zip(found, base, strict=False)), "nothing moved"


def shared(name, own, **changes):
    wanted = {"rank": RANK, "alpha": ALPHA, "lr": LR, "rounds": ROUNDS, "dtype": "float64", "local_steps": 4}
    return settings(method=(name, own), seed=3, **{**wanted, **changes})


@pytest.mark.parametrize(("name", "own", "parts", "length"), ALL_CASES)
def test_a_perceptron_trained_by_part_of_the_clients_ends_where_numpy_does(name, own, parts, length):
    check(shared(name, own), parts, length)


@pytest.mark.parametrize(("name", "own", "parts", "length"), ALL_CASES)
def test_softmax_regression_with_local_epochs_of_unequal_clients_ends_where_numpy_does(name, own, parts, length):
    epochs = {"local_steps": 20, "local_epochs": 1, "batch_size": 50, "model": "softmax_regression", "fraction": 0.34}
    check(shared(name, own, **epochs), parts, length)


def test_every_method_has_a_case():
    assert set(CASES) <= set(METHODS)


@pytest.mark.parametrize("law", sketch.LAWS)
def test_every_law_of_the_sketch_goes_through_the_whole_stack(law):
    chosen = shared("rac_lora", {}, lr=0.01 if law == "raw" else LR)
    chosen.sketch.law = law
    check(chosen, "b", 1)


def test_server_lr_scales_the_step_of_each_round():
    """From B = 0 in each link, the merged step is server_lr times the mean's, whatever the clients do."""
    one = federation(shared("rac_lora", {"server_lr": 1.0}, rounds=1))
    half = federation(shared("rac_lora", {"server_lr": 0.5}, rounds=1))
    base = {name: tensor.clone() for name, tensor in one.chain.weights().items()}
    one.run()
    half.run()
    for name, start in base.items():
        step = one.chain.weights()[name] - start
        torch.testing.assert_close(half.chain.weights()[name] - start, 0.5 * step, rtol=1e-12, atol=1e-14)
