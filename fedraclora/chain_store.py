"""A chain on disk: its base, one safetensors file a version, and an index.

A version's file holds only what its link says in explicit numbers. The index names, for each version, its link,
whether that link was closed then, and the chain's digest, which is checked when the chain is read: a damaged log is
never taken for a model.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedraclora import sketch
from fedraclora.chain import Chain
from fedraclora.files import read_json, read_tensors, write_json, write_tensors
from fedraclora.link import Json, Link, describe, restore, slots
from fedraclora.payload import Packed

FORMAT = 2


@dataclass(frozen=True)
class Entry:
    """One line of the index: the link that `version` wrote, the how-manieth update of it that was, and the digest.

    `has_merged` says that the version closed another link before it.
    """

    version: int
    link: int
    updates_in_link: int
    is_closed: bool
    has_merged: bool
    digest: str

    @property
    def num_closed(self) -> int:
        """Return how many links the version closed."""
        return int(self.is_closed) + int(self.has_merged)

    @property
    def file(self) -> str:
        """Return the name of the version's file."""
        return f"version_{self.version:06d}.safetensors"


class ChainStore:
    """The chain kept in `folder`. One process writes it; any number may read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: list[Entry] = []
        self._snapshots: list[int] = []

    def create(self, chain: Chain) -> None:
        """Write the base of a chain without links, replacing what the folder held."""
        write_tensors(self.folder / "base.safetensors", chain.merged, {"hash": chain.hash})
        self._entries, self._snapshots = [], []
        self._write_index()

    def append(self, chain: Chain) -> None:
        """Write the chain's newest version; call it once after each update."""
        is_closed = chain.open is None
        link = chain.links[-1] if chain.open is None else chain.open
        has_merged = chain.num_links - chain.num_links_before > int(is_closed)
        entry = Entry(chain.version, link.index, chain.updates_in_link, is_closed, has_merged, chain.digest)
        tensors, metadata = _to_file("link", link)
        if has_merged:
            more, texts = _to_file("merged", chain.links[-1 - int(is_closed)])
            tensors, metadata = tensors | more, metadata | texts
        write_tensors(self.folder / entry.file, tensors, metadata)
        self._entries = [old for old in self._entries if old.version < entry.version] + [entry]
        self._write_index()

    def snapshot(self, chain: Chain) -> None:
        """Write the merged weights of the closed links, so that reading the chain need not replay them."""
        metadata = {"hash": chain.hash, "weights": sketch.digest_all(chain.everything())}
        write_tensors(self.folder / _snapshot_file(chain.num_links), chain.everything(), metadata)
        self._snapshots = sorted({*self._snapshots, chain.num_links})
        self._write_index()

    def forget_replaced(self) -> None:
        """Delete the versions that closed no link, but for the newest; they can no longer be read."""
        kept = _needed(self._entries)
        replaced = [entry for entry in self._entries if entry not in kept]
        self._entries = kept
        self._write_index()
        for entry in replaced:
            (self.folder / entry.file).unlink(missing_ok=True)

    def base_hash(self) -> str:
        """Return the digest of the base that the chain started from."""
        return read_tensors(self.folder / "base.safetensors")[1]["hash"]

    def versions(self) -> list[int]:
        """Return the versions that can be read, 0 (the base) first."""
        self._read_index()
        return [0, *(entry.version for entry in self._entries)]

    def load(self, version: int | None = None) -> Chain:
        """Return the chain at `version` (default: the newest), its digest checked.

        Raises ValueError where a file is missing or damaged, or the version is not kept.
        """
        versions = self.versions()
        wanted = versions[-1] if version is None else version
        if wanted not in versions:
            raise ValueError(f"version {wanted} is not in {self.folder}; it holds {versions}")
        self._entries = [entry for entry in self._entries if entry.version <= wanted]
        num_closed = sum(entry.num_closed for entry in self._entries)
        self._snapshots = [num_links for num_links in self._snapshots if num_links <= num_closed]
        chain = self._replay()
        chain.version = wanted
        if self._entries:
            newest = self._entries[-1]
            chain.updates_in_link = newest.updates_in_link
            chain.num_links_before = chain.num_links - newest.num_closed
        return chain

    def _replay(self) -> Chain:
        """Return the chain rebuilt from the newest snapshot, or from the base, with every link kept."""
        chain, num_merged = self._base(), max(self._snapshots, default=0)
        for entry in _needed(self._entries):
            self._replay_version_(chain, entry, num_merged)
        return chain

    def _replay_version_(self, chain: Chain, entry: Entry, num_merged: int) -> None:
        """Add a version's links; the first `num_merged` are not merged, because a snapshot of them follows."""
        path = self.folder / entry.file
        try:
            tensors, metadata = read_tensors(path)
            # What an earlier version left open stands in this one as it was, or was replaced.
            chain.open = None
            for name in ("merged", "link") if entry.has_merged else ("link",):
                chain.open_link(_from_file(name, tensors, metadata))
                if name == "merged" or entry.is_closed:
                    chain.close(merge=chain.num_links >= num_merged)
        except Exception as error:  # a damaged description may fail in any way; the cause is shown and kept
            raise ValueError(f"{path} is damaged: {error!r}") from error
        if chain.digest != entry.digest:
            raise ValueError(f"{path} is damaged: version {entry.version} has another digest")
        if entry.num_closed and chain.num_links == num_merged:
            self._take_snapshot(chain)

    def _base(self) -> Chain:
        base, metadata = read_tensors(self.folder / "base.safetensors")
        chain = Chain.start(base)
        if chain.hash != metadata.get("hash"):
            raise ValueError(
                f"{self.folder / 'base.safetensors'} is damaged: its digest differs from the one it states"
            )
        return chain

    def _take_snapshot(self, chain: Chain) -> None:
        path = self.folder / _snapshot_file(chain.num_links)
        tensors, metadata = read_tensors(path)
        if metadata.get("hash") != chain.hash or metadata.get("weights") != sketch.digest_all(tensors):
            raise ValueError(f"{path} is damaged or of another chain: its digest differs; delete it from the index")
        chain.take(tensors)

    def _read_index(self) -> None:
        path = self.folder / "index.json"
        index = read_json(path)
        try:
            found, rows, snapshots = index["format"], index["versions"], index["snapshots"]
            if found != FORMAT:
                raise ValueError(f"{path} has format {found!r}; this program reads {FORMAT}")
            self._entries, self._snapshots = [Entry(**row) for row in rows], list(snapshots)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from error

    def _write_index(self) -> None:
        rows = [asdict(entry) for entry in self._entries]
        write_json(self.folder / "index.json", {"format": FORMAT, "versions": rows, "snapshots": self._snapshots})


