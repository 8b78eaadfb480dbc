"""From the usable replies of a round to the next version of the chain, step by step.

`merging.py` has the steps; here they are put in their order and given what they need of the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedraclora.chain import Chain
from fedraclora.link import Link
from fedraclora.privacy import next_clip, noise_generator, noisy_share
from fedraclora.seeding import derive_seed, stream
from strategies.asking import Asked
from strategies.merging import (
    Finish,
    aggregation_gap,
    combine,
    estimate_reply,
    private_mean,
    update_variates,
    values_of,
    widen,
)
from strategies.method import ClientUpdate, Method, Updates
from strategies.replies import Reply
from strategies.rounds import RoundSettings
from strategies.state import ServerState


@dataclass(frozen=True)
class Advance:
    """What a round's replies change, and by what rules; the chain and the server's state are changed in place."""

    method: Method
    chain: Chain
    state: ServerState
    settings: RoundSettings
    asked: Asked

    def update(self, usable: Mapping[int, Reply]) -> float:
        """Append what the replies make of the log, and return the aggregation's gap (NaN where it is not asked for)."""
        chain, settings, state, plan = self.chain, self.settings, self.state, self.asked.plan
        start = self._start
        updates = {partition: self._read(partition, reply) for partition, reply in usable.items()}
        step = self.method.aggregate(chain.merged, start, self._combined(updates))
        has_gap = settings.verify and self.method.traits.is_global
        gap = aggregation_gap(chain.merged, start, step, updates) if has_gap else float("nan")
        finish = Finish(settings.rule, settings.downlink, self.method.traits.merges)
        closes = self.method.closes(chain.updates_in_link + 1)
        seed = derive_seed(stream(settings.seed, "batches"), "downlink", plan.round)
        link, merged = finish.apply(chain, step, state.memory, closes=closes, seed=seed)
        chain.update(link, close=closes, merged=merged)
        state.open_since = unchanged_since(start, chain.open, state.open_since, chain.version)
        state.last_used |= dict.fromkeys(usable, plan.round)
        if plan.sending.variates:
            changes = {partition: reply.variates for partition, reply in usable.items()}
            memory, clients = state.memory, settings.num_clients
            update_variates(memory, changes, start, num_clients=clients, mode=plan.sending.memory)
        self._adapt_clip(usable)
        return gap

    @property
    def _start(self) -> Link:
        """Return the link that the clients started from."""
        assert self.chain.open is not None
        return self.chain.open

    def _read(self, partition: int, reply: Reply) -> ClientUpdate:
        """Return a client's values in the open link's own rank and scale, and its weight."""
        plan, view = self.asked.plan, self.asked.view(partition)
        link, full = view.link.of_client(partition), self._start.of_client(partition)
        values = reply.sent
        if plan.sending.sends_differences:
            if plan.sending.feedback in ("ef21", "marina"):
                whole = self.asked.own[partition].is_whole
                values = estimate_reply(self.state.memory, partition, reply, link, plan, is_whole=whole)
            values = values_of(values, link, self.chain.merged)
        is_uniform = self.settings.weighting == "uniform" or self.settings.privacy is not None
        weight = 1.0 if is_uniform else float(reply.num_examples)
        return ClientUpdate(widen(values, link, full) if view.ranks else values, weight, full, view.ranks)

    def _combined(self, updates: Updates) -> Updates:
        """Return the updates that enter the method's mean."""
        settings, privacy, plan = self.settings, self.settings.privacy, self.asked.plan
        if privacy is None or privacy.level != "client":
            return combine(updates, self._start, self.chain.merged, settings.robust)
        seed = None if settings.is_deployed else derive_seed(stream(settings.seed, "noise"), "server", plan.round)
        return private_mean(
            updates,
            self._start,
            self.chain.merged,
            privacy,
            clip=plan.sending.clip,
            cohort_size=settings.cohort_size,
            generator=noise_generator(seed),
        )

    def _adapt_clip(self, usable: Mapping[int, Reply]) -> None:
        """Move the clip towards the norms of the updates, where privacy asks for that."""
        settings, privacy, plan = self.settings, self.settings.privacy, self.asked.plan
        if privacy is None or not privacy.adaptive:
            return
        seed = None if settings.is_deployed else derive_seed(stream(settings.seed, "noise"), "count", plan.round)
        within = [reply.is_within for reply in usable.values()]
        share = noisy_share(within, privacy, cohort_size=settings.cohort_size, generator=noise_generator(seed))
        self.state.clip = next_clip(plan.sending.clip, share, privacy)

    def count_steps(self, usable: Mapping[int, Reply]) -> None:
        """Count the local steps of all who were asked: a reply that is refused has been seen, too."""
        state = self.state
        state.num_examples |= {partition: reply.num_examples for partition, reply in usable.items()}
        for partition in self.asked.sent & state.num_examples.keys():
            steps = self.settings.local.num_steps(state.num_examples[partition])
            state.num_steps[partition] = state.num_steps.get(partition, 0) + steps


def unchanged_since(before: Link, after: Link | None, since: Mapping[str, int], version: int) -> dict[str, int]:
    """Return the version since which each factor of the open link has stood as it is, bit for bit."""
    if after is None:
        return {}
    old, new = before.explicit_factors, after.explicit_factors
    return {
        name: since.get(name, version) if name in old and torch.equal(old[name], tensor) else version
        for name, tensor in new.items()
    }
