"""Tests of fedraclora.files."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedraclora.files import read_json, read_tensors, write_atomically, write_json, write_tensors


def test_content_is_written_and_replaced_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os if broken == "fsync" else Path, broken, crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def _noting(name: str, function: Callable[..., object], calls: list[str]) -> Callable[..., object]:
    def noted(*arguments: object) -> object:
        calls.append(name)
        return function(*arguments)

    return noted


def test_content_is_on_the_disk_before_it_takes_the_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", _noting("fsync", fsync, calls))
    monkeypatch.setattr(Path, "replace", _noting("replace", replace, calls))
    write_atomically(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace"]


def test_json_values_survive(tmp_path: Path) -> None:
    value = {"name": "é", "list": [1, 2.5, None, True], "nested": {"seed": 2**63 - 1}}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value


def test_tensors_and_metadata_survive_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.randn(3, 4).T,
        "double": torch.randn(2, dtype=torch.float64, requires_grad=True),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "special": torch.tensor([-0.0, float("inf")]),
    }
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, tensors, {"hash": "0f", "note": "é"})
    found, metadata = read_tensors(path)
    assert metadata == {"hash": "0f", "note": "é"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert found["special"].signbit().tolist() == [True, False]


def test_tensors_that_share_memory_are_written_each_by_itself(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": whole, "again": whole, "rows": whole[:2], "flat": whole.reshape(-1)}
    write_tensors(tmp_path / "tensors", tensors, {})
    found, _ = read_tensors(tmp_path / "tensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors", b"\xff" * 16])
def test_missing_and_damaged_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "broken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken cannot be read as safetensors"):
        read_tensors(path)
    with pytest.raises(ValueError, match=r"broken cannot be read as JSON"):
        read_json(path)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tensors"
    write_tensors(path, {"a": torch.ones(8)}, {})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"tensors cannot be read as safetensors"):
        read_tensors(path)
