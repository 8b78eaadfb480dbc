"""RAC-LoRA's theory in numbers, each through the project's own draws, rounds, messages and merges.

G. Malinovsky et al., "Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank
Adaptation", 2024, arXiv 2410.08305. With H_A = A^T (A A^T)^+ A and H_B = B (B^T B)^+ B^T a link is the projected step
W - gamma G H_A (B is trained: side b) or W - gamma H_B G (A is trained: side a), its equations 3 and 4.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from clients.state_store import ClientStore
from experiments.settings import SketchSettings
from fedraclora import sketch
from fedraclora.aggregate import weighted_mean
from fedraclora.chain import Chain
from fedraclora.link import Link, LowRank
from fedraclora.local import LocalClient, train_cohort
from fedraclora.local_config import LocalConfig
from fedraclora.payload import unflatten
from fedraclora.plan import RoundPlan, Training
from fedraclora.seeding import stream
from fedraclora.sketch import LAWS, SketchKey
from fedraclora.tasks import evaluate
from strategies.rounds import sample_cohort
from tests.conformance import oracle
from tests.helpers import (
    METHODS,
    AppsGrid,
    RecordingGrid,
    federation,
    nodes_grid,
    relative_distance,
    same_weights,
    settings,
)

LAYERS = ["fc1", "fc2"]  # of the perceptron of the tiny run, 64 -> 12 -> 10
FULL_BATCH = {"dtype": "float64", "local_steps": 1, "batch_size": 10_000, "fraction": 1.0}
ORTHONORMAL = ["orthonormal", "selector", "selector_without_replacement", "sparse_sign"]  # A A^T = I


# ---- what the tests know of a run


def drawn_factor(parts, link, layer, side):
    """Return the drawn factor of a link, [r, n] for side b and [m, r] for side a, from the settings alone."""
    chosen = parts.settings
    outputs, inputs = parts.problem.new_chain().merged[f"{layer}.weight"].shape
    key = SketchKey(
        law=chosen.sketch.law, seed=stream(chosen.seed, "sketch"), link=link, layer=layer, side=side,
        rank=chosen.ranks.get(layer, chosen.rank), dim=outputs if side == "a" else inputs,
    )  # fmt: skip
    return sketch.draw(key).numpy().astype(np.float64)


def weights_of(parts):
    return [parts.chain.weights()[f"{layer}.weight"].numpy().copy() for layer in LAYERS]


def shares_of(parts, round):
    """Return the weight of each client of a round's cohort in the mean."""
    rows = parts.replica.data.partitions
    cohort = sample_cohort(parts.settings.seed, round, parts.problem.rounds)
    sizes = {client: 1 if parts.settings.weighting == "uniform" else len(rows[client]) for client in cohort}
    return {client: size / sum(sizes.values()) for client, size in sizes.items()}


def mean_gradients(parts, weights, shares):
    """Return sum p_k grad f_k for both layers, by back-propagation written in NumPy."""
    examples, base = parts.problem.dataset.train, parts.problem.new_chain().merged
    biases = [base[f"{layer}.bias"].numpy() if f"{layer}.bias" in base else np.zeros(len(weight))
              for layer, weight in zip(LAYERS, weights, strict=True)]  # fmt: skip
    total = [np.zeros_like(weight) for weight in weights]
    for client, share in shares.items():
        rows = parts.replica.data.partitions[client]
        inputs = examples.inputs[rows].numpy().reshape(len(rows), -1)
        found, _ = oracle.gradient(weights, biases, inputs, examples.targets[rows].numpy())
        for place, gradient in enumerate(found):
            total[place] += share * gradient
    return total


def replies_of(parts, round):
    """Return what each client of a round sent: its trained factors by key, float64."""
    link = parts.problem.method.open_link(round - 1, parts.problem.new_chain().merged)
    keys = parts.problem.method.trains(round, link).sent_factors({})
    shapes = [tuple(link.factors[key].shape) for key in keys]
    found = {}
    for way, part, message in parts.grid.seen:
        if way == "up" and message.metadata.group_id == str(round):
            flat = message.content.array_records["update"]["flat"].numpy()
            found[part] = {key: t.numpy() for key, t in zip(keys, unflatten(flat, shapes), strict=True)}
    return found


