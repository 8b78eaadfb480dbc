"""MNIST (LeCun, Cortes and Burges): 60,000 training and 10,000 test images of handwritten digits.

They are read from a NumPy file, from the four original files, or from the Hugging Face hub.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fedraclora.data import Dataset, Examples
from fedraclora.datasets._mnist_files import ByteArray, RawMnist, read_idx_folder, read_npz

HUB_NAME = "ylecun/mnist"
NUM_DIGITS = 10
PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081


@dataclass
class Config:
    """Settings of MNIST.

    path: an `.npz` file with the uint8 arrays x_train, y_train, x_test and y_test, or a folder with the four original
        IDX files, gzipped or not; without one, `ylecun/mnist` is loaded from the Hugging Face hub.
    digits: the digits that are kept, whose labels are their places in this list; none: all ten.
    """

    path: str | None = None
    digits: list[int] = field(default_factory=list)


def build(config: Config, *, seed: int) -> Dataset:
    """Return MNIST as normalised float32 images `[num, 1, 28, 28]`; the seed changes nothing.

    Raises FileNotFoundError for a missing file, ValueError for a file that does not hold MNIST's form and for `digits`
    that are none, and ConnectionError when the hub cannot be reached.
    """
    del seed
    digits = _check_digits(config.digits) if config.digits else list(range(NUM_DIGITS))
    raw = _load_hub() if config.path is None else _read(Path(config.path).expanduser())
    return Dataset(
        name="mnist",
        train=as_examples(*_keep(digits, raw.train_pixels, raw.train_labels)),
        test=as_examples(*_keep(digits, raw.test_pixels, raw.test_labels)),
        task="classification",
        num_outputs=len(digits),
    )


def as_examples(pixels: ByteArray, labels: ByteArray) -> Examples:
    """Return examples with inputs `(pixels / 255 - 0.1307) / 0.3081` as float32 `[num, 1, height, width]`."""
    inputs = torch.from_numpy(pixels).to(torch.float32).unsqueeze(1)
    inputs.div_(255).sub_(PIXEL_MEAN).div_(PIXEL_STD)
    return Examples(inputs, torch.from_numpy(labels).to(torch.int64))


def _check_digits(digits: Sequence[int]) -> list[int]:
    """Return the digits. Raises ValueError for anything else, and where one is named twice."""
    wrong = [digit for digit in digits if digit not in range(NUM_DIGITS)]
    twice = sorted({digit for digit in digits if list(digits).count(digit) > 1})
    if wrong or twice:
        found = f"{wrong} are no digits" if wrong else f"{twice} are named twice"
        raise ValueError(f"dataset.digits={list(digits)}: {found}; name digits from 0 to 9, each once, as in [5, 6, 7]")
    return list(digits)


def _keep(digits: Sequence[int], pixels: ByteArray, labels: ByteArray) -> tuple[ByteArray, ByteArray]:
    """Return the images of these digits, in the order they come in, with each digit's place in the list as label."""
    places = np.full(NUM_DIGITS, NUM_DIGITS, dtype=np.uint8)
    places[list(digits)] = np.arange(len(digits), dtype=np.uint8)
    new = places[labels]
    rows = new < NUM_DIGITS
    return (pixels, new) if rows.all() else (pixels[rows], new[rows])


def _read(path: Path) -> RawMnist:
    if path.is_dir():
        return read_idx_folder(path)
    if path.is_file():
        return read_npz(path)
    raise FileNotFoundError(
        f"dataset.path={path} does not exist; give an .npz file with x_train, y_train, x_test and y_test, or a folder "
        "with MNIST's four IDX files"
    )


def _load_hub() -> RawMnist:
    from datasets import load_dataset

    try:
        splits = load_dataset(HUB_NAME)
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        raise ConnectionError(
            f"cannot load {HUB_NAME!r} from the Hugging Face hub ({type(error).__name__}: {error}); without a network "
            "give dataset.path=FILE.npz or dataset.path=FOLDER with MNIST's files, or use dataset=mnist_5k"
        ) from error
    columns = [splits[split].with_format("numpy")[:] for split in ("train", "test")]
    arrays = [np.asarray(column[key], dtype=np.uint8) for column in columns for key in ("image", "label")]
    return RawMnist(*arrays)
