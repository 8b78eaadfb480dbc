"""The oracle against itself: identities between the methods' rules, and derivatives against differences."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance import oracle

SIZES = (6, 5, 7, 4)
RANK = 2
CLIENTS = {0: 10, 1: 30, 2: 25}
EVERYONE = tuple(CLIENTS)
SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=5)


def orthonormal_rows(rows, dim, *key):
    return np.linalg.qr(np.random.default_rng(key).normal(size=(dim, rows)))[0].T


def described(seed=0, *, rounds=2, cohort=EVERYONE, steps=3, rank=RANK):
    """Return a run on a random perceptron with random data; a rank of None is the whole of each layer."""
    rng = np.random.default_rng(seed)
    shapes = [(out, n) for n, out in pairwise(SIZES)]

    def draw(link, layer, trained, client=99):
        out, n = shapes[layer]
        rows = rank or (out if trained == "a" else n)
        if trained == "a":
            return orthonormal_rows(rows, out, seed, link, layer, client, 1).T
        return orthonormal_rows(rows, n, seed, link, layer, client, 0)

    def batches(round, client):
        own = np.random.default_rng([seed, round, client])
        for _ in range(steps):
            yield own.normal(size=(7, SIZES[0])) + 0.3 * client, own.integers(SIZES[-1], size=7)

    return oracle.Run(
        weights=[0.6 * rng.normal(size=shape) for shape in shapes], biases=[rng.normal(size=out) for out, _ in shapes],
        cohorts=[cohort] * rounds, batches=batches, sizes=CLIENTS, lr=0.2, scale=1.7, draw=draw,
    )  # fmt: skip


def loss(weights, biases, inputs, labels):
    for depth, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        outputs = inputs @ weight.T + bias
        inputs = np.maximum(outputs, 0) if depth < len(weights) else outputs
    return np.mean(np.log(np.exp(inputs).sum(axis=1)) - inputs[np.arange(len(labels)), labels])


def close(found, expected, atol=1e-12):
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=atol)


def differ(found, expected):
    return max(np.abs(mine - theirs).max() for mine, theirs in zip(found, expected, strict=True)) > 1e-4


def first_gradients(run, client):
    """Return the first round's first gradients of a client by the weights."""
    return oracle.gradient(run.weights, run.biases, *next(iter(run.batches(1, client))))[0]


def share(client):
    return CLIENTS[client] / sum(CLIENTS.values())


def one_subspace(run):
    """Return the arguments with which FedKRSO has the one subspace that RAC-LoRA draws."""
    return {
        "subspaces": lambda link, layer: [run.draw(link, layer, "b")],
        "orders": lambda round, client: [0],
        "block_steps": 1,
    }


def two_subspaces(run):
    return {
        "subspaces": lambda link, layer: [run.draw(link, layer, "b", client) for client in (7, 8)],
        "orders": lambda round, client: [(round + client) % 2, 1 - (round + client) % 2],
        "block_steps": 2,
    }


def sides_of(link, layer):
    return "ab"[(link + layer) % 2]