def right_projector(factor):
    """Return A^T (A A^T)^+ A, of one matrix or of each in a stack."""
    transposed = np.swapaxes(factor, -1, -2)
    return transposed @ np.linalg.pinv(factor @ transposed, hermitian=True) @ factor


def projected(gradient, factor, side):
    """Return G H_A, or H_B G where the drawn factor is B."""
    return right_projector(factor.T) @ gradient if side == "a" else gradient @ right_projector(factor)


def largest(matrix):
    return float(np.abs(matrix).max())


# ---- C1: H is a projector of rank r, and E[H] = (r / n) I


def rows_of(law, side, rank, dim, link):
    found = sketch.draw(SketchKey(law, 11, link, "fc1", side, rank, dim)).numpy().astype(np.float64)
    return found.T if side == "a" else found


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize(("rank", "dim"), [(1, 5), (3, 24), (6, 30)])
def test_c1_h_is_a_symmetric_idempotent_matrix_of_rank_r(law, side, rank, dim):
    for link in range(15):
        rows = rows_of(law, side, rank, dim, link)
        H = right_projector(rows)
        assert largest(H @ H - H) < 1e-12
        assert largest(H - H.T) < 1e-12
        assert np.linalg.matrix_rank(H) == rank
        assert abs(np.trace(H) - rank) < 1e-12
        np.testing.assert_allclose(rows @ H, rows, rtol=0, atol=1e-12)  # it keeps what the rows span
        if law in ORTHONORMAL:
            # A A^T = I up to the rounding of float32: then A^T A is H.
            np.testing.assert_allclose(rows.T @ rows, H, rtol=0, atol=4e-7)


def bernstein(rank, dim, num):
    """Return t with P(||mean of num H - (r / n) I|| > t) <= 1e-6, in the spectral norm, for independent H.

    Matrix Bernstein: H - E[H] has eigenvalues in [-r / n, 1 - r / n], so a norm of at most 1, and the variance
    E[H^2] - E[H]^2 = v I with v = (r / n)(1 - r / n). The probability is at most 2 n exp(-N t^2 / (2 v + 2 t / 3)).
    """
    v, log = rank / dim * (1 - rank / dim), np.log(2 * dim / 1e-6)
    return (log / 3 + np.sqrt((log / 3) ** 2 + 2 * num * v * log)) / num


def distance_from_isotropic(projectors):
    mean = projectors.mean(axis=0)
    share = np.trace(projectors[0]) / len(mean)
    return float(np.linalg.norm(mean - share * np.eye(len(mean)), ord=2))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("side", ["a", "b"])
def test_c1_the_mean_of_h_over_the_links_is_r_over_n_times_the_identity(law, side):
    """Links are independent but for `selector_without_replacement`, of which only the ceil(n / r) of a cycle are not.

    The variance of a cycle's mean is at most that of one link, so that for this law each cycle counts as one draw.
    Two of three rows of random signs are parallel with a probability of at most 6 / 2^16, which moves E[H] by 1e-5.
    """
    rank, dim, links = 3, 16, 1500
    projectors = right_projector(np.stack([rows_of(law, side, rank, dim, link) for link in range(links)]))
    num = links // 6 if law == "selector_without_replacement" else links
    assert distance_from_isotropic(projectors) < bernstein(rank, dim, num)
    assert bernstein(rank, dim, links) < 0.07 < rank / dim


def test_c1_the_tolerance_on_the_mean_of_h_tells_a_law_that_is_not_isotropic():
    """Entries uniform on (0, 1) are no centred law: their rows lean towards the vector of ones."""
    rng = np.random.default_rng(0)
    projectors = right_projector(rng.random((1500, 3, 16)))
    assert distance_from_isotropic(projectors) > 5 * bernstein(3, 16, 1500)


