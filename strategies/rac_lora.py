"""RAC-LoRA: a chain of links, in each of which one factor is drawn from a seed and only the other one is trained.

G. Malinovsky, U. Michieli, H. A. A. K. Hammoud, T. Ceritli, H. Elesedy, M. Ozay, P. Richtarik, "Randomized Asymmetric
Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank Adaptation", 2024, arXiv 2410.08305.
Algorithm 1 is the chain; its federated form (the paper's Algorithm 2) is read as: for t = 0, 1, ...

1. the server names the seed of A^t; every client of the cohort draws it and sets B = 0             (`open_link`)
2. each client trains B on its own data and sends B_k                                               (`trains`)
3. the server merges W^{t+1} = W^t + (alpha / rank) * mean(B_k) A^t, exact because A^t is shared    (`aggregate`,
   `closes`)

Differs from the paper: A has orthonormal rows by default, so that a gradient step on B is the projected step of the
theory; a link may last several rounds. Clients may have smaller ranks: client k then uses the first rows of A^t. With
private draws (`sketch.shared=false`) each client draws an A_k of its own, and the server merges, and hands on,
(alpha / rank) * sum p_k B_k A_k.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedraclora.chain import Weights
from fedraclora.link import Link
from fedraclora.plan import MOMENTS, Training
from fedraclora.plugins import nearest
from fedraclora.targets import MatrixShape
from strategies._factors import dense_terms, mean_of_contributors, relay
from strategies.method import Adapter, Step, Traits, Updates, mean_update, replace_trained

SIDES = ("b", "a", "auto")
CONTRIBUTORS = ("all", "rows")


@dataclass
class Config:
    """Settings of RAC-LoRA.

    side: the factor that is trained and sent: `b` (A is drawn), `a` (B is drawn), or `auto` (per layer the smaller).
    rounds_per_link: rounds before a link is merged and a new one opened; 1 as published, 0 never (FFA-LoRA).
    moments: the optimiser's state between rounds: `reset`; its first moments alone, `carry` as they are or `transport`
    into the new link's basis; or `keep`, first and second moments and the step count as they are.
    contributors: over whom a rank component is averaged where ranks differ: `all` clients (those that do not train it
    count as zero there), or `rows`, those that train it.
    lr: the clients' learning rate where the run names none.
    """

    side: str = "b"
    rounds_per_link: int = 1
    moments: str = "reset"
    contributors: str = "all"
    lr: float = 2.0


@dataclass(frozen=True)
class RacLora:
    """The method for one adapted model; `sides` is the trained factor of each layer."""

    config: Config
    adapter: Adapter
    sides: Mapping[str, str]

    @property
    def traits(self) -> Traits:
        """Return what the method can be combined with."""
        return Traits(
            is_mean=self.adapter.is_shared and self.config.contributors == "all",
            merges=self.config.rounds_per_link > 0,
            has_ranks=True,
            has_private_draws=self.config.rounds_per_link == 1,
            is_steady=self.adapter.is_shared,
        )

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return link `index`: per layer one drawn factor, the trained one zero."""
        return self.adapter.open_link(index, self.sides, is_private=not self.adapter.is_shared)

    def trains(self, round: int, start: Link) -> Training:
        """Return the trained factor of each layer, the same in every round."""
        return Training(self.sides, self.adapter.dense, moments=self.config.moments)

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return the link with the mean of the clients' trained factors in it."""
        if not self.adapter.is_shared:
            return Step([*relay(start, updates, self.sides), *dense_terms(self.adapter.dense, updates)])
        if self.config.contributors == "rows":
            return Step(replace_trained(start, mean_of_contributors(start, updates, self.sides)))
        return Step(replace_trained(start, mean_update(updates)))

    def closes(self, updates_in_link: int) -> bool:
        """Return whether the link has lasted its rounds."""
        return updates_in_link == self.config.rounds_per_link


def build(config: Config, adapter: Adapter) -> RacLora:
    """Return RAC-LoRA for an adapted model. Raises ValueError for settings that make no sense."""
    choices = {"side": SIDES, "moments": MOMENTS, "contributors": CONTRIBUTORS}
    for name, valid in choices.items():
        found = getattr(config, name)
        if found not in valid:
            raise ValueError(f"method.{name}={found!r} is unknown; {nearest(found, valid)}")
    if config.rounds_per_link < 0:
        raise ValueError(f"method.rounds_per_link={config.rounds_per_link} must not be negative")
    if not adapter.is_shared:
        _check_private(config)
    return RacLora(config, adapter, choose_sides(config.side, adapter.shapes))


def _check_private(config: Config) -> None:
    if config.rounds_per_link != 1:
        raise ValueError(
            f"with sketch.shared=false a link lasts one round, because no client holds the factor of another; "
            f"found method.rounds_per_link={config.rounds_per_link}, set it to 1"
        )
    if config.contributors != "all":
        raise ValueError(
            f"with sketch.shared=false no two clients train the same rank component, so method.contributors="
            f"{config.contributors!r} has nothing to average over; set it to 'all'"
        )


def choose_sides(side: str, shapes: Mapping[str, MatrixShape]) -> dict[str, str]:
    """Return the trained side of each layer; `auto` takes the one with fewer numbers to send (B where equal)."""
    if side != "auto":
        return dict.fromkeys(shapes, side)
    return {layer: "b" if shape.out <= shape.in_ else "a" for layer, shape in shapes.items()}
