"""Real SuperNodes on the loopback interface: the simulator's model, whatever happens to them on the way."""

import os
import shutil
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from experiments.credentials import write_credentials
from experiments.problem import prepare
from experiments.run import run
from experiments.runtimes.deployment import Config, Security, build, local_superlink, name_of, submit, write_data
from experiments.runtimes.flower import CONNECTION
from experiments.runtimes.processes import marked, program
from fedraclora.files import read_json
from tests.helpers import Silent, federation, settings, spoil


def alike(**changes):
    return settings(**{"num_clients": 3, "fraction": 1.0, "rounds": 4, "exact": True, "connect_s": 90.0, **changes})


class When(Silent):
    """A watcher that acts once, when a round's row appears: the next round has just begun."""

    def __init__(self, round, act):
        super().__init__()
        self._round, self._act = round, act

    def on_round(self, row, num_rounds):
        super().on_round(row, num_rounds)
        if row["round"] == self._round:
            self._act()


def test_one_round_over_two_real_nodes_is_the_simulators(tmp_path):
    chosen = alike(num_clients=2, rounds=1, runtime="deployment")
    found = run(replace(chosen, out=str(tmp_path / "real")), Silent())
    expected = run(alike(num_clients=2, rounds=1, out=str(tmp_path / "simulated")), Silent())
    assert found["chain_digest"] == expected["chain_digest"]
    assert found["total_bytes"] == expected["total_bytes"]
    assert read_json(tmp_path / "real" / "flower" / "run.json")["status"] == "finished:completed"


@pytest.mark.parametrize(
    ("config", "words"), [(Config(superlink="host"), "PORT"), (Config(root_certificates="/no/file"), "is no file")]
)
def test_settings_that_make_no_sense_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        build(config)


# ---- what happens to real processes


@pytest.fixture(scope="module")
def disks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    return write_data(prepare(alike()), folder)


@pytest.fixture(scope="module")
def nodes(disks, tmp_path_factory):
    with local_superlink(tmp_path_factory.mktemp("superlink")) as started:
        for partition, folder in disks.items():
            started.start(partition, 3, folder)
        yield started


def table(folder):
    return pd.read_csv(folder / "rounds.csv").set_index("round")


@pytest.mark.slow
def test_a_node_that_loses_its_disk_is_brought_up_within_the_round(nodes, disks, tmp_path):
    chosen = alike()
    lose = When(2, lambda: shutil.rmtree(disks[1] / "replica"))
    found = submit(nodes.processes, chosen, tmp_path / "run", lose)
    expected = run(replace(chosen, out=str(tmp_path / "simulated")), Silent())
    assert found["chain_digest"] == expected["chain_digest"]
    rounds = table(tmp_path / "run")
    assert rounds.loc[3, "num_retried"] == 1
    assert rounds.loc[1:, "num_ok"].tolist() == [3] * 4


@pytest.mark.slow
def test_a_server_that_is_killed_goes_on_from_the_chain_on_disk(nodes, tmp_path):
    chosen = alike()
    with pytest.raises(RuntimeError, match="finished:failed"):
        submit(nodes.processes, chosen, tmp_path / "run", When(2, lambda: kill_server_app(nodes.processes.token)))
    assert table(tmp_path / "run").index.max() < 4
    found = submit(nodes.processes, replace(chosen, resume=True), tmp_path / "run", Silent())
    expected = run(replace(chosen, out=str(tmp_path / "simulated")), Silent())
    assert found["chain_digest"] == expected["chain_digest"]
    assert table(tmp_path / "run").index.tolist() == [0, 1, 2, 3, 4]
    assert found["total_bytes"] == expected["total_bytes"]


