"""The server's half of every method, without clients: what its step does to the weights, by dense NumPy formulas."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedraclora.link import Dense, Link, LowRank, Private, Set, Stack, Zero
from fedraclora.narrowing import narrow
from fedraclora.plan import MOMENTS
from fedraclora.plugins import names
from fedraclora.sketch import SketchKey, draw
from fedraclora.targets import MatrixShape
from strategies import _factors
from strategies.method import Adapter, ClientUpdate

# Settings beside the defaults; `shared` belongs to the adapter.
VARIANTS = [
    ("rac_lora", {"side": "a"}),
    ("rac_lora", {"side": "auto", "rounds_per_link": 2}),
    ("rac_lora", {"contributors": "rows"}),
    ("rac_lora", {"shared": False}),
    ("rac_lora", {"side": "a", "shared": False}),
    ("chain_of_lora", {"rounds_per_link": 2}),
    ("flora", {"private_start": False}),
    ("fedex_lora", {"residual": "factors"}),
    ("fedex_lora", {"residual": "dense"}),
    ("fedex_lora", {"residual": "truncated", "residual_rank": 1}),
    ("fed_sb", {"init": "random"}),
    ("fed_slop", {"upload": "factor", "moments": "reset"}),
    ("fed_krso", {"num_seeds": 1}),
    ("bernoulli_lora", {"probability": 1.0}),
    ("bernoulli_lora", {"shared": False}),
    ("sketched_full", {"side": "auto"}),
]
EVERY = [(name, {}) for name in names("strategies")] + VARIANTS
INEXACT = ("fed_it", "chain_of_lora", "flexlora", "het_lora", "lora_fair", "fr_lora")
few = settings(max_examples=15)


def _id(case):
    return "-".join([case[0], *(f"{name}={value}" for name, value in case[1].items())])


every_method = pytest.mark.parametrize("case", EVERY, ids=_id)


# ---- a problem: an adapter, weights, and clients that answer with random numbers


@dataclass(frozen=True)
class Problem:
    adapter: Adapter
    weights: dict[str, Tensor]
    clients: dict[int, float]
    seed: int

    @property
    def p(self):
        total = sum(self.clients.values())
        return {client: weight / total for client, weight in self.clients.items()}

    @property
    def layers(self):
        return list(self.adapter.shapes)


def problem(*, clients=None, ranks=(2, 3, 2), scales=(0.5, 1.0, 2.0), sizes=((6, 9), (4, 6), (5, 2, 2)), seed=0):
    """Return a problem of two dense layers and a convolution (`sizes`: outputs and inputs; channels and kernel)."""
    rng = np.random.default_rng(seed)
    (out1, in1), (out2, in2), (channels, inputs, kernel) = sizes
    kernels = {"fc1": (out1, in1), "conv": (channels, inputs, kernel, kernel), "fc2": (out2, in2)}
    shapes = {layer: MatrixShape(shape[0], int(np.prod(shape[1:]))) for layer, shape in kernels.items()}
    weights = {f"{layer}.weight": torch.from_numpy(rng.normal(size=shape)) for layer, shape in kernels.items()}
    weights |= {f"{layer}.bias": torch.from_numpy(rng.normal(size=shape[0])) for layer, shape in kernels.items()}
    adapter = Adapter(
        shapes=shapes,
        ranks=dict(zip(shapes, ranks, strict=True)),
        scales=dict(zip(shapes, scales, strict=True)),
        dense=("fc1.bias",),
        parameters=tuple(weights),
        law="gaussian",
        seed=seed + 1,
    )
    return Problem(adapter, weights, clients or {7: 3.0, 2: 1.0, 5: 4.0}, seed)


@st.composite
def problems(draw_from, *, min_clients=1):
    size, small = st.integers(2, 6), st.integers(1, 3)
    sizes = (
        (draw_from(size), draw_from(size)),
        (draw_from(size), draw_from(size)),
        (draw_from(size), draw_from(small), draw_from(st.integers(1, 2))),
    )
    limits = [min(*sizes[0]), min(sizes[2][0], sizes[2][1] * sizes[2][2] ** 2), min(*sizes[1])]
    ranks = tuple(draw_from(st.integers(1, limit)) for limit in limits)
    scales = tuple(draw_from(st.sampled_from([0.25, 1.0, 3.0])) for _ in ranks)
    client, weight = st.integers(0, 99), st.integers(1, 9).map(float)
    clients = draw_from(st.dictionaries(client, weight, min_size=min_clients, max_size=4))
    return problem(clients=clients, ranks=ranks, scales=scales, sizes=sizes, seed=draw_from(st.integers(0, 2**32 - 1)))


def build(case, adapter):
    name, changes = case
    own = {key: value for key, value in changes.items() if key != "shared"}
    module = import_module(f"strategies.{name}")
    return module.build(module.Config(**own), replace(adapter, is_shared=changes.get("shared", True)))


def sent_shapes(training, start, weights):
    """Return what a client sends: factors, or weights in full, by key."""
    factors = {key: factor.shape for key, factor in start.factors.items()}
    sides = {layer: "lora_a" if isinstance(t.lora_a, Zero) else "lora_b" for layer, t in start.low_rank_terms().items()}
    shapes = {key: factors[key] for key in training.sent_factors(sides)}
    return shapes | {name: tuple(weights[name].shape) for name in training.sent_dense}


def replies(method, case, start, *, round=1, dtype=torch.float64):
    """Return updates of random numbers: small changes of whole tensors, any factors."""
    updates = {}
    for client, weight in case.clients.items():
        rng = np.random.default_rng([case.seed, client, round])
        tensors = {}
        for key, shape in sent_shapes(method.trains(round, start), start, case.weights).items():
            value = torch.from_numpy(rng.normal(size=shape))
            tensors[key] = (0.1 * value + case.weights[key] if key in case.weights else value).to(dtype)
        updates[client] = ClientUpdate(tensors, weight, start.of_client(client))
    return updates


def narrowed(update, case, ranks, scales):
    """Return a client's update padded from random factors of its own rank and scale, and the dense sum of these."""
    tensors, change = dict(update.tensors), {}
    for layer, rank in ranks.items():
        ratio = scales[layer] / case.adapter.scales[layer]
        lora_b, lora_a = (tensors[f"{layer}.{name}"].clone() for name in ("lora_b", "lora_a"))
        lora_b[:, rank:], lora_a[rank:] = 0, 0
        change[layer] = scales[layer] * lora_b.numpy() @ lora_a.numpy()
        tensors |= {f"{layer}.lora_b": lora_b * ratio, f"{layer}.lora_a": lora_a}
    return replace(update, tensors=tensors, ranks=ranks), change


