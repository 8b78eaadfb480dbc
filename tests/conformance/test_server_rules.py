"""The server's optimiser in whole runs: replayed by the replicas where links are merged, on the factors where not.

The steps are written here in NumPy, after Algorithm 2 of Reddi et al. 2021 (arXiv 2003.00295), and the clients'
updates are read from the messages.
"""

import numpy as np
import pytest
import torch

from experiments.settings import ServerSettings
from fedraclora.chain import equal_weights
from fedraclora.link import materialize
from fedraclora.payload import unflatten
from fedraclora.server_rule import RULES
from strategies.rounds import sample_cohort
from tests.helpers import AppsGrid, federation, settings

LR, BETA1, BETA2, TAU = 0.3, 0.8, 0.9, 0.01
REPLAYED = [rule for rule in RULES if rule != "sgd"]


def server(rule, lr=LR):
    return ServerSettings(rule, lr=lr, beta1=BETA1, beta2=BETA2, tau=TAU)


def stepper(rule):
    """Return what makes steps of updates one after the other."""
    m, v = 0.0, TAU**2

    def step(u):
        nonlocal m, v
        if rule == "sgd":
            return LR * u
        if rule == "momentum":
            m = BETA1 * m + u
            return LR * m
        m = BETA1 * m + (1 - BETA1) * u
        if rule == "adagrad":
            v = v + u**2
        elif rule == "adam":
            v = BETA2 * v + (1 - BETA2) * u**2
        else:
            v = v - (1 - BETA2) * u**2 * np.sign(v - u**2)
        return LR * m / (np.sqrt(v) + TAU)

    return step


def means_of(parts, kind="update", shapes=None):
    """Yield the mean of what the clients sent in each round, as a list of arrays."""
    sizes = [len(rows) for rows in parts.problem.split.indices]
    for round in range(1, parts.settings.rounds + 1):
        cohort = sample_cohort(parts.settings.seed, round, parts.problem.rounds)
        total = sum(sizes[client] for client in cohort)
        sent = {
            client: unflatten(message.content.array_records[kind]["flat"].numpy(), shapes)
            for way, client, message in parts.grid.seen
            if (way, message.metadata.group_id) == ("up", str(round))
        }
        yield [
            sum(sizes[client] / total * sent[client][place].numpy() for client in cohort)
            for place in range(len(shapes))
        ]


def close(found, expected):
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
def test_merged_links_are_the_updates_of_the_rule(rule):
    parts = federation(settings(dtype="float64", server=server(rule), rounds=5))
    parts.run()
    base = parts.problem.new_chain().weights()
    terms = parts.chain.links[0].terms
    weights = {term.target: base[term.target].numpy() for term in terms}
    steps = {target: stepper(rule) for target in weights}
    means = means_of(parts, shapes=[tuple(term.lora_b.shape) for term in terms])
    for link, mean in zip(parts.chain.links, means, strict=True):
        for term, lora_b in zip(link.terms, mean, strict=True):
            lora_a = materialize(term.lora_a, base[term.target]).numpy()
            weights[term.target] = weights[term.target] + steps[term.target](term.scale * lora_b @ lora_a)
    for target, expected in weights.items():
        close(parts.chain.weights()[target], expected)


