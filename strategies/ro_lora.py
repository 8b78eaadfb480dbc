"""RoLoRA: one pair of factors whose two sides train in turn, so that the mean is exact and both sides move.

S. Chen, Y. Guo, Y. Ju, H. Dalal, Z. Zhu, A. Khisti, "Robust Federated Finetuning of LLMs via Alternating Optimization
of LoRA", 2025, arXiv 2502.01755 (first as arXiv 2409.02346, 2024). In odd rounds the clients train and send B with A
frozen, in even rounds A with B frozen; the server averages what was trained. Only the factor that changed is sent to
clients that hold the other.

Differs from the paper: clients are weighted by their examples unless the run has `weighting=uniform`, as the paper; the
start of A follows the run's sketch law.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedraclora.chain import Weights
from fedraclora.link import Link
from fedraclora.plan import Training
from strategies.method import Adapter, Step, Traits, Updates, mean_update, replace_trained


@dataclass
class Config:
    """Settings of RoLoRA; `lr` is the clients' learning rate where the run names none."""

    lr: float = 0.25


@dataclass(frozen=True)
class RoLora:
    """The method for one adapted model."""

    config: Config
    adapter: Adapter
    traits: ClassVar[Traits] = Traits(merges=False, is_steady=False)

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return the one pair: a drawn start for A, zero for B."""
        return self.adapter.open_link(index, self.adapter.everywhere("ab"))

    def trains(self, round: int, start: Link) -> Training:
        """Return B in odd rounds (the first is 1), A in even ones."""
        return Training(self.adapter.everywhere("b" if round % 2 else "a"), self.adapter.dense)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return the pair with the mean of the factor that was trained."""
        return Step(replace_trained(start, mean_update(updates)))

    def closes(self, updates_in_link: int) -> bool:
        """Return False: the pair goes on."""
        return False


def build(config: Config, adapter: Adapter) -> RoLora:
    """Return RoLoRA for an adapted model."""
    return RoLora(config, adapter)
