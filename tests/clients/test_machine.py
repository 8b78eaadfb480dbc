"""A machine finds its replica, its data and what it was told of the run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.app import client_app
from clients.machine import KEPT_RUNS, LostSetup, Machines, local_data, node_of, own_dataset, remember_setup
from experiments.groups import configure
from experiments.problem import prepare
from fedraclora.files import write_tensors
from fedraclora.setup import Setup
from tests.helpers import (
    RecordingGrid,
    federate,
    federation,
    four_clients_problem,
    nodes_grid,
    relative_distance,
    same_weights,
    settings,
)


@pytest.fixture(scope="module")
def problem():
    federate()
    return four_clients_problem()


def context(run_config=None, **config):
    named = {key.replace("_", "-"): value for key, value in config.items()}
    return Context(run_id=1, node_id=5, node_config=named, state=RecordDict(), run_config=run_config or {})


def introduction(text, chain="c" * 32):
    record = ConfigRecord({"chain": chain, "text": text})
    return Message(RecordDict({"setup": record}), 5, "query.partition", group_id="0")


def plan(chain="c" * 32):
    return Message(RecordDict({"plan": ConfigRecord({"chain": chain})}), 5, "train", group_id="1")


def test_a_setup_survives_the_message(problem):
    assert Setup.from_json(problem.setup.to_json()) == problem.setup


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": 3}'])
def test_what_is_no_setup_is_refused(text):
    with pytest.raises(ValueError, match="not the setup of a run"):
        Setup.from_json(text)


def test_a_machine_builds_the_base_and_the_split_that_the_server_has(problem, tmp_path):
    node = context(partition_id=1, replica_path=str(tmp_path))
    replica = Machines().open(node, introduction(problem.setup.to_json()))
    assert replica.chain.hash == problem.new_chain().hash
    assert same_weights(replica.chain.merged, problem.new_chain().merged)
    expected = problem.split.indices
    assert all(np.array_equal(replica.data.partitions[who], rows) for who, rows in enumerate(expected))
    assert replica.data.examples.inputs.equal(problem.dataset.train.inputs)


def test_held_out_examples_are_held_out_on_the_machines_too(tmp_path):
    problem = prepare(settings(eval_split="validation"))
    data = local_data(problem.setup, node_of(context(partition_id=0)))
    assert data.examples.inputs.equal(problem.dataset.train.inputs)


def test_a_machine_that_was_never_told_of_the_run_says_so(problem, tmp_path):
    node = context(partition_id=1, replica_path=str(tmp_path))
    with pytest.raises(LostSetup):
        Machines().open(node, plan())
    Machines().open(node, introduction(problem.setup.to_json()))
    assert Machines().open(node, plan()).chain.num_links == 0


@pytest.mark.parametrize("chain", ["../elsewhere", "", "C" * 32, "c" * 31])
def test_a_run_whose_name_is_no_folder_of_ours_is_refused(problem, tmp_path, chain):
    node = context(partition_id=1, replica_path=str(tmp_path / "replicas"))
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        Machines().open(node, introduction(problem.setup.to_json(), chain))
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_comes_out_otherwise_counts_as_none(problem, tmp_path):
    other = replace(problem.setup, base="0" * 64)
    replica = Machines().open(context(partition_id=0, replica_path=str(tmp_path)), introduction(other.to_json()))
    assert replica.chain.num_links == -1


class MachinesGrid(RecordingGrid):
    """Simulated clients as in worker processes: a new one for every message, all on one disk, `folder`."""

    folder: Path

    def __init__(self, replica, num_clients, *, fault=None):
        super().__init__(replica, num_clients, fault=fault)
        for one in self._contexts.values():
            one.node_config["replica-path"] = str(self.folder)
        self._app = self._new_process

    def _new_process(self, message, context):
        return client_app(Machines())(message, context)

    def _train(self, messages):
        return [self._app(message, self._contexts[message.metadata.dst_node_id]) for message in messages]


@pytest.fixture
def started(problem, tmp_path):
    """Settings of a run that starts from weights which no client can build."""
    weights = {name: tensor + 0.01 for name, tensor in problem.new_chain().weights().items()}
    write_tensors(tmp_path / "start.safetensors", weights, {})
    return settings(start_from=str(tmp_path / "start.safetensors"), num_clients=4, fraction=1.0)


def test_weights_that_a_run_starts_from_are_no_part_of_what_machines_are_told(started, tmp_path):
    setup = prepare(started).setup
    assert "start" not in setup.to_json()
    replica = Machines().open(context(partition_id=0, replica_path=str(tmp_path)), introduction(setup.to_json()))
    assert replica.chain.num_links == -1


@pytest.mark.parametrize("method", ["rac_lora", "fed_it", "full"])
@pytest.mark.parametrize("disks", ["one", "each"])
def test_machines_are_sent_the_weights_a_run_starts_from_once_and_end_in_its_model(started, tmp_path, method, disks):
    """On one disk for all, as in a simulation, and on a disk each, as deployed."""
    started = replace(started, method=configure("method", method, {}))
    one_disk = type("Grid", (MachinesGrid,), {"folder": tmp_path / "disk"})
    grid = one_disk if disks == "one" else nodes_grid(tmp_path / "nodes")
    parts, here = federation(started, grid=grid), federation(started)
    assert len(parts.run()) == len(here.run())
    assert relative_distance(parts.chain.weights(), here.chain.weights()) < 1e-5
    # What an open link sets whole is never sent beside it, so `full` needs the base in its first round alone, too.
    bases = [
        (part, message.metadata.group_id, array.numpy().size)
        for way, part, message in parts.grid.seen
        if way == "down" and "snapshot" in message.content.array_records
        for array in message.content.array_records["snapshot"].values()
    ]
    size = sum(tensor.numel() for tensor in here.chain.merged.values())
    assert sorted(bases) == [(part, "1", size) for part in range(4)]
    assert not any("snapshot" in m.content.array_records for way, _, m in here.grid.seen if way == "down")


def test_old_runs_make_room_for_new_ones(problem, tmp_path):
    for run in range(KEPT_RUNS + 3):
        remember_setup(tmp_path / f"run_{run}", problem.setup.to_json())
    assert len(list(tmp_path.iterdir())) == KEPT_RUNS
    assert (tmp_path / f"run_{KEPT_RUNS + 2}").exists()


def own_file(folder, num=4, shape=(1, 8, 8), largest=9):
    labels = np.arange(num) % (largest + 1)
    labels[-1] = largest
    np.savez(folder / "own.npz", inputs=np.ones((num, *shape), dtype=np.float32), targets=labels)
    return str(folder / "own.npz")


def test_a_node_trains_on_its_own_data(problem, tmp_path):
    data = local_data(problem.setup, node_of(context(partition_id=7, data_path=own_file(tmp_path))))
    assert list(data.partitions) == [7]
    assert len(data.examples) == len(data.partitions[7]) == 4


def test_data_that_do_not_fit_the_run_are_named(problem, tmp_path):
    wrong_shape = node_of(context(partition_id=1, data_path=own_file(tmp_path, shape=(3, 8, 8))))
    with pytest.raises(ValueError, match=r"of client 1: an input has the shape \(3, 8, 8\), .* takes \(1, 8, 8\)"):
        local_data(problem.setup, wrong_shape)
    wrong_label = node_of(context(partition_id=1, data_path=own_file(tmp_path, largest=10)))
    with pytest.raises(ValueError, match="needs labels from 0 to 9"):
        local_data(problem.setup, wrong_label)


def test_the_plug_in_that_reads_a_nodes_data_is_its_own_then_the_runs_then_files(problem):
    def chosen(setup, **config):
        plugin = own_dataset(setup, node_of(context(partition_id=0, **config)))
        return plugin.name, plugin.config.get("path")

    assert chosen(problem.setup, data_path="here") == ("files", "here")
    with_path = replace(problem.setup, dataset=replace(problem.setup.dataset, name="mnist", config={"path": None}))
    assert chosen(with_path, data_path="here") == ("mnist", "here")
    assert chosen(with_path, data_path="here", dataset="files") == ("files", "here")


def test_a_folder_in_the_node_config_comes_before_the_runs(tmp_path):
    both = context({"replica-path": "there"}, partition_id=0, replica_path="here")
    assert node_of(both).replica_path == "here"
    assert node_of(context({"replica-path": "there"}, partition_id=0)).replica_path == "there"