# Every rule, with what it needs; the first group's rounds end in the exact mean of the clients' models.
EXACT = {
    "full": oracle.full,
    "rac_lora": oracle.rac_lora,
    "rac_lora, side a": partial(oracle.rac_lora, side="a"),
    "rac_lora, private": lambda run: oracle.rac_lora(run, private=run.draw),
    "rac_lora, unlike ranks": lambda run: oracle.rac_lora(replace(run, ranks={0: 1}, scales={0: 3.4})),
    "rac_lora, longer links": partial(oracle.chain, trained="b", length=2),
    "bernoulli_lora": partial(oracle.bernoulli_lora, sides=sides_of),
    "ffa_lora": oracle.ffa_lora,
    "flora": oracle.flora,
    "flora, private": lambda run: oracle.flora(run, private=run.draw),
    "fedex_lora": oracle.fedex_lora,
    "ro_lora": oracle.ro_lora,
    "fed_sb_random": oracle.fed_sb_random,
    "sketched_full": oracle.sketched_full,
    "fed_krso": lambda run: oracle.fed_krso(run, **two_subspaces(run)),
    "fed_slop": partial(oracle.fed_slop, momentum=0.9),
    "fed_slop, factor": partial(oracle.fed_slop, momentum=0.9, carried=False, upload="factor"),
}
INEXACT = {
    "fed_it": oracle.fed_it,
    "chain_of_lora": oracle.chain_of_lora,
    "flexlora": oracle.flexlora,
    "het_lora": oracle.het_lora,
    "lora_fair": partial(oracle.lora_fair, ridge=0.01),
    "fr_lora": partial(oracle.fr_lora, rank=RANK),
    "fedex_lora, truncated": partial(oracle.fedex_lora, residual_rank=1),
    "rac_lora, rows": lambda run: oracle.rac_lora_rows(replace(run, ranks={0: 1}, scales={0: 3.4})),
}
ALL = {**EXACT, **INEXACT, "fed_sb": partial(oracle.fed_sb, rank=RANK)}
FROZEN = [name for name in ALL if name != "full" and not name.startswith("fed_slop")]


# The calculus.


@few
@given(SEEDS)
def test_gradients_are_the_slopes_of_the_loss(seed):
    run = described(seed)
    inputs, labels = next(iter(run.batches(1, 0)))
    by_weight, by_bias = oracle.gradient(run.weights, run.biases, inputs, labels)
    ways = described(seed + 1)
    ways = ways.weights + ways.biases
    there, back = (
        [array + sign * 1e-6 * way for array, way in zip(run.weights + run.biases, ways, strict=True)]
        for sign in (1, -1)
    )
    values = [loss(ends[:3], ends[3:], inputs, labels) for ends in (there, back)]
    slope = sum(np.vdot(g, way) for g, way in zip(by_weight + by_bias, ways, strict=True))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("names", [("b", "a"), ("b", "r", "a")])
def test_a_step_on_each_factor_goes_down_the_slope_of_the_loss(names):
    run = replace(described(steps=1), lr=1.0)
    rng = np.random.default_rng(5)
    ends = {"b": lambda w: (w.shape[0], RANK), "r": lambda w: (RANK, RANK), "a": lambda w: (RANK, w.shape[1])}
    factors = [{name: rng.normal(size=ends[name](weight)) for name in names} for weight in run.weights]
    inputs, labels = next(iter(run.batches(1, 0)))

    def value():
        return loss(oracle.effective(run.weights, factors, run.scale), run.biases, inputs, labels)

    for name in names:
        moved = run.train_factors((1, 0), run.weights, factors, [name] * len(factors))
        for layer, end in zip(factors, moved, strict=True):
            assert all(np.array_equal(layer[other], end[other]) for other in names if other != name)
            keep, way = layer[name], rng.normal(size=layer[name].shape)
            layer[name] = keep + 1e-6 * way
            above = value()
            layer[name] = keep - 1e-6 * way
            slope = (above - value()) / 2e-6
            layer[name] = keep
            assert slope == pytest.approx(np.vdot(keep - end[name], way), rel=1e-4, abs=1e-7)


# Laws of all rules.


@pytest.mark.parametrize("name", ALL)
def test_a_learning_rate_of_zero_changes_nothing(name):
    run = replace(described(), lr=0.0)
    weights, biases = ALL[name](run)
    close(weights + biases, run.weights + run.biases)


