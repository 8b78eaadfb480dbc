"""FedAvg on all weights: the reference that every low-rank method is measured against.

B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas, "Communication-Efficient Learning of Deep Networks
from Decentralized Data", 2017, arXiv 1602.05629. Clients train and send every parameter; the server averages them. As
a log it is one open link that sets the current weights, so a client that was away needs the newest version only.
"""

from dataclasses import dataclass

from fedraclora.chain import Weights
from fedraclora.link import Link, Term
from strategies.method import Adapter, Trained, Updates, mean_update, move_from_start, replace_trained


@dataclass
class Config:
    """Settings of FedAvg.

    server_lr: the server's step from its weights towards the clients' mean; 1 is plain averaging.
    lr: the clients' learning rate where the run names none.
    """

    server_lr: float = 1.0
    lr: float = 0.2


@dataclass(frozen=True)
class Full:
    """The method for one model; targets and ranks do not concern it."""

    config: Config
    parameters: tuple[str, ...]

    def open_link(self, index: int) -> Link:
        """Return the one link, empty until the first update."""
        return Link(index, ())

    def trains(self, round: int) -> Trained:
        """Return all parameters."""
        return Trained(dense=self.parameters)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> list[Term]:
        """Return a term that sets each parameter to the clients' mean."""
        return replace_trained(start, move_from_start(weights, start, mean_update(updates), self.config.server_lr))

    def closes(self, updates_in_link: int) -> bool:
        """Return False: only the newest weights are ever sent."""
        return False


def build(config: Config, adapter: Adapter) -> Full:
    """Return FedAvg on all parameters. Raises ValueError for a server step that is not positive."""
    if not config.server_lr > 0:
        raise ValueError(f"method.server_lr={config.server_lr} must be positive")
    return Full(config, adapter.parameters)
