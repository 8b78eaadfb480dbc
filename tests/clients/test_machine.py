"""A machine finds its replica, its data and what it was told of the run."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.machine import KEPT_RUNS, LostSetup, Machines, local_data, node_of, own_dataset, remember_setup
from experiments.problem import prepare
from fedraclora.setup import Setup
from tests.helpers import federate, four_clients_problem, same_weights, settings


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