def test_c1_selectors_without_replacement_average_to_r_over_n_exactly_in_every_cycle():
    for cycle in range(5):
        links = range(4 * cycle, 4 * cycle + 4)
        projectors = [right_projector(rows_of("selector_without_replacement", "b", 3, 12, link)) for link in links]
        np.testing.assert_allclose(np.mean(projectors, axis=0), 3 / 12 * np.eye(12), rtol=0, atol=1e-15)


# ---- C2: the closed form of a link, and one step of a client


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("side", ["a", "b"])
def test_c2_the_closed_form_is_the_projected_gradient_and_minimises_the_quadratic_model_of_a_link(law, side):
    """B* = -gamma G A^T (A A^T)^+ is where <G, B A> + ||B A||^2 / (2 gamma) has no slope, and B* A = -gamma G H_A."""
    rng, gamma = np.random.default_rng(1), 0.7
    m, n, rank = (20, 9, 3) if side == "a" else (9, 20, 3)
    gradient = rng.standard_normal((m, n))
    frozen = rows_of(law, side, rank, 20, link=4).T if side == "a" else rows_of(law, side, rank, 20, link=4)
    if side == "b":
        best = -gamma * gradient @ frozen.T @ np.linalg.pinv(frozen @ frozen.T)
        step = best @ frozen
        slope = (gradient + step / gamma) @ frozen.T
    else:
        best = -gamma * np.linalg.pinv(frozen.T @ frozen) @ frozen.T @ gradient
        step = frozen @ best
        slope = frozen.T @ (gradient + step / gamma)
    np.testing.assert_allclose(step, -gamma * projected(gradient, frozen, side), rtol=0, atol=1e-12)
    assert largest(slope) < 1e-11 * largest(gradient)
    # The chain merges that very matrix.
    factors = (torch.from_numpy(best), torch.from_numpy(frozen))
    lora_a, lora_b = factors if side == "a" else factors[::-1]
    chain = Chain.start({"fc1.weight": torch.zeros(m, n, dtype=torch.float64)})
    chain.open_link(Link(0, (LowRank("fc1", 1.0, lora_a=lora_a, lora_b=lora_b),)))
    chain.close()
    np.testing.assert_allclose(
        chain.merged["fc1.weight"].numpy(), -gamma * projected(gradient, frozen, side), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_c2_one_step_of_one_client_merges_the_projected_step_with_gamma_lr_times_scale_squared(law, side, alpha):
    """With scale s = alpha / r the step on B is -lr s G A^T, and W gains s B A = -lr s^2 G A^T A.

    A^T A is H_A where A has orthonormal rows, exactly for selectors and up to the rounding of A to float32 otherwise.
    """
    scale, lr, rank = (1.0 if alpha is None else alpha / 2), 0.3, 2
    chosen = settings(
        **FULL_BATCH, num_clients=1, method=("rac_lora", {"side": side}), sketch=SketchSettings(law), alpha=alpha,
        rank=rank, lr=lr, rounds=3,
    )  # fmt: skip
    parts = federation(chosen)
    before = weights_of(parts)
    for report in parts.iterate():
        if report.round == 0:
            continue
        after = weights_of(parts)
        gradients = mean_gradients(parts, before, {0: 1.0})
        sent = replies_of(parts, report.round)[0]
        for place, layer in enumerate(LAYERS):
            drawn, gradient = drawn_factor(parts, report.round - 1, layer, side), gradients[place]
            gram = drawn @ drawn.T
            step = gram @ gradient if side == "a" else gradient @ (drawn.T @ drawn)
            size = largest(step)
            assert size > 1e-4, "a gradient of nothing"
            np.testing.assert_allclose(
                after[place] - before[place], -lr * scale**2 * step, rtol=0, atol=1e-13 + 1e-12 * size
            )
            best = drawn.T @ gradient if side == "a" else gradient @ drawn.T
            np.testing.assert_allclose(sent[f"{layer}.lora_{side}"], -lr * scale * best, rtol=0, atol=1e-13)
            if law in ORTHONORMAL:
                wanted = -lr * scale**2 * projected(gradient, drawn, side)
                rounding = 1e-14 if law.startswith("selector") else 1e-6 * largest(gradient) * lr * scale**2
                np.testing.assert_allclose(after[place] - before[place], wanted, rtol=0, atol=1e-14 + rounding)
        before = after


# ---- C3: with the full rank a chain is gradient descent


FULL_RANKS = {"b": {"fc1": 64, "fc2": 12}, "a": {"fc1": 12, "fc2": 10}}
# A permutation has A^T A = I exactly; the orthonormal factor is rounded to float32.
ROUNDING = {"selector": 1e-13, "sparse_sign": 1e-13, "orthonormal": 1e-6}


@pytest.mark.parametrize("law", ROUNDING)
@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize(
    "clients",
    [
        {"num_clients": 1},
        {"num_clients": 5},
        {"num_clients": 5, "weighting": "uniform"},
        {"num_clients": 6, "fraction": 0.5},
    ],
    ids=["one client", "weighted by examples", "weighted equally", "half a cohort"],
)
def test_c3_full_rank_with_one_step_a_round_is_gradient_descent_on_the_clients_weighted_mean(law, side, clients):
    """Frozen biases; the loss of a round is sum p_k f_k over its cohort, which for examples is that of their union."""
    chosen = settings(
        **FULL_BATCH | clients, method=("rac_lora", {"side": side}), sketch=SketchSettings(law),
        ranks=FULL_RANKS[side], lr=0.4, rounds=6,
    )  # fmt: skip
    parts = federation(chosen)
    weights = weights_of(parts)
    start = [weight.copy() for weight in weights]
    for report in parts.iterate():
        if report.round:
            gradients = mean_gradients(parts, weights, shares_of(parts, report.round))
            weights = [weight - 0.4 * gradient for weight, gradient in zip(weights, gradients, strict=True)]
            for found, expected in zip(weights_of(parts), weights, strict=True):
                np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING[law])
    assert all(largest(now - then) > 0.01 for now, then in zip(weights, start, strict=True))