def kill_server_app(token):
    for process in marked(token):
        with suppress(OSError):
            if b"flwr-serverapp" in Path(f"/proc/{process}/cmdline").read_bytes():
                os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_a_node_that_is_killed_is_missing_until_it_comes_back(nodes, disks, tmp_path):
    """Its messages of the rounds without it are lost, and those alone: the simulator without them ends alike."""
    chosen = alike(rounds=6, timeout_s=200.0)

    def come_back():
        nodes.start(2, 3, disks[2])

    class KillAndRestart(Silent):
        def on_round(self, row, num_rounds):
            super().on_round(row, num_rounds)
            {1: lambda: nodes.kill(2), 3: come_back}.get(row["round"], int)()

    found = submit(nodes.processes, chosen, tmp_path / "run", KillAndRestart())
    ledger = pd.read_csv(tmp_path / "run" / "ledger.csv")
    answered = ledger[(ledger["direction"] == "up") & (ledger["partition"] == 2) & (ledger["kind"] == "update")]
    missing = {round for round in range(1, 7) if round not in set(answered["round"])}
    assert 2 in missing
    assert 6 not in missing
    rounds = table(tmp_path / "run")
    assert all(rounds.loc[round, "num_missing"] == (round in missing) for round in range(1, 7))
    lost = [spoil(lambda reply: None, partition=2, only_round=round) for round in missing]

    def fault(who, reply):
        for one in lost:
            reply = None if reply is None else one(who, reply)
        return reply

    expected = federation(replace(chosen, timeout_s=60.0), fault=fault)
    expected.run()
    assert found["chain_digest"] == expected.chain.digest


@pytest.mark.slow
def test_a_superlink_that_is_killed_comes_back_with_its_nodes(disks, tmp_path):
    """It has forgotten its nodes, who end when it says so; the chain and the replicas are on disk."""
    chosen = alike(rounds=3)
    with local_superlink(tmp_path / "superlink") as nodes:
        for partition, disk in disks.items():
            nodes.start(partition, 3, disk)
        with pytest.raises(RuntimeError, match="superlink ended"):
            submit(nodes.processes, chosen, tmp_path / "run", When(1, lambda: nodes.processes.kill("superlink")))
    with local_superlink(tmp_path / "again") as nodes:
        for partition, disk in disks.items():
            nodes.start(partition, 3, disk)
        found = submit(nodes.processes, replace(chosen, resume=True), tmp_path / "run", Silent())
    assert found["num_rounds"] == 3
    assert found["chain_digest"] == run(replace(chosen, out=str(tmp_path / "simulated")), Silent())["chain_digest"]
    assert table(tmp_path / "run")["num_retried"].sum() == 0, "the replicas were where they had been"


@pytest.mark.slow
def test_certificates_and_keys_keep_strangers_out(disks, tmp_path):
    tls = tmp_path / "tls"
    write_credentials(tls, clients=3, hosts=["localhost", "127.0.0.1"], days=1)
    keys = {partition: str(tls / f"client_{partition}") for partition in (0, 1)}
    security = Security(str(tls / "ca.crt"), str(tls / "server.pem"), str(tls / "server.key"), keys)
    with local_superlink(tmp_path / "superlink", security) as nodes:
        for partition in keys:
            public = f"{tls / f'client_{partition}'}.pub"
            nodes.processes.run([program("flwr"), "supernode", "register", public, CONNECTION])
            nodes.start(partition, 2, disks[partition])
        strangers = {
            "an unregistered key": [
                "--root-certificates",
                security.ca,
                "--auth-supernode-private-key",
                str(tls / "client_2"),
            ],
            "no key": ["--root-certificates", security.ca],
            "no encryption": ["--insecure", "--max-retries", "1"],
        }
        for name, options in strangers.items():
            nodes.start(2, 3, disks[2], options)
            assert nodes.processes.wait(name_of(2), timeout_s=60) != 0, name
        found = submit(nodes.processes, alike(num_clients=2, rounds=1), tmp_path / "run", Silent())
    assert found["num_rounds"] == 1
    assert table(tmp_path / "run").loc[1, "num_ok"] == 2