def own_ranks(case, client):
    """Return a smaller rank and its scale for each layer of one client."""
    full = case.adapter.ranks
    ranks = {layer: 1 + (client + place) % full[layer] for place, layer in enumerate(full)}
    return ranks, {layer: case.adapter.scales[layer] * full[layer] / ranks[layer] for layer in ranks}


# ---- what terms mean, written down a second time


def matrix(factor):
    """Return the numbers of a factor."""
    if isinstance(factor, Zero):
        return np.zeros(factor.shape)
    if isinstance(factor, Stack):
        return np.concatenate([matrix(key) for key in factor.keys], axis=1 if factor.keys[0].side == "a" else 0)
    return (draw(factor) if isinstance(factor, SketchKey) else factor).double().numpy()


def product(term):
    """Return what a low-rank term adds, `[out, in]`."""
    core = np.eye(matrix(term.lora_a).shape[0]) if term.core is None else matrix(term.core)
    return term.scale * matrix(term.lora_b) @ core @ matrix(term.lora_a)


def apply(weights, terms):
    """Return the weights with terms applied, as NumPy arrays."""
    result = {
        name: (value if isinstance(value, np.ndarray) else value.numpy()).copy() for name, value in weights.items()
    }
    for term in terms:
        if isinstance(term, Set):
            result[term.target] = term.value.double().numpy().copy()
        else:
            shape = result[term.target].shape
            change = term.delta.double().numpy() if isinstance(term, Dense) else product(term).reshape(shape)
            assert change.shape == shape
            result[term.target] += change
    return result


def after(case, step):
    """Return the effective weights after a step: what is merged, and the open link on top."""
    return apply(case.weights, [*step.merged, *step.open])


def ended(case, start, update):
    """Return the effective weights of one client at the end of its round."""
    last = {term.layer: place for place, term in enumerate(start.terms) if isinstance(term, LowRank)}
    terms = list(update.link.terms)
    for place in last.values():
        term = terms[place]
        own = {name: update.tensors.get(f"{term.layer}.{name}") for name in ("lora_a", "lora_b", "core")}
        terms[place] = replace(term, **{name: tensor for name, tensor in own.items() if tensor is not None})
    whole = [Set(key, tensor) for key, tensor in update.tensors.items() if key in case.weights]
    return apply(case.weights, terms + whole)


def mean_end(case, start, updates):
    """Return the weighted mean of the clients' effective weights."""
    ends = {client: ended(case, start, update) for client, update in updates.items()}
    return {name: sum(case.p[client] * end[name] for client, end in ends.items()) for name in case.weights}


def mean(case, updates, key):
    return sum(case.p[client] * update.tensors[key].double().numpy() for client, update in updates.items())


def flat(array):
    return np.asarray(array).reshape(len(array), -1)


def assert_equal(found, expected, tolerance=1e-12):
    for name in expected:
        size = max(1.0, float(np.linalg.norm(expected[name])))
        assert np.linalg.norm(found[name] - expected[name]) <= tolerance * size, name


def opened(case, method, index=0):
    return method.open_link(index, case.weights)


def next_link(start, step):
    return Link(start.index + bool(step.merged), tuple(step.open))


def merged_problem(case, step):
    """Return the problem whose closed weights hold what a step merged."""
    return replace(case, weights={name: torch.from_numpy(w) for name, w in apply(case.weights, step.merged).items()})


def best(dense, rank):
    """Return the best approximation of a rank, by Eckart and Young."""
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


# ---- laws of all methods


@every_method
def test_a_new_link_changes_nothing(case):
    drawn = problem()
    start = opened(drawn, build(case, drawn.adapter))
    public = [term.with_factors({k: f.of(3) for k, f in start.factors.items() if isinstance(f, Private)})
              for term in start.terms if isinstance(term, LowRank)]  # fmt: skip
    assert_equal(apply(drawn.weights, public), apply(drawn.weights, []), 1e-14)


@every_method
@given(drawn=problems())
@few
def test_an_exact_method_moves_the_weights_by_the_mean_of_the_clients_changes(case, drawn):
    """Two rounds, the second from what the first left; an inexact method is right in what it trains in full."""
    method = build(case, drawn.adapter)
    is_exact = case[0] not in INEXACT and case[1].get("residual") != "truncated"
    start = opened(drawn, method)
    for round in (1, 2):
        updates = replies(method, drawn, start, round=round)
        step, expected = method.aggregate(drawn.weights, start, updates), mean_end(drawn, start, updates)
        found = after(drawn, step)
        kept = (
            set(drawn.weights) if is_exact and not _is_estimate(case, round) else drawn.weights.keys() - targets(drawn)
        )
        assert_equal({name: found[name] for name in kept}, {name: expected[name] for name in kept})
        if method.closes(round):
            drawn = replace(drawn, weights={name: torch.from_numpy(w) for name, w in found.items()})
            start = opened(drawn, method, start.index + 1)
        else:
            start, drawn = next_link(start, step), merged_problem(drawn, step)


def _is_estimate(case, round):
    return case[0] == "fed_sb" and not case[1] and round == 1


def targets(case):
    return {f"{layer}.weight" for layer in case.layers}


@every_method
def test_a_method_that_says_so_depends_on_the_replies_through_their_mean_only(case):
    """One client that sends the mean, with all the weight, stands for all."""
    drawn = problem()
    method = build(case, drawn.adapter)
    start = opened(drawn, method)
    updates = replies(method, drawn, start)
    alone = {key: torch.from_numpy(mean(drawn, updates, key)) for key in updates[2].tensors}
    stand_in = {2: ClientUpdate(alone, 8.0, start.of_client(2))}
    found, expected = (after(drawn, method.aggregate(drawn.weights, start, sent)) for sent in (stand_in, updates))
    gap = max(np.abs(found[name] - expected[name]).max() for name in expected)
    if case == ("rac_lora", {"contributors": "rows"}):
        assert not method.traits.is_mean  # Only where ranks differ.
    else:
        assert (gap < 1e-12) == method.traits.is_mean


