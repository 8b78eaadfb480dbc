"""RAC-LoRA: a chain of links, in each of which one factor is drawn from a seed and only the other one is trained.

G. Malinovsky, U. Michieli, H. A. A. K. Hammoud, T. Ceritli, H. Elesedy, M. Ozay, P. Richtarik, "Randomized Asymmetric
Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank Adaptation", 2024, arXiv 2410.08305.
Algorithm 1 is the chain; its federated form (the paper's Algorithm 2) is read as: for t = 0, 1, ...

1. the server names the seed of A^t; every client of the cohort draws it and sets B = 0             (`open_link`)
2. each client trains B on its own data and sends B_k                                               (`trains`)
3. the server merges W^{t+1} = W^t + (alpha / rank) * mean(B_k) A^t, exact because A^t is shared    (`aggregate`,
   `closes`)

Differs from the paper: A has orthonormal rows by default, so that a gradient step on B is the projected step of the
theory; a link may last several rounds; the server may take a longer step than the mean (`server_lr`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedraclora.chain import Weights
from fedraclora.link import Link, Term
from fedraclora.plan import MOMENTS
from fedraclora.plugins import nearest
from fedraclora.targets import MatrixShape
from strategies.method import Adapter, Trained, Updates, mean_update, move_from_start, replace_trained

SIDES = ("b", "a", "auto")


@dataclass
class Config:
    """Settings of RAC-LoRA.

    side: the factor that is trained and sent: `b` (A is drawn), `a` (B is drawn), or `auto` (per layer the smaller).
    rounds_per_link: rounds before a link is merged and a new one opened; 1 as published, 0 never (FFA-LoRA).
    moments: the optimiser's first moments between rounds: `reset`, `carry`, or `transport` into the new link's basis.
    server_lr: the server's step from the start towards the clients' mean; 1 is plain averaging.
    lr: the clients' learning rate where the run names none.
    """

    side: str = "b"
    rounds_per_link: int = 1
    moments: str = "reset"
    server_lr: float = 1.0
    lr: float = 2.0


@dataclass(frozen=True)
class RacLora:
    """The method for one adapted model; `sides` is the trained factor of each layer."""

    config: Config
    adapter: Adapter
    sides: Mapping[str, str]

    def open_link(self, index: int) -> Link:
        """Return link `index`: per layer one drawn factor, the trained one zero."""
        return self.adapter.open_link(index, self.sides)

    def trains(self, round: int) -> Trained:
        """Return the trained factor of each layer, the same in every round."""
        return Trained(self.sides, self.adapter.dense, self.config.moments)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> list[Term]:
        """Return the link with the mean of the clients' trained factors in it."""
        mean = mean_update(updates)
        return replace_trained(start, move_from_start(weights, start, mean, self.config.server_lr))

    def closes(self, updates_in_link: int) -> bool:
        """Return whether the link has lasted its rounds."""
        return updates_in_link == self.config.rounds_per_link


def build(config: Config, adapter: Adapter) -> RacLora:
    """Return RAC-LoRA for an adapted model. Raises ValueError for settings that make no sense."""
    if config.side not in SIDES:
        raise ValueError(f"method.side={config.side!r} is unknown; {nearest(config.side, SIDES)}")
    if config.rounds_per_link < 0 or not config.server_lr > 0:
        raise ValueError(
            f"method.rounds_per_link={config.rounds_per_link} must not be negative and "
            f"method.server_lr={config.server_lr} must be positive"
        )
    if config.moments not in MOMENTS:
        raise ValueError(f"method.moments={config.moments!r} is unknown; {nearest(config.moments, MOMENTS)}")
    sides = {layer: _side(config.side, shape) for layer, shape in adapter.shapes.items()}
    return RacLora(config, adapter, sides)


def _side(side: str, shape: MatrixShape) -> str:
    """Return the trained side of a layer; `auto` takes the one with fewer numbers to send (B where equal)."""
    if side != "auto":
        return side
    return "b" if shape.out <= shape.in_ else "a"
