"""Every method, through server, messages and clients, is what a few dozen lines of NumPy say it is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from experiments.settings import SketchSettings
from fedraclora import sketch
from fedraclora.link import SketchKey
from fedraclora.local import local_batches
from fedraclora.payload import unflatten
from fedraclora.seeding import derive_seed, generator, stream
from strategies.rounds import sample_cohort
from tests.conformance import oracle
from tests.helpers import METHODS, Federation, federation, settings

RANK, ALPHA, LR, ROUNDS = 3, 4.5, 0.4, 3
UNLIKE = {"client_ranks": [1, 2, 3, 1, 3, 2]}
PRIVATE = {"sketch": SketchSettings(shared=False)}


def plain(tensor):
    return tensor.numpy().astype(np.float64)


@dataclass(frozen=True)
class World:
    """A federation as the oracle wants to be told of it: its run, and whatever is random."""

    parts: Federation

    @property
    def layers(self) -> list[str]:
        return [
            name for name, module in self.parts.problem.model.named_modules() if isinstance(module, torch.nn.Linear)
        ]

    @property
    def base(self) -> dict[str, torch.Tensor]:
        return self.parts.problem.new_chain().weights()

    @property
    def run(self) -> oracle.Run:
        chosen, problem = self.parts.settings, self.parts.problem
        base, rows = self.base, self.parts.replica.data.partitions
        rank, ranks = chosen.rank, dict(enumerate(chosen.client_ranks or []))
        is_uniform = chosen.weighting == "uniform"
        return oracle.Run(
            weights=[plain(base[f"{layer}.weight"]) for layer in self.layers],
            biases=[plain(base[f"{layer}.bias"]) for layer in self.layers],
            cohorts=[sample_cohort(chosen.seed, round, problem.rounds) for round in range(1, chosen.rounds + 1)],
            batches=self.batches, sizes={client: 1 if is_uniform else len(own) for client, own in rows.items()},
            lr=chosen.lr, scale=1.0 if chosen.alpha is None else chosen.alpha / rank, draw=self.draw, ranks=ranks,
            scales={client: chosen.alpha / min(rank, own) for client, own in ranks.items() if chosen.alpha is not None},
        )  # fmt: skip

    def key(self, link: int, layer: int, trained: str) -> SketchKey:
        chosen, name = self.parts.settings, self.layers[layer]
        shape = self.base[f"{name}.weight"].shape
        return SketchKey(
            law=chosen.sketch.law, seed=stream(chosen.seed, "sketch"), link=link, layer=name, side=trained,
            rank=chosen.rank, dim=shape[0] if trained == "a" else shape[1],
        )  # fmt: skip

    def draw(self, link: int, layer: int, trained: str) -> oracle.Matrix:
        return plain(sketch.draw(self.key(link, layer, trained)))

    def private(self, link: int, layer: int, trained: str, client: int) -> oracle.Matrix:
        key = self.key(link, layer, trained)
        return plain(sketch.draw(replace(key, seed=derive_seed(key.seed, "client", client))))

    def subspaces(self, number: int) -> Callable[[int, int], oracle.Layers]:
        def drawn(link: int, layer: int) -> oracle.Layers:
            key = self.key(link, layer, "b")
            return [plain(sketch.draw(replace(key, seed=derive_seed(key.seed, "block", j)))) for j in range(number)]

        return drawn

    def orders(self, number: int) -> Callable[[int, int], list[int]]:
        return lambda round, client: list(
            generator(derive_seed(self.batch_seed(round, client), "blocks")).permutation(number)
        )

    def sides(self, link: int, layer: int) -> str:
        """Return the trained side, read off the links after the run."""
        return "b" if isinstance(self.parts.chain.links[link].terms[layer].lora_a, SketchKey) else "a"

    def batch_seed(self, round: int, client: int) -> int:
        seed = stream(self.parts.settings.seed, "batches")
        return derive_seed(derive_seed(seed, "round", round), "client", client)

    def batches(self, round: int, client: int) -> Iterator[tuple[oracle.Matrix, Any]]:
        examples, own = self.parts.problem.dataset.train, self.parts.replica.data.partitions[client]
        rows, sizes = local_batches(own, self.batch_seed(round, client), self.parts.problem.rounds.local)
        for row, size in zip(rows, sizes, strict=True):
            yield plain(examples.inputs[row[:size]]).reshape(size, -1), examples.targets[row[:size]].numpy()


@dataclass(frozen=True)
class Case:
    """A method with some options, the oracle's function for it, and whether what it merges is the clients' mean."""

    rule: Callable[[oracle.Run, World], oracle.Final]
    own: Mapping[str, Any]
    more: Mapping[str, Any]
    is_exact: bool | None
    first_exact: int = 1


def case(rule, own=None, more=None, *, exact=True, first_exact=1) -> Case:
    return Case(rule, own or {}, more or {}, exact, first_exact)


def run_rank(world: World) -> int:
    return world.parts.settings.rank


def chain(side: str, length: int) -> Callable[[oracle.Run, World], oracle.Final]:
    return lambda run, world: oracle.chain(run, side, length)


def seeds(number: int, block_steps: int) -> Callable[[oracle.Run, World], oracle.Final]:
    return lambda run, world: oracle.fed_krso(run, world.subspaces(number), world.orders(number), block_steps)


def slop(*, carried: bool, upload: str = "delta") -> Callable[[oracle.Run, World], oracle.Final]:
    """FedSLoP's projector is that of the rows of P, which as drawn are orthonormal in float32 only."""

    def rule(run, world):
        def rows(link, layer, trained):
            u, _, vt = np.linalg.svd(world.draw(link, layer, trained), full_matrices=False)
            return u @ vt

        return oracle.fed_slop(replace(run, draw=rows), 0.6, carried=carried, upload=upload)

    return rule


