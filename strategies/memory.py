"""The tensors that a server remembers between rounds beside the chain: a set of them for each purpose, in its basis."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedraclora.link import Json, Link, describe, restore
from fedraclora.rebase import rebase

SLOTS, VARIATES = "slots", "variates"


def estimate_of(client: int) -> str:
    """Return the purpose under which the server's estimate of a client's update is remembered."""
    return f"estimate {client}"


@dataclass
class Memory:
    """Named tensors by purpose, and the description of the link whose basis they live in."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    links: dict[str, Json] = field(default_factory=dict)

    def remember(self, purpose: str, tensors: Mapping[str, Tensor], link: Link) -> None:
        """Replace what is remembered for a purpose."""
        self.tensors[purpose], self.links[purpose] = dict(tensors), describe(link.skeleton())

    def recall(self, purpose: str, link: Link, *, mode: str) -> dict[str, Tensor]:
        """Return what is remembered for a purpose, in the basis of `link` by way of `fedraclora.rebase`."""
        if purpose not in self.tensors:
            return {}
        return rebase(self.tensors[purpose], restore(self.links[purpose], []), link, mode=mode)[0]

    def forget(self, purpose: str) -> None:
        """Remember nothing for a purpose."""
        self.tensors.pop(purpose, None)
        self.links.pop(purpose, None)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return all of it as the tensors and the texts of one file."""
        flat = {f"{purpose}/{key}": t for purpose, named in self.tensors.items() for key, t in named.items()}
        return flat, {"links": json.dumps(self.links)}

    @staticmethod
    def from_file(flat: Mapping[str, Tensor], metadata: Mapping[str, str]) -> "Memory":
        """Return what `to_file` was made of."""
        memory = Memory(links=json.loads(metadata["links"]))
        memory.tensors = {purpose: {} for purpose in memory.links}
        for name, tensor in flat.items():
            purpose, _, key = name.partition("/")
            memory.tensors[purpose][key] = tensor
        return memory