@pytest.mark.parametrize("side", ["a", "b"])
def test_c3_full_rank_is_full_fine_tuning_without_biases_in_every_round(side):
    shared = {**FULL_BATCH, "model": ("mlp", {"hidden": [12], "bias": False}), "lr": 0.4, "rounds": 6}
    law = SketchSettings("selector")
    rac = federation(settings(**shared, method=("rac_lora", {"side": side}), sketch=law, ranks=FULL_RANKS[side]))
    full = federation(settings(**shared, method="full"))
    for _ in zip(rac.iterate(), full.iterate(), strict=True):
        assert relative_distance(rac.chain.weights(), full.chain.weights()) < 1e-14
    assert relative_distance(full.chain.weights(), full.problem.new_chain().weights()) > 0.01


# ---- C6: the rank of what was learnt


@pytest.mark.parametrize(
    ("outputs", "inputs", "rank", "side", "clients"),
    [(9, 12, 2, "b", 1), (9, 12, 2, "a", 1), (12, 9, 2, "b", 3), (6, 16, 1, "a", 2), (10, 10, 4, "b", 3)],
)
def test_c6_the_rank_of_the_update_after_t_links_is_min_m_n_tr(outputs, inputs, rank, side, clients):
    shape = {"num_inputs": inputs, "num_outputs": outputs, "condition": 4.0, "num_samples": 60, "noise": 0.5}
    chosen = settings(
        dataset=("quadratic", shape), model=("softmax_regression", {"bias": False}), partition="iid", dtype="float64",
        num_clients=clients, fraction=1.0, local_steps=3, batch_size=8, method=("rac_lora", {"side": side}), rank=rank,
        lr=0.1, rounds=7,
    )  # fmt: skip
    parts = federation(chosen)
    base, ranks = parts.chain.weights()["fc1.weight"].numpy().copy(), []
    for _ in parts.iterate():
        values = np.linalg.svd(parts.chain.weights()["fc1.weight"].numpy() - base, compute_uv=False)
        ranks.append(int((values > 1e-10 * max(values[0], 1e-3)).sum()))
    assert ranks == [min(outputs, inputs, t * rank) for t in range(8)]


# ---- C7: one shared factor makes the mean of the products the product of the mean


