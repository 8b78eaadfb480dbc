"""Examples from one's own files: NumPy arrays, a table, or folders of images.

This is how a real client brings its data: `dataset=files dataset.path=...`, or `data-path=...` in its node config.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fedraclora.data import Dataset, Examples
from fedraclora.datasets._files_readers import READERS, Arrays

KINDS = "an .npz file, a .csv file, or a folder with one subfolder of images a class"


@dataclass
class Config:
    """Settings of one's own files.

    path: an `.npz` or `.csv` file, or a folder of images with one subfolder a class; or a folder with the entry `train`
        (`train.npz`, `train.csv` or `train/`), the entry `test` of the same kinds, or both: a client needs the first,
        a server whose clients have their own data the second.
    task: classification or regression.
    num_outputs: classes or targets, 0 where the files hold them all; a client may lack some.
    target: the column of a table that holds the target; empty is the last one.
    classes: names of the classes in the order of their labels, for images and tables with names; empty is all that
        are found, sorted.
    image_size: images are scaled to this height and width; 0 leaves them as they are.
    grayscale: images have one channel instead of three.
    mean, std: inputs become `(input - mean) / std`, images after their pixels are brought to 0 to 1.
    """

    path: str = ""
    task: str = "classification"
    num_outputs: int = 0
    target: str = ""
    classes: list[str] = field(default_factory=list)
    image_size: int = 0
    grayscale: bool = False
    mean: float = 0.0
    std: float = 1.0


def build(config: Config, *, seed: int) -> Dataset:
    """Return the examples; the seed changes nothing. A part without an entry is empty.

    Inputs of `.npz` files keep their floating type, all others are float32. Raises FileNotFoundError and ValueError
    that name the file, what was found and what is right.
    """
    del seed
    if config.task not in ("classification", "regression") or not config.std > 0:
        raise ValueError(
            f"dataset.task={config.task!r} is classification or regression, dataset.std={config.std} positive"
        )
    root = Path(config.path).expanduser()
    if not config.path or not root.exists():
        raise FileNotFoundError(f"dataset.path={config.path!r} does not exist; give {KINDS}")
    train, test = _read_parts(root, config)
    num_outputs = config.num_outputs or len(config.classes) or _num_outputs(train, test, config.task)
    return Dataset("files", train, test, config.task, num_outputs)


def _read_parts(root: Path, config: Config) -> tuple[Examples, Examples]:
    """Return the training and the test examples; a part that is not there has none."""
    paths = {part: _entry(root, part) for part in ("train", "test")}
    found = {part: _read(path, config) for part, path in paths.items() if path is not None}
    if not found:
        found = {"train": _read(root, config)}
    nothing = next(iter(found.values())).select(np.zeros(0, dtype=np.int64))
    return found.get("train", nothing), found.get("test", nothing)


def _entry(root: Path, part: str) -> Path | None:
    """Return the file or folder of a part, None where there is none."""
    if not root.is_dir():
        return None
    found = [path for path in (root / f"{part}.npz", root / f"{part}.csv", root / part) if path.exists()]
    if len(found) > 1:
        raise ValueError(f"{root} holds {[path.name for path in found]}; one {part} entry is right")
    return found[0] if found else None


def _read(path: Path, config: Config) -> Examples:
    kind = "" if path.is_dir() else path.suffix
    if kind not in READERS:
        raise ValueError(f"{path} is neither {KINDS.replace(', or', ', nor')}")
    return _as_examples(READERS[kind](path, config), path, config)


def _as_examples(arrays: Arrays, path: Path, config: Config) -> Examples:
    inputs, targets = arrays
    if len(inputs) != len(targets):
        raise ValueError(f"{path} holds {len(inputs)} inputs and {len(targets)} targets; each input needs one")
    if not np.isfinite(inputs).all() or not np.isfinite(targets).all():
        raise ValueError(f"{path} holds NaN or infinity; every input and target must be a number")
    if inputs.dtype not in (np.float32, np.float64):
        inputs = inputs.astype(np.float32)
    if (config.mean, config.std) != (0.0, 1.0):
        inputs = ((inputs - config.mean) / config.std).astype(inputs.dtype)
    return Examples(torch.from_numpy(inputs.copy()), _targets(targets, path, config.task))


def _targets(targets: np.ndarray, path: Path, task: str) -> torch.Tensor:
    if task == "regression":
        numbers = targets if targets.dtype == np.float64 else targets.astype(np.float32)
        return torch.from_numpy(numbers.reshape(len(numbers), -1).copy())
    whole = targets.astype(np.int64)
    if targets.ndim != 1 or not np.array_equal(whole, targets) or (len(whole) and whole.min() < 0):
        raise ValueError(f"{path}: the targets of a classification are whole numbers from 0, one an input")
    return torch.from_numpy(whole)


def _num_outputs(train: Examples, test: Examples, task: str) -> int:
    if task == "regression":
        return int(train.targets.shape[1])
    labels = torch.cat([train.targets, test.targets])
    return int(labels.max()) + 1 if len(labels) else 0
