"""One app, three runtimes: the same settings end in the same model, and every message carries the same tensors."""

from contextlib import ExitStack
from dataclasses import replace

import pandas as pd
import pytest

from experiments.problem import prepare
from experiments.run import run
from experiments.runtimes import simulation
from experiments.runtimes.deployment import local_superlink, submit, write_data
from fedraclora.files import read_json
from fedraclora.finished import load_run
from tests.helpers import Silent, relative_distance, settings

pytestmark = pytest.mark.slow

METHODS = ("rac_lora", "fed_it", "full")
# Factors that stay on a client's disk, what is never sent, and links that are merged beside an open one.
KEEPING = ("fed_sb", "fed_sa_lora", "fr_lora")
SENT = ["round", "direction", "partition", "kind", "parameters", "tensor_bytes"]


def eight_clients(method, **changes):
    lr = 0.05 if method in KEEPING else 0.5
    plain = {"num_clients": 8, "fraction": 0.5, "rounds": 6, "dataset": "mnist_5k", "method": method, "lr": lr}
    return settings(**{**plain, "connect_s": 120.0, **changes})


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    def start(chosen):
        folder = tmp_path_factory.mktemp("in_process") / "run"
        return run(replace(chosen, out=str(folder)), Silent()), folder

    return start


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    with simulation.simulation_superlink(folder) as processes:

        def start(chosen):
            own = folder / f"{chosen.method.name}_{chosen.exact}_{chosen.dtype}"
            summary = simulation.Simulation(simulation.Config()).submit(processes, chosen, own, Silent())
            return summary, own

        yield start


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """A SuperLink and eight SuperNodes, which serve run after run."""
    folder = tmp_path_factory.mktemp("deployed")
    with ExitStack() as stack:
        nodes = stack.enter_context(local_superlink(folder / "flower"))
        for partition, own in write_data(prepare(eight_clients("rac_lora")), folder / "nodes").items():
            nodes.start(partition, 8, own)

        def start(chosen):
            own = folder / f"{chosen.method.name}_{chosen.exact}_{chosen.dtype}"
            return submit(nodes.processes, chosen, own, Silent()), own

        yield start


def sent(folder):
    """Return what every message carried, in an order of its own: replies come as they come."""
    return pd.read_csv(folder / "ledger.csv")[SENT].sort_values(SENT).reset_index(drop=True)


def weights(folder):
    return load_run(folder).chain().weights()


def assert_same_but_for_kernels(found, expected, tolerance):
    assert relative_distance(weights(found[1]), weights(expected[1])) <= tolerance
    pd.testing.assert_frame_equal(sent(found[1]), sent(expected[1]))


@pytest.mark.parametrize("method", METHODS + KEEPING)
def test_exact_runs_end_with_one_digest_in_every_runtime(method, in_process, simulated, deployed):
    """And what the default, a cohort of many, makes of the same settings differs by the rounding of float32."""
    chosen = eight_clients(method, exact=True)
    expected, folder = in_process(chosen)
    together = in_process(replace(chosen, exact=False))
    for start in (simulated, deployed):
        found, own = start(chosen)
        assert found["chain_digest"] == expected["chain_digest"], start
        assert found["split_digest"] == expected["split_digest"]
        pd.testing.assert_frame_equal(sent(own), sent(folder))
        columns = ["round", "num_ok", "num_failed", "num_missing", "num_retried", "test_accuracy", "cum_total_bytes"]
        pd.testing.assert_frame_equal(
            pd.read_csv(own / "rounds.csv")[columns], pd.read_csv(folder / "rounds.csv")[columns]
        )
        assert_same_but_for_kernels((found, own), together, 1e-5)
    assert_flower_counts_the_same_bytes(own)


def assert_flower_counts_the_same_bytes(folder):
    """The uplink within 64 bytes a message (2 % of these small ones); the downlink with the SuperLink's answer to each.

    What it adds to an upload are ids and times, whose lengths vary from run to run. The answer names, with 66 bytes
    each, the objects it wants: message, content, records, array and its chunk, seven of them.
    """
    counted = read_json(folder / "flower" / "run.json")["network-traffic"]
    rows = pd.read_csv(folder / "ledger.csv")
    ours = rows.groupby("direction")["record_bytes"].sum()
    # One row of a kind that every upload has: 8 handshakes and 4 clients in each of 6 rounds.
    num_messages = int(((rows["direction"] == "up") & rows["kind"].isin(["setup", "metrics"])).sum())
    assert num_messages == 8 + 6 * 4
    assert 0 < counted["inbound-bytes"] - ours["up"] < 64 * num_messages
    assert 0 < counted["outbound-bytes"] - ours["down"] < (7 * 66 + 150) * num_messages


@pytest.mark.parametrize("method", METHODS)
def test_without_exact_only_the_kernels_rounding_differs(method, in_process, simulated):
    chosen = eight_clients(method, dtype="float64")
    assert_same_but_for_kernels(simulated(chosen), in_process(chosen), 1e-12)


def test_without_exact_real_nodes_differ_by_rounding_too(in_process, deployed):
    chosen = eight_clients("rac_lora", dtype="float64")
    assert_same_but_for_kernels(deployed(chosen), in_process(chosen), 1e-12)