@every_method
def test_the_order_of_arrival_changes_no_bit(case):
    drawn = problem()
    method = build(case, drawn.adapter)
    start = opened(drawn, method)
    updates = replies(method, drawn, start)
    steps = [
        method.aggregate(drawn.weights, start, {client: updates[client] for client in order})
        for order in ((2, 5, 7), (7, 2, 5))
    ]
    for part in ("open", "merged"):
        first, second = (Link(0, tuple(getattr(step, part))).digest for step in steps)
        assert first == second


@every_method
def test_explicit_numbers_have_the_type_of_the_weights(case):
    drawn = problem()
    drawn = replace(drawn, weights={name: tensor.float() for name, tensor in drawn.weights.items()})
    method = build(case, drawn.adapter)
    start = opened(drawn, method)
    step = method.aggregate(drawn.weights, start, replies(method, drawn, start, dtype=torch.float32))
    for terms in (start.terms, step.open, step.merged):
        for name, tensor in Link(0, tuple(terms)).named_tensors.items():
            assert tensor.dtype == torch.float32, name
            assert tensor.is_contiguous(), name


@every_method
def test_the_next_link_sets_what_the_open_one_set_and_is_of_the_same_layers(case):
    drawn = problem()
    method = build(case, drawn.adapter)
    start = opened(drawn, method)
    step = method.aggregate(drawn.weights, start, replies(method, drawn, start))
    targets_set = {term.target for term in step.open if isinstance(term, Set)}
    trained = {*method.trains(1, start).dense, *method.trains(1, start).sent_dense}
    assert targets_set <= trained
    if not method.closes(1):
        follower = next_link(start, step)
        assert set(method.trains(2, follower).parts) <= set(follower.low_rank_terms())
        later = method.aggregate(drawn.weights, follower, replies(method, drawn, follower, round=2))
        assert targets_set <= {term.target for term in later.open if isinstance(term, Set)}


@every_method
def test_what_trains_is_in_the_link_and_is_never_drawn(case):
    drawn = problem()
    method = build(case, drawn.adapter)
    start = opened(drawn, method)
    training = method.trains(1, start)
    for key in training.keys:
        assert key in start.factors or key in drawn.weights
    if "ab" not in training.parts.values():  # A drawn start of a pair may train.
        assert not any(isinstance(start.factors.get(key), SketchKey | Stack | Private) for key in training.keys)
    assert set(training.dense) >= set(drawn.adapter.dense)


CLOSES = {
    ("rac_lora", ()): [1],
    ("rac_lora", (("rounds_per_link", 3),)): [3],
    ("rac_lora", (("rounds_per_link", 0),)): [],
    ("chain_of_lora", ()): [1],
    ("chain_of_lora", (("rounds_per_link", 2),)): [2],
    **{(name, ()): [] for name in ("ffa_lora", "fed_it", "full", "fedex_lora", "flexlora", "het_lora", "ro_lora")},
    **{(name, ()): [] for name in ("fed_sa_lora", "fed_sb", "lora_fair", "fr_lora")},
    **{(name, ()): [1, 2, 3, 4] for name in ("flora", "fed_krso", "fed_slop", "bernoulli_lora", "sketched_full")},
}


@pytest.mark.parametrize("case", CLOSES, ids=str)
def test_links_last_as_long_as_the_method_says(case):
    name, changes = case
    method = build((name, dict(changes)), problem().adapter)
    assert [count for count in range(1, 5) if method.closes(count)] == CLOSES[case]


# ---- rac_lora


@given(drawn=problems(), sides=st.sampled_from(["b", "a", "auto"]))
@few
def test_rac_lora_merges_the_mean_of_the_trained_factor_times_the_drawn_one(drawn, sides):
    method = build(("rac_lora", {"side": sides}), drawn.adapter)
    start = opened(drawn, method, 4)
    updates = replies(method, drawn, start)
    found = after(drawn, method.aggregate(drawn.weights, start, updates))
    for layer, shape in drawn.adapter.shapes.items():
        side = ("b" if shape.out <= shape.in_ else "a") if sides == "auto" else sides
        drawn_factor = draw(drawn.adapter.key(4, layer, side)).double().numpy()
        trained = mean(drawn, updates, f"{layer}.lora_{side}")
        change = trained @ drawn_factor if side == "b" else drawn_factor @ trained
        expected = flat(drawn.weights[f"{layer}.weight"]) + drawn.adapter.scales[layer] * change
        assert_equal({"w": flat(found[f"{layer}.weight"])}, {"w": expected})


@pytest.mark.parametrize("side", ["b", "a"])
@given(drawn=problems())
@few
def test_private_draws_are_relayed_by_their_seeds_beside_the_weighted_factors(side, drawn):
    """Unlike ranks, too: nothing is sent of what only pads a factor."""
    method = build(("rac_lora", {"side": side, "shared": False}), drawn.adapter)
    start = opened(drawn, method, 2)
    expected = {layer: flat(drawn.weights[f"{layer}.weight"]).copy() for layer in drawn.layers}
    updates = replies(method, drawn, start)
    for client, update in updates.items():
        ranks, scales = own_ranks(drawn, client)
        tensors = dict(update.tensors)
        for layer, rank in ranks.items():
            key, own = f"{layer}.lora_{side}", Private(drawn.adapter.key(2, layer, side)).of(client)
            padding = (slice(None), slice(rank, None)) if side == "b" else slice(rank, None)
            tensors[key][padding] = 0
            trained, sketch = tensors[key].numpy(), draw(own).double().numpy()
            change = trained @ sketch if side == "b" else sketch @ trained
            expected[layer] += drawn.p[client] * scales[layer] * change
            tensors[key] = tensors[key] * (scales[layer] / drawn.adapter.scales[layer])
        updates[client] = replace(update, tensors=tensors, ranks=ranks)
    step = method.aggregate(drawn.weights, start, updates)
    found = after(drawn, step)
    assert_equal({layer: flat(found[f"{layer}.weight"]) for layer in drawn.layers}, expected)
    for term in (term for term in step.open if isinstance(term, LowRank)):
        total = sum(own_ranks(drawn, client)[0][term.layer] for client in drawn.clients)
        assert isinstance(term.lora_a if side == "b" else term.lora_b, Stack)
        assert (term.lora_a.shape[0], term.lora_b.shape[1]) == (total, total)