def residual(way: str, **own: Any) -> Case:
    rank = own.get("residual_rank")
    return case(lambda run, world: oracle.fedex_lora(run, rank), {"residual": way, **own}, exact=rank is None)


MOMENTUM = {"momentum": 0.6}
GENTLE = {**UNLIKE, "lr": 0.05}  # two factors of rank 1 have the whole alpha for their scale
CASES: dict[str, dict[str, Case]] = {
    "rac_lora": {
        **{f"{side} {n}": case(chain(side, n), {"side": side, "rounds_per_link": n}) for side in "ba" for n in (2, 0)},
        **{side: case(lambda run, world, s=side: oracle.rac_lora(run, s), {"side": side}) for side in "ba"},
        "unlike": case(lambda run, world: oracle.rac_lora(run), more=UNLIKE),
        "unlike a": case(lambda run, world: oracle.rac_lora(run, "a"), {"side": "a"}, UNLIKE),
        "private": case(lambda run, world: oracle.rac_lora(run, "b", world.private), more=PRIVATE),
        "private a": case(lambda run, world: oracle.rac_lora(run, "a", world.private), {"side": "a"}, PRIVATE),
        "private unlike": case(lambda run, world: oracle.rac_lora(run, "b", world.private), more=UNLIKE | PRIVATE),
        **{
            f"rows {side}": case(
                lambda run, world, s=side: oracle.rac_lora_rows(run, s),
                {"side": side, "contributors": "rows"}, UNLIKE, exact=False,
            )
            for side in "ba"
        },
    },
    "ffa_lora": {"": case(lambda run, world: oracle.ffa_lora(run))},
    "fed_it": {
        "": case(lambda run, world: oracle.fed_it(run), exact=False),
        "A at zero": case(lambda run, world: oracle.chain(run, "ab", 0, "a"), {"zero": "a"}, exact=False),
    },
    "chain_of_lora": {
        "A at zero": case(
            lambda run, world: oracle.chain(run, "ab", 2, "a"), {"zero": "a", "rounds_per_link": 2}, exact=False
        ),
        "1": case(lambda run, world: oracle.chain_of_lora(run), exact=False),
        "2": case(lambda run, world: oracle.chain_of_lora(run, 2), {"rounds_per_link": 2}, exact=False),
    },
    "full": {"": case(lambda run, world: oracle.full(run))},
    "flora": {
        "": case(lambda run, world: oracle.flora(run, world.private)),
        "common": case(lambda run, world: oracle.flora(run), {"private_start": False}),
        "unlike": case(lambda run, world: oracle.flora(run, world.private), more=UNLIKE),
    },
    "fedex_lora": {
        **{way: residual(way) for way in ("auto", "factors", "dense")},
        "truncated": residual("truncated", residual_rank=2),
    },
    "flexlora": {
        "": case(lambda run, world: oracle.flexlora(run), exact=False),
        # Exact in rounds whose clients' ranks add up to no more than the pair's.
        "unlike": case(lambda run, world: oracle.flexlora(run), more=GENTLE, exact=None),
    },
    "het_lora": {
        "": case(lambda run, world: oracle.het_lora(run), exact=False),
        "unlike": case(lambda run, world: oracle.het_lora(run), more=GENTLE, exact=False),
    },
    "ro_lora": {"": case(lambda run, world: oracle.ro_lora(run))},
    "fed_sb": {
        "": case(lambda run, world: oracle.fed_sb(run, run_rank(world)), first_exact=2),
        "random": case(lambda run, world: oracle.fed_sb_random(run), {"init": "random"}),
    },
    "lora_fair": {"": case(lambda run, world: oracle.lora_fair(run, 0.05), {"ridge": 0.05}, exact=False)},
    "fr_lora": {"": case(lambda run, world: oracle.fr_lora(run, run_rank(world)), exact=False)},
    "fed_krso": {
        "": case(seeds(3, 1), {"num_seeds": 3, "block_steps": 1}),
        "long blocks": case(seeds(2, 3), {"num_seeds": 2, "block_steps": 3}),
    },
    "fed_slop": {
        "": case(slop(carried=True), more=MOMENTUM),
        "reset": case(slop(carried=False), {"moments": "reset"}, MOMENTUM),
        "factor": case(slop(carried=False, upload="factor"), {"moments": "reset", "upload": "factor"}, MOMENTUM),
    },
    "bernoulli_lora": {"": case(lambda run, world: oracle.bernoulli_lora(run, world.sides))},
    "sketched_full": {"": case(lambda run, world: oracle.sketched_full(run))},
}  # fmt: skip
ALL_CASES = {f"{name} {key}".strip(): (name, found) for name, cases in CASES.items() for key, found in cases.items()}
every_case = pytest.mark.parametrize("which", ALL_CASES)


