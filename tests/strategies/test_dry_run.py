"""A dry run tells the bytes of every message of the run, and needs no numbers for it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from experiments.settings import MemorySettings, PrivacySettings, RobustSettings, ServerSettings, SketchSettings
from fedraclora.chain import Chain
from fedraclora.ledger import LedgerRow
from fedraclora.link import Dense, Link
from fedraclora.server_rule import RULES, ServerRule
from strategies.base import ChainStrategy
from strategies.dry_run import DryRun, ShapeChain
from strategies.rounds import RoundReport
from strategies.state import Budget, BudgetTooSmall
from tests.conformance.cases import ALL
from tests.helpers import METHODS, Federation, federation, settings

Messages = dict[tuple[int, str, int, str], int]


def dry_run(parts: Federation) -> DryRun:
    """Return the dry run of a federation, on its problem's shapes."""
    return DryRun(parts.problem.method, parts.problem.new_chain().merged, parts.problem.rounds)


def tensor_bytes(reports: list[RoundReport]) -> Messages:
    """Return the tensor bytes by round, direction, client and kind."""
    rows: list[LedgerRow] = [row for report in reports for row in report.rows if row.tensor_bytes]
    return {(row.round, row.direction, row.partition, row.kind): row.tensor_bytes for row in rows}


def assert_told(parts: Federation) -> DryRun:
    """Run both and compare them message by message and kind by kind."""
    told = dry_run(parts)
    predicted = tensor_bytes(list(told.rounds_to(parts.settings.rounds)))
    spent = tensor_bytes(parts.run())
    if told.is_exact:
        assert predicted == spent
    else:
        assert all(size <= predicted.get(key, 0) for key, size in spent.items())
    return told


@pytest.mark.parametrize("name", ALL)
def test_every_method_and_option_sends_what_its_dry_run_says(name):
    assert_told(federation(settings(rounds=5, **ALL[name])))


def test_what_is_exact():
    """All but a compressor of varying size, and compressing what an open link sends again and again."""
    cases = {name: dry_run(federation(settings(**case))).is_exact for name, case in ALL.items()}
    assert [name for name, is_exact in cases.items() if not is_exact] == ["EF21"]
    assert not dry_run(federation(settings(uplink="lossless"))).is_exact
    assert not dry_run(federation(settings(method="fed_it", downlink="int8"))).is_exact
    assert not dry_run(federation(settings(method="fed_it", uplink="rand_k"))).is_exact
    assert dry_run(federation(settings(method="rac_lora", uplink="rand_k", downlink="int8"))).is_exact


# ---- over random settings