@pytest.mark.parametrize("name", ALL)
def test_every_rule_moves_every_weight_and_leaves_its_run_alone(name):
    run = described()
    before = [array.copy() for array in run.weights + run.biases]
    weights, _ = ALL[name](run)
    assert all(np.abs(mine - start).max() > 1e-3 for mine, start in zip(weights, run.weights, strict=True))
    close(run.weights + run.biases, before, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_the_clients_does_not_matter(name):
    weights, biases = ALL[name](described())
    others, their_biases = ALL[name](described(cohort=EVERYONE[::-1]))
    close(weights + biases, others + their_biases)


@pytest.mark.parametrize("name", FROZEN)
def test_biases_stay_in_low_rank_methods(name):
    run = described()
    close(ALL[name](run)[1], run.biases, atol=0)


def solo_means(rule, run):
    """Return the mean of the models of which each has one client alone in the last round."""
    ends = {}
    for client in EVERYONE:
        weights, biases = rule(replace(run, cohorts=[*run.cohorts[:-1], (client,)]))
        ends[client] = weights + biases
    return oracle.mean(ends, {client: share(client) for client in EVERYONE})


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=3)
@given(seed=SEEDS, rounds=st.integers(1, 3))
def test_a_round_of_an_exact_rule_ends_in_the_mean_of_the_models_of_single_clients(name, seed, rounds):
    run = described(seed, rounds=rounds)
    weights, biases = EXACT[name](run)
    close(weights + biases, solo_means(EXACT[name], run), atol=1e-10)


def test_fed_sb_is_exact_after_its_first_round():
    run = described(rounds=3)
    weights, biases = ALL["fed_sb"](run)
    close(weights + biases, solo_means(ALL["fed_sb"], run))


@pytest.mark.parametrize("name", INEXACT)
def test_a_round_of_an_inexact_rule_does_not(name):
    run = described()
    weights, biases = INEXACT[name](run)
    assert differ(weights + biases, solo_means(INEXACT[name], run))


# RAC-LoRA and its relatives.


@pytest.mark.parametrize("side", ["a", "b"])
def test_rac_lora_by_full_weights_is_rac_lora_by_averaged_factors(side):
    run = described(rounds=3)
    close(oracle.rac_lora(run, side)[0], oracle.chain(run, side, 1)[0])


@pytest.mark.parametrize("side", ["a", "b"])
def test_one_step_of_rac_lora_is_a_projected_gradient_step(side):
    """W - lr s^2 G A^T A, or W - lr s^2 B B^T G, with the mean G."""
    run = described(rounds=1, steps=1)
    weights, _ = oracle.rac_lora(run, side)
    for layer, start in enumerate(run.weights):
        drawn = run.draw(0, layer, side)
        slope = sum(share(client) * first_gradients(run, client)[layer] for client in EVERYONE)
        step = drawn @ drawn.T @ slope if side == "a" else slope @ drawn.T @ drawn
        np.testing.assert_allclose(weights[layer], start - run.lr * run.scale**2 * step, atol=1e-12)


def test_bernoulli_lora_whose_coins_all_fall_alike_is_rac_lora():
    run = described()
    for side in "ab":
        close(oracle.bernoulli_lora(run, lambda link, layer, side=side: side)[0], oracle.rac_lora(run, side)[0])


def test_coins_of_bernoulli_lora_choose_the_side_of_each_layer():
    run = described(rounds=1, steps=1)
    weights, _ = oracle.bernoulli_lora(run, lambda link, layer: "aba"[layer])
    close(weights[::2], oracle.rac_lora(run, "a")[0][::2])
    close(weights[1:2], oracle.rac_lora(run, "b")[0][1:2])


@pytest.mark.parametrize("rule", [oracle.rac_lora, oracle.flora])
def test_private_draws_that_agree_are_a_shared_draw(rule):
    run = described()
    close(rule(run, private=lambda link, layer, trained, _: run.draw(link, layer, trained))[0], rule(run)[0])
    assert differ(rule(run, private=run.draw)[0], rule(run)[0])


@pytest.mark.parametrize("side", ["a", "b"])
def test_a_private_draw_projects_its_clients_gradient(side):
    run = described(rounds=1, steps=1)
    weights, _ = oracle.rac_lora(run, side, private=run.draw)
    for layer, start in enumerate(run.weights):
        step = np.zeros_like(start)
        for client in EVERYONE:
            mine, slope = run.draw(0, layer, side, client), share(client) * first_gradients(run, client)[layer]
            step += mine @ mine.T @ slope if side == "a" else slope @ mine.T @ mine
        np.testing.assert_allclose(weights[layer], start - run.lr * run.scale**2 * step, atol=1e-12)


