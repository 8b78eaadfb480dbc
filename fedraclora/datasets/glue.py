"""GLUE, five of its tasks: English sentences, alone or in pairs, as the token ids of a language model.

A. Wang, A. Singh, J. Michael, F. Hill, O. Levy, S. R. Bowman, "GLUE: A Multi-Task Benchmark and Analysis Platform for
Natural Language Understanding", 2019, arXiv 1804.07461. The test set is GLUE's *validation* split, as in the papers on
fine-tuning: the labels of its test split are not public. Scored are the loss and, for classes, the accuracy; Matthews'
correlation (CoLA's own metric), F1 and the correlations of STS-B are left out, as are the tasks MNLI, QNLI, QQP and
WNLI.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedraclora.data import Dataset, Examples
from fedraclora.datasets._glue_files import TASKS, Rows, Task, as_rows, read_bundle
from fedraclora.models.transformer import import_transformers
from fedraclora.plugins import nearest

HUB_NAME = "nyu-mll/glue"
# A pair of sentences has up to four special tokens beside its own.
MIN_LENGTH = 8


@dataclass
class Config:
    """Settings of GLUE.

    task: mrpc, cola, rte or sst2 (two classes), or stsb (regression of a score from 0 to 5).
    path: a `.json` or `.json.xz` file of the form {task: {"train": [[text, (text,) label], ...], "dev": ...}}; without
        one, `nyu-mll/glue` is loaded from the Hugging Face hub.
    tokenizer: the tokenizer's name on the hub, or a local folder that holds it: that of the model.
    max_length: tokens of an example, special ones included; longer texts are cut.
    """

    task: str = "mrpc"
    path: str | None = None
    tokenizer: str = "roberta-base"
    max_length: int = 128


def build(config: Config, *, seed: int) -> Dataset:
    """Return the task's examples with inputs `[num, 2, max_length]`; the seed changes nothing.

    `inputs[:, 0]` are the token ids, `inputs[:, 1]` the attention mask (1 for a token, 0 for the padding behind it).
    They are whole numbers kept as float32, which holds them exactly up to 2^24, because the inputs of all data sets are
    floats. Segment ids, which RoBERTa does not have, are left out. Targets are classes, or scores `[num, 1]`.

    Raises ValueError for settings that cannot be used, a file of another form, and where `transformers` is not
    installed; FileNotFoundError for a missing file; ConnectionError when the hub cannot be reached.
    """
    del seed
    _check(config)
    task = TASKS[config.task]
    tokenizer = _load_tokenizer(config.tokenizer)
    parts = _load_hub(config.task) if config.path is None else read_bundle(_file(config.path), config.task)
    train, test = (Examples(_encode(tokenizer, rows, config.max_length), _targets(rows, task)) for rows in parts)
    kind = "regression" if task.is_regression else "classification"
    return Dataset("glue", train, test, kind, num_outputs=task.num_classes or 1)


def _check(config: Config) -> None:
    if config.task not in TASKS:
        raise ValueError(f"dataset.task={config.task!r} is unknown; {nearest(config.task, TASKS)}")
    if config.max_length < MIN_LENGTH:
        raise ValueError(f"dataset.max_length={config.max_length} must be at least {MIN_LENGTH}")


def _file(path: str) -> Path:
    return Path(path).expanduser()


def _load_tokenizer(source: str) -> Any:  # noqa: ANN401
    transformers = import_transformers(f"dataset=glue needs the tokenizer {source!r}")
    folder = Path(source).expanduser()
    try:
        # The model cuts off columns that no row of a batch uses, from the right.
        return transformers.AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else source, padding_side="right"
        )
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        raise ConnectionError(
            f"cannot load the tokenizer {source!r} ({type(error).__name__}: {error}); without a network give "
            "dataset.tokenizer=FOLDER with the tokenizer's files"
        ) from error


def _load_hub(name: str) -> tuple[Rows, Rows]:
    from datasets import load_dataset

    task = TASKS[name]
    try:
        splits = load_dataset(HUB_NAME, name)
    except Exception as error:  # as above
        raise ConnectionError(
            f"cannot load {name!r} of {HUB_NAME!r} from the Hugging Face hub ({type(error).__name__}: {error}); "
            "without a network give dataset.path=FILE.json.xz with GLUE's tasks"
        ) from error
    columns = [splits[split][:] for split in ("train", "validation")]
    rows = [list(zip(*(column[key] for key in (*task.columns, "label")), strict=True)) for column in columns]
    train, test = (as_rows(found, task, f"{name} of {HUB_NAME}") for found in rows)
    return train, test


def _encode(tokenizer: Any, rows: Rows, max_length: int) -> Tensor:  # noqa: ANN401
    """Return the texts as `[num, 2, max_length]`: token ids and attention mask."""
    encoded = tokenizer(
        *rows.texts, padding="max_length", truncation=True, max_length=max_length, return_attention_mask=True
    )
    parts = [torch.tensor(encoded[key], dtype=torch.float32) for key in ("input_ids", "attention_mask")]
    return torch.stack(parts, dim=1)


def _targets(rows: Rows, task: Task) -> Tensor:
    if task.is_regression:
        return torch.tensor(rows.labels, dtype=torch.float32).unsqueeze(1)
    return torch.tensor(rows.labels, dtype=torch.int64)
