"""Every method with everything that it goes with: what is not refused before training has no failed reply."""

import pytest

from experiments.problem import prepare
from experiments.settings import MemorySettings, PrivacySettings, RobustSettings, ServerSettings, SketchSettings
from tests.helpers import METHODS, federation, settings

TOP_K = {"uplink": ("top_k", {"share": 0.3})}
RANKS = {"client_ranks": [1, 2, 3, 1, 2, 3], "rank": 3}
PRIVATE = {"sketch": SketchSettings(shared=False)}
HEADS = {"dense": ["*.bias"]}
SCAFFOLD, ADAM = {"scaffold": True}, {"server": ServerSettings("adam", lr=0.01)}
CLIENTS = {"privacy": PrivacySettings("client", clip=0.5, noise=0.1)}
MORE = {
    "error feedback": {**TOP_K, "memory": MemorySettings("ef", at_new_link="carry")},
    "EF21": {**TOP_K, "memory": MemorySettings("ef21")},
    "EF21 that forgets": {**TOP_K, "memory": MemorySettings("ef21", at_new_link="drop")},
    "MARINA": {"uplink": ("rand_k", {"share": 0.3}), "memory": MemorySettings("marina", whole_probability=0.3)},
    "signs": {"uplink": "sign"},
    "both ways": {"uplink": "int8", "downlink": "int8"},
    "a sparse downlink": {"downlink": ("top_k", {"share": 0.3})},
    "control variates": SCAFFOLD,
    "control variates and EF21": {**SCAFFOLD, **TOP_K, "memory": MemorySettings("ef21")},
    "control variates of heads": {**SCAFFOLD, **HEADS},
    "Adam and a downlink": {**ADAM, "downlink": "int8"},
    "Adam of heads": {**ADAM, **HEADS, "downlink": "float16"},
    "clients' privacy": CLIENTS,
    "clients' privacy of unlike ranks and heads": {**CLIENTS, **RANKS, **HEADS},
    "examples' privacy": {"privacy": PrivacySettings("example", clip=0.5, noise=0.1)},
    "a median": {"robust": RobustSettings("median")},
    "Krum": {"robust": RobustSettings("krum", num_attackers=0)},
    "a bounded norm": {"robust": RobustSettings(max_norm=0.1)},
    "unlike ranks": RANKS,
    "unlike ranks and scales": {**RANKS, "alpha": 3.0},
    "unlike ranks and EF21": {**RANKS, **TOP_K, "memory": MemorySettings("ef21")},
    "unlike ranks and a downlink": {**RANKS, "downlink": "int8"},
    "private draws": PRIVATE,
    "private draws and error feedback": {**PRIVATE, **TOP_K, "memory": MemorySettings("ef")},
    "models of their own": {"personal_fraction": 0.2, "momentum": 0.5},
    "heads and EF21": {**HEADS, **TOP_K, "memory": MemorySettings("ef21")},
    "eager links": {"broadcast": "eager", "optimizer": "adamw", "lr": 0.01},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MORE)
def test_what_is_prepared_runs(name, method):
    chosen = settings(method=method, rounds=4, **{"lr": 0.05, **MORE[name]})
    try:
        problem = prepare(chosen)
    except ValueError:
        assert method != "rac_lora", "it goes with all of them"
        return
    reports = federation(chosen, problem=problem).run()[1:]
    assert len(reports) == 4
    for report in reports:
        assert (report.num_ok, report.num_retried) == (report.num_clients, 0), report.failures
