"""FedAvg on all weights: the reference that every low-rank method is measured against.

B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas, "Communication-Efficient Learning of Deep Networks
from Decentralized Data", 2017, arXiv 1602.05629. Clients train and send every parameter; the server averages them. As
a log it is one open link that sets the current weights, so a client that was away needs the newest version only.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedraclora.chain import Weights
from fedraclora.link import Link
from fedraclora.plan import MOMENTS, Training
from fedraclora.plugins import nearest
from strategies.method import Adapter, Step, Traits, Updates, mean_update, replace_trained


@dataclass
class Config:
    """Settings of FedAvg.

    moments: the optimiser's state between rounds: `reset`; `carry` (or `transport`), its first moments; or `keep`,
    first and second moments and the step count.
    lr: the clients' learning rate where the run names none.
    """

    moments: str = "reset"
    lr: float = 0.2


@dataclass(frozen=True)
class Full:
    """The method for one model; targets and ranks do not concern it."""

    config: Config
    parameters: tuple[str, ...]
    traits: ClassVar[Traits] = Traits(merges=False)

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return the one link, empty until the first update."""
        return Link(index, ())

    def trains(self, round: int, start: Link) -> Training:
        """Return all parameters."""
        return Training(dense=self.parameters, moments=self.config.moments)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return a term that sets each parameter to the clients' mean."""
        return Step(replace_trained(start, mean_update(updates)))

    def closes(self, updates_in_link: int) -> bool:
        """Return False: only the newest weights are ever sent."""
        return False


def build(config: Config, adapter: Adapter) -> Full:
    """Return FedAvg on all parameters. Raises ValueError for a rule on moments that there is not."""
    if config.moments not in MOMENTS:
        raise ValueError(f"method.moments={config.moments!r} is unknown; {nearest(config.moments, MOMENTS)}")
    return Full(config, adapter.parameters)
