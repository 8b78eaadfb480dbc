"""FedSA-LoRA: both factors train, A is averaged, and each client keeps a B of its own.

P. Guo, S. Zeng, Y. Wang, H. Fan, F. Wang, L. Qu, "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
2024, arXiv 2410.01463. What A learns is held to be common, what B learns the client's own: A is sent and averaged, B_k
stays with client k, zero at its first round and afterwards as its last used reply left it. There is no one model: the
server's, whose B is zero, is the base model but for the tensors trained in full, and a client's is completed by its
B_k.

Left out: the paper's variants on rsLoRA and VeRA. Differs from the paper: the start of A follows the run's sketch law.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedraclora.chain import Weights
from fedraclora.link import Link
from fedraclora.plan import Training
from strategies.method import Adapter, Step, Traits, Updates, mean_update, replace_trained


@dataclass
class Config:
    """Settings of FedSA-LoRA; `lr` is the clients' learning rate where the run names none."""

    lr: float = 0.1


@dataclass(frozen=True)
class FedSaLora:
    """The method for one adapted model."""

    config: Config
    adapter: Adapter
    traits: ClassVar[Traits] = Traits(merges=False, is_global=False)

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return the one pair: a drawn start for A, zero for B."""
        return self.adapter.open_link(index, self.adapter.everywhere("ab"))

    def trains(self, round: int, start: Link) -> Training:
        """Return both factors of every layer, of which B is never sent."""
        private = tuple(f"{layer}.lora_b" for layer in self.adapter.shapes)
        return Training(self.adapter.everywhere("ab"), self.adapter.dense, private=private)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return the pair with the mean of A."""
        return Step(replace_trained(start, mean_update(updates)))

    def closes(self, updates_in_link: int) -> bool:
        """Return False: the pair goes on."""
        return False


def build(config: Config, adapter: Adapter) -> FedSaLora:
    """Return FedSA-LoRA for an adapted model."""
    return FedSaLora(config, adapter)
