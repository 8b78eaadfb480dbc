"""What does not go together is refused by name, with what would be right; what does is prepared and runs."""

from functools import cache

import pytest

from experiments.problem import prepare
from experiments.settings import (
    MemorySettings,
    PrivacySettings,
    RobustSettings,
    ServerSettings,
    SketchSettings,
)
from tests.helpers import METHODS, federation, settings

PRIVATE_DRAWS = {"sketch": SketchSettings(shared=False)}
RANKS = {"client_ranks": [1, 2, 1, 2, 1, 2]}
MEDIAN = {"robust": RobustSettings("median")}
CLIENT = {"privacy": PrivacySettings("client")}
EXAMPLE = {"privacy": PrivacySettings("example")}
TOP_K = {"uplink": "top_k"}
SCAFFOLD = {"scaffold": True}

# By the trait that each needs: settings, and the methods that do without them.
BY_TRAIT = {
    "has_private_draws": (PRIVATE_DRAWS, "sketch.shared=false"),
    "has_ranks": (RANKS, "client_ranks"),
    "is_mean": (MEDIAN, "robust"),
    "is_steady": (SCAFFOLD, "scaffold=true"),
}


@cache
def traits_of(method):
    return prepare(settings(method=method)).method.traits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trait", BY_TRAIT)
def test_a_method_goes_with_what_its_traits_say_and_runs_or_is_refused_by_name(method, trait):
    more, words = BY_TRAIT[trait]
    chosen = settings(method=method, **more, lr=0.05, rounds=2)
    if getattr(traits_of(method), trait):
        assert [report.num_ok for report in federation(chosen).run()] == [0, 3, 3]
    else:
        # FFA-LoRA refuses the draws itself.
        with pytest.raises(ValueError, match=rf"{words}.*{method}|FFA-LoRA .*{words}"):
            prepare(chosen)


def sparse(method, **own):
    return {"method": (method, own), "downlink": "top_k"}


