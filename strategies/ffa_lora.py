"""FFA-LoRA: A is drawn once and frozen for good, only B is trained and averaged.

Y. Sun, Z. Li, Y. Li, B. Ding, "Improving LoRA in Privacy-preserving Federated Learning", 2024, arXiv 2403.12313. The
mean of the products is exact, but the update never leaves the row space of the one A. It is RAC-LoRA with a link that
never closes.

Differs from the paper: A follows the run's sketch law (orthonormal rows by default), as every method's does.
"""

from dataclasses import dataclass

from strategies import rac_lora
from strategies.method import Adapter, Method


@dataclass
class Config:
    """Settings of FFA-LoRA.

    moments: the optimiser's state between rounds: `reset`; `carry` (or `transport`), its first moments; or `keep`,
    first and second moments and the step count.
    lr: the clients' learning rate where the run names none.
    """

    moments: str = "reset"
    lr: float = 1.0


def build(config: Config, adapter: Adapter) -> Method:
    """Return FFA-LoRA for an adapted model. Raises ValueError for private draws, and for unknown `moments`."""
    if not adapter.is_shared:
        raise ValueError(
            "FFA-LoRA freezes one A for all clients, so that sketch.shared=false is not for it; set it true"
        )
    chain = rac_lora.Config(side="b", rounds_per_link=0, moments=config.moments, lr=config.lr)
    return rac_lora.build(chain, adapter)
