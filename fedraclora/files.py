"""Files that are either there whole or not at all."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, so that a reader or a crash at any moment finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        # A full disk must not be filled further by what could not be finished.
        draft.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write plain values as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors and text metadata as safetensors, atomically."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    uses = Counter(_memory(tensor) for tensor in plain.values())
    # The format refuses tensors that share memory, as those of a link do that has one factor twice.
    apart = {name: tensor.clone() if uses[_memory(tensor)] > 1 else tensor for name, tensor in plain.items()}
    write_atomically(path, safetensors.torch.save(apart, metadata=dict(metadata)))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. Raises ValueError where it is missing or damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Return the value of a JSON file. Raises ValueError where it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
