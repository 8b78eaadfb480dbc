import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.data import Dataset, Examples, Split, check_dataset, choose_stratified, holdout


def dataset_of(labels, task="classification", *, groups=None):
    """Examples whose input is their own index, so that they can be followed."""
    num = len(labels)
    inputs = torch.arange(num, dtype=torch.float32).unsqueeze(1)
    targets = torch.tensor(labels) if task == "classification" else torch.rand(num, 2)
    test = Examples(torch.full((3, 1), -1.0), targets[:3])
    return Dataset("made_up", Examples(inputs, targets), test, task, 4, groups)


def rows(examples):
    return examples.inputs[:, 0].to(torch.int64).numpy()


labels_of = st.lists(st.integers(0, 3), min_size=10, max_size=80)
fractions = st.floats(0.2, 0.8)


@given(labels=labels_of, fraction=fractions, seed=st.integers(0, 2**63 - 1))
def test_holdout_divides_the_training_examples_in_two(labels, fraction, seed):
    held = holdout(dataset_of(labels), fraction=fraction, seed=seed)
    assert sorted([*rows(held.train), *rows(held.test)]) == list(range(len(labels)))


@given(labels=labels_of, fraction=fractions, seed=st.integers(0, 2**63 - 1))
def test_holdout_takes_the_fraction_of_each_class_to_the_nearest_example(labels, fraction, seed):
    held = holdout(dataset_of(labels), fraction=fraction, seed=seed)
    for label in set(labels):
        num_held = int((held.test.targets == label).sum())
        assert abs(num_held - fraction * labels.count(label)) <= 0.5


@given(labels=labels_of, seed=st.integers(0, 2**63 - 1))
def test_holdout_keeps_inputs_targets_and_groups_together(labels, seed):
    groups = np.arange(len(labels)) * 7
    held = holdout(dataset_of(labels, groups=groups), fraction=0.5, seed=seed)
    for part in (held.train, held.test):
        assert part.targets.tolist() == [labels[row] for row in rows(part)]
    assert held.groups is not None
    assert held.groups.tolist() == (rows(held.train) * 7).tolist()


def test_holdout_never_shows_the_real_test_examples():
    held = holdout(dataset_of([0, 1] * 20), fraction=0.25, seed=0)
    assert (rows(held.test) >= 0).all()
    assert (rows(held.train) >= 0).all()


def test_holdout_is_drawn_by_the_seed():
    dataset = dataset_of([0, 1, 2, 3] * 30)
    first, again, other = (holdout(dataset, fraction=0.5, seed=seed) for seed in (0, 0, 1))
    assert rows(first.test).tolist() == rows(again.test).tolist()
    assert rows(first.test).tolist() != rows(other.test).tolist()


def test_holdout_of_regression_takes_the_fraction_of_all():
    held = holdout(dataset_of([0] * 40, "regression"), fraction=0.25, seed=3)
    assert (len(held.train), len(held.test)) == (30, 10)


def test_every_example_can_be_held_out():
    dataset = dataset_of([0] * 10)
    seen = {row for seed in range(60) for row in rows(holdout(dataset, fraction=0.2, seed=seed).test)}
    assert seen == set(range(10))


@pytest.mark.parametrize("fraction", [-0.1, 0.0, 1.0, 1.5, float("nan")])
def test_holdout_refuses_fractions_outside_0_to_1(fraction):
    with pytest.raises(ValueError, match=f"between 0 and 1; found {fraction}"):
        holdout(dataset_of([0] * 10), fraction=fraction, seed=0)


@pytest.mark.parametrize(("fraction", "taken"), [(0.01, 0), (0.99, 10)])
def test_holdout_refuses_to_empty_a_side(fraction, taken):
    with pytest.raises(ValueError, match=f"takes {taken}; both"):
        holdout(dataset_of([0] * 10), fraction=fraction, seed=0)


def test_a_fifth_in_file_order_is_every_fifth_of_each_class():
    labels = np.array([0] * 50 + [1] * 25)
    chosen = choose_stratified(labels, fraction=0.2, order=np.arange(75))
    assert chosen.tolist() == list(range(4, 75, 5))


def test_split_survives_saving_even_with_an_empty_client(tmp_path):
    split = Split((np.array([3, 5]), np.array([], dtype=np.int64), np.array([0])))
    split.save(tmp_path / "split.npz")
    loaded = Split.load(tmp_path / "split.npz")
    assert [owned.tolist() for owned in loaded.indices] == [[3, 5], [], [0]]
    assert loaded.digest == split.digest


@pytest.mark.parametrize("other", [([0], [1, 2]), ([0, 1, 2],), ([0, 2], [1]), ([0, 1], [2], [])])
def test_digest_tells_splits_apart(other):
    def digest(parts):
        return Split(tuple(np.array(part, dtype=np.int64) for part in parts)).digest

    assert digest(([0, 1], [2])) != digest(other)


def test_select_follows_the_order_of_the_indices():
    chosen = dataset_of([0, 1, 2, 3]).train.select(np.array([2, 0]))
    assert rows(chosen).tolist() == [2, 0]
    assert chosen.targets.tolist() == [2, 0]
    assert len(chosen) == 2


def test_dataset_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset_of([0, 1, 2]).name = "other"


# ---- a data set fits its own description


def regression_of(targets):
    examples = Examples(torch.zeros(3, 1), targets)
    return Dataset("made_up", examples, examples, "regression", 2)


def test_data_sets_that_fit_their_description_are_accepted():
    check_dataset(dataset_of([0, 3, 1]))
    check_dataset(dataset_of([0, 3, 1], groups=np.array([5, 5, 9])))
    check_dataset(regression_of(torch.zeros(3, 2)))


BAD_PARTS = {
    "fewer targets": (Examples(torch.zeros(4, 1), torch.tensor([0, 1, 2])), r"\(3,\) torch.int64 for 4 inputs"),
    "no example": (Examples(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)), "for 0 inputs.*must be some"),
    "float labels": (Examples(torch.zeros(3, 1), torch.zeros(3)), r"torch.float32; .*needs \[num\] int64 labels"),
    "short labels": (Examples(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int32)), "torch.int32; .*int64 labels"),
    "one-hot labels": (Examples(torch.zeros(3, 1), torch.eye(3, 4, dtype=torch.int64)), r"\(3, 4\).*needs \[num\]"),
    "label too large": (Examples(torch.zeros(3, 1), torch.tensor([1, 4, 2])), "from 1 to 4; .*labels from 0 to 3"),
    "label negative": (Examples(torch.zeros(3, 1), torch.tensor([-1, 3, 2])), "from -1 to 3; .*labels from 0 to 3"),
}


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", BAD_PARTS)
def test_examples_that_do_not_fit_are_refused_by_part(name, part):
    bad, words = BAD_PARTS[name]
    with pytest.raises(ValueError, match=f"made_up: the {part} targets are .*{words}"):
        check_dataset(dataclasses.replace(dataset_of([0, 3, 1]), **{part: bad}))


@pytest.mark.parametrize("targets", [torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 2, 1)])
def test_regression_needs_a_column_an_output(targets):
    with pytest.raises(ValueError, match=r"the train targets are .*num_outputs=2 needs \[num, num_outputs\]"):
        check_dataset(regression_of(targets))


def test_each_training_example_needs_one_group():
    with pytest.raises(ValueError, match="made_up: 2 groups for 3 training examples"):
        check_dataset(dataset_of([0, 3, 1], groups=np.array([5, 9])))
