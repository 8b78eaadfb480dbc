"""What the theory says exactly, checked through the whole stack: closed forms of a link, and their means."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from experiments.runtimes.in_process import InProcessGrid
from experiments.settings import MemorySettings
from fedraclora.datasets.quadratic import minimiser
from fedraclora.link import materialize
from fedraclora.payload import unflatten
from tests.helpers import federation, final_weights, relative_distance, same_weights, settings

QUADRATIC = {
    "dataset": ("quadratic", {"num_inputs": 6, "num_outputs": 4, "condition": 10.0, "num_samples": 24}),
    "model": ("softmax_regression", {"bias": False}),
    "partition": "iid",
    "dtype": "float64",
    "num_clients": 1,
    "fraction": 1.0,
    "local_steps": 1,
    "batch_size": 24,
}


def full_batch_gradient(problem, weight):
    """Return the gradient of f(W) = mean over rows of 0.5 ||W x - y||^2."""
    inputs, targets = problem.dataset.train.inputs, problem.dataset.train.targets
    return (inputs @ weight.T - targets).T @ inputs / len(inputs)


def weight_of(parts):
    return parts.chain.weights()["fc1.weight"].clone()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_links_that_never_close_are_ffa_lora(momentum):
    rac = final_weights(settings(method=("rac_lora", {"rounds_per_link": 0}), lr=0.5, momentum=momentum))
    ffa = final_weights(settings(method="ffa_lora", lr=0.5, momentum=momentum))
    assert same_weights(rac, ffa)


def test_never_closing_links_of_one_side_are_bernoulli_lora_whose_coin_always_falls_so():
    shared = {"lr": 0.5, "rounds": 4}
    for side, probability in (("b", 0.0), ("a", 1.0)):
        rac = federation(settings(method=("rac_lora", {"side": side}), **shared))
        coin = federation(settings(method=("bernoulli_lora", {"probability": probability}), **shared))
        rac.run()
        coin.run()
        assert coin.chain.digest == rac.chain.digest


def test_links_longer_than_the_run_are_ffa_lora():
    rac = final_weights(settings(method=("rac_lora", {"rounds_per_link": 99}), lr=0.5))
    assert same_weights(rac, final_weights(settings(method="ffa_lora", lr=0.5)))


def test_fed_it_is_chain_of_lora_that_never_closes():
    cola = final_weights(settings(method=("chain_of_lora", {"rounds_per_link": 0}), lr=0.2))
    assert same_weights(cola, final_weights(settings(method="fed_it", lr=0.2)))


def test_full_rank_with_one_step_a_round_is_full_fine_tuning_of_the_weights():
    """Square orthonormal A: A^T A = I, so the step on B is the step on W (r = n, check C3)."""
    shared = {"model": ("softmax_regression", {"bias": False}), "local_steps": 1, "lr": 0.5, "rounds": 4}
    rac = final_weights(settings(method="rac_lora", rank=64, alpha=64.0, dtype="float64", **shared))
    full = final_weights(settings(method="full", dtype="float64", **shared))
    assert relative_distance(rac, full) < 1e-6


def test_full_rank_on_the_side_of_the_outputs_is_full_fine_tuning_too():
    shared = {"model": ("softmax_regression", {"bias": False}), "local_steps": 1, "lr": 0.5, "rounds": 4}
    rac = final_weights(settings(method=("rac_lora", {"side": "a"}), rank=10, dtype="float64", **shared))
    full = final_weights(settings(method="full", dtype="float64", **shared))
    assert relative_distance(rac, full) < 1e-6


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_one_step_a_link_is_a_projected_gradient_step(side, alpha):
    """C2: W+ = W - lr (alpha / r)^2 G H_A (or H_B G), with H the projector on the sketch's rows (or columns)."""
    parts = federation(
        settings(**QUADRATIC, method=("rac_lora", {"side": side}), rank=2, alpha=alpha, lr=0.3, rounds=4)
    )
    before = weight_of(parts)
    for report in parts.iterate():
        if not report.is_updated:
            continue
        after = weight_of(parts)
        term = parts.chain.links[-1].terms[0]
        drawn = materialize(term.lora_b if side == "a" else term.lora_a, before).numpy()
        projector = drawn @ np.linalg.pinv(drawn) if side == "a" else np.linalg.pinv(drawn) @ drawn
        gradient = full_batch_gradient(parts.problem, before).numpy()
        projected = projector @ gradient if side == "a" else gradient @ projector
        expected = before.numpy() - 0.3 * (alpha / 2) ** 2 * projected
        np.testing.assert_allclose(after.numpy(), expected, atol=2e-7)  # A is orthonormal in float32
        before = after


