"""COLA, federated: both factors are trained and averaged, and the pair is merged at the end of each link.

W. Xia, C. Qin, E. Hazan, "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning", 2024, arXiv
2401.04151, is the chain for one machine. Federated here: within a link the two factors are averaged separately as in
FedIT, so the merged product is not the mean of the clients' products (it misses the covariance of their factors).

Differs from the paper: the start of A follows the run's sketch law; the paper fixes no federated form.
"""

from dataclasses import dataclass

from fedraclora.chain import Weights
from fedraclora.link import Link
from fedraclora.plan import MOMENTS, Training
from fedraclora.plugins import nearest
from strategies.method import Adapter, Step, Traits, Updates, mean_update, replace_trained

ZEROS = ("b", "a")


@dataclass
class Config:
    """Settings of COLA.

    rounds_per_link: rounds before the pair is merged and a new one started; 0 never (FedIT).
    zero: the factor that starts at zero: `b` (A is drawn), or `a` (B is drawn).
    moments: the optimiser's state between rounds: `reset`; `carry`, its first moments as they are (`transport` is the
    same here, as neither factor is a fixed basis); or `keep`, first and second moments and the step count.
    lr: the clients' learning rate where the run names none.
    """

    rounds_per_link: int = 1
    zero: str = "b"
    moments: str = "reset"
    lr: float = 0.1


@dataclass(frozen=True)
class ChainOfLora:
    """The method for one adapted model."""

    config: Config
    adapter: Adapter

    @property
    def traits(self) -> Traits:
        """Return what the method can be combined with."""
        return Traits(merges=self.config.rounds_per_link > 0)

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return link `index`: a drawn start for one factor, zero for the other."""
        return self.adapter.open_link(index, self.adapter.everywhere("ab" if self.config.zero == "b" else "a"))

    def trains(self, round: int, start: Link) -> Training:
        """Return both factors of every layer."""
        return Training(self.adapter.everywhere("ab"), self.adapter.dense, moments=self.config.moments)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return the pair of the means of the factors."""
        return Step(replace_trained(start, mean_update(updates)))

    def closes(self, updates_in_link: int) -> bool:
        """Return whether the link has lasted its rounds."""
        return updates_in_link == self.config.rounds_per_link


def build(config: Config, adapter: Adapter) -> ChainOfLora:
    """Return federated COLA for an adapted model. Raises ValueError for settings that make no sense."""
    if config.rounds_per_link < 0:
        raise ValueError(f"method.rounds_per_link={config.rounds_per_link} must not be negative")
    for name, valid in {"moments": MOMENTS, "zero": ZEROS}.items():
        found = getattr(config, name)
        if found not in valid:
            raise ValueError(f"method.{name}={found!r} is unknown; {nearest(found, valid)}")
    for layer in adapter.shapes:
        adapter.check_rank(layer)
    return ChainOfLora(config, adapter)
