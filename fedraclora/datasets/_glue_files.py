"""The rows of GLUE's tasks, and the bundle of them in one JSON file: {task: {split: [[text, (text,) label], ...]}}."""

import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedraclora.plugins import nearest

# The similarity of two sentences of STS-B.
MAX_SCORE = 5.0
# The name that bundles and the hub have for the labelled examples that are not trained on.
DEV_NAMES = ("dev", "validation")


@dataclass(frozen=True)
class Task:
    """The columns of a task's texts on the hub, and its number of classes: 0 is a score from 0 to 5."""

    columns: tuple[str, ...]
    num_classes: int = 2

    @property
    def is_regression(self) -> bool:
        """Return whether the label is a score."""
        return self.num_classes == 0


_PAIR = ("sentence1", "sentence2")
TASKS: Mapping[str, Task] = {
    "mrpc": Task(_PAIR),
    "cola": Task(("sentence",)),
    "rte": Task(_PAIR),
    "sst2": Task(("sentence",)),
    "stsb": Task(_PAIR, num_classes=0),
}


@dataclass(frozen=True)
class Rows:
    """The examples of one split: each column of texts, and the labels."""

    texts: tuple[list[str], ...]
    labels: list[float]


def as_rows(found: object, task: Task, where: str) -> Rows:
    """Return rows `[text, (text,) label]` as columns; `where` names them in messages.

    Raises ValueError where there is none, and for the first one of another form.
    """
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise ValueError(f"{where} has to be a list of rows, at least one; found {_shortened(found)}")
    for place, row in enumerate(found):
        if not _is_row(row, task):
            label = f"a score from 0 to {MAX_SCORE:g}" if task.is_regression else f"0 to {task.num_classes - 1}"
            raise ValueError(
                f"row {place} of {where} has to be [{'text, ' * len(task.columns)}label] with a label of {label}; "
                f"found {_shortened(row)}"
            )
    *texts, labels = (list(column) for column in zip(*found, strict=True))
    return Rows(tuple(texts), labels)


def _is_row(row: object, task: Task) -> bool:
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != len(task.columns) + 1:
        return False
    texts, label = row[:-1], row[-1]
    # True is an int to Python, and no label.
    is_number = isinstance(label, int | float) and not isinstance(label, bool)
    if not is_number or not all(isinstance(text, str) for text in texts):
        return False
    if task.is_regression:
        return bool(0 <= label <= MAX_SCORE)  # false for NaN
    return isinstance(label, int) and 0 <= label < task.num_classes


def _shortened(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_bundle(path: Path, name: str) -> tuple[Rows, Rows]:
    """Return the training and the development examples of a task from a `.json` or a `.json.xz` file.

    Raises FileNotFoundError where there is no file, ValueError for one that is damaged or lacks the task or a split.
    """
    bundle = _load(path)
    splits = bundle.get(name) if isinstance(bundle, dict) else None
    if not isinstance(splits, dict):
        tasks = sorted(bundle) if isinstance(bundle, dict) else []
        raise ValueError(f"{path} holds no task {name!r}; {nearest(name, tasks)}")
    dev = next((key for key in DEV_NAMES if key in splits), DEV_NAMES[0])
    missing = [key for key in ("train", dev) if key not in splits]
    if missing:
        raise ValueError(f"{path}: {name} lacks the split {' and '.join(missing)}; found {sorted(splits)}")
    train, test = (as_rows(splits[key], TASKS[name], f"{name}/{key} in {path}") for key in ("train", dev))
    return train, test


def _load(path: Path) -> Any:  # noqa: ANN401
    if not path.is_file():
        raise FileNotFoundError(f"dataset.path={path} does not exist; give a .json or a .json.xz file of GLUE's tasks")
    read: Callable[[bytes], bytes] = lzma.decompress if path.suffix == ".xz" else bytes
    try:
        return json.loads(read(path.read_bytes()))
    except (lzma.LZMAError, ValueError) as error:  # JSON's and the text encoding's errors are ValueErrors
        raise ValueError(f"{path} is not a readable {path.suffix or 'JSON'} file: {error}") from error
