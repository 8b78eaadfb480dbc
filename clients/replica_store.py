"""A replica on disk: snapshots of its merged weights and the links after the newest of them.

A deployed ClientApp is a new process for every message, so what a machine was sent must survive on its disk. Every
file is written whole or not at all and is checked against digests when it is read: what does not check is deleted, and
the machine then lacks it and says so. When the links take more bytes than the weights, they are folded into a new
snapshot, so that a replica never takes more than about twice the model. The base is not stored; whoever reads builds
it again.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from fedraclora import link as links
from fedraclora import sketch
from fedraclora.chain import SLOT, Chain, extend_hash
from fedraclora.delivery import Received
from fedraclora.files import read_tensors, write_tensors
from fedraclora.link import Link
from fedraclora.travel import Kept

log = logging.getLogger("fedraclora")

LOCK_TIMEOUT_S = 600.0


class ReplicaStore:
    """The replica kept in `folder`; several processes may use it, one at a time while they hold `locked()`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out. Raises filelock.Timeout after ten minutes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "replica.lock", timeout=LOCK_TIMEOUT_S):
            yield

    def advance(self, chain: Chain) -> None:
        """Bring `chain` as far as the files go, from wherever it is."""
        newest = max(self._snapshots(), default=-1)
        if newest > chain.num_links:
            self._checked(self._snapshot(newest), lambda path: _restore(chain, path))
        while (path := self._link(chain.num_links)).exists():
            if not self._checked(path, lambda path: _append(chain, path)):
                return

    def keep(self, chain: Chain, received: Received) -> None:
        """Write what a delivery brought; `chain` is the replica after it. Raises OSError where the disk refuses."""
        if received.is_snapshot or any(item.link.has_given for item in received.links) or self._has_gap(received):
            # A link whose factors this machine draws otherwise cannot be read again from its seeds, and one whose
            # predecessor could not be written not at all.
            self._fold(chain)
            return
        for item in received.links:
            tensors = {str(position): tensor for position, tensor in enumerate(item.link.tensors)}
            stated = {"digest": item.digest, "sent": item.link.digest, "hash": item.hash}
            described = {**stated, "link": json.dumps(links.describe(item.link))}
            write_tensors(self._link(item.link.index), tensors, described)
        if received.links and self._link_bytes() > _weight_bytes(chain):
            self._fold(chain)

    def _has_gap(self, received: Received) -> bool:
        first = received.links[0].link.index if received.links else 0
        return first > 0 and not (self._link(first - 1).exists() or self._snapshot(first).exists())

    def clear(self) -> None:
        """Forget the replica; what else lies in the folder stays."""
        for path in [*map(self._snapshot, self._snapshots()), *self._links(), self._open]:
            path.unlink(missing_ok=True)

    def keep_open(self, kept: Kept, version: int) -> None:
        """Write the factors of an open link, of which the server will send only what changes."""
        tensors = {f"{position}": tensor for position, tensor in enumerate(kept.values())}
        named = {"names": json.dumps([name for name, _ in kept]), "digest": sketch.digest_all(tensors)}
        write_tensors(self._open, tensors, {**named, "version": str(version)})

    def read_open(self) -> tuple[Kept, int] | None:
        """Return what `keep_open` wrote last and its version, None where there is nothing that can be used."""
        found: list[tuple[Kept, int]] = []

        def read(path: Path) -> None:
            tensors, metadata = read_tensors(path)
            if sketch.digest_all(tensors) != metadata["digest"]:
                raise ValueError("its tensors are not what their digest says")
            ordered = [tensors[str(position)] for position in range(len(tensors))]
            named = zip(json.loads(metadata["names"]), ordered, strict=True)
            found.append(({(name, tuple(t.shape)): t for name, t in named}, int(metadata["version"])))

        if self._open.exists():
            self._checked(self._open, read)
        return found[0] if found else None

    @property
    def _open(self) -> Path:
        return self.folder / "open.safetensors"

    def _fold(self, chain: Chain) -> None:
        everything = chain.everything()
        metadata = {"hash": chain.hash, "num_links": str(chain.num_links), "weights": sketch.digest_all(everything)}
        old = [*map(self._snapshot, self._snapshots()), *self._links()]
        kept = self._snapshot(chain.num_links)
        write_tensors(kept, everything, metadata)
        for path in old:
            if path != kept:
                path.unlink(missing_ok=True)

    def _checked(self, path: Path, read: Callable[[Path], None]) -> bool:
        """Read a file; one that cannot be used is deleted, and the replica stays as it was."""
        try:
            read(path)
        except Exception as error:  # noqa: BLE001
            # A damaged description may fail in any way; whatever it is, the machine simply lacks this link.
            log.warning("%s cannot be used and is deleted: %s", path.name, error)
            path.unlink(missing_ok=True)
            return False
        return True

    def _snapshots(self) -> list[int]:
        return [int(path.stem.rpartition("_")[2]) for path in self.folder.glob("weights_*.safetensors")]

    def _links(self) -> list[Path]:
        return sorted(self.folder.glob("link_*.safetensors"))

    def _link_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._links())

    def _snapshot(self, num_links: int) -> Path:
        return self.folder / f"weights_{num_links:06d}.safetensors"

    def _link(self, index: int) -> Path:
        return self.folder / f"link_{index:06d}.safetensors"


def _weight_bytes(chain: Chain) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in chain.merged.values())


def _restore(chain: Chain, path: Path) -> None:
    tensors, metadata = read_tensors(path)
    weights = {name for name in tensors if not name.startswith(SLOT)}
    if sketch.digest_all(tensors) != metadata["weights"] or weights != chain.merged.keys():
        raise ValueError("its weights are not what their digest says, or those of another model")
    chain.restore(tensors, num_links=int(metadata["num_links"]), hash=metadata["hash"])


def _append(chain: Chain, path: Path) -> None:
    tensors, metadata = read_tensors(path)
    link: Link = links.restore(json.loads(metadata["link"]), [tensors[str(place)] for place in range(len(tensors))])
    if link.digest != metadata["sent"] or link.index != chain.num_links:
        raise ValueError("its link is not what its digest says")
    if metadata["hash"] != extend_hash(chain.hash, metadata["digest"]):
        raise ValueError("it follows another link than the one before it")
    chain.open = None
    chain.open_link(link)
    chain.close(digest=metadata["digest"])
    chain.links.clear()
