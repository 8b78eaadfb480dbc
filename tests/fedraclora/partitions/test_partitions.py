import socket
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedraclora import plugins
from fedraclora.data import Dataset, Examples, Split
from fedraclora.datasets import mnist_5k, quadratic
from fedraclora.partitions import label_counts, make_split

# `own` shares nothing out, and has a test of its own.
PARTITIONS = [name for name in plugins.names("fedraclora.partitions") if name != "own"]
BY_LABEL = [name for name in PARTITIONS if name not in ("iid", "natural")]
NUM_CLIENTS = 10


def labelled(labels, num_classes, groups=None):
    examples = Examples(torch.zeros(len(labels), 1), torch.as_tensor(labels))
    return Dataset("made_up", examples, examples, "classification", num_classes, groups)


def ordinary(num=400):
    """Ten balanced classes in file order, owned by ten groups that are no multiples of the classes."""
    return labelled(np.repeat(np.arange(10), num // 10), 10, groups=np.arange(num) * 7 % 10 + 100)


def split_of(name, dataset=None, *, num_clients=NUM_CLIENTS, seed=0, **settings):
    module = plugins.find("fedraclora.partitions", name)
    dataset = ordinary() if dataset is None else dataset
    return make_split(module, module.Config(**settings), dataset=dataset, num_clients=num_clients, seed=seed)


def plugin_returning(*parts):
    module = types.ModuleType("my_package.strange")
    split = Split(tuple(np.array(part, dtype=np.int64) for part in parts))
    module.build = lambda config, *, dataset, num_clients, seed: split
    return module


@pytest.mark.parametrize("name", PARTITIONS)
def test_split_gives_every_example_to_one_client_in_sorted_order(name):
    split = split_of(name)
    assert len(split.indices) == NUM_CLIENTS
    assert np.sort(np.concatenate(split.indices)).tolist() == list(range(400))
    for owned in split.indices:
        assert owned.dtype == np.int64
        assert (np.diff(owned) > 0).all()


@pytest.mark.parametrize("name", PARTITIONS)
def test_same_seed_same_digest(name):
    assert split_of(name, seed=2**63 - 1).digest == split_of(name, seed=2**63 - 1).digest


@pytest.mark.parametrize("name", [name for name in PARTITIONS if name != "natural"])
def test_other_seed_gives_another_split(name):
    assert len({split_of(name, seed=seed).digest for seed in range(4)}) == 4


@pytest.mark.parametrize("name", BY_LABEL)
def test_the_seed_draws_who_holds_which_class(name):
    dataset = ordinary()
    assert len({label_counts(split_of(name, dataset, seed=seed), dataset).tobytes() for seed in range(4)}) == 4


@pytest.mark.parametrize("name", PARTITIONS)
def test_splitting_is_silent_and_leaves_the_network_and_global_generator_alone(name, monkeypatch, capfd):
    def refuse(*_args):
        raise AssertionError("a partition used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 (the global generator is what is watched)
    split_of(name)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", [name for name in PARTITIONS if name != "natural"])
@hypothesis_settings(max_examples=15)
@given(num_clients=st.integers(10, 25), seed=st.integers(0, 2**63 - 1), labels_seed=st.integers(0, 99))
def test_split_is_disjoint_for_any_labels(name, num_clients, seed, labels_seed):
    labels = np.random.default_rng(labels_seed).integers(0, 4, 300)
    flat = np.concatenate(split_of(name, labelled(labels, 4), num_clients=num_clients, seed=seed).indices)
    assert len(np.unique(flat)) == len(flat)
    num_unused = 300 - len(flat)
    assert num_unused < 2 * num_clients if name == "shards" else num_unused == 0


@given(num=st.integers(20, 60), num_clients=st.integers(1, 20))
def test_iid_shares_differ_by_at_most_one_example(num, num_clients):
    sizes = [len(owned) for owned in split_of("iid", labelled([0] * num, 2), num_clients=num_clients).indices]
    assert max(sizes) - min(sizes) <= 1


def test_iid_mixes_the_classes_of_a_sorted_file():
    counts = label_counts(split_of("iid", ordinary(4000)), ordinary(4000))
    assert counts.min() >= 20  # 40 expected a cell, standard deviation below 6.4
    assert counts.max() <= 65


def test_smaller_alpha_is_more_unequal():
    dataset = ordinary(4000)

    def largest_share(alpha):
        counts = label_counts(split_of("dirichlet", dataset, alpha=alpha), dataset)
        return (counts.max(axis=0) / counts.sum(axis=0)).mean()

    assert largest_share(0.1) > 0.4
    assert largest_share(1000.0) < 0.13


def test_dirichlet_of_fifty_clients_with_alpha_a_tenth_works_on_mnist_5k():
    dataset = mnist_5k.build(mnist_5k.Config(), seed=0)
    for seed in range(5):
        split = split_of("dirichlet", dataset, num_clients=50, seed=seed, alpha=0.1)
        assert label_counts(split, dataset).sum(axis=0).tolist() == [400] * 10
        assert min(len(owned) for owned in split.indices) >= 1


def test_dirichlet_keeps_the_minimum_size():
    sizes = [len(owned) for owned in split_of("dirichlet", alpha=1.0, min_partition_size=15).indices]
    assert min(sizes) >= 15


def test_impossible_dirichlet_names_the_way_out():
    with pytest.raises(ValueError, match=r"alpha=0\.001 .*min_partition_size=1 .*larger alpha, fewer clients"):
        split_of("dirichlet", num_clients=40, alpha=0.001)


def test_dirichlet_that_allows_empty_clients_names_them():
    with pytest.raises(ValueError, match=r"leaves \d+ of 40 clients without examples \(\d+.*larger partition.alpha"):
        split_of("dirichlet", num_clients=40, alpha=0.001, min_partition_size=0)


@pytest.mark.parametrize("per_client", [1, 2, 5])
def test_shards_have_one_size_and_few_classes(per_client):
    dataset = ordinary()
    counts = label_counts(split_of("shards", dataset, shards_per_client=per_client), dataset)
    assert (counts.sum(axis=1) == 40).all()
    assert ((counts > 0).sum(axis=1) <= per_client).all()  # shards do not straddle these balanced classes


@pytest.mark.parametrize("per_client", [1, 2, 5, 10])
def test_pathological_clients_hold_exactly_their_classes(per_client):
    dataset = ordinary()
    counts = label_counts(split_of("pathological", dataset, classes_per_client=per_client), dataset)
    assert ((counts > 0).sum(axis=1) == per_client).all()
    assert (np.diag(counts) > 0).all()


def test_pathological_leaves_only_classes_that_nobody_holds():
    dataset = ordinary()
    counts = label_counts(split_of("pathological", dataset, num_clients=3), dataset)
    assert set(counts.sum(axis=0)) == {0, 40}


def test_natural_clients_are_the_groups_in_order():
    dataset = ordinary()
    split = split_of("natural", dataset)
    assert [set(dataset.groups[owned]) for owned in split.indices] == [{100 + client} for client in range(10)]


def test_natural_needs_groups_and_their_number():
    with pytest.raises(ValueError, match="made_up does not; use partition=iid"):
        split_of("natural", labelled([0] * 20, 2))
    with pytest.raises(ValueError, match="10 natural owners; found num_clients=9"):
        split_of("natural", num_clients=9)


@pytest.mark.parametrize("name", BY_LABEL)
def test_partitions_by_class_refuse_regression_and_name_iid(name):
    dataset = quadratic.build(quadratic.Config(), seed=0)
    with pytest.raises(ValueError, match=f"partition={name} .* quadratic is a regression data set; use partition=iid"):
        split_of(name, dataset)


def test_iid_takes_regression():
    split = split_of("iid", quadratic.build(quadratic.Config(), seed=0), num_clients=8)
    assert [len(owned) for owned in split.indices] == [64] * 8


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("num_clients", [-1, 0, 401])
def test_more_clients_than_examples_or_none_are_refused(name, num_clients):
    with pytest.raises(ValueError, match=f"num_clients={num_clients} .* between 1 and the 400 training examples"):
        split_of(name, num_clients=num_clients)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dirichlet", {"alpha": 0.0}, r"alpha=0\.0 has to be positive"),
        ("dirichlet", {"alpha": float("nan")}, "alpha=nan has to be positive"),
        ("dirichlet", {"min_partition_size": 41}, "needs 410 examples; 400 are there"),
        ("shards", {"shards_per_client": 0}, "shards_per_client=0"),
        ("shards", {"shards_per_client": 41}, "makes 410 shards of 400 examples"),
        ("pathological", {"classes_per_client": 0}, "classes_per_client=0 has to lie between 1 and the 10"),
        ("pathological", {"classes_per_client": 11}, "classes_per_client=11 has to lie between 1 and the 10"),
    ],
)
def test_impossible_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        split_of(name, **settings)


def test_pathological_with_too_few_examples_of_a_class_gives_the_reason():
    with pytest.raises(ValueError, match="PathologicalPartitioner cannot divide 21 examples over 20 clients: Label: 1"):
        split_of("pathological", labelled([0] * 20 + [1], 2), num_clients=20)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (([0, 1], [1]), "partition=strange gives 1 examples to more than one client"),
        (([0, 0], [1]), "gives 1 examples"),
        (([0], []), r"partition=strange leaves 1 of 2 clients without examples \(1\); use fewer clients"),
        (([0], [400]), "outside 0 to 399"),
        (([-1], [3]), "outside 0 to 399"),
        (([0],), "Split of 2 clients"),
    ],
)
def test_splits_from_outside_are_checked(parts, message):
    with pytest.raises(ValueError, match=message):
        make_split(plugin_returning(*parts), None, dataset=ordinary(), num_clients=2, seed=0)


def test_splits_from_outside_are_sorted():
    split = make_split(plugin_returning([5, 2], [1, 0]), None, dataset=ordinary(), num_clients=2, seed=0)
    assert [owned.tolist() for owned in split.indices] == [[2, 5], [0, 1]]


def test_label_counts_count_each_class_of_each_client():
    dataset = labelled([0, 2, 2, 1, 0, 2], 4)
    split = Split((np.array([0, 1, 2]), np.array([3, 5])))
    assert label_counts(split, dataset).tolist() == [[1, 0, 2, 0], [0, 1, 1, 0]]


def test_label_counts_refuse_regression():
    with pytest.raises(ValueError, match="no classes to count"):
        label_counts(Split((np.array([0]),)), quadratic.build(quadratic.Config(), seed=0))


def test_clients_with_their_own_data_own_nothing_of_the_servers():
    module = plugins.find("fedraclora.partitions", "own")
    nothing = torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)
    empty = Dataset("elsewhere", Examples(*nothing), Examples(*nothing), "classification", 3)
    split = make_split(module, module.Config(), dataset=empty, num_clients=4, seed=0)
    assert [len(rows) for rows in split.indices] == [0] * 4
