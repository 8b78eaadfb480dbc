"""What a run will send, before it is run: the same rounds, cohorts, links and rules, on shapes without numbers.

Nothing is trained: the clients' replies are tensors of the right shapes, from which the method makes its next version
as it always does. So the bytes are those of the real messages, for any method, and no model is too large. What it
supposes: every client of a cohort answers, and every tensor that trains moves (one that stays as it is, bit for bit, is
not sent again). Where the size of a message depends on its numbers it tells the most.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedraclora.chain import Chain, Weights
from fedraclora.codec import codec_of
from fedraclora.delivery import Needs, OpenLink, weigh
from fedraclora.ledger import DOWN, UP, LedgerRow, bytes_by_partition
from fedraclora.link import Set
from fedraclora.plan import RoundPlan
from fedraclora.server_rule import ServerRule
from fedraclora.shapes_only import META, ShapesOnly
from fedraclora.upload import VARIATES_KIND
from strategies.advancing import unchanged_since
from strategies.asking import Asked, View, plan_round
from strategies.base import ChainStrategy
from strategies.merging import Finish
from strategies.method import ClientUpdate, Method
from strategies.rounds import RoundReport, RoundSettings
from strategies.state import BudgetTooSmall, exceeded


@dataclass
class ShapeChain(Chain):
    """A chain over weights without numbers, which no link changes."""

    @staticmethod
    def over(weights: Weights) -> "ShapeChain":
        """Return an empty chain over tensors of the shapes and types of `weights`."""
        return ShapeChain({name: torch.empty_like(tensor, device=META) for name, tensor in weights.items()}, hash="")

    def close(self, *, digest: str | None = None, merge: bool = True) -> None:
        """Count the open link as closed, and note the moments that its server rule keeps."""
        assert self.open is not None
        rule = self.open.rule
        for term in self.open.terms if rule is not None else ():
            if not isinstance(term, Set):
                assert rule is not None
                self.slots |= {f"{term.target}/{name}": self.merged[term.target] for name in rule.slots}
        super().close(digest=digest or str(self.num_links), merge=False)


class DryRun(ChainStrategy):
    """Goes through a run's rounds on shapes; `rounds_to` yields their reports, whose rows count tensor bytes alone."""

    def __init__(self, method: Method, weights: Weights, settings: RoundSettings) -> None:
        super().__init__(method, ShapeChain.over(weights), settings)

    @property
    def is_exact(self) -> bool:
        """Return whether the bytes are those of the run, and not the most that they may be."""
        codecs = (self.settings.sending.codec, self.settings.downlink)
        # Rounded coarsely, or kept in part, the numbers of an open link may come out as they were: not sent again then.
        may_stand_still = any(codecs) and not self.method.closes(1)
        return not may_stand_still and all(getattr(codec_of(text), "is_fixed_size", False) for text in codecs)

    def rounds_to(self, num_rounds: int) -> Iterator[RoundReport]:
        """Yield the reports of the rounds up to `num_rounds`; stops before the round that would exceed the budget.

        Raises BudgetTooSmall where not even the first round is affordable.
        """
        for round in range(1, num_rounds + 1):
            with ShapesOnly():
                cohort = self._open(round)
            rows = [*self._down(cohort), *self._up(cohort)]
            down, up = (bytes_by_partition(row for row in rows if row.direction == way) for way in (DOWN, UP))
            self.stop_reason = exceeded(self.settings.budget, self.state, down, up)
            if self.stop_reason is not None:
                if round == 1:
                    raise BudgetTooSmall(f"no round affordable: {self.stop_reason}")
                return
            report = RoundReport(round, self.chain.num_links, num_clients=len(cohort), num_ok=len(cohort), rows=rows)
            with ShapesOnly():
                self._advance(cohort)
            yield self._finish(report)

    def _open(self, round: int) -> list[int]:
        link, cohort = self._open_link(), self._cohort(round)
        plan = plan_round(round, self.method.trains(round, link), self.settings, self.state.clip)
        self._asked = self._ask(plan, cohort)
        return cohort

    def _down(self, cohort: Sequence[int]) -> Iterator[LedgerRow]:
        """Yield what the clients of the cohort are sent, and the others where broadcast is eager."""
        known: dict[tuple[Needs, int], Mapping[str, int]] = {}
        for partition in cohort:
            key = self._needs(partition), self._now.ranks.get(partition, 0)
            if key not in known:
                known[key] = self._sizes(key[0], self._now.view(partition))
            yield from _rows(self._now.plan, DOWN, partition, known[key])
            self.state.held[partition], self.state.held_open[partition] = self.chain.num_links, self.chain.version
        for partition in sorted(set(range(self.settings.num_clients)) - set(cohort)) if self._is_eager else []:
            needs = self._needs(partition)
            if needs.num_held < self.chain.num_links:
                sizes = weigh(self.chain, needs, policy=self.settings.catch_up)
                yield from _rows(self._now.plan, DOWN, partition, sizes)
                self.state.held[partition] = self.chain.num_links

    def _sizes(self, needs: Needs, view: View) -> dict[str, int]:
        """Return what one client of the cohort is sent, by kind."""
        opened = OpenLink(view.link, self.state.open_since)
        sizes = weigh(self.chain, needs, policy=self.settings.catch_up, opened=opened)
        # The server has no control variates before the first update.
        has_variates = self._now.plan.sending.variates and self.chain.version > 0
        return sizes | ({VARIATES_KIND: view.manifest.plain_bytes} if has_variates else {})

    @property
    def _is_eager(self) -> bool:
        return self.settings.broadcast == "eager"

    def _up(self, cohort: Sequence[int]) -> Iterator[LedgerRow]:
        for partition in cohort:
            view, own = self._now.view(partition), self._now.own[partition]
            sizes = view.manifest.max_bytes(self._now.plan.sending, is_whole=own.is_whole)
            yield from _rows(self._now.plan, UP, partition, sizes)

    def _advance(self, cohort: Sequence[int]) -> None:
        """Make the next version of replies without numbers."""
        chain, asked, traits = self.chain, self._now, self.method.traits
        assert chain.open is not None
        start = chain.open
        # A mean has the shapes of any one of what it is the mean of.
        partitions = cohort[:1] if traits.is_mean else cohort
        updates = {partition: _update(asked, chain, partition) for partition in partitions}
        step = self.method.aggregate(chain.merged, start, updates)
        # An optimiser that works on the open link's factors moves numbers and no shapes.
        rule = self.settings.rule if traits.merges else ServerRule()
        closes = self.method.closes(chain.updates_in_link + 1)
        finish = Finish(rule, self.settings.downlink, traits.merges)
        link, merged = finish.apply(chain, step, self.state.memory, closes=closes, seed=0)
        chain.update(link, close=closes, merged=merged)
        self.state.open_since = unchanged_since(start, chain.open, self.state.open_since, chain.version)
        self.state.last_used |= dict.fromkeys(cohort, asked.plan.round)


def _rows(plan: RoundPlan, direction: str, partition: int, sizes: Mapping[str, int]) -> list[LedgerRow]:
    return [LedgerRow(plan.round, direction, partition, kind, 0, size, 0) for kind, size in sizes.items()]


def _update(asked: Asked, chain: Chain, partition: int) -> ClientUpdate:
    """Return a reply without numbers, in the open link's own rank."""
    assert chain.open is not None
    view = asked.view(partition)
    shapes = {
        key: chain.open.factors[key].shape if key in chain.open.factors else chain.merged[key].shape
        for key in view.manifest.keys
    }
    tensors = {key: torch.empty(tuple(shape), dtype=view.manifest.dtype, device=META) for key, shape in shapes.items()}
    return ClientUpdate(tensors, 1.0, chain.open.of_client(partition), view.ranks)