@given(
    seed=st.integers(0, 2**32 - 1),
    raw=st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=6).filter(any),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    scale=st.floats(0.05, 20),
)
@hypothesis_settings(deadline=None)
def test_c7_the_mean_factor_times_a_is_the_mean_of_the_products_whatever_the_weights(seed, raw, shape, scale):
    """The bound is that of sums of rounded products: each way errs by less than (K + r + 4) u a term of the sum."""
    m, n, rank = shape
    rng = np.random.default_rng(seed)
    frozen, base = rng.standard_normal((rank, n)), rng.standard_normal((m, n))
    own = {client: rng.standard_normal((m, rank)) for client in range(len(raw))}
    weights = dict(enumerate(raw))
    mean = weighted_mean({client: [torch.from_numpy(b)] for client, b in own.items()}, weights)[0]
    products = {client: [torch.from_numpy(b @ frozen)] for client, b in own.items()}
    shares = {client: weight / sum(raw) for client, weight in weights.items()}
    size = sum(share * np.abs(own[client]) @ np.abs(frozen) for client, share in shares.items())
    slack = 2 * (len(raw) + rank + 6) * np.finfo(np.float64).eps
    assert (np.abs(mean.numpy() @ frozen - weighted_mean(products, weights)[0].numpy()) <= slack * size).all()

    def merged(lora_b):
        chain = Chain.start({"fc1.weight": torch.from_numpy(base)})
        term = LowRank("fc1", scale, lora_a=torch.from_numpy(frozen), lora_b=lora_b)
        chain.open_link(Link(0, (term,)))
        chain.close()
        return chain.merged["fc1.weight"].numpy()

    expected = sum(share * merged(torch.from_numpy(own[client])) for client, share in shares.items())
    assert (np.abs(merged(mean) - expected) <= slack * (np.abs(base) + scale * size)).all()


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("own", [{}, {"weighting": "uniform"}, {"alpha": 7.0, "sketch": SketchSettings("raw")}])
def test_c7_a_round_merges_the_mean_of_what_each_client_alone_would_merge(side, own):
    """W^{t+1} = sum p_k (W^t + s B_k A^t), from the messages, for cohorts that are a part of the clients."""
    more = {"lr": 1e-3, **own} if own.get("alpha") else {"lr": 0.5, **own}
    parts = federation(settings(dtype="float64", method=("rac_lora", {"side": side}), rounds=4, **more))
    scale = 1.0 if parts.settings.alpha is None else parts.settings.alpha / parts.settings.rank
    before = weights_of(parts)
    for report in parts.iterate():
        if report.round == 0:
            continue
        after, shares, sent = weights_of(parts), shares_of(parts, report.round), replies_of(parts, report.round)
        assert sent.keys() == shares.keys()
        assert len(sent) == 3
        for place, layer in enumerate(LAYERS):
            drawn = drawn_factor(parts, report.round - 1, layer, side)
            trained = {client: factors[f"{layer}.lora_{side}"] for client, factors in sent.items()}
            alone = {client: drawn @ t if side == "a" else t @ drawn for client, t in trained.items()}
            expected = sum(shares[client] * (before[place] + scale * product) for client, product in alone.items())
            np.testing.assert_allclose(after[place], expected, rtol=0, atol=1e-14 * (1 + largest(expected)))
            assert largest(after[place] - before[place]) > 1e-4
        before = after