@pytest.mark.parametrize("side", ["a", "b"])
def test_unlike_ranks_are_projections_on_fewer_components_under_scales_of_their_own(side):
    run = replace(described(rounds=1, steps=1), ranks={0: 1}, scales={0: 3.4})
    weights, _ = oracle.rac_lora(run, side)
    for layer, start in enumerate(run.weights):
        drawn, step = run.draw(0, layer, side), np.zeros_like(start)
        for client in EVERYONE:
            mine = drawn if client else (drawn[:, :1] if side == "a" else drawn[:1])
            slope = share(client) * run.scale_of(client) ** 2 * first_gradients(run, client)[layer]
            step += mine @ mine.T @ slope if side == "a" else slope @ mine.T @ mine
        np.testing.assert_allclose(weights[layer], start - run.lr * step, atol=1e-12)


@pytest.mark.parametrize("side", ["a", "b"])
def test_contributors_by_rows_of_clients_of_one_rank_are_rac_lora(side):
    run = described()
    close(oracle.rac_lora_rows(run, side)[0], oracle.rac_lora(run, side)[0])


@pytest.mark.parametrize("side", ["a", "b"])
def test_rows_that_one_client_trains_are_that_clients(side):
    """Component 0 is the mean of clients 0 and 1, component 1 is client 1's alone."""
    run = replace(described(rounds=1, steps=1, cohort=(0, 1)), ranks={0: 1}, scales={0: 3.4})
    weights, _ = oracle.rac_lora_rows(run, side)
    for layer, start in enumerate(run.weights):
        drawn, step = run.draw(0, layer, side), np.zeros_like(start)
        for j, parts in enumerate([{0: 10 / 40, 1: 30 / 40}, {1: 1.0}]):
            slope = sum(p * run.scale_of(k) ** 2 * first_gradients(run, k)[layer] for k, p in parts.items())
            one = drawn[:, j : j + 1] if side == "a" else drawn[j : j + 1]
            step += one @ one.T @ slope if side == "a" else slope @ one.T @ one
        np.testing.assert_allclose(weights[layer], start - run.lr * step, atol=1e-12)


def test_one_plain_step_of_sketched_full_is_one_of_rac_lora_and_fed_slop():
    """With orthonormal rows and s = 1; the biases of FedSLoP have not moved when the gradient is taken."""
    run = replace(described(rounds=1, steps=1), scale=1.0)
    weights, _ = oracle.rac_lora(run)
    close(oracle.sketched_full(run)[0], weights)
    close(oracle.fed_slop(run, 0.0)[0], weights)


def test_ffa_lora_never_leaves_the_rows_of_its_first_sketch():
    run = described(rounds=3)
    for layer, (start, end) in enumerate(zip(run.weights, oracle.ffa_lora(run)[0], strict=True)):
        A = run.draw(0, layer, "b")
        np.testing.assert_allclose((end - start) @ A.T @ A, end - start, atol=1e-12)


def test_a_link_of_chain_of_lora_is_a_fed_it_of_its_own_on_what_came_before():
    run = described(rounds=4)
    half = replace(run, cohorts=run.cohorts[:2])
    second = replace(
        half,
        weights=oracle.fed_it(half)[0],
        draw=lambda link, layer, trained: run.draw(link + 1, layer, trained),
        batches=lambda round, client: run.batches(round + 2, client),
    )
    close(oracle.chain_of_lora(run, 2)[0], oracle.fed_it(second)[0])


def test_several_steps_of_sketched_full_leave_the_subspace_that_rac_lora_trains_in():
    run = replace(described(rounds=1), scale=1.0)
    assert differ(oracle.sketched_full(run)[0], oracle.rac_lora(run)[0])


def test_sketched_full_depends_on_the_rows_of_its_sketch_only():
    run = described()
    mixed = replace(run, draw=lambda *key: np.array([[2.0, 1.0], [0.5, -1.0]]) @ run.draw(*key), scale=0.3)
    close(oracle.sketched_full(mixed)[0], oracle.sketched_full(run)[0])