@pytest.mark.parametrize("contributors", ["all", "rows"])
@pytest.mark.parametrize("side", ["b", "a"])
@given(drawn=problems())
@few
def test_each_row_is_averaged_over_all_clients_or_over_those_that_train_it(side, contributors, drawn):
    method = build(("rac_lora", {"side": side, "contributors": contributors}), drawn.adapter)
    start = opened(drawn, method)
    updates, expected = replies(method, drawn, start), apply(drawn.weights, [])
    for client, update in updates.items():
        ranks, scales = own_ranks(drawn, client)
        tensors = dict(update.tensors)
        for layer, rank in ranks.items():
            key = f"{layer}.lora_{side}"
            tensors[key][(slice(None), slice(rank, None)) if side == "b" else slice(rank, None)] = 0
            tensors[key] = tensors[key] * (scales[layer] / drawn.adapter.scales[layer])
        updates[client] = replace(update, tensors=tensors, ranks=ranks)
    for layer, rank in drawn.adapter.ranks.items():
        sketch = draw(drawn.adapter.key(0, layer, side)).double().numpy()
        for row in range(rank):
            who = [k for k in drawn.clients if own_ranks(drawn, k)[0][layer] > row]
            total = sum(drawn.p[k] for k in who) if contributors == "rows" else 1.0
            for k in who:
                tensor = updates[k].tensors[f"{layer}.lora_{side}"].numpy()
                part = np.outer(tensor[:, row], sketch[row]) if side == "b" else np.outer(sketch[:, row], tensor[row])
                change = drawn.p[k] / total * drawn.adapter.scales[layer] * part
                expected[f"{layer}.weight"] += change.reshape(expected[f"{layer}.weight"].shape)
    found = after(drawn, method.aggregate(drawn.weights, start, updates))
    assert_equal({name: found[name] for name in targets(drawn)}, {name: expected[name] for name in targets(drawn)})


def test_rows_that_nobody_trains_stay_where_they_started():
    drawn = problem()
    method = build(("rac_lora", {"contributors": "rows", "rounds_per_link": 0}), drawn.adapter)
    start = opened(drawn, method)
    before = next_link(start, method.aggregate(drawn.weights, start, replies(method, drawn, start)))
    updates = {k: replace(u, ranks={"fc1": 1}) for k, u in replies(method, drawn, before, round=2).items()}
    for update in updates.values():
        update.tensors["fc1.lora_b"][:, 1:] = 0
    later = next_link(before, method.aggregate(drawn.weights, before, updates))
    assert torch.equal(later.factors["fc1.lora_b"][:, 1:], before.factors["fc1.lora_b"][:, 1:])
    assert not torch.equal(later.factors["fc1.lora_b"][:, :1], before.factors["fc1.lora_b"][:, :1])


def test_with_equal_ranks_it_makes_no_bit_of_difference_who_contributes():
    drawn, digests = problem(), set()
    for contributors in ("all", "rows"):
        method = build(("rac_lora", {"contributors": contributors}), drawn.adapter)
        start = opened(drawn, method)
        step = method.aggregate(drawn.weights, start, replies(method, drawn, start))
        digests.add(Link(0, tuple(step.open)).digest)
    assert len(digests) == 1


# ---- pairs that are averaged factor by factor


@pytest.mark.parametrize("name", ["fed_it", "chain_of_lora"])
@given(drawn=problems())
@few
def test_averaging_both_factors_misses_the_covariance_of_the_factors(name, drawn):
    method = build((name, {}), drawn.adapter)
    start = opened(drawn, method)
    updates = replies(method, drawn, start)
    found, wanted = after(drawn, method.aggregate(drawn.weights, start, updates)), mean_end(drawn, start, updates)
    for layer, scale in drawn.adapter.scales.items():
        means = [mean(drawn, updates, f"{layer}.{factor}") for factor in ("lora_b", "lora_a")]
        covariance = sum(
            drawn.p[client]
            * (update.tensors[f"{layer}.lora_b"].numpy() - means[0])
            @ (update.tensors[f"{layer}.lora_a"].numpy() - means[1])
            for client, update in updates.items()
        )
        missed = flat(wanted[f"{layer}.weight"]) - flat(found[f"{layer}.weight"])
        assert_equal({"w": missed}, {"w": scale * covariance})


@given(drawn=problems())
@few
def test_all_ways_to_send_the_residual_give_the_same_weights_and_auto_is_the_shortest(drawn):
    found, sizes = {}, {}
    for way in ("factors", "dense", "auto"):
        method = build(("fedex_lora", {"residual": way}), drawn.adapter)
        start = opened(drawn, method)
        step = method.aggregate(drawn.weights, start, replies(method, drawn, start))
        found[way] = after(drawn, step)
        sizes[way] = {term.target: size(term) for term in step.merged}
    assert_equal(found["factors"], found["dense"])
    assert_equal(found["auto"], found["dense"])
    expected = {name: min(sizes["factors"][name], number) for name, number in sizes["dense"].items()}
    assert sizes["auto"] == expected
    others = len(drawn.clients) - 1
    for layer, shape in drawn.adapter.shapes.items() if others else ():
        assert sizes["factors"][f"{layer}.weight"] == others * drawn.adapter.ranks[layer] * (shape.out + shape.in_)


def size(term):
    return sum(tensor.numel() for tensor in Link(0, (term,)).tensors)


def test_one_client_leaves_no_residual():
    drawn = problem(clients={3: 2.0})
    method = build(("fedex_lora", {}), drawn.adapter)
    start = opened(drawn, method)
    assert list(method.aggregate(drawn.weights, start, replies(method, drawn, start)).merged) == []