def test_full_rank_follows_gradient_descent_step_by_step():
    """C3 against plain gradient descent written here."""
    parts = federation(settings(**QUADRATIC, method="rac_lora", rank=6, lr=0.7, rounds=12))
    weight = weight_of(parts)
    for report in parts.iterate():
        if report.is_updated:
            weight = weight - 0.7 * full_batch_gradient(parts.problem, weight)
            torch.testing.assert_close(weight_of(parts), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("gamma", "rank"), [(1.0, 2), (0.5, 2), (1.0, 3)])
def test_mean_factor_of_a_link_on_half_the_squared_distance(gamma, rank):
    """C4: with C = I, f = 0.5 ||W - W*||^2 and the mean factor of a link is 1 - (2 gamma - gamma^2) r / n, exactly.

    A factor is 1 - (2 gamma - gamma^2) s, where s is the share of W - W* that the projector keeps: a mean over the rows
    of variables Beta(r / 2, (n - r) / 2), so its variance is at most v = 2 r (n - r) / (n^2 (n + 2)). Links are
    independent, so by Bernstein's inequality the mean of N shares is within t of r / n with probability 1 - p for
    N t^2 = (2 v + 2 t / 3) ln(2 / p). The seeds are fixed, so a pass stays a pass.
    """
    n, links, seeds, log = 6, 30, 10, np.log(2 / 1e-6)
    identity = {**QUADRATIC, "dataset": ("quadratic", {**QUADRATIC["dataset"][1], "condition": 1.0})}
    factors = []
    for seed in range(seeds):
        parts = federation(settings(**identity, method="rac_lora", rank=rank, lr=gamma, rounds=links, seed=seed))
        losses = [half_squared_distance(parts) for report in parts.iterate()]
        factors += [after / before for before, after in pairwise(losses)]
    num = links * seeds
    assert len(factors) == num
    shares = (1 - np.array(factors)) / (2 * gamma - gamma**2)
    variance = 2 * rank * (n - rank) / (n**2 * (n + 2))
    bound = (log / 3 + np.sqrt((log / 3) ** 2 + 2 * num * variance * log)) / num
    assert bound < 0.13, "too loose to tell r / n from r / m"
    assert abs(shares.mean() - rank / n) < bound
    assert ((shares > -1e-6) & (shares < 1 + 1e-6)).all()


def half_squared_distance(parts):
    return 0.5 * float((weight_of(parts) - minimiser(parts.problem.dataset)).square().sum())


def test_rank_of_the_total_update_grows_by_the_rank_of_each_link():
    """C6: min(m, n, t r), while a link that never closes stays at r."""
    parts = federation(settings(**QUADRATIC, method="rac_lora", rank=1, lr=0.3, rounds=6))
    base = weight_of(parts)
    ranks = [int(torch.linalg.matrix_rank(weight_of(parts) - base, atol=1e-9)) for _ in parts.iterate()]
    assert ranks == [0, 1, 2, 3, 4, 4, 4]
    still = federation(settings(**QUADRATIC, method="ffa_lora", rank=1, lr=0.3, rounds=6))
    ranks = [int(torch.linalg.matrix_rank(weight_of(still) - base, atol=1e-9)) for _ in still.iterate()]
    assert ranks == [0, 1, 1, 1, 1, 1, 1]


def test_a_new_link_changes_no_bit_of_the_model():
    """C12: before it is trained, the open link adds nothing."""
    for side in ("a", "b", "auto"):
        parts = federation(settings(method=("rac_lora", {"side": side})))
        parts.run()
        before = parts.chain.weights()
        parts.chain.open_link(parts.problem.method.open_link(parts.chain.num_links, parts.chain.merged))
        assert same_weights(parts.chain.weights(), before)


def test_the_mean_of_the_clients_products_is_the_product_of_their_mean():
    """C7 through the stack: the merged model is the weighted mean of the models that each client alone would give."""
    parts = federation(settings(dtype="float64", rounds=1, fraction=1.0))
    base = {name: tensor.clone() for name, tensor in parts.chain.weights().items()}
    parts.run()
    link = parts.chain.links[0]
    replies = {
        part: message for way, part, message in parts.grid.seen if way == "up" and message.metadata.group_id == "1"
    }
    sizes = {part: len(rows) for part, rows in enumerate(parts.problem.split.indices)}
    shapes = [tuple(term.lora_b.shape) for term in link.terms]
    for place, term in enumerate(link.terms):
        drawn = materialize(term.lora_a, base[term.target])
        expected = base[term.target].clone()
        for part, reply in replies.items():
            own = unflatten(reply.content.array_records["update"]["flat"].numpy(), shapes)[place]
            expected += sizes[part] / sum(sizes.values()) * term.scale * (own @ drawn)
        torch.testing.assert_close(parts.chain.weights()[term.target], expected, rtol=1e-12, atol=1e-13)


def test_clients_of_nested_ranks_on_one_a_are_aggregated_exactly():
    chosen = settings(
        method="rac_lora", rank=4, client_ranks=[1, 2, 4, 4, 2, 1], alpha=4.0, lr=0.2, dtype="float64", verify=True,
        fraction=1.0,
    )  # fmt: skip
    for report in federation(chosen).run()[1:]:
        assert report.aggregation_gap < 1e-12


