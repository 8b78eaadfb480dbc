"""Readers of one's own files: each returns inputs `[num, *input_shape]` and targets `[num, ...]` as arrays."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = tuple[Array, Array]


class Options(Protocol):
    """The settings that readers use."""

    task: str
    target: str
    classes: list[str]
    image_size: int
    grayscale: bool


def read_npz(path: Path, options: Options) -> Arrays:
    """Return the arrays `inputs` and `targets` of a NumPy file, as they are."""
    del options
    wanted = ("inputs", "targets")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = sorted(arrays.files)
            found = {name: arrays[name] for name in wanted if name in names}
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as a NumPy file: {error}") from error
    missing = sorted(set(wanted) - found.keys())
    if missing:
        raise ValueError(f"{path} lacks the arrays {missing}; it holds {names}")
    inputs, targets = (found[name] for name in wanted)
    if inputs.dtype.kind not in "fiub" or targets.dtype.kind not in "fiub":
        raise ValueError(f"{path} holds {inputs.dtype} inputs and {targets.dtype} targets; numbers are right")
    return inputs, targets


def read_csv(path: Path, options: Options) -> Arrays:
    """Return a table's columns as float32 inputs, and one column, the last or the one that is named, as targets."""
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    target = options.target or str(table.columns[-1])
    if target not in table.columns:
        raise ValueError(f"{path} has no column {target!r}; it has {list(table.columns)}")
    inputs = table.drop(columns=target)
    text = [str(name) for name in inputs.columns if inputs[name].dtype.kind not in "fiub"]
    if text:
        raise ValueError(f"{path}: the columns {text} do not hold numbers; every input column must")
    column = table[target]
    if column.dtype.kind in "fiub":
        return inputs.to_numpy(np.float32), column.to_numpy()
    if options.task == "regression":
        raise ValueError(f"{path}: the column {target!r} does not hold numbers, which a regression needs")
    names = column.astype(str).tolist()
    return inputs.to_numpy(np.float32), _labels(names, options.classes or sorted(set(names)), path)


def read_images(path: Path, options: Options) -> Arrays:
    """Return the images of a folder with one subfolder a class: float32 `[num, channels, height, width]` in 0 to 1."""
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    names = options.classes or [folder.name for folder in folders]
    files = [(file, folder.name) for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    if not files:
        raise ValueError(f"{path} holds no images; one subfolder a class, with the images in it, is right")
    images = [_read_image(file, options) for file, _ in files]
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise ValueError(f"{path} holds images of {shapes[:3]}; give dataset.image_size to bring them to one size")
    return np.stack(images), _labels([name for _, name in files], names, path)


def _read_image(file: Path, options: Options) -> Array:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if options.grayscale else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error
    if options.image_size:
        image = image.resize((options.image_size, options.image_size))
    pixels = np.asarray(image, dtype=np.float32) / 255
    return pixels[None] if options.grayscale else pixels.transpose(2, 0, 1)


def _labels(found: Sequence[str], names: Sequence[str], path: Path) -> Array:
    places = {name: place for place, name in enumerate(names)}
    unknown = sorted(set(found) - places.keys())
    if unknown:
        raise ValueError(f"{path} holds the classes {unknown}, which dataset.classes does not list: {list(names)}")
    return np.array([places[name] for name in found], dtype=np.int64)


READERS: Mapping[str, Callable[[Path, Options], Arrays]] = {".npz": read_npz, ".csv": read_csv, "": read_images}