# ---- C8: what averaging both factors gets wrong


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_c8_the_error_of_fed_it_is_the_covariance_of_the_clients_factors(weighting):
    """sum p_k B_k A_k - Bbar Abar = sum p_k (B_k - Bbar)(A_k - Abar), of rank (K - 1) r at most and here just that."""
    chosen = settings(dtype="float64", method="fed_it", weighting=weighting, alpha=3.0, lr=0.3, verify=True)
    parts = federation(chosen)
    base = weights_of(parts)
    before = base
    for report in parts.iterate():
        if report.round == 0:
            continue
        after, shares = weights_of(parts), shares_of(parts, report.round)
        sent = replies_of(parts, report.round)
        assert len(sent) == 3
        wrong, change = 0.0, 0.0
        for place, layer in enumerate(LAYERS):
            B, A = ({k: own[f"{layer}.lora_{side}"] for k, own in sent.items()} for side in "ba")
            B_mean, A_mean = (sum(p * factor[k] for k, p in shares.items()) for factor in (B, A))
            exact = base[place] + 1.5 * sum(p * B[k] @ A[k] for k, p in shares.items())
            error = exact - after[place]
            covariance = 1.5 * sum(p * (B[k] - B_mean) @ (A[k] - A_mean) for k, p in shares.items())
            size = largest(covariance)
            assert size > 1e-5, "factors that do not differ"
            np.testing.assert_allclose(error, covariance, rtol=0, atol=1e-13)
            assert np.linalg.matrix_rank(error, tol=1e-9 * size) == (len(sent) - 1) * chosen.rank
            wrong += float(np.square(covariance).sum())
            change += float(np.square(exact - before[place]).sum())
        assert report.aggregation_gap == pytest.approx((wrong / change) ** 0.5, rel=1e-10)
        before = after


def test_c8_one_client_has_no_such_error():
    parts = federation(settings(dtype="float64", method="fed_it", lr=0.3, fraction=1 / 6, verify=True))
    assert max(report.aggregation_gap for report in parts.run()[1:]) < 1e-13


# ---- C12: closing a link and opening the next one changes no loss


def merged_loss(parts, weights):
    """Return the loss on the training examples as the server evaluates it, of the merged weights."""
    parts.problem.model.load_state_dict(weights, strict=False)
    return evaluate(parts.problem.model, parts.problem.dataset.train, parts.problem.dataset.task)[0]


def adapted_loss(parts, merged, link):
    """Return the loss that a client computes on all examples, beside the frozen weights and the link's factors.

    A client reports the mean loss over its steps, before each step; so that of one step is the loss at the start.
    """
    chain = Chain.start(merged)
    link = replace(link.of_client(0), index=0)
    chain.open_link(link)
    replica = parts.problem.replica(chain, ClientStore())
    trainer, start = replica.prepare(RoundPlan(round=1, training=Training(dict.fromkeys(link.low_rank_terms(), "ab"))))
    everyone = LocalClient(np.arange(len(parts.problem.dataset.train)), seed=0)
    return next(train_cohort(trainer, start, [everyone], LocalConfig(steps=1, batch_size=10_000))).loss


def watch_closings(parts, monkeypatch):
    """Return a list that gets the loss and the weights of each version whose link the server closes, checked there."""
    close, closed = Chain.close, []

    def watched_close(chain, **options):
        if chain is not parts.chain:
            close(chain, **options)
            return
        link, weights = chain.open, chain.weights()
        losses = [merged_loss(parts, weights)]
        if link.low_rank_terms():
            losses.append(adapted_loss(parts, chain.merged, link))
        close(chain, **options)
        losses.append(merged_loss(parts, chain.weights()))
        np.testing.assert_allclose(losses, losses[0], rtol=1e-12)
        assert same_weights(chain.weights(), weights), "merging rounds otherwise than evaluating"
        closed.append((losses[0], weights))

    monkeypatch.setattr(Chain, "close", watched_close)
    return closed


C12_CASES = {name: name for name in METHODS} | {
    "rac_lora, side a": ("rac_lora", {"side": "a"}),
    "rac_lora, two rounds a link": ("rac_lora", {"rounds_per_link": 2}),
    "chain_of_lora, B drawn": ("chain_of_lora", {"zero": "a"}),
}