@given(drawn=problems(min_clients=2), rank=st.integers(1, 4))
@few
def test_a_truncated_residual_is_its_best_approximation(drawn, rank):
    method = build(("fedex_lora", {"residual": "truncated", "residual_rank": rank}), drawn.adapter)
    start = opened(drawn, method)
    updates = replies(method, drawn, start)
    step, wanted = method.aggregate(drawn.weights, start, updates), mean_end(drawn, start, updates)
    without = apply(drawn.weights, step.open)
    for term in step.merged:
        whole = flat(wanted[term.target] - without[term.target])
        assert_equal({"r": product(term)}, {"r": best(whole, rank)}, 1e-11)
        assert term.lora_a.shape[0] <= rank


# ---- flora


@given(drawn=problems(), is_private=st.booleans())
@few
def test_flora_sums_the_products_of_any_ranks_in_no_more_numbers_than_the_weights(drawn, is_private):
    method = build(("flora", {"private_start": is_private}), drawn.adapter)
    start = opened(drawn, method)
    updates, expected = replies(method, drawn, start), apply(drawn.weights, [])
    for client, update in updates.items():
        updates[client], change = narrowed(update, drawn, *own_ranks(drawn, client))
        for layer, own in change.items():
            expected[f"{layer}.weight"] += drawn.p[client] * own.reshape(expected[f"{layer}.weight"].shape)
    step = method.aggregate(drawn.weights, start, updates)
    found = after(drawn, step)
    assert_equal({name: found[name] for name in targets(drawn)}, {name: expected[name] for name in targets(drawn)})
    for term in step.open:
        if term.target in targets(drawn):
            layer = term.target.removesuffix(".weight")
            shape = drawn.adapter.shapes[layer]
            stacked = sum(own_ranks(drawn, k)[0][layer] for k in drawn.clients) * (shape.out + shape.in_)
            assert size(term) == min(stacked, shape.out * shape.in_)


@pytest.mark.parametrize("is_private", [True, False])
def test_floras_clients_start_from_their_own_draws_or_from_one(is_private):
    drawn = problem()
    start = opened(drawn, build(("flora", {"private_start": is_private}), drawn.adapter))
    first, second = (start.of_client(client).factors["fc1.lora_a"] for client in (1, 2))
    assert (first != second) == is_private


# ---- flexlora, het_lora


@given(drawn=problems())
@few
def test_flexloras_pair_is_the_best_approximation_of_the_mean_product(drawn):
    method = build(("flexlora", {}), drawn.adapter)
    start = opened(drawn, method)
    updates, total = replies(method, drawn, start), dict.fromkeys(drawn.layers, 0.0)
    for client, update in updates.items():
        updates[client], change = narrowed(update, drawn, *own_ranks(drawn, client))
        total = {layer: total[layer] + drawn.p[client] * change[layer] for layer in total}
    step = method.aggregate(drawn.weights, start, updates)
    link = next_link(start, step)
    for layer, term in link.low_rank_terms().items():
        assert_equal({"w": product(term)}, {"w": best(total[layer], drawn.adapter.ranks[layer])}, 1e-11)
        # Both factors share the singular values, and a client of a smaller rank gets the largest.
        gram_b, gram_a = matrix(term.lora_b).T @ matrix(term.lora_b), matrix(term.lora_a) @ matrix(term.lora_a).T
        assert_equal({"g": gram_b}, {"g": gram_a}, 1e-11)
    ranks, scales = own_ranks(drawn, 1)
    for layer, term in narrow(link, ranks, scales).low_rank_terms().items():
        assert_equal({"w": product(term)}, {"w": best(total[layer], ranks[layer])}, 1e-11)


@given(drawn=problems())
@few
def test_het_lora_weighs_the_padded_factors_by_the_norms_of_the_products(drawn):
    method = build(("het_lora", {}), drawn.adapter)
    start = opened(drawn, method)
    updates, norms = replies(method, drawn, start), {layer: {} for layer in drawn.layers}
    for client, update in updates.items():
        updates[client], change = narrowed(update, drawn, *own_ranks(drawn, client))
        for layer, own in change.items():
            norms[layer][client] = np.linalg.norm(own)
    link = next_link(start, method.aggregate(drawn.weights, start, updates))
    for key, factor in link.factors.items():
        layer = key.rpartition(".")[0]
        q = {client: norm / sum(norms[layer].values()) for client, norm in norms[layer].items()}
        expected = sum(q[client] * update.tensors[key].numpy() for client, update in updates.items())
        assert_equal({key: matrix(factor)}, {key: expected})


def test_het_lora_weighs_by_examples_where_no_product_has_moved():
    drawn = problem()
    method = build(("het_lora", {}), drawn.adapter)
    start = opened(drawn, method)
    updates = replies(method, drawn, start)
    for update in updates.values():
        update.tensors["conv.lora_b"].zero_()
    link = next_link(start, method.aggregate(drawn.weights, start, updates))
    key = "conv.lora_a"
    assert_equal({key: matrix(link.factors[key])}, {key: mean(drawn, updates, key)})


@pytest.mark.parametrize(("rank", "out", "in_"), [(2, 7, 9), (6, 4, 9), (9, 9, 3), (5, 3, 3)])
def test_the_norm_and_the_decomposition_of_a_product_need_no_multiplication(rank, out, in_):
    rng = np.random.default_rng(rank)
    lora_b, lora_a = rng.normal(size=(out, rank)), rng.normal(size=(rank, in_))
    found = _factors.Product(torch.from_numpy(lora_b), torch.from_numpy(lora_a))
    assert found.norm() == pytest.approx(np.linalg.norm(lora_b @ lora_a), rel=1e-13)
    for kept in (1, 2, min(out, in_)):
        svd = _factors.truncated(found, kept)
        assert_equal({"w": (svd.u * svd.s @ svd.vh).numpy()}, {"w": best(lora_b @ lora_a, kept)}, 1e-11)
        assert_equal({"u": (svd.u.T @ svd.u).numpy()}, {"u": np.eye(len(svd.s))})


# ---- ro_lora, fed_sa_lora


