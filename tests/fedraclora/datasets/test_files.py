"""One's own files: what was written is what is read, and what is wrong is named."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from fedraclora.data import check_dataset
from fedraclora.datasets import files
from fedraclora.datasets.files import Config


def build(path, **options):
    return files.build(Config(path=str(path), **options), seed=0)


def save(path, inputs, targets):
    np.savez(path, inputs=np.asarray(inputs), targets=np.asarray(targets))
    return path


@settings(max_examples=30, deadline=None)
@given(
    inputs=arrays.arrays(st.sampled_from([np.float32, np.float64]), (5, 2, 3), elements=st.floats(-1e3, 1e3, width=32)),
    targets=arrays.arrays(np.int64, 5, elements=st.integers(0, 9)),
)
def test_arrays_are_read_as_they_were_written(tmp_path_factory, inputs, targets):
    train = build(save(tmp_path_factory.mktemp("own") / "own.npz", inputs, targets)).train
    assert train.inputs.numpy().dtype == inputs.dtype
    assert np.array_equal(train.inputs.numpy(), inputs)
    assert np.array_equal(train.targets.numpy(), targets)


def test_whole_numbers_become_float32_and_are_normalised(tmp_path):
    path = save(tmp_path / "own.npz", np.array([[0, 4], [2, 6]], dtype=np.uint8), [0, 1])
    train = build(path, mean=2.0, std=4.0).train
    assert train.inputs.tolist() == [[-0.5, 0.5], [0.0, 1.0]]
    assert train.inputs.dtype == torch.float32


def test_a_folder_may_hold_a_part_for_training_and_one_for_testing(tmp_path):
    save(tmp_path / "train.npz", np.zeros((3, 2)), [0, 1, 1])
    alone = build(tmp_path)
    assert (len(alone.train), len(alone.test), alone.num_outputs) == (3, 0, 2)
    with pytest.raises(ValueError, match="there must be some"):
        check_dataset(alone)
    save(tmp_path / "test.npz", np.zeros((2, 2)), [2, 0])
    both = build(tmp_path)
    assert (len(both.test), both.num_outputs) == (2, 3)
    check_dataset(both)


def test_a_client_that_lacks_classes_is_told_how_many_there_are(tmp_path):
    assert build(save(tmp_path / "own.npz", np.zeros((2, 2)), [0, 1]), num_outputs=10).num_outputs == 10


def test_a_table_gives_its_last_column_or_the_one_that_is_named(tmp_path):
    (tmp_path / "own.csv").write_text("a,b,c\n1,2,0\n3,4,1\n")
    last, named = build(tmp_path / "own.csv"), build(tmp_path / "own.csv", target="a", task="regression")
    assert last.train.inputs.tolist() == [[1, 2], [3, 4]]
    assert last.train.targets.tolist() == [0, 1]
    assert named.train.inputs.tolist() == [[2, 0], [4, 1]]
    assert named.train.targets.tolist() == [[1], [3]]


def test_names_of_classes_have_the_order_that_is_given(tmp_path):
    (tmp_path / "own.csv").write_text("a,kind\n1,cat\n2,ant\n")
    assert build(tmp_path / "own.csv").train.targets.tolist() == [1, 0]
    given_order = build(tmp_path / "own.csv", classes=["cat", "bee", "ant"])
    assert given_order.train.targets.tolist() == [0, 2]
    assert given_order.num_outputs == 3


@pytest.fixture
def pictures(tmp_path):
    for name, level in (("cat", 255), ("ant", 51)):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (4, 6), (level, 0, level)).save(tmp_path / "train" / name / "one.png")
    return tmp_path


def test_a_folder_of_images_has_a_subfolder_a_class(pictures):
    train = build(pictures).train
    assert train.inputs.shape == (2, 3, 6, 4)
    assert train.targets.tolist() == [0, 1], "ant, cat"
    torch.testing.assert_close(train.inputs[:, 0, 0, 0], torch.tensor([0.2, 1.0]))
    assert not train.inputs[:, 1].any()


def test_images_may_be_brought_to_one_size_and_one_channel(pictures):
    Image.new("L", (9, 9), 10).save(pictures / "train" / "cat" / "two.png")
    with pytest.raises(ValueError, match="image_size"):
        build(pictures)
    assert build(pictures, image_size=5, grayscale=True).train.inputs.shape == (3, 1, 5, 5)


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def other_arrays(path):
    np.savez(path / "own.npz", x=np.zeros(3))
    return path / "own.npz"


WRONG = {
    "nothing there": (lambda path: path / "no.npz", FileNotFoundError, "does not exist"),
    "no such kind": (lambda path: touch(path / "own.txt"), ValueError, "neither"),
    "no NumPy file": (lambda path: touch(path / "own.npz"), ValueError, "cannot be read"),
    "half a file": (
        lambda path: cut(save(path / "own.npz", np.zeros((3, 2)), [0, 1, 0])),
        ValueError,
        "cannot be read",
    ),
    "other arrays": (other_arrays, ValueError, "lacks the arrays"),
    "other lengths": (lambda path: save(path / "own.npz", np.zeros((3, 2)), [0]), ValueError, "3 inputs and 1 targets"),
    "NaN": (lambda path: save(path / "own.npz", [[np.nan]], [0]), ValueError, "NaN"),
    "half classes": (lambda path: save(path / "own.npz", [[0.0]], [0.5]), ValueError, "whole numbers"),
    "words": (lambda path: save(path / "own.npz", [["a"]], [0]), ValueError, "numbers are right"),
    "text column": (lambda path: touch(path / "own.csv", "a,b\nx,1\n"), ValueError, r"columns \['a'\]"),
    "empty table": (lambda path: touch(path / "own.csv"), ValueError, "cannot be read as a table"),
    "no image": (
        lambda path: touch(path / "train" / "cat" / "one.png").parent.parent.parent,
        ValueError,
        "as an image",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(tmp_path, name):
    make, kind, words = WRONG[name]
    with pytest.raises(kind, match=words):
        build(make(tmp_path))


def test_a_column_or_a_class_that_is_not_there_is_named(tmp_path):
    path = touch(tmp_path / "own.csv", "a,kind\n1,cat\n2,ant\n")
    with pytest.raises(ValueError, match=r"no column 'b'; it has \['a', 'kind'\]"):
        build(path, target="b")
    with pytest.raises(ValueError, match=r"\['ant'\], which dataset.classes does not list"):
        build(path, classes=["cat"])
    with pytest.raises(ValueError, match="regression"):
        build(path, task="regression")


def test_pickled_objects_are_never_loaded(tmp_path):
    np.savez(tmp_path / "own.npz", inputs=np.array([{}], dtype=object), targets=np.zeros(1))
    with pytest.raises(ValueError, match="cannot be read as a NumPy file: Object arrays"):
        build(tmp_path / "own.npz")