REFUSED = {
    "sketch.shared=false: method fed_it needs factors that all clients share": {"method": "fed_it", **PRIVATE_DRAWS},
    "sketch.shared=false a link lasts one round": {
        "method": ("rac_lora", {"rounds_per_link": 2}), **PRIVATE_DRAWS,
    },
    "client_ranks: in method full all clients have one rank; set ranks by layer": {"method": "full", **RANKS},
    "robust.*: method flora is no mean of what clients send": {"method": "flora", **MEDIAN},
    "robust.*: method rac_lora is no mean": {**PRIVATE_DRAWS, **MEDIAN},
    "robust.*: method het_lora is no mean": {"method": "het_lora", "robust": RobustSettings(max_norm=1.0)},
    "privacy.level=client: method fedex_lora is no mean of what clients send": {"method": "fedex_lora", **CLIENT},
    "method fed_sa_lora has no model for all; set personal_fraction=0.1": {
        "method": "fed_sa_lora", "personal_fraction": 0.0,
    },
    "scaffold=true: in method rac_lora, as it is set": {**SCAFFOLD, **PRIVATE_DRAWS},
    "scaffold=true: in method fed_slop, as it is set": {
        "method": ("fed_slop", {"upload": "factor", "moments": "reset"}), **SCAFFOLD,
    },
    "downlink=top_k keeps few of the numbers, which is right for differences only; method ffa_lora": sparse("ffa_lora"),
    "method rac_lora sends the values of a link that stays open": sparse("rac_lora", rounds_per_link=2),
    "memory.feedback=ef goes with a compressor; name one with uplink=": {"memory": MemorySettings("ef")},
    "memory.feedback=marina goes with a compressor": {"memory": MemorySettings("marina"), "uplink": "none"},
    "scaffold=true needs plain SGD (optimizer=sgd momentum=0 weight_decay=0)": {**SCAFFOLD, "momentum": 0.5},
    "scaffold=true needs plain SGD ": {**SCAFFOLD, "optimizer": "adamw"},
    "scaffold=true needs plain SGD (optimizer": {**SCAFFOLD, "weight_decay": 0.1},
    "scaffold=true goes with clients of one rank": {**SCAFFOLD, **RANKS},
    "scaffold=true goes with clients of one rank, without privacy.*": {**SCAFFOLD, **EXAMPLE},
    "without privacy.* and robust.*": {**SCAFFOLD, **MEDIAN},
    "memory.feedback=ef21 with client_ranks needs one scale for all: leave alpha out": {
        "memory": MemorySettings("ef21"), **TOP_K, **RANKS, "alpha": 2.0,
    },
    "robust.aggregate=trimmed_mean with these settings needs": {"robust": RobustSettings("trimmed_mean", trim=2)},
    "robust.aggregate=krum with these settings needs": {"robust": RobustSettings("krum", num_attackers=1)},
    "privacy.* and robust.* do not go together": {**CLIENT, **MEDIAN},
    "the accountant counts on the noisy mean": {**EXAMPLE, "robust": RobustSettings(max_norm=1.0)},
    "privacy.* goes without memory.feedback and scaffold": {**CLIENT, **TOP_K, "memory": MemorySettings("ef")},
    "privacy.* goes without personal_fraction": {**EXAMPLE, "personal_fraction": 0.2},
    "privacy.level=client with client_ranks needs one scale for all clients": {**CLIENT, **RANKS, "alpha": 2.0},
    "memory.feedback='ef22' is unknown; did you mean 'ef21'": {"memory": MemorySettings("ef22")},
    "memory.at_new_link='dorp' is unknown; did you mean 'drop'": {"memory": MemorySettings(at_new_link="dorp")},
    "server.rule='adm' is unknown; did you mean 'adam'": {"server": ServerSettings("adm")},
    "server.lr=0.0": {"server": ServerSettings(lr=0.0)},
    "server.lr=-1.0": {"method": "full", "server": ServerSettings(lr=-1.0)},
    "server.beta1=1.0 must lie in [0, 1)": {"server": ServerSettings("momentum", beta1=1.0)},
    "robust.aggregate='medain' is unknown; did you mean 'median'": {"robust": RobustSettings("medain")},
    "privacy.level='cleint' is unknown; did you mean 'client'": {"privacy": PrivacySettings("cleint")},
    "client_ranks=[1, 2] must hold a rank, at least 1, for each of 6 clients": {"client_ranks": [1, 2]},
    "client_ranks=[1, 2, 3, 0, 1, 1] must hold a rank": {"client_ranks": [1, 2, 3, 0, 1, 1]},
    "client_ranks={1: 0.5, 2: 0.4}: ranks must be at least 1, and their shares add up to 1": {
        "client_ranks": {1: 0.5, 2: 0.4},
    },
    "client_ranks={0: 0.5, 2: 0.5}: ranks must be at least 1": {"client_ranks": {0: 0.5, 2: 0.5}},
    "lr_scales must be positive, one for each of num_clients=6": {"client_lr_scales": [1.0, 2.0]},
    "lr_scales must be positive": {"client_lr_scales": [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]},
    "personal_fraction=1.0 must lie in [0, 1)": {"personal_fraction": 1.0},
    "deadline_s=5.0 is simulated time: name devices, too": {"deadline_s": 5.0},
    "deadline_s=-1.0 must be finite, and at least 0": {"devices": "lte", "deadline_s": -1.0},
    "deadline_s=inf must be finite": {"devices": "lte", "deadline_s": float("inf")},
    "devices=lte goes with runtime=in_process alone": {"devices": "lte", "runtime": "simulation"},
    "devices=mixed goes with runtime=in_process alone": {"devices": "mixed", "runtime": "deployment"},
    "devices='brodband' is neither a preset nor a .csv file; did you mean 'broadband'": {"devices": "brodband"},
    "whole_probability=0.0 must lie in (0, 1]": {
        "memory": MemorySettings("marina", whole_probability=0.0), "uplink": "rand_k",
    },
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_go_together_is_refused_before_training(words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below, not matched
        prepare(settings(**REFUSED[words]))
    assert words in str(caught.value)


ACCEPTED = {
    "unlike ranks and feedback on one scale": {**RANKS, **TOP_K, "memory": MemorySettings("ef21")},
    "unlike ranks of one scale and clients' privacy": {**RANKS, **CLIENT},
    "private draws, feedback and a server's optimiser": {
        **PRIVATE_DRAWS, **TOP_K, "memory": MemorySettings("ef"), "server": ServerSettings("yogi", lr=0.01),
    },
    "a sparse downlink of links that close": {"downlink": ("top_k", {"share": 0.5})},
    "a dense downlink of a link that stays open": {"method": "fed_it", "downlink": "float16"},
    "control variates and a compressor": {**SCAFFOLD, "uplink": "int8"},
    "control variates of both factors from one start": {"method": ("flora", {"private_start": False}), **SCAFFOLD},
    "examples' privacy and no mean": {"method": "flora", **EXAMPLE},
    "a trimmed mean of enough clients": {"fraction": 1.0, "robust": RobustSettings("trimmed_mean", trim=2)},
    "a bound on the norm and a server's optimiser": {
        "robust": RobustSettings(max_norm=0.5), "server": ServerSettings("momentum"),
    },
    "heads trained in full, both ways compressed": {
        "dense": ["*.bias"], "uplink": "qsgd", "downlink": "int8", "server": ServerSettings("adam", lr=0.01),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_does_runs_without_a_failed_reply(name):
    reports = federation(settings(**{"lr": 0.05, **ACCEPTED[name]})).run()
    for report in reports[1:]:
        assert (report.num_ok, report.num_retried) == (report.num_clients, 0)


def test_shares_of_ranks_are_dealt_out_in_an_order_of_the_seed():
    ranks = {
        seed: prepare(settings(seed=seed, num_clients=20, client_ranks={"4": 0.25, 1: 0.5, 2: 0.25})).rounds.ranks
        for seed in (0, 1)
    }
    assert [sorted(dealt) for dealt in ranks.values()] == [[1] * 10 + [2] * 5 + [4] * 5] * 2
    assert ranks[0] != ranks[1]
    odd = prepare(settings(num_clients=7, client_ranks={1: 0.33, 2: 0.67})).rounds.ranks
    assert sorted(odd) == [1, 1, 2, 2, 2, 2, 2]