def test_ro_lora_trains_one_factor_after_the_other_and_leaves_the_other_one_alone():
    drawn = problem()
    method = build(("ro_lora", {}), drawn.adapter)
    link = opened(drawn, method)
    for round in range(1, 6):
        trained, frozen = ("lora_b", "lora_a") if round % 2 else ("lora_a", "lora_b")
        updates = replies(method, drawn, link, round=round)
        assert set(updates[2].tensors) == {f"{layer}.{trained}" for layer in drawn.layers} | {"fc1.bias"}
        later = next_link(link, method.aggregate(drawn.weights, link, updates))
        for layer in drawn.layers:
            key = f"{layer}.{trained}"
            assert later.factors[f"{layer}.{frozen}"] is link.factors[f"{layer}.{frozen}"]
            assert_equal({key: matrix(later.factors[key])}, {key: mean(drawn, updates, key)})
        link = later


def test_fed_sa_lora_averages_a_and_never_sees_b():
    drawn = problem()
    method = build(("fed_sa_lora", {}), drawn.adapter)
    start = opened(drawn, method)
    training = method.trains(1, start)
    assert set(training.private) == {f"{layer}.lora_b" for layer in drawn.layers}
    assert set(training.parts.values()) == {"ab"}
    updates = replies(method, drawn, start)
    link = next_link(start, method.aggregate(drawn.weights, start, updates))
    for layer, term in link.low_rank_terms().items():
        key = f"{layer}.lora_a"
        assert key in updates[2].tensors
        assert f"{layer}.lora_b" not in updates[2].tensors
        assert_equal({key: matrix(term.lora_a)}, {key: mean(drawn, updates, key)})
        assert term.lora_b == start.factors[f"{layer}.lora_b"]
    assert not method.traits.is_global


# ---- fed_sb


@given(drawn=problems())
@few
def test_fed_sbs_factors_are_the_principal_part_of_the_first_full_update(drawn):
    method = build(("fed_sb", {}), drawn.adapter)
    start = opened(drawn, method)
    assert set(method.trains(1, start).parts.values()) == {"w"}
    updates = replies(method, drawn, start)
    step = method.aggregate(drawn.weights, start, updates)
    for term in (term for term in step.open if isinstance(term, LowRank)):
        weight = drawn.weights[term.target].numpy()
        update = flat(mean(drawn, updates, term.target) - weight)
        rank = drawn.adapter.ranks[term.layer]
        assert_equal({"w": product(term)}, {"w": best(update, rank)}, 1e-11)
        assert_equal({"b": matrix(term.lora_b).T @ matrix(term.lora_b)}, {"b": np.eye(rank)})
        assert_equal({"a": matrix(term.lora_a) @ matrix(term.lora_a).T}, {"a": np.eye(rank)})


def test_fed_sb_waits_for_a_first_update_and_then_trains_the_core_alone():
    drawn = problem()
    method = build(("fed_sb", {}), drawn.adapter)
    start = opened(drawn, method)
    assert set(method.trains(2, start).parts.values()) == {"w"}, "the first round may fail"
    link = next_link(start, method.aggregate(drawn.weights, start, replies(method, drawn, start)))
    for round in (2, 3):
        assert set(method.trains(round, link).parts.values()) == {"core"}
        updates = replies(method, drawn, link, round=round)
        later = next_link(link, method.aggregate(drawn.weights, link, updates))
        for layer in drawn.layers:
            for name in ("lora_a", "lora_b"):
                assert later.factors[f"{layer}.{name}"] is link.factors[f"{layer}.{name}"]
            key = f"{layer}.core"
            assert_equal({key: matrix(later.factors[key])}, {key: mean(drawn, updates, key)})
        link = later


def test_fed_sb_can_draw_its_factors_and_starts_at_nothing():
    drawn = problem()
    method = build(("fed_sb", {"init": "random"}), drawn.adapter)
    for layer, term in opened(drawn, method).low_rank_terms().items():
        shape, rank = drawn.adapter.shapes[layer], drawn.adapter.ranks[layer]
        assert isinstance(term.lora_a, SketchKey)
        assert isinstance(term.lora_b, SketchKey)
        assert (term.lora_a.shape, term.lora_b.shape) == ((rank, shape.in_), (shape.out, rank))
        assert term.core == Zero((rank, rank))


# ---- lora_fair


@given(drawn=problems(), ridge=st.sampled_from([1e-3, 0.01, 1.0]))
@few
def test_lora_fairs_correction_minimises_its_objective(drawn, ridge):
    method = build(("lora_fair", {"ridge": ridge}), drawn.adapter)
    start = opened(drawn, method)
    updates = replies(method, drawn, start)
    link = next_link(start, method.aggregate(drawn.weights, start, updates))
    rng = np.random.default_rng(drawn.seed)
    for layer, term in link.low_rank_terms().items():
        mean_b, mean_a = (mean(drawn, updates, f"{layer}.{name}") for name in ("lora_b", "lora_a"))
        tensors = {
            k: (u.tensors[f"{layer}.lora_b"].numpy(), u.tensors[f"{layer}.lora_a"].numpy()) for k, u in updates.items()
        }
        wanted = sum(drawn.p[k] * b @ a for k, (b, a) in tensors.items())

        def objective(db, wanted=wanted, b=mean_b, a=mean_a):
            return np.linalg.norm(wanted - (b + db) @ a) ** 2 + ridge * np.linalg.norm(db) ** 2

        assert_equal({"a": matrix(term.lora_a)}, {"a": mean_a})
        found = matrix(term.lora_b) - mean_b
        for step in (1e-1, 1e-3):
            nearby = found + step * rng.normal(size=found.shape)
            assert objective(found) < objective(nearby)
        residual = wanted - (mean_b + found) @ mean_a
        assert np.linalg.norm(ridge * found - residual @ mean_a.T) <= 1e-11 * max(1.0, np.linalg.norm(wanted) ** 2)


# ---- fr_lora


