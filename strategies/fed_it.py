"""FedIT: one pair of factors, both trained and averaged separately in every round.

J. Zhang, S. Vahidian, M. Kuo, C. Li, R. Zhang, T. Yu, G. Wang, Y. Chen, "Towards Building the Federated GPT:
Federated Instruction Tuning", 2024, arXiv 2305.05644. The product of the means is not the mean of the products; the
gap is the covariance of the clients' factors. It is federated COLA with a link that never closes.

Differs from the paper: the start of A follows the run's sketch law, as every method's does.
"""

from dataclasses import dataclass

from strategies import chain_of_lora
from strategies.method import Adapter, Method


@dataclass
class Config:
    """Settings of FedIT.

    zero: the factor that starts at zero: `b` (A is drawn), or `a` (B is drawn).
    moments: the optimiser's state between rounds: `reset`; `carry` (or `transport`), its first moments; or `keep`,
    first and second moments and the step count.
    lr: the clients' learning rate where the run names none. At 0.1, the best rate of the default job, long runs may
    diverge without gradient clipping (`clip_norm=5`).
    """

    zero: str = "b"
    moments: str = "reset"
    lr: float = 0.1


def build(config: Config, adapter: Adapter) -> Method:
    """Return FedIT for an adapted model. Raises ValueError for settings that make no sense."""
    chain = chain_of_lora.Config(rounds_per_link=0, zero=config.zero, moments=config.moments, lr=config.lr)
    return chain_of_lora.build(chain, adapter)
