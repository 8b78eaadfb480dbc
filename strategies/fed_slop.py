"""FedSLoP: all weights train, on gradients that are projected on a drawn subspace, with a full momentum.

Y. He, Z. Huang, J. Geng, "FedSLoP: Memory-Efficient Federated Learning with Low-Rank Gradient Projection", 2026, arXiv
2604.24012. In each round every target layer has one drawn P `[rank, in]`, the same for all clients, and a client's
optimiser is given G P^T P in place of the gradient G; the other parameters train plainly. The momentum has the shape of
the weight and is carried across rounds, so that a client's update leaves the round's subspace and is sent whole; the
server averages. The momentum itself is the run's `momentum`.

With `upload=factor` the momentum starts anew each round. A client's update then lies in the rows of P, and
(W_k - W) P^T `[out, rank]` says all of it: the same model for a fraction of the uplink.

Differs from the paper: it describes a momentum inside the subspace; carrying one of the weight's shape, and sending all
of the update, is what the code released with it does. Clients are weighted by their examples unless the run has
`weighting=uniform`, as the paper. Momentum at the server, which that code has too, is the run's server rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedraclora.chain import Weights
from fedraclora.link import Dense, Link, Term
from fedraclora.plan import MOMENTS, Training
from fedraclora.plugins import nearest
from strategies.method import Adapter, Step, Traits, Updates, mean_update

UPLOADS = ("delta", "factor")


@dataclass
class Config:
    """Settings of FedSLoP.

    upload: what is sent of the target weights: the whole of them (`delta`, as published), or a `factor`.
    moments: the optimiser's first moments between rounds: `carry` as published, or `reset`, which `factor` needs.
    lr: the clients' learning rate where the run names none.
    """

    upload: str = "delta"
    moments: str = "carry"
    lr: float = 0.2


@dataclass(frozen=True)
class FedSlop:
    """The method for one adapted model."""

    config: Config
    adapter: Adapter

    @property
    def traits(self) -> Traits:
        """Return what the method can be combined with."""
        return Traits(is_steady=self.config.upload == "delta")

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return link `index`: the drawn projection of every target layer, beside zeros."""
        return self.adapter.open_link(index, self.adapter.everywhere("b"))

    def trains(self, round: int, start: Link) -> Training:
        """Return all parameters, those of the target layers on projected gradients."""
        targets = {f"{layer}.weight" for layer in self.adapter.shapes}
        return Training(
            self.adapter.everywhere("w"),
            dense=tuple(name for name in self.adapter.parameters if name not in targets),
            projects=True,
            sends_factor=self.config.upload == "factor",
            moments=self.config.moments,
        )

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return what brings every parameter to the clients' mean."""
        mean = mean_update(updates)
        factors = {name: tensor for name, tensor in mean.items() if name in start.factors}
        terms: list[Term] = list(start.with_factors(factors).low_rank_terms().values()) if factors else []
        return Step(terms + _differences(weights, {name: mean[name] for name in mean if name not in factors}))

    def closes(self, updates_in_link: int) -> bool:
        """Return True: every round has its own projection."""
        return True


def _differences(weights: Weights, mean: Mapping[str, Tensor]) -> list[Term]:
    return [Dense(name, value - weights[name]) for name, value in mean.items()]


def build(config: Config, adapter: Adapter) -> FedSlop:
    """Return FedSLoP for an adapted model. Raises ValueError for settings that make no sense."""
    for name, valid in {"upload": UPLOADS, "moments": MOMENTS[:2]}.items():
        found = getattr(config, name)
        if found not in valid:
            raise ValueError(f"method.{name}={found!r} is unknown; {nearest(found, valid)}")
    if config.upload == "factor" and config.moments != "reset":
        raise ValueError(
            f"method.upload=factor needs method.moments=reset, found {config.moments!r}: a momentum from earlier "
            "rounds takes the weights out of the subspace that the factor stands for"
        )
    return FedSlop(config, adapter)