@given(drawn=problems())
@few
def test_fr_lora_starts_each_round_from_the_principal_part_and_merges_what_the_means_add(drawn):
    method = build(("fr_lora", {}), drawn.adapter)
    link = opened(drawn, method)
    first = link.low_rank_terms()
    for layer, term in first.items():
        base = flat(drawn.weights[f"{layer}.weight"].numpy())
        assert_equal({"w": product(term)}, {"w": best(base, drawn.adapter.ranks[layer])}, 1e-11)
    for round in (1, 2, 3):
        updates = replies(method, drawn, link, round=round)
        step = method.aggregate(drawn.weights, link, updates)
        found, expected = after(drawn, step), apply(drawn.weights, [])
        for layer, term in first.items():
            change = term.scale * mean(drawn, updates, f"{layer}.lora_b") @ mean(drawn, updates, f"{layer}.lora_a")
            change = change - product(term)
            expected[f"{layer}.weight"] += change.reshape(expected[f"{layer}.weight"].shape)
        assert_equal({name: found[name] for name in targets(drawn)}, {name: expected[name] for name in targets(drawn)})
        link, drawn = next_link(link, step), merged_problem(drawn, step)


def test_fr_loras_first_factors_stay_the_same_tensors_in_the_open_link_and_in_what_is_merged():
    drawn = problem()
    method = build(("fr_lora", {}), drawn.adapter)
    first = link = opened(drawn, method)
    for round in (1, 2, 3):
        step = method.aggregate(drawn.weights, link, replies(method, drawn, link, round=round))
        taken_away = {term.layer: term for term in step.merged if term.scale < 0}
        link = next_link(link, step)
        for layer, term in first.low_rank_terms().items():
            for name in ("lora_a", "lora_b"):
                assert link.factors[f"{layer}.{name}"] is getattr(term, name)
                assert getattr(taken_away[layer], name) is getattr(term, name)


def test_fr_lora_refuses_weights_without_a_principal_part():
    drawn = problem()
    method = build(("fr_lora", {}), drawn.adapter)
    with pytest.raises(ValueError, match="'conv' has a smaller rank than"):
        method.open_link(0, {**drawn.weights, "conv.weight": torch.zeros_like(drawn.weights["conv.weight"])})


# ---- several subspaces, projections, coins


def test_fed_krso_has_new_subspaces_for_every_seed_and_link():
    drawn = problem()
    method = build(("fed_krso", {"num_seeds": 3, "block_steps": 4}), drawn.adapter)
    seen = set()
    for index in (0, 1):
        for layer, term in opened(drawn, method, index).low_rank_terms().items():
            assert [key.shape[0] for key in term.lora_a.keys] == [drawn.adapter.ranks[layer]] * 3
            seen |= {tuple(np.round(draw(key).numpy().ravel(), 6)) for key in term.lora_a.keys}
    assert len(seen) == 2 * 3 * 3
    training = method.trains(1, opened(drawn, method))
    assert (training.blocks, training.block_steps) == (3, 4)


@given(drawn=problems())
@few
def test_fed_krso_adds_every_accumulator_in_its_own_subspace(drawn):
    method = build(("fed_krso", {"num_seeds": 3}), drawn.adapter)
    start = opened(drawn, method)
    updates = replies(method, drawn, start)
    found = after(drawn, method.aggregate(drawn.weights, start, updates))
    for layer, term in start.low_rank_terms().items():
        blocks = np.split(mean(drawn, updates, f"{layer}.lora_b"), 3, axis=1)
        change = sum(block @ draw(key).double().numpy() for block, key in zip(blocks, term.lora_a.keys, strict=True))
        expected = flat(drawn.weights[f"{layer}.weight"].numpy()) + drawn.adapter.scales[layer] * change
        assert_equal({"w": flat(found[f"{layer}.weight"])}, {"w": expected})


@given(drawn=problems())
@few
def test_fed_slops_factor_says_all_of_an_update_in_the_rows_of_the_projection(drawn):
    drawn = replace(drawn, adapter=replace(drawn.adapter, law="orthonormal"))
    whole, factored = (
        build(("fed_slop", own), drawn.adapter) for own in ({}, {"upload": "factor", "moments": "reset"})
    )
    start = opened(drawn, whole, 3)
    assert opened(drawn, factored, 3) == start
    rows = {layer: draw(term.lora_a).double().numpy() for layer, term in start.low_rank_terms().items()}
    sent, sent_factors = {}, {}
    for client, update in replies(whole, drawn, start).items():
        tensors, factors = dict(update.tensors), {}
        for layer, drawn_rows in rows.items():
            name = f"{layer}.weight"
            projected = flat(tensors[name] - drawn.weights[name]) @ drawn_rows.T @ drawn_rows
            tensors[name] = drawn.weights[name] + torch.from_numpy(projected).reshape(tensors[name].shape)
            factors[f"{layer}.lora_b"] = torch.from_numpy(projected @ drawn_rows.T / drawn.adapter.scales[layer])
        sent[client] = replace(update, tensors=tensors)
        rest = {name: tensor for name, tensor in tensors.items() if name not in targets(drawn)}
        sent_factors[client] = replace(update, tensors={**factors, **rest})
    expected = after(drawn, whole.aggregate(drawn.weights, start, sent))
    # The draws are float32, so that their rows are orthonormal to 1e-7 only.
    assert_equal(after(drawn, factored.aggregate(drawn.weights, start, sent_factors)), expected, 1e-6)
    assert_equal(expected, {name: mean(drawn, sent, name) for name in drawn.weights})


def test_fed_slop_trains_everything_on_projected_gradients():
    drawn = problem()
    for changes, sends_factor in (({}, False), ({"upload": "factor", "moments": "reset"}, True)):
        method = build(("fed_slop", changes), drawn.adapter)
        training = method.trains(1, opened(drawn, method))
        assert {*training.keys, *training.dense} == set(drawn.adapter.parameters)
        assert training.projects
        assert training.sends_factor == sends_factor
        assert training.moments == ("reset" if sends_factor else "carry")


def _coins(probability, seed, num_links):
    drawn = problem()
    method = build(("bernoulli_lora", {"probability": probability}), replace(drawn.adapter, seed=seed))
    links = [opened(drawn, method, index) for index in range(num_links)]
    return [isinstance(term.lora_a, Zero) for link in links for term in link.low_rank_terms().values()]


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.9])
def test_b_is_drawn_as_often_as_the_coins_probability_says(probability):
    coins = _coins(probability, 11, 500)
    deviation = (probability * (1 - probability) / len(coins)) ** 0.5
    assert abs(np.mean(coins) - probability) < 4 * deviation


