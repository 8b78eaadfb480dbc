"""FedKRSO: within one round a client trains in several drawn subspaces, one after the other.

G. Yang, T. Wu, Y. Guo, Y. Sun, Y. Gong, "FedKRSO: Communication and Memory Efficient Federated Fine-Tuning of Large
Language Models", 2026, arXiv 2602.03019. The server names S seeds a round, hence A_1 .. A_S. A client trains the B of
one subspace for some steps, then that of another, with everything it has trained so far in its own model; it sends all
S of them (accumulators), and W <- W + (alpha / rank) * sum_j mean(B_j) A_j, which is exact because the draws are
shared.

Differs from the paper: a client goes through the subspaces in a random order without repeats, where the paper draws one
anew each time; a subspace follows the run's sketch law (orthonormal rows by default, the paper's are Gaussian); the
local optimiser is the run's (the paper's is Adam); clients are weighted by their examples unless the run has
`weighting=uniform`, as the paper.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from fedraclora.chain import Weights
from fedraclora.link import Link, LowRank, Stack, Zero
from fedraclora.plan import Training
from fedraclora.seeding import derive_seed
from strategies.method import Adapter, Step, Traits, Updates, mean_update, replace_trained


@dataclass
class Config:
    """Settings of FedKRSO.

    num_seeds: subspaces a round (the paper's K); a client sends the numbers of all of them.
    block_steps: local steps in one subspace before the next one.
    lr: the clients' learning rate where the run names none.
    """

    num_seeds: int = 4
    block_steps: int = 5
    lr: float = 2.0


@dataclass(frozen=True)
class FedKrso:
    """The method for one adapted model."""

    config: Config
    adapter: Adapter
    traits: ClassVar[Traits] = Traits()

    def open_link(self, index: int, weights: Weights) -> Link:
        """Return link `index`: per layer the subspaces side by side, and zeros for what trains in them."""
        return Link(index, tuple(self._term(index, layer) for layer in self.adapter.shapes))

    def _term(self, index: int, layer: str) -> LowRank:
        key = self.adapter.key(index, layer, "b")
        keys = tuple(replace(key, seed=derive_seed(key.seed, "block", j)) for j in range(self.config.num_seeds))
        zero = Zero((self.adapter.shapes[layer].out, self.config.num_seeds * key.rank))
        return LowRank(layer, self.adapter.scales[layer], lora_a=Stack(keys), lora_b=zero)

    def trains(self, round: int, start: Link) -> Training:
        """Return B of every layer, block by block."""
        return Training(
            self.adapter.everywhere("b"),
            self.adapter.dense,
            blocks=self.config.num_seeds,
            block_steps=self.config.block_steps,
        )

    def aggregate(self, weights: Weights, start: Link, updates: Updates) -> Step:
        """Return the link with the means of the accumulators in it."""
        return Step(replace_trained(start, mean_update(updates)))

    def closes(self, updates_in_link: int) -> bool:
        """Return True: every round has its own subspaces."""
        return True


def build(config: Config, adapter: Adapter) -> FedKrso:
    """Return FedKRSO for an adapted model. Raises ValueError for settings that make no sense."""
    if config.num_seeds < 1 or config.block_steps < 1:
        raise ValueError(
            f"method.num_seeds={config.num_seeds} and method.block_steps={config.block_steps} must be at least 1"
        )
    return FedKrso(config, adapter)