def shared(name, own, **changes):
    wanted = {"rank": RANK, "alpha": ALPHA, "lr": LR, "rounds": ROUNDS, "dtype": "float64", "local_steps": 4}
    return settings(method=(name, dict(own)), seed=3, verify=True, **{**wanted, **changes})


def check(chosen, found: Case, *, least=1e-3):
    """Run the settings and compare with the oracle: the weights and biases at the end, and each round's gap.

    Every layer must have moved by `least` somewhere.
    """
    parts = federation(chosen)
    gaps = [report.aggregation_gap for report in parts.run()[1:]]
    world = World(parts)
    run = world.run
    weights, biases = found.rule(run, world)
    ends = parts.chain.weights()
    mine = [plain(ends[f"{layer}.{kind}"]) for kind in ("weight", "bias") for layer in world.layers]
    for ours, theirs in zip(mine, weights + biases, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    moved = [np.abs(end - start).max() for end, start in zip(mine, run.weights, strict=False)]
    assert min(moved) > least, moved
    assert len(gaps) == chosen.rounds
    for round, gap in enumerate(gaps, start=1):
        if round >= found.first_exact and found.is_exact is not None:
            assert (gap < 1e-12) == found.is_exact, (round, gap)


@every_case
def test_a_perceptron_trained_by_part_of_the_clients_ends_where_numpy_does(which):
    name, found = ALL_CASES[which]
    check(shared(name, found.own, **found.more), found)


@every_case
def test_softmax_regression_with_local_epochs_of_unequal_clients_ends_where_numpy_does(which):
    name, found = ALL_CASES[which]
    epochs = {"local_steps": 20, "local_epochs": 1, "batch_size": 50, "model": "softmax_regression", "fraction": 0.34}
    check(shared(name, found.own, **found.more, **epochs), found)


def test_every_method_has_a_case():
    assert {*CASES, "fed_sa_lora"} == set(METHODS)


@given(which=st.sampled_from(sorted(ALL_CASES)), data=st.data())
@hypothesis_settings(max_examples=12)
def test_whatever_the_shapes_ranks_scales_clients_and_weights(which, data):
    """Ranks do not exceed the ten outputs, as both factors may train."""
    name, found = ALL_CASES[which]
    num_clients, rank = data.draw(st.integers(1, 5), "clients"), data.draw(st.integers(1, 4), "rank")
    more = dict(found.more)
    if "client_ranks" in more:
        more["client_ranks"] = data.draw(
            st.lists(st.integers(1, 5), min_size=num_clients, max_size=num_clients), "ranks"
        )
    hidden = data.draw(st.lists(st.integers(4, 9), max_size=2), "hidden")
    chosen = shared(
        name, found.own, **{
            **more, "num_clients": num_clients, "fraction": data.draw(st.floats(0.3, 1.0), "fraction"), "rank": rank,
            "alpha": data.draw(st.none() | st.floats(0.5, 1.5).map(lambda scale: scale * rank), "alpha"),
            "weighting": data.draw(st.sampled_from(["examples", "uniform"]), "weighting"),
            "model": ("mlp", {"hidden": hidden}) if hidden else "softmax_regression",
            "partition": data.draw(st.sampled_from(["dirichlet", "iid"]), "partition"),
            "rounds": 2, "local_steps": data.draw(st.integers(1, 4), "steps"), "lr": 0.05,
        },
    )  # fmt: skip
    check(chosen, replace(found, is_exact=None), least=1e-8)


def test_clients_of_fedsa_lora_end_with_the_a_and_each_its_own_b_of_numpy():
    parts = federation(shared("fed_sa_lora", {}, rounds=4))
    reports = parts.run()
    world = World(parts)
    common, own = oracle.fed_sa_lora(world.run)
    for layer, expected in zip(world.layers, common, strict=True):
        np.testing.assert_allclose(plain(parts.chain.open.factors[f"{layer}.lora_a"]), expected, rtol=1e-10, atol=1e-10)
    last_used = parts.strategy.state.last_used
    assert own.keys() == last_used.keys()
    for client, matrices in own.items():
        kept = parts.replica.store.load(client, last_used[client]).tensors["private"]
        for layer, expected in zip(world.layers, matrices, strict=True):
            np.testing.assert_allclose(plain(kept[f"{layer}.lora_b"]), expected, rtol=1e-10, atol=1e-10)
    assert all(np.isnan(report.aggregation_gap) for report in reports), "there is no model to compare"
    base, ends = world.base, parts.chain.weights()
    assert all(torch.equal(ends[name], base[name]) for name in base), "the server's B is zero"


@pytest.mark.parametrize("law", sketch.LAWS)
def test_every_law_of_the_sketch_goes_through_the_whole_stack(law):
    chosen = shared("rac_lora", {}, lr=0.01 if law == "raw" else LR)
    chosen.sketch.law = law
    check(chosen, CASES["rac_lora"]["b"])


def test_the_gap_of_fed_it_is_the_covariance_of_the_clients_factors():
    """sum p_k B_k A_k - Bbar Abar = sum p_k (B_k - Bbar)(A_k - Abar), relative to the mean of the clients' changes."""
    parts = federation(shared("fed_it", {}, fraction=1.0))
    gaps = [report.aggregation_gap for report in parts.run()[1:]]
    world = World(parts)
    shapes = [tuple(t.shape) for t in parts.chain.open.explicit_factors.values()]
    start = {layer: (0.0, world.draw(0, place, "ab")) for place, layer in enumerate(world.layers)}
    for round, shares in world.run.rounds():
        sent = {
            client: [plain(t) for t in unflatten(message.content.array_records["update"]["flat"].numpy(), shapes)]
            for way, client, message in parts.grid.seen
            if (way, message.metadata.group_id) == ("up", str(round))
        }
        missed, moved = 0.0, 0.0
        for place, layer in enumerate(world.layers):
            pairs = {client: (arrays[2 * place + 1], arrays[2 * place]) for client, arrays in sent.items()}
            b, a = (sum(share * pairs[client][side] for client, share in shares.items()) for side in (0, 1))
            covariance = sum(share * (pairs[k][0] - b) @ (pairs[k][1] - a) for k, share in shares.items())
            wanted = sum(share * pairs[k][0] @ pairs[k][1] for k, share in shares.items())
            old_b, old_a = start[layer]
            missed += np.square(covariance).sum()
            moved += np.square(wanted - (old_b @ old_a if round > 1 else 0.0)).sum()
            start[layer] = b, a
        assert gaps[round - 1] == pytest.approx(np.sqrt(missed / moved), rel=1e-9)
        assert gaps[round - 1] > 1e-3