OWN: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "rac_lora": st.fixed_dictionaries(
        {"side": st.sampled_from(["b", "a", "auto"]), "rounds_per_link": st.integers(0, 3)}
    ),
    "ffa_lora": st.just({}),
    "bernoulli_lora": st.fixed_dictionaries({"probability": st.sampled_from([0.0, 0.3, 1.0])}),
    "chain_of_lora": st.fixed_dictionaries({"rounds_per_link": st.integers(0, 3)}),
    "sketched_full": st.fixed_dictionaries({"side": st.sampled_from(["b", "a", "auto"])}),
    "fed_krso": st.fixed_dictionaries({"num_seeds": st.integers(1, 3), "block_steps": st.just(1)}),
    "flora": st.fixed_dictionaries({"private_start": st.booleans()}),
    "fedex_lora": st.fixed_dictionaries(
        {"residual": st.sampled_from(["auto", "factors", "dense", "truncated"]), "residual_rank": st.integers(1, 3)}
    ),
    "fed_sb": st.fixed_dictionaries({"init": st.sampled_from(["update", "random"])}),
    "fed_slop": st.sampled_from([{}, {"upload": "factor", "moments": "reset"}]),
}
UPLINKS = ["none", "float16", "bfloat16", "int8", "int4", "qsgd", "natural", "top_k", "rand_k", "sign", "lossless"]
DOWNLINKS = ["none", "float16", "int8", "natural", "lossless", "top_k"]


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the settings of a small run, whatever goes together."""
    method = draw(st.sampled_from(METHODS))
    clients = draw(st.integers(2, 6))
    chosen: dict[str, Any] = {
        "method": (method, draw(OWN.get(method, st.just({})))),
        "model": draw(st.sampled_from([("mlp", {"hidden": [12]}), "softmax_regression"])),
        "partition": "iid",
        "num_clients": clients,
        "fraction": draw(st.integers(1, clients)) / clients,
        "rounds": draw(st.integers(1, 6)),
        "rank": draw(st.integers(1, 4)),
        "catch_up": draw(st.sampled_from(["cheapest", "replay", "snapshot"])),
        "broadcast": draw(st.sampled_from(["lazy", "eager"])),
        "uplink": draw(st.sampled_from(UPLINKS)),
        "downlink": draw(st.sampled_from(DOWNLINKS)),
        "dense": draw(st.sampled_from([[], ["*.bias"]])),
        "dtype": draw(st.sampled_from(["float32", "float64"])),
        "seed": draw(st.integers(0, 1000)),
        "lr": 0.05,
    }
    return chosen | draw(st.sampled_from(MORE))


MORE: list[dict[str, Any]] = [
    {},
    {"memory": MemorySettings("ef")},
    {"memory": MemorySettings("ef21")},
    {"memory": MemorySettings("marina", whole_probability=0.4)},
    {"scaffold": True},
    {"server": ServerSettings("adam", lr=0.03)},
    {"server": ServerSettings("momentum", lr=0.5)},
    {"sketch": SketchSettings(shared=False)},
    {"client_ranks": {1: 0.5, 3: 0.5}, "rank": 3},
    {"robust": RobustSettings("median")},
    {"privacy": PrivacySettings("client", clip=0.5, noise=0.1)},
]


@examples(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(runs())
def test_the_ledger_of_a_random_run_is_what_was_predicted(chosen):
    try:
        parts = federation(settings(**chosen))
    except ValueError:  # settings that do not go together are refused, and cost nothing
        assume(False)
    event(chosen["method"][0])
    assert_told(parts)


# ---- what else it keeps to


@pytest.mark.parametrize("limit", ["total_bytes", "uplink_bytes", "per_client_bytes"])
def test_a_budget_ends_a_dry_run_in_the_round_in_which_it_ends_the_run(limit):
    parts = federation(settings(rounds=12))
    whole = list(dry_run(parts).rounds_to(6))
    half = sum(report.traffic.total_bytes for report in whole) * {"total_bytes": 1, "uplink_bytes": 0.4}.get(limit, 0.3)
    problem = replace(parts.problem, rounds=replace(parts.problem.rounds, budget=Budget(**{limit: half})))
    told = DryRun(problem.method, problem.new_chain().merged, problem.rounds)
    predicted = list(told.rounds_to(12))
    strategy = ChainStrategy(problem.method, problem.new_chain(), problem.rounds)
    spent = list(strategy.rounds(parts.grid, 12))[1:]
    assert told.stop_reason == strategy.stop_reason is not None
    assert len(predicted) == len(spent) > 0
    assert tensor_bytes(predicted) == tensor_bytes(spent)


def test_a_budget_below_one_round_is_refused():
    parts = federation(settings())
    problem = parts.problem
    told = DryRun(problem.method, problem.new_chain().merged, replace(problem.rounds, budget=Budget(total_bytes=10)))
    with pytest.raises(BudgetTooSmall, match="no round affordable"):
        list(told.rounds_to(3))


def test_nothing_of_the_size_of_the_model_is_allocated():
    """A thousand layers of 4096 x 4096 would take 64 GiB."""
    parts = federation(settings(method="full"))
    weights = {f"layer{place}.weight": torch.empty(4096, 4096, device="meta") for place in range(1000)}
    chain = ShapeChain.over(weights)
    assert sum(tensor.numel() for tensor in chain.merged.values()) == 1000 * 4096**2
    assert all(tensor.is_meta for tensor in dry_run(parts).chain.merged.values())


@pytest.mark.parametrize("rule", RULES)
def test_the_moments_of_a_server_rule_are_part_of_a_snapshot(rule):
    real = {"fc.weight": torch.zeros(3, 4)}
    chain, shapes = Chain.start(real), ShapeChain.over(real)
    for each, delta in ((chain, torch.ones(3, 4)), (shapes, torch.ones(3, 4, device="meta"))):
        each.open_link(Link(0, (Dense("fc.weight", delta),), rule=ServerRule(rule)))
        each.close()
    found = {name: tuple(tensor.shape) for name, tensor in shapes.everything().items()}
    assert found == {name: tuple(tensor.shape) for name, tensor in chain.everything().items()}
