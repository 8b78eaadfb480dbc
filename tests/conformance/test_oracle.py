"""Every method, through server, messages and clients, is what a few dozen lines of NumPy say it is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from experiments.settings import ServerSettings, SketchSettings
from fedraclora import sketch
from fedraclora.link import SketchKey
from fedraclora.local import local_batches
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
    is_exact: bool
    first_exact: int = 1


def case(rule, own=None, more=None, *, exact=True, first_exact=1) -> Case:
    return Case(rule, own or {}, more or {}, exact, first_exact)


def chain(side: str, length: int) -> Callable[[oracle.Run, World], oracle.Final]:
    return lambda run, world: oracle.chain(run, side, length)


def seeds(number: int, block_steps: int) -> Callable[[oracle.Run, World], oracle.Final]:
    return lambda run, world: oracle.fed_krso(run, world.subspaces(number), world.orders(number), block_steps)


CASES: dict[str, dict[str, Case]] = {
    "rac_lora": {
        **{f"{side} {n}": case(chain(side, n), {"side": side, "rounds_per_link": n}) for side in "ba" for n in (2, 0)},
        **{side: case(lambda run, world, s=side: oracle.rac_lora(run, s), {"side": side}) for side in "ba"},
        "unlike": case(lambda run, world: oracle.rac_lora(run), more=UNLIKE),
        "unlike a": case(lambda run, world: oracle.rac_lora(run, "a"), {"side": "a"}, UNLIKE),
        "private": case(lambda run, world: oracle.rac_lora(run, "b", world.private), more=PRIVATE),
        "private a": case(lambda run, world: oracle.rac_lora(run, "a", world.private), {"side": "a"}, PRIVATE),
        "private unlike": case(lambda run, world: oracle.rac_lora(run, "b", world.private), more=UNLIKE | PRIVATE),
        "rows": case(
            lambda run, world: oracle.rac_lora_rows(run), {"contributors": "rows"}, UNLIKE, exact=False,
        ),
        "rows a": case(
            lambda run, world: oracle.rac_lora_rows(run, "a"), {"contributors": "rows", "side": "a"}, UNLIKE, exact=False,
        ),
    },
    "ffa_lora": {"": case(lambda run, world: oracle.ffa_lora(run))},
    "fed_it": {"": case(lambda run, world: oracle.fed_it(run), exact=False)},
    "chain_of_lora": {
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
        **{way: case(lambda run, world: oracle.fedex_lora(run), {"residual": way}) for way in ("auto", "factors", "dense")},
        "truncated": case(
            lambda run, world: oracle.fedex_lora(run, 2), {"residual": "truncated", "residual_rank": 2}, exact=False,
        ),
    },
    "flexlora": {
        "": case(lambda run, world: oracle.flexlora(run), exact=False),
        "unlike": case(lambda run, world: oracle.flexlora(run), more=UNLIKE, exact=False),
    },
    "het_lora": {
        "": case(lambda run, world: oracle.het_lora(run), exact=False),
        "unlike": case(lambda run, world: oracle.het_lora(run), more=UNLIKE, exact=False),
    },
    "ro_lora": {"": case(lambda run, world: oracle.ro_lora(run))},
    "fed_sb": {
        "": case(lambda run, world: oracle.fed_sb(run, RANK), first_exact=2),
        "random": case(lambda run, world: oracle.fed_sb_random(run), {"init": "random"}),
    },
    "lora_fair": {"": case(lambda run, world: oracle.lora_fair(run, 0.05), {"ridge": 0.05}, exact=False)},
    "fr_lora": {"": case(lambda run, world: oracle.fr_lora(run, RANK), exact=False)},
    "fed_krso": {
        "": case(seeds(3, 1), {"num_seeds": 3, "block_steps": 1}),
        "long blocks": case(seeds(2, 3), {"num_seeds": 2, "block_steps": 3}),
    },
    "fed_slop": {
        "": case(lambda run, world: oracle.fed_slop(run, 0.6), more={"momentum": 0.6}),
        "reset": case(
            lambda run, world: oracle.fed_slop(run, 0.6, carried=False), {"moments": "reset"}, {"momentum": 0.6},
        ),
        "factor": case(
            lambda run, world: oracle.fed_slop(run, 0.6, carried=False, upload="factor"),
            {"moments": "reset", "upload": "factor"}, {"momentum": 0.6},
        ),
    },
    "bernoulli_lora": {"": case(lambda run, world: oracle.bernoulli_lora(run, world.sides))},
    "sketched_full": {"": case(lambda run, world: oracle.sketched_full(run))},
}  # fmt: skip
ALL_CASES = {
    f"{name} {options}".strip(): (name, found) for name, cases in CASES.items() for options, found in cases.items()
}
every_case = pytest.mark.parametrize("which", ALL_CASES)


def shared(name, own, **changes):
    wanted = {"rank": RANK, "alpha": ALPHA, "lr": LR, "rounds": ROUNDS, "dtype": "float64", "local_steps": 4}
    return settings(method=(name, dict(own)), seed=3, verify=True, **{**wanted, **changes})


def check(chosen, found: Case):
    """Run the settings and compare with the oracle: the weights and biases at the end, and each round's gap."""
    parts = federation(chosen)
    gaps = [report.aggregation_gap for report in parts.run()[1:]]
    world = World(parts)
    run = world.run
    weights, biases = found.rule(run, world)
    ends = parts.chain.weights()
    mine = [plain(ends[f"{layer}.{kind}"]) for kind in ("weight", "bias") for layer in world.layers]
    for ours, theirs in zip(mine, weights + biases, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    assert all(np.abs(end - start).max() > 1e-3 for end, start in zip(mine, run.weights, strict=False)), "nothing moved"
    assert len(gaps) == chosen.rounds
    is_alone = len(run.cohorts[0]) == 1
    for round, gap in enumerate(gaps, start=1):
        assert (gap < 1e-12) == ((found.is_exact and round >= found.first_exact) or is_alone), (round, gap)


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