@pytest.mark.parametrize("rule", REPLAYED)
@pytest.mark.parametrize("catch_up", ["replay", "snapshot"])
def test_replicas_replay_the_rule_bit_for_bit_at_no_cost(rule, catch_up):
    """Each client has a replica of its own; few take part, so that most replay several links, or take the moments."""
    own = {"rounds": 6, "fraction": 0.34, "catch_up": catch_up}
    chosen = settings(server=server(rule), **own)
    parts = federation(chosen)
    parts.grid = AppsGrid(parts.problem, chosen)
    merged, reports = {}, []
    for report in parts.iterate():
        reports.append(report)
        merged[parts.chain.num_links] = {name: tensor.clone() for name, tensor in parts.chain.merged.items()}
    assert all((report.num_ok, report.num_retried) == (report.num_clients, 0) for report in reports)
    for replica in parts.grid.replicas:
        assert equal_weights(replica.chain.merged, merged[replica.chain.num_links])
    assert max(replica.chain.num_links for replica in parts.grid.replicas) == 5
    found, plain = (
        [report.traffic.downlink_bytes for report in run] for run in (reports, federation(settings(**own)).run())
    )
    assert found == plain if catch_up == "replay" else sum(found) > sum(plain), "moments are in a snapshot"


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_on_a_link_that_stays_open_the_rule_works_on_its_factors(rule):
    """Momentum: FedAvgM on A and B, each from where the clients started."""
    parts = federation(settings(method="fed_it", dtype="float64", server=server(rule), lr=0.05, rounds=4))
    parts.run()
    first = parts.problem.method.open_link(0, parts.chain.merged)
    factors = {name: materialize(f, torch.zeros((), dtype=torch.float64)).numpy() for name, f in first.factors.items()}
    steps = {name: stepper(rule) for name in factors}
    for mean in means_of(parts, shapes=[factor.shape for factor in factors.values()]):
        for name, value in zip(list(factors), mean, strict=True):
            factors[name] = factors[name] + steps[name](value - factors[name])
    for name, expected in factors.items():
        close(parts.chain.open.factors[name], expected)


@pytest.mark.parametrize("rule", ["momentum", "yogi"])
def test_full_weights_are_moved_from_the_last_ones(rule):
    parts = federation(settings(method="full", dtype="float64", server=server(rule), lr=0.05, rounds=4))
    parts.run()
    names = parts.problem.method.parameters
    weights = {name: parts.problem.new_chain().weights()[name].numpy() for name in names}
    steps = {name: stepper(rule) for name in names}
    for mean in means_of(parts, "dense", [weights[name].shape for name in names]):
        for name, value in zip(names, mean, strict=True):
            weights[name] = weights[name] + steps[name](value - weights[name])
    for name in names:
        close(parts.chain.weights()[name], weights[name])


def test_what_is_merged_beside_a_link_that_stays_open_goes_by_the_rule_too():
    """FRLoRA merges s (Bbar Abar - B0 A0) each round, of which the server's momentum makes a step."""
    parts = federation(settings(method="fr_lora", dtype="float64", server=server("momentum"), lr=0.02, rounds=4))
    parts.run()
    terms = parts.chain.open.low_rank_terms()
    weights = {term.target: parts.problem.new_chain().weights()[term.target].numpy() for term in terms.values()}
    steps = {target: stepper("momentum") for target in weights}
    shapes = [tuple(factor.shape) for term in terms.values() for factor in (term.lora_a, term.lora_b)]
    for mean in means_of(parts, shapes=shapes):
        pairs = zip(terms.values(), mean[::2], mean[1::2], strict=True)
        for term, lora_a, lora_b in pairs:
            update = term.scale * (lora_b @ lora_a - (term.lora_b @ term.lora_a).numpy())
            weights[term.target] = weights[term.target] + steps[term.target](update)
    for target, expected in weights.items():
        close(parts.chain.weights()[target], expected)


@pytest.mark.parametrize("method", ["rac_lora", "ffa_lora", "full"])
def test_the_learning_rate_alone_scales_a_rounds_step(method):
    """From the same start, the step is the learning rate times the mean's, whatever the clients do."""
    base = {name: tensor.clone() for name, tensor in federation(settings(dtype="float64")).chain.weights().items()}
    one, half = (
        federation(settings(method=method, dtype="float64", rounds=1, lr=0.3, server=server("sgd", lr)))
        for lr in (1.0, 0.5)
    )
    one.run()
    half.run()
    for name, start in base.items():
        step = one.chain.weights()[name] - start
        torch.testing.assert_close(half.chain.weights()[name] - start, 0.5 * step, rtol=1e-12, atol=1e-14)


def test_plain_sgd_of_rate_one_is_no_rule_at_all():
    with_defaults = federation(settings())
    stated = federation(settings(server=server("sgd", 1.0)))
    with_defaults.run()
    stated.run()
    assert stated.chain.digest == with_defaults.chain.digest
    assert all(link.rule is None for link in stated.chain.links)