@pytest.mark.parametrize("case", C12_CASES)
def test_c12_the_loss_is_the_same_before_a_link_is_closed_and_after_the_next_one_is_opened(case, monkeypatch):
    """By the loss of the merged weights and by the clients' own one, beside the factors.

    Where a method closes a link for good beside one that goes on with other factors, only the closing is watched.
    """
    parts = federation(settings(dtype="float64", method=C12_CASES[case], alpha=3.0))
    closed = watch_closings(parts, monkeypatch)
    merges, losses = parts.problem.method.traits.merges, [merged_loss(parts, parts.chain.weights())]
    for report in parts.iterate():
        if report.round == 0 or not merges:
            continue
        was_closed = parts.chain.num_links == report.round
        loss, weights = closed[-1] if was_closed else (losses[-1], parts.chain.weights())
        opened = parts.strategy._open_link()
        found = [merged_loss(parts, parts.chain.weights()), adapted_loss(parts, parts.chain.merged, opened)]
        if was_closed:
            found += [loss, merged_loss(parts, parts.chain.merged)]
        np.testing.assert_allclose(found, found[0], rtol=1e-12)
        assert relative_distance(parts.chain.weights(), weights) < 1e-15
        losses.append(found[0])
    assert len(closed) == parts.chain.num_links
    if merges:
        assert len(closed) == (1 if "two rounds" in case else 3)
        assert abs(losses[-1] - losses[0]) > 1e-3, "nothing was trained"


# ---- C13: one seed, one factor


class AppsSeen(AppsGrid, RecordingGrid):
    """Clients with replicas of their own, and what they sent."""


def stated_sketches(parts):
    """Return the digests of the drawn factors that the clients stated, by round."""
    found = {}
    for way, part, message in parts.grid.seen:
        if way == "up" and "reply" in message.content.config_records:
            digests = found.setdefault(int(message.metadata.group_id), {})
            digests[part] = message.content.config_records["reply"]["sketches"]
    return found


def with_replicas(chosen):
    parts = federation(chosen)
    parts.grid = AppsSeen(parts.problem, chosen)
    return parts


def wide(law, **more):
    # Both layers have 64 inputs, so that a draw keyed by the shape alone would be the same for both.
    return settings(
        model=("mlp", {"hidden": [64]}), num_clients=3, fraction=1.0, rounds=3, sketch=SketchSettings(law), rank=3,
        local_steps=1, **more,
    )  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
def test_c13_every_client_draws_the_factors_of_the_seed_and_of_no_other_link_layer_or_seed(law):
    parts, other = with_replicas(wide(law)), with_replicas(wide(law, seed=1))
    parts.run()
    other.run()
    found, digests = stated_sketches(parts), set()
    assert found.keys() == {1, 2, 3}
    for round, stated in found.items():
        drawn = {f"{layer}.lora_a": drawn_factor(parts, round - 1, layer, "b") for layer in LAYERS}
        expected = sketch.digest_all({name: torch.from_numpy(a).float() for name, a in drawn.items()})
        assert stated == dict.fromkeys(range(3), expected)
        assert not np.array_equal(drawn["fc1.lora_a"], drawn["fc2.lora_a"])
        digests |= {expected, *stated_sketches(other)[round].values()}
    assert len(digests) == 6, "another link and another seed are other factors"
    # What they state is what they train beside: each holds the factor itself.
    links = [replica.chain.open or replica.chain.links[-1] for replica in parts.grid.replicas]
    assert len({id(link) for link in links}) == 3
    for link in links:
        for layer in LAYERS:
            held = link.drawn_factors[f"{layer}.lora_a"].numpy()
            np.testing.assert_array_equal(held, drawn_factor(parts, 2, layer, "b"))


@pytest.mark.parametrize("side", ["a", "b"])
def test_c13_clients_in_processes_of_their_own_draw_alike_and_no_message_holds_the_factor(side, tmp_path):
    chosen = wide("orthonormal", method=("rac_lora", {"side": side}))
    parts = federation(chosen, grid=nodes_grid(tmp_path))
    parts.run()
    name = {"a": "lora_b", "b": "lora_a"}[side]
    for round, stated in stated_sketches(parts).items():
        drawn = {f"{layer}.{name}": drawn_factor(parts, round - 1, layer, side) for layer in LAYERS}
        expected = sketch.digest_all({key: torch.from_numpy(a).float() for key, a in drawn.items()})
        assert stated == dict.fromkeys(range(3), expected)
        sent = [
            array.numpy().tobytes()
            for way, _, message in parts.grid.seen
            if way == "down" and message.metadata.group_id == str(round)
            for record in message.content.array_records.values()
            for array in record.values()
        ]
        numbers = [factor.astype(np.float32).tobytes() for factor in drawn.values()]
        assert not any(number in array for number in numbers for array in sent)
