"""Sketched full training: the weights train in full, and their change is sent through the link's drawn factor.

A control of this project's own for RAC-LoRA (G. Malinovsky et al., 2024, arXiv 2410.08305), with the same draws, bytes
and merge: client k trains the target weights in full, sends B_k = (W_k - W) A^T (A A^T)^-1 / s with s = alpha / rank,
the nearest that A can say of its update, and W <- W + s mean(B_k) A. It tells what training inside the subspace is
worth, against training freely and projecting once: the structured against the sketched update of J. Konecny, H. B.
McMahan, F. X. Yu, P. Richtarik, A. T. Suresh, D. Bacon, "Federated Learning: Strategies for Improving Communication
Efficiency", 2016, arXiv 1610.05492. Biases stay frozen, as in every low-rank method.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedraclora.chain import Weights
from fedraclora.link import Link
from fedraclora.plan import Training
from fedraclora.plugins import nearest
from strategies.method import Adapter, Step, Traits, Updates, mean_update, replace_trained
from strategies.rac_lora import SIDES, choose_sides


@dataclass
class Config:
    """Settings of sketched full training.

    side: the factor that is sent: `b` (A is drawn), `a` (B is drawn), or `auto` (per layer the smaller).
    lr: the clients' learning rate where the run names none.
    """

    side: str = "b"
    lr: float = 0.2


@dataclass(frozen=True)
class SketchedFull:
    """The method for one adapted model; `sides` is the factor that is sent of each layer."""

    config: Config
    adapter: Adapter
    sides: Mapping[str, str]
    traits: ClassVar[Traits] = Traits(is_steady=False)

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return link `index`: per layer one drawn factor, the one to be sent zero."""
        return self.adapter.open_link(index, self.sides)

    def trains(self, round: int, start: Link) -> Training:
        """Return the target weights in full, of which a factor is sent."""
        return Training(self.adapter.everywhere("w"), self.adapter.dense, sends_factor=True)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return the link with the mean of the clients' factors in it."""
        return Step(replace_trained(start, mean_update(updates)))

    def closes(self, updates_in_link: int) -> bool:
        """Return True: every round has its own draws."""
        return True


def build(config: Config, adapter: Adapter) -> SketchedFull:
    """Return sketched full training for an adapted model. Raises ValueError for an unknown side."""
    if config.side not in SIDES:
        raise ValueError(f"method.side={config.side!r} is unknown; {nearest(config.side, SIDES)}")
    return SketchedFull(config, adapter, choose_sides(config.side, adapter.shapes))