def test_fed_krso_of_one_seed_is_rac_lora():
    run = described(rounds=3)
    close(oracle.fed_krso(run, **one_subspace(run))[0], oracle.rac_lora(run)[0])


@pytest.mark.parametrize("block_steps", [1, 2, 5])
def test_fed_krso_whose_seeds_agree_is_rac_lora(block_steps):
    run = described()
    same = {**two_subspaces(run), "subspaces": lambda link, layer: [run.draw(link, layer, "b")] * 2}
    close(oracle.fed_krso(run, **{**same, "block_steps": block_steps})[0], oracle.rac_lora(run)[0])


def test_fed_krso_sends_what_its_accumulators_add_up_to():
    """The published form: B_j on top of all that the client has trained, W + s sum_j mean(B_kj) A_j."""
    run = described(rounds=1, steps=5)
    own = two_subspaces(run)
    blocks = [own["subspaces"](0, layer) for layer in range(len(run.weights))]
    expected = [weight.copy() for weight in run.weights]
    for client in EVERYONE:
        sums = [[np.zeros((w.shape[0], RANK)) for _ in range(2)] for w in run.weights]
        for step, (inputs, labels) in enumerate(run.batches(1, client)):
            now = [
                w + run.scale * sum(b @ a for b, a in zip(B, A, strict=True))
                for w, B, A in zip(run.weights, sums, blocks, strict=True)
            ]
            block = own["orders"](1, client)[step // 2 % 2]
            for B, A, g in zip(sums, blocks, oracle.gradient(now, run.biases, inputs, labels)[0], strict=True):
                B[block] = B[block] - run.lr * run.scale * g @ A[block].T
        for layer, (B, A) in enumerate(zip(sums, blocks, strict=True)):
            expected[layer] += share(client) * run.scale * sum(b @ a for b, a in zip(B, A, strict=True))
    close(oracle.fed_krso(run, **own)[0], expected)


# FedSLoP.


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_factor_of_fed_slop_loses_nothing_where_moments_are_reset(momentum):
    run = described(rounds=3)
    weights, biases = oracle.fed_slop(run, momentum, carried=False, upload="factor")
    others, their_biases = oracle.fed_slop(run, momentum, carried=False)
    close(weights + biases, others + their_biases)


def test_a_factor_of_fed_slop_would_lose_what_moments_carry_from_the_last_subspace():
    run = described(rounds=2)
    assert differ(oracle.fed_slop(run, 0.9, upload="factor")[0], oracle.fed_slop(run, 0.9)[0])


def test_fed_slop_of_the_whole_space_without_momentum_is_fed_avg():
    run = described(rank=None)
    weights, biases = oracle.fed_slop(run, 0.0)
    others, their_biases = oracle.full(run)
    close(weights + biases, others + their_biases)


def test_momentum_of_fed_slop_is_a_heavy_ball():
    """Two small steps on one batch go (1 + (1 + momentum)) lr g far."""
    run = replace(described(rounds=1, rank=None, cohort=(1,)), lr=1e-7)
    again = replace(run, batches=lambda round, client: [next(iter(run.batches(1, 1)))] * 2)
    weights, biases = oracle.fed_slop(again, 0.9)
    by_weight, by_bias = oracle.gradient(run.weights, run.biases, *next(iter(run.batches(1, 1))))
    moved = zip(run.weights + run.biases, weights + biases, strict=True)
    close([(start - end) / run.lr for start, end in moved], [2.9 * g for g in by_weight + by_bias], atol=1e-5)


def test_moments_of_fed_slop_are_carried_into_the_next_round_of_the_same_client():
    """One client, one subspace for good: two rounds of three steps are one round of six."""
    run = described(cohort=(1,), rounds=2)
    fixed = replace(run, draw=lambda link, layer, trained: run.draw(0, layer, trained))
    steps = [*run.batches(1, 1), *run.batches(2, 1)]
    long = replace(fixed, cohorts=[(1,)], batches=lambda round, client: steps)
    weights, biases = oracle.fed_slop(fixed, 0.9)
    others, their_biases = oracle.fed_slop(long, 0.9)
    close(weights + biases, others + their_biases)
    assert differ(oracle.fed_slop(fixed, 0.9, carried=False)[0], others)


def test_moments_of_fed_slop_wait_for_a_client_that_sits_out():
    run = described()
    waited = replace(run, cohorts=[(0,), (1,), (0,)])
    assert differ(oracle.fed_slop(waited, 0.9)[0], oracle.fed_slop(waited, 0.9, carried=False)[0])
    once = replace(run, cohorts=[(0,), (1,)])
    close(oracle.fed_slop(once, 0.9)[0], oracle.fed_slop(once, 0.9, carried=False)[0])


# Methods of one open pair.


def test_fedex_lora_after_one_round_is_flora_from_a_common_start():
    run = described(rounds=1)
    close(oracle.fedex_lora(run)[0], oracle.flora(run)[0])


def test_fedex_lora_without_its_residual_is_fed_it():
    run = described(rounds=3)
    close(oracle.fedex_lora(run, residual_rank=0)[0], oracle.fed_it(run)[0])


def test_a_residual_of_fedex_lora_has_the_rank_of_all_clients_but_one():
    run = described(rounds=3, cohort=(0, 1))
    close(oracle.fedex_lora(run, residual_rank=RANK)[0], oracle.fedex_lora(run)[0])
    assert differ(oracle.fedex_lora(run, residual_rank=RANK - 1)[0], oracle.fedex_lora(run)[0])


@pytest.mark.parametrize(
    "rule",
    [oracle.fedex_lora, oracle.flexlora, oracle.het_lora, partial(oracle.lora_fair, ridge=0.1)],
    ids=["fedex_lora", "flexlora", "het_lora", "lora_fair"],
)
def test_a_single_client_is_served_as_by_fed_it(rule):
    run = described(rounds=1, cohort=(2,))
    close(rule(run)[0], oracle.fed_it(run)[0], atol=1e-10)


@pytest.mark.parametrize(
    "rule",
    [oracle.fedex_lora, oracle.het_lora, partial(oracle.lora_fair, ridge=0.1)],
    ids=["fedex_lora", "het_lora", "lora_fair"],
)
def test_a_single_client_may_go_on_for_rounds(rule):
    """FlexLoRA is not among them: it hands the same product back as another pair, which trains otherwise."""
    run = described(rounds=3, cohort=(2,))
    close(rule(run)[0], oracle.fed_it(run)[0], atol=1e-10)


def test_flexlora_of_the_full_rank_is_the_exact_mean():
    run = described(rounds=1, rank=None)
    close(oracle.flexlora(run)[0], oracle.flora(run)[0])


@pytest.mark.parametrize(("ranks", "scales"), [({}, {}), ({0: 1}, {0: 3.4})])
def test_flexlora_keeps_the_best_approximation_of_the_mean_product(ranks, scales):
    """No pair of its rank is nearer: the distance is the norm of the singular values that are left out."""
    run = replace(described(rounds=1), ranks=ranks, scales=scales)
    exact, found = oracle.flora(run)[0], oracle.flexlora(run)[0]
    for start, mean, kept in zip(run.weights, exact, found, strict=True):
        left_out = np.linalg.svd(mean - start, compute_uv=False)[RANK:]
        assert np.linalg.matrix_rank(kept - start, tol=1e-10) == RANK
        assert np.linalg.norm(mean - kept) == pytest.approx(np.linalg.norm(left_out), rel=1e-9)


@pytest.mark.parametrize("rule", [oracle.flexlora, oracle.het_lora])
def test_a_view_of_the_full_rank_under_another_scale_is_the_same_function(rule):
    run = replace(described(), scales={0: 3.4, 1: 0.9})
    pairs = [oracle.balanced(weight, RANK, run.scale) for weight in run.weights]
    for client in EVERYONE:
        seen = oracle.effective(run.weights, run.view(client, pairs), run.scale_of(client))
        close(seen, oracle.effective(run.weights, pairs, run.scale))


def test_a_view_of_a_smaller_rank_has_the_first_components():
    run = replace(described(), ranks={0: 1}, scales={0: 3.4})
    (first, *_), weight = run.view(0, [oracle.balanced(w, RANK, run.scale) for w in run.weights]), run.weights[0]
    np.testing.assert_allclose(3.4 * oracle.product(first), oracle.best_approximation(weight, 1), atol=1e-12)


def test_het_lora_weighs_clients_by_the_norms_of_their_products_and_not_by_their_examples():
    run = described()
    close(oracle.het_lora(replace(run, sizes={0: 1, 1: 500, 2: 3}))[0], oracle.het_lora(run)[0])


def test_het_lora_of_unlike_ranks_averages_padded_factors():
    run = replace(described(rounds=1, cohort=(0, 1)), ranks={0: 1}, scales={0: 3.4})
    ends = {}
    for client in (0, 1):
        start = run.cut(client, run.start(0, "ab"))
        ends[client] = run.train_factors((1, client), run.weights, start, ["ab"] * 3)
    for layer, found in enumerate(oracle.het_lora(run)[0]):
        small, large = (ends[client][layer] for client in (0, 1))
        norms = 3.4 * np.linalg.norm(small["b"] @ small["a"]), 1.7 * np.linalg.norm(large["b"] @ large["a"])
        q = np.array(norms) / sum(norms)
        padded_a = np.vstack([small["a"], np.zeros_like(small["a"])])
        padded_b = np.hstack([small["b"] * 3.4 / 1.7, np.zeros_like(small["b"])])
        step = (q[0] * padded_b + q[1] * large["b"]) @ (q[0] * padded_a + q[1] * large["a"])
        np.testing.assert_allclose(found, run.weights[layer] + 1.7 * step, atol=1e-12)


def test_the_first_round_of_ro_lora_is_ffa_lora_and_the_second_moves_along_the_columns_of_b():
    run = described(rounds=1)
    first = oracle.ro_lora(run)[0]
    close(first, oracle.ffa_lora(run)[0])
    second = oracle.ro_lora(replace(run, cohorts=run.cohorts * 2))[0]
    for start, one, two in zip(run.weights, first, second, strict=True):
        columns = np.linalg.svd(one - start)[0][:, :RANK]
        np.testing.assert_allclose(columns @ columns.T @ (two - one), two - one, atol=1e-12)
        assert np.abs(two - one).max() > 1e-3


def test_fed_sa_lora_of_one_client_is_fed_it():
    run = described(rounds=3, cohort=(1,))
    common, own = oracle.fed_sa_lora(run)
    pairs = [{"b": b, "a": a} for b, a in zip(own[1], common, strict=True)]
    close(oracle.effective(run.weights, pairs, run.scale), oracle.fed_it(run)[0])


def test_fed_sa_lora_leaves_the_b_of_a_client_that_sits_out():
    run = replace(described(), cohorts=[(0, 1), (1, 2)])
    _, first = oracle.fed_sa_lora(replace(run, cohorts=[(0, 1)]))
    _, own = oracle.fed_sa_lora(run)
    assert set(own) == {0, 1, 2}
    close(own[0], first[0], atol=0)
    assert differ(own[1], first[1])


def test_fed_sb_of_the_full_rank_starts_from_the_mean_of_full_training():
    """As sketched_full with a square sketch: the weights in full, the biases as they were."""
    run = described(rounds=1)
    close(oracle.fed_sb(run, max(SIZES))[0], oracle.sketched_full(described(rounds=1, rank=None))[0])


def test_fed_sb_starts_from_the_best_approximation_of_the_mean_update():
    run = described(rounds=1)
    exact = oracle.sketched_full(described(rounds=1, rank=None))[0]
    steps = [oracle.best_approximation(end - start, RANK) for end, start in zip(exact, run.weights, strict=True)]
    close(oracle.fed_sb(run, RANK)[0], [start + step for start, step in zip(run.weights, steps, strict=True)])


def test_one_step_of_a_random_fed_sb_is_a_gradient_step_projected_on_both_sides():
    run = described(rounds=1, steps=1)
    weights, _ = oracle.fed_sb_random(run)
    for layer, start in enumerate(run.weights):
        B, A = run.draw(0, layer, "a"), run.draw(0, layer, "b")
        slope = sum(share(client) * first_gradients(run, client)[layer] for client in EVERYONE)
        step = run.lr * run.scale**2 * B @ B.T @ slope @ A.T @ A
        np.testing.assert_allclose(weights[layer], start - step, atol=1e-12)


def test_the_steps_of_fed_sb_stay_between_its_factors():
    one, three = (oracle.fed_sb(described(rounds=rounds), RANK)[0] for rounds in (1, 3))
    for start, first, last in zip(described().weights, one, three, strict=True):
        u, _, vt = np.linalg.svd(first - start)
        left, right = u[:, :RANK] @ u[:, :RANK].T, vt[:RANK].T @ vt[:RANK]
        np.testing.assert_allclose(left @ (last - start) @ right, last - start, atol=1e-12)
        assert np.abs(last - first).max() > 1e-3


def test_lora_fair_with_an_endless_ridge_is_fed_it():
    run = described(rounds=3)
    close(oracle.lora_fair(run, 1e18)[0], oracle.fed_it(run)[0])


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_a_correction_of_lora_fair_is_the_closed_form_of_the_ridge(ridge):
    """dB = (D - B A) A^T (A A^T + ridge I)^-1; without a ridge B A becomes D's projection on the rows of A."""
    run = described(rounds=1)
    ends = run.train_pairs(1, EVERYONE, run.weights, run.start(0, "ab"))
    for layer, found in enumerate(oracle.lora_fair(run, ridge)[0]):
        A, B, D = (
            sum(share(k) * value(ends[k][layer]) for k in EVERYONE)
            for value in (lambda pair: pair["a"], lambda pair: pair["b"], oracle.product)
        )
        change = (D - B @ A) @ A.T @ np.linalg.inv(A @ A.T + ridge * np.eye(RANK))
        np.testing.assert_allclose(found, run.weights[layer] + run.scale * (B + change) @ A, atol=1e-12)
        if ridge == 0:
            np.testing.assert_allclose(found - run.weights[layer], run.scale * D @ np.linalg.pinv(A) @ A, atol=1e-12)


def test_a_small_step_of_fr_lora_is_the_one_of_its_principal_pair():
    """dW = -lr s^2 (B0 B0^T G + G A0^T A0) to first order, and s B0 B0^T = U_r S_r U_r^T."""
    run = replace(described(rounds=1, steps=1), lr=1e-7)
    weights, _ = oracle.fr_lora(run, RANK)
    for layer, start in enumerate(run.weights):
        u, values, vt = np.linalg.svd(start)
        slope = sum(share(client) * first_gradients(run, client)[layer] for client in EVERYONE)
        left, right = ((side * values[:RANK]) @ side.T for side in (u[:, :RANK], vt[:RANK].T))
        step = run.scale * (left @ slope + slope @ right)
        np.testing.assert_allclose((start - weights[layer]) / run.lr, step, atol=1e-5)


def test_each_round_of_fr_lora_starts_from_the_same_pair():
    """With the same batches, small steps of two rounds add up; a carried pair would give the same, so the pair is
    compared where steps are large: the second round from W_1 is a first round whose base pair is W_0's."""
    run = described(rounds=2, cohort=(1,))
    first = oracle.fr_lora(replace(run, cohorts=[(1,)]), RANK)[0]
    pairs = [oracle.balanced(weight, RANK, run.scale) for weight in run.weights]
    below = oracle.effective(first, pairs, -run.scale)
    ends = run.train_factors((2, 1), below, pairs, ["ab"] * 3)
    close(oracle.fr_lora(run, RANK)[0], oracle.effective(below, ends, run.scale))