def test_clients_that_all_have_the_full_rank_are_clients_without_ranks_of_their_own():
    shared = {"rank": 3, "alpha": 6.0, "lr": 0.1, "dtype": "float64"}
    for method in ("rac_lora", "flora", "flexlora", "het_lora"):
        plain = final_weights(settings(method=method, **shared))
        ranked = final_weights(settings(method=method, client_ranks=[3] * 6, **shared))
        assert same_weights(ranked, plain)


def test_one_round_of_fedex_lora_is_one_of_flora_from_a_common_start():
    """Both merge the mean of the clients' products: one as means and their residual, the other side by side."""
    shared = {"dtype": "float64", "rounds": 1, "lr": 0.2, "alpha": 4.0}
    flora = final_weights(settings(method=("flora", {"private_start": False}), **shared))
    for residual in ("factors", "dense"):
        fedex = final_weights(settings(method=("fedex_lora", {"residual": residual}), **shared))
        assert relative_distance(fedex, flora) < 1e-14


def test_a_ridge_without_end_makes_lora_fair_fed_it():
    shared = {"dtype": "float64", "lr": 0.2}
    fair = final_weights(settings(method=("lora_fair", {"ridge": 1e12}), **shared))
    assert relative_distance(fair, final_weights(settings(method="fed_it", **shared))) < 1e-10


def test_het_lora_of_one_client_a_round_is_fed_it():
    """One client's product has all the weight, whatever its norm."""
    shared = {"dtype": "float64", "lr": 0.2, "fraction": 1 / 6, "rounds": 4}
    het = final_weights(settings(method="het_lora", **shared))
    assert relative_distance(het, final_weights(settings(method="fed_it", **shared))) < 1e-12


def test_one_subspace_of_full_rank_is_rac_lora_of_full_rank():
    """FedKRSO with one seed is RAC-LoRA on another draw, and at full rank all draws span everything."""
    shared = {"lr": 0.5, "dtype": "float64", "rank": 64, "model": ("softmax_regression", {"bias": False}), "rounds": 3}
    one = final_weights(settings(method=("fed_krso", {"num_seeds": 1}), **shared))
    rac = final_weights(settings(method="rac_lora", **shared))
    assert relative_distance(one, rac) < 1e-6


def test_a_clients_own_factor_on_the_learning_rate_is_one_on_its_steps():
    half = federation(settings(lr=0.8, client_lr_scales=[0.5] * 6))
    plain = federation(settings(lr=0.4))
    half.run()
    plain.run()
    assert half.chain.digest == plain.chain.digest
    still = federation(settings(lr=0.4, fraction=1.0, rounds=1, client_lr_scales=[1.0, *[1e-30] * 5]))
    alone = federation(settings(lr=0.4, fraction=1.0, rounds=1))
    still.run()
    alone.run()
    norms = {
        name: [float(np.abs(m.content.array_records["update"]["flat"].numpy()).max()) for m in replies(parts)]
        for name, parts in {"still": still, "alone": alone}.items()
    }
    assert norms["still"][0] == norms["alone"][0]
    assert max(norms["still"][1:]) < 1e-20 < min(norms["alone"][1:])


def replies(parts):
    return [message for way, _, message in parts.grid.seen if way == "up" and "update" in message.content.array_records]


# ---- compression on a problem whose optimum is known

HETEROGENEOUS = {
    **QUADRATIC,
    "dataset": ("quadratic", {**QUADRATIC["dataset"][1], "condition": 1.5, "noise": 1.0}),
    "num_clients": 6,
    "method": "full",
    "lr": 0.4,
}


def distance_from_the_optimum(feedback, uplink, rounds):
    """Return f(W) - f(W*) after full gradients of all clients, each with an optimum of its own."""
    chosen = settings(
        **HETEROGENEOUS, rounds=rounds, uplink=(uplink, {"share": 0.25}),
        memory=MemorySettings(feedback, whole_probability=0.2),
    )  # fmt: skip
    parts = federation(chosen, grid=InProcessGrid)
    parts.run()
    train = parts.problem.dataset.train
    losses = [
        0.5 * float((train.inputs @ weight.T - train.targets).square().sum()) / len(train)
        for weight in (weight_of(parts), minimiser(parts.problem.dataset))
    ]
    return losses[0] - losses[1]


@pytest.mark.parametrize(("feedback", "uplink"), [("ef21", "top_k"), ("marina", "rand_k")])
def test_an_estimate_at_both_ends_reaches_the_optimum_where_a_compressor_alone_stalls(feedback, uplink):
    """EF21 and MARINA compress what goes to zero; the clients' own updates do not."""
    assert distance_from_the_optimum(feedback, uplink, 60) < 1e-5
    assert distance_from_the_optimum("none", uplink, 60) > 1e-2