def test_the_coins_are_those_of_the_seed():
    assert _coins(0.5, 3, 40) == _coins(0.5, 3, 40)
    assert _coins(0.5, 3, 40) != _coins(0.5, 4, 40)


@pytest.mark.parametrize(("probability", "side"), [(0.0, "b"), (1.0, "a")])
def test_a_coin_that_always_falls_alike_is_rac_lora_of_that_side(probability, side):
    drawn = problem()
    coin, chain = (
        build(("bernoulli_lora", {"probability": probability}), drawn.adapter),
        build(("rac_lora", {"side": side}), drawn.adapter),
    )
    start = opened(drawn, coin, 5)
    assert start == opened(drawn, chain, 5)
    assert coin.trains(6, start) == chain.trains(6, start)
    updates = replies(coin, drawn, start)
    found, expected = (Link(5, tuple(m.aggregate(drawn.weights, start, updates).open)) for m in (coin, chain))
    assert found.digest == expected.digest


@given(drawn=problems(), side=st.sampled_from(["b", "a"]))
@few
def test_sketched_full_merges_the_projection_of_the_mean_update_on_the_drawn_factor(drawn, side):
    method = build(("sketched_full", {"side": side}), drawn.adapter)
    start = opened(drawn, method)
    rng, updates, expected = np.random.default_rng(drawn.seed), {}, {}
    changes = {client: {} for client in drawn.clients}
    for layer, scale in drawn.adapter.scales.items():
        sketch = draw(drawn.adapter.key(0, layer, side)).double().numpy()
        weight = flat(drawn.weights[f"{layer}.weight"].numpy())
        moves = {client: rng.normal(size=weight.shape) for client in drawn.clients}
        moved = sum(drawn.p[client] * move for client, move in moves.items())
        if side == "b":
            inverse = sketch.T @ np.linalg.inv(sketch @ sketch.T)
            expected[layer] = weight + moved @ inverse @ sketch
            factors = {client: move @ inverse / scale for client, move in moves.items()}
        else:
            inverse = np.linalg.inv(sketch.T @ sketch) @ sketch.T
            expected[layer] = weight + sketch @ inverse @ moved
            factors = {client: inverse @ move / scale for client, move in moves.items()}
        for client, factor in factors.items():
            changes[client][f"{layer}.lora_{side}"] = torch.from_numpy(factor)
    for client, weight in drawn.clients.items():
        updates[client] = ClientUpdate({**changes[client], "fc1.bias": drawn.weights["fc1.bias"]}, weight, start)
    assert set(updates[client].tensors) == set(sent_shapes(method.trains(1, start), start, drawn.weights))
    found = after(drawn, method.aggregate(drawn.weights, start, updates))
    assert_equal({layer: flat(found[f"{layer}.weight"]) for layer in expected}, expected, 1e-10)


# ---- the optimiser's state between rounds

KEEPING = ("rac_lora", "fed_it", "chain_of_lora", "ffa_lora", "full")


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("mode", MOMENTS)
def test_the_rule_on_moments_is_what_the_clients_are_told_and_reset_where_none_is_named(name, mode):
    drawn = problem()
    for own, expected in (({"moments": mode}, mode), ({}, "reset")):
        method = build((name, own), drawn.adapter)
        assert method.trains(1, opened(drawn, method)).moments == expected


# ---- settings that make no sense

REFUSED: Sequence[tuple[str, dict, str]] = [
    ("rac_lora", {"side": "c"}, r"method.side='c' is unknown; valid: a, auto, b"),
    ("rac_lora", {"moments": "carried"}, r"did you mean 'carry'"),
    ("rac_lora", {"contributors": "row"}, r"did you mean 'rows'"),
    ("rac_lora", {"rounds_per_link": -1}, r"rounds_per_link=-1 must not be negative"),
    ("rac_lora", {"rounds_per_link": 2, "shared": False}, r"found method.rounds_per_link=2, set it to 1"),
    ("rac_lora", {"contributors": "rows", "shared": False}, r"set it to 'all'"),
    ("ffa_lora", {"shared": False}, r"sketch.shared=false is not for it"),
    *((name, {"moments": "kep"}, "did you mean 'keep'") for name in KEEPING),
    ("chain_of_lora", {"rounds_per_link": -1}, r"rounds_per_link=-1 must not be negative"),
    ("fedex_lora", {"residual": "denze"}, r"did you mean 'dense'"),
    ("fedex_lora", {"residual_rank": 0}, r"residual_rank=0 must be at least 1"),
    ("fed_sb", {"init": "rand"}, r"did you mean 'random'"),
    ("lora_fair", {"ridge": 0.0}, r"ridge=0.0 must be positive"),
    ("fed_krso", {"num_seeds": 0}, r"num_seeds=0 .* must be at least 1"),
    ("fed_krso", {"block_steps": 0}, r"block_steps=0 must be at least 1"),
    ("fed_slop", {"upload": "deltas"}, r"did you mean 'delta'"),
    ("fed_slop", {"moments": "transport"}, r"method.moments='transport' is unknown; valid: carry, reset"),
    ("fed_slop", {"upload": "factor"}, r"upload=factor needs method.moments=reset, found 'carry'"),
    ("bernoulli_lora", {"probability": 1.5}, r"probability=1.5 must lie in \[0, 1\]"),
    ("sketched_full", {"side": "ab"}, r"method.side='ab' is unknown"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED, ids=[f"{n}-{m[:25]}" for n, _, m in REFUSED])
def test_settings_that_make_no_sense_are_refused_with_what_would(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build((name, changes), problem().adapter)


@pytest.mark.parametrize("name", [name for name in names("strategies") if name != "full"])
def test_a_rank_that_a_layer_cannot_have_is_refused_with_the_limit(name):
    drawn = problem(ranks=(10, 3, 2))  # fc1 has 6 outputs and 9 inputs
    with pytest.raises(ValueError, match=r"rank 10 exceeds|rank 10 of|smaller rank than 10") as refusal:
        opened(drawn, build((name, {}), drawn.adapter))
    assert re.search(r"\b[69]\b", str(refusal.value))
