"""Bernoulli-LoRA: RAC-LoRA in which a coin says, link by link and layer by layer, which factor is drawn.

I. Sokolov, A. Sadiev, Y. Demidovich, F. S. Al-Qahtani, P. Richtarik, "Bernoulli-LoRA: A Theoretical Framework for
Randomized Low-Rank Adaptation", 2025, arXiv 2508.03820. With probability p B is drawn and A trains (the left sketch),
else A is drawn and B trains. Its federated forms compress what is sent (QGD, MARINA, EF21): here that is the run's
compressor and its feedback, which any method can have.

Differs from the paper: each layer has its own coin; the drawn factor has orthonormal columns or rows by default.
"""

from dataclasses import dataclass, replace

from fedraclora.chain import Weights
from fedraclora.link import Link
from fedraclora.plan import Training
from fedraclora.seeding import derive_seed
from strategies import rac_lora
from strategies.method import Adapter, Step, Traits, Updates


@dataclass
class Config:
    """Settings of Bernoulli-LoRA.

    probability: that of a drawn B (A trains), in [0, 1].
    lr: the clients' learning rate where the run names none.
    """

    probability: float = 0.5
    lr: float = 0.5


@dataclass(frozen=True)
class BernoulliLora:
    """The method for one adapted model."""

    config: Config
    adapter: Adapter

    @property
    def traits(self) -> Traits:
        """Return what the method can be combined with: all that its links can, whatever their coins."""
        return replace(self._link_method(0).traits, is_steady=False)

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return link `index`: per layer the factor that its coin says drawn, the other one zero."""
        return self._link_method(index).open_link(index, weights)

    def trains(self, round: int, start: Link) -> Training:
        """Return the factor of each layer that is not drawn."""
        return self._link_method(start.index).trains(round, start)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return the link with the mean of the clients' trained factors in it."""
        return self._link_method(start.index).aggregate(weights, start, updates)

    def closes(self, updates_in_link: int) -> bool:
        """Return True: every round tosses its coins."""
        return True

    def _link_method(self, index: int) -> rac_lora.RacLora:
        sides = {layer: "a" if self._is_b_drawn(index, layer) else "b" for layer in self.adapter.shapes}
        return rac_lora.RacLora(rac_lora.Config(), self.adapter, sides)

    def _is_b_drawn(self, index: int, layer: str) -> bool:
        # A derived seed is uniform on the 63-bit integers and the same on every machine.
        return derive_seed(self.adapter.seed, "coin", index, layer) < self.config.probability * 2**63


def build(config: Config, adapter: Adapter) -> BernoulliLora:
    """Return Bernoulli-LoRA for an adapted model. Raises ValueError for settings that make no sense."""
    if not 0 <= config.probability <= 1:
        raise ValueError(f"method.probability={config.probability} must lie in [0, 1]")
    for layer, shape in adapter.shapes.items():
        rank, limit = adapter.ranks[layer], min(shape.out, shape.in_)
        if 0 < config.probability < 1 and rank > limit:
            raise ValueError(f"rank {rank} exceeds min(in, out) = {limit} of layer {layer!r}, where either is drawn")
    return BernoulliLora(config, adapter)
