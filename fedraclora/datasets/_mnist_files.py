"""Read MNIST's arrays from the files they are passed around in."""

import gzip
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

ByteArray = npt.NDArray[np.uint8]

_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_IDX_STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
_IDX_DIMENSIONS = {"images": 3, "labels": 1}


@dataclass(frozen=True)
class RawMnist:
    """Pixels `[num, 28, 28]` and labels `[num]` (0 to 9) as unsigned bytes."""

    train_pixels: ByteArray
    train_labels: ByteArray
    test_pixels: ByteArray
    test_labels: ByteArray


def read_npz(path: Path) -> RawMnist:
    """Return the arrays of an `.npz` file with x_train, y_train, x_test and y_test.

    Raises ValueError naming the file when it is damaged, lacks an array, or holds arrays of another form.
    """
    try:
        # NumPy leaves a damaged file open when it opens it by itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in _NPZ_KEYS if key in archive}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from error
    missing = [key for key in _NPZ_KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; MNIST needs the uint8 arrays {', '.join(_NPZ_KEYS)}")
    return _checked([arrays[key] for key in _NPZ_KEYS], path)


def read_idx_folder(folder: Path) -> RawMnist:
    """Return the arrays of the four original files, whose names may end in `.gz` and have a dot for the last hyphen.

    Raises FileNotFoundError naming the files that are missing, and ValueError for damaged ones.
    """
    found = {stem: _find_idx(folder, stem) for stem in _IDX_STEMS}
    missing = [_idx_name(stem) for stem, file in found.items() if file is None]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} (with or without .gz)")
    return _checked([_read_idx(file, stem.split("-")[1]) for stem, file in found.items() if file is not None], folder)


def _idx_name(stem: str) -> str:
    return f"{stem}-idx{_IDX_DIMENSIONS[stem.split('-')[1]]}-ubyte"


def _find_idx(folder: Path, stem: str) -> Path | None:
    name = _idx_name(stem)
    names = [base + suffix for base in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_idx(file: Path, kind: str) -> ByteArray:
    """Return one IDX array: two zero bytes, type 8 (unsigned byte), number of axes, big-endian sizes, data."""
    num_axes = _IDX_DIMENSIONS[kind]
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is not a readable gzip file: {error}") from error
    magic = bytes((0, 0, 8, num_axes))
    if content[:4] != magic:
        raise ValueError(f"{file} has to start with the bytes {magic.hex()} of IDX {kind}; found {content[:4].hex()}")
    header_bytes = 4 + 4 * num_axes
    sizes = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header_bytes, 4)]
    if len(content) != header_bytes + math.prod(sizes):
        raise ValueError(f"{file} has {len(content)} bytes; its header says {header_bytes + math.prod(sizes)}: {sizes}")
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(sizes).copy()


def _checked(arrays: list[npt.NDArray[np.uint8]], source: Path) -> RawMnist:
    for part, pixels, labels in (("training", arrays[0], arrays[1]), ("test", arrays[2], arrays[3])):
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (28, 28) or len(pixels) == 0:
            found = f"{pixels.dtype} of shape {list(pixels.shape)}"
            raise ValueError(f"{source}: the {part} images have to be uint8 of shape [num, 28, 28]; found {found}")
        if labels.dtype != np.uint8 or labels.shape != pixels.shape[:1] or labels.max() > 9:
            found = f"{labels.dtype} of shape {list(labels.shape)}, at most {labels.max(initial=0)}"
            raise ValueError(f"{source}: {len(pixels)} {part} images need as many uint8 labels, 0 to 9; found {found}")
    return RawMnist(*arrays)