def _needed(entries: Sequence[Entry]) -> list[Entry]:
    """Return the last version and those that closed a link: what the others held was replaced."""
    return [entry for entry in entries if entry.num_closed or entry is entries[-1]]


def _snapshot_file(num_links: int) -> str:
    return f"snapshot_{num_links:06d}.safetensors"


def _to_file(name: str, link: Link) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a link as the tensors and the texts of a file: its numbers, and the arrays of those that were packed."""
    tensors = {f"{name}.{position}": tensor for position, tensor in enumerate(link.tensors)}
    packed = []
    for position, (key, item) in enumerate(link.packed.items()):
        # A copy: arrays that came from elsewhere may be read-only.
        arrays = {array: torch.from_numpy(values.copy()) for array, values in item.arrays.items()}
        stated = [key, item.codec, item.seed, list(arrays)]
        packed.append([*stated, _seal(stated, arrays)])
        tensors |= {f"{name}.packed.{position}.{array}": values for array, values in arrays.items()}
    return tensors, {name: json.dumps(describe(link)), f"{name}.packed": json.dumps(packed)}


def _from_file(name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Link:
    packed = {}
    for position, (*stated, seal) in enumerate(json.loads(metadata[f"{name}.packed"])):
        key, codec, seed, names = stated
        arrays = {array: tensors[f"{name}.packed.{position}.{array}"] for array in names}
        if _seal(stated, arrays) != seal:
            raise ValueError(f"the encoded numbers of {key!r} are not what their digest says")
        packed[key] = Packed(codec, seed, {array: values.numpy() for array, values in arrays.items()})
    description = json.loads(metadata[name])
    numbers = [tensors[f"{name}.{position}"] for position in range(len(slots(description)))]
    return replace(restore(description, numbers), packed=packed)


def _seal(stated: Json, arrays: Mapping[str, Tensor]) -> str:
    """Return a digest of how a tensor travels: the link's own covers its numbers alone."""
    return hashlib.sha256(json.dumps([stated, sketch.digest_all(arrays)]).encode()).hexdigest()
