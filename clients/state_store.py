"""A client's own state between rounds: what it keeps and never sends.

A round writes its state as a candidate under its round number; the next plan names the round whose candidate to start
from, because only the server knows which replies were used. So a reply that was lost or refused changes nothing, and
a run that is resumed starts from what it started from before.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedraclora.files import read_tensors, write_tensors

# What a client remembers: its optimiser's first and second moments, what its compressor left out (or the difference it
# has told of), its control variates, and what it trains and never sends.
MOMENTS, SECOND_MOMENTS, FEEDBACK, VARIATES, PRIVATE = "moments", "second_moments", "feedback", "variates", "private"


class LostState(ValueError):
    """The state that a plan names is not there."""


@dataclass(frozen=True)
class ClientState:
    """What a client remembers, by purpose and key, and the description of the link whose basis that lives in.

    `num_steps` counts the steps over which moments were gathered.
    """

    tensors: dict[str, dict[str, Tensor]]
    num_steps: int
    link: list[Any]


class ClientStore:
    """The states of the clients that live on this machine: in memory, and in `folder` where there is one."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._states: dict[tuple[int, int], ClientState] = {}

    def save(self, partition: int, round: int, state: ClientState) -> None:
        """Keep `state` as the candidate of `round`."""
        self._states[partition, round] = state
        if self._folder is not None:
            metadata = {"link": json.dumps(state.link), "num_steps": str(state.num_steps)}
            flat = {f"{purpose}/{key}": t for purpose, named in state.tensors.items() for key, t in named.items()}
            write_tensors(self._path(partition, round), flat, metadata)

    def load(self, partition: int, round: int) -> ClientState:
        """Return the candidate of `round` and forget all others. Raises LostState where there is none."""
        self._forget_others(partition, round)
        if (partition, round) not in self._states:
            self._states[partition, round] = self._read(partition, round)
        return self._states[partition, round]

    def _forget_others(self, partition: int, round: int) -> None:
        for key in [key for key in self._states if key[0] == partition and key[1] != round]:
            del self._states[key]
        if self._folder is not None:
            kept = self._path(partition, round)
            for path in self._folder.glob(f"client_{partition:06d}_round_*.safetensors"):
                if path != kept:
                    path.unlink()

    def _read(self, partition: int, round: int) -> ClientState:
        path = None if self._folder is None else self._path(partition, round)
        if path is None or not path.exists():
            raise LostState(f"client {partition} has no state of round {round} to start from")
        flat, metadata = read_tensors(path)
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, tensor in flat.items():
            purpose, _, key = name.partition("/")
            tensors.setdefault(purpose, {})[key] = tensor
        return ClientState(tensors, int(metadata["num_steps"]), json.loads(metadata["link"]))

    def _path(self, partition: int, round: int) -> Path:
        assert self._folder is not None
        return self._folder / f"client_{partition:06d}_round_{round:06d}.safetensors"
