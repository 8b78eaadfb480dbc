"""From the replies of a round to the next version of the log: the steps that all methods share.

Replies become values in the open link's own rank and scale; another aggregate than the mean, or noise, takes the place
of the clients; the method makes a step of them; the server's optimiser and the downlink's compressor have the last
word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedraclora.chain import Chain, Weights
from fedraclora.codec import codec_of
from fedraclora.link import Dense, Link, Set, Term, Zero, is_zero, product, replace_tensors
from fedraclora.plan import NO_STATE, RoundPlan
from fedraclora.privacy import Privacy, clip_to, noisy_mean
from fedraclora.robust import clip_norms, coordinate_median, krum, trimmed_mean
from fedraclora.server_rule import ServerRule, step_
from fedraclora.travel import encode_link
from fedraclora.upload import estimate, start_of
from strategies.memory import SLOTS, VARIATES, Memory, estimate_of
from strategies.method import ClientUpdate, Step, Updates, shares
from strategies.replies import Reply

AGGREGATES = ("mean", "median", "trimmed_mean", "krum", "multi_krum")


@dataclass(frozen=True)
class Robust:
    """What takes the place of the mean.

    `trim` is how many values the trimmed mean drops at either end, `num_attackers` how many clients Krum expects to
    lie, `num_chosen` how many multi-Krum averages. `max_norm` bounds each client's whole difference; 0 is no bound.
    """

    aggregate: str = "mean"
    trim: int = 1
    num_attackers: int = 1
    num_chosen: int = 2
    max_norm: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that are no aggregate."""
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"robust.aggregate={self.aggregate!r} is unknown; valid: {', '.join(AGGREGATES)}")
        if min(self.trim, self.num_attackers, self.num_chosen - 1) < 0 or not self.max_norm >= 0:
            raise ValueError("robust.trim, num_attackers and max_norm must not be negative, num_chosen at least 1")

    @property
    def is_plain(self) -> bool:
        """Return whether all replies enter the mean as they are."""
        return self.aggregate == "mean" and self.max_norm == 0

    @property
    def fewest(self) -> int:
        """Return how many replies the aggregate needs at least."""
        krum_needs = self.num_attackers + 3
        needs = {"trimmed_mean": 2 * self.trim + 1, "krum": krum_needs, "multi_krum": max(krum_needs, self.num_chosen)}
        return needs.get(self.aggregate, 1)


# ---- from replies to updates


def estimate_reply(  # noqa: PLR0913 - the reply, and what both ends know of how it was encoded
    memory: Memory, client: int, reply: Reply, link: Link, plan: RoundPlan, *, is_whole: bool
) -> dict[str, Tensor]:
    """Return a client's difference by the server's estimate, which its reply moves, and remember that.

    A client that lost its state started from zero, and so does the server then.
    """
    feedback = plan.sending.feedback
    known = memory.recall(estimate_of(client), link, mode=plan.sending.memory) if reply.state != NO_STATE else {}
    found = estimate(feedback, reply.sent, known, is_whole=is_whole)
    memory.remember(estimate_of(client), found, link)
    return found


def values_of(differences: Mapping[str, Tensor], link: Link, weights: Weights) -> dict[str, Tensor]:
    """Return where a client ended, given how far it went from where it started."""
    return {key: start_of(key, link, with_set(weights, link), d) + d for key, d in differences.items()}


def with_set(weights: Weights, link: Link) -> Weights:
    """Return the weights with those that a link sets."""
    return {**weights, **{term.target: term.value for term in link.terms if isinstance(term, Set)}}


def widen(values: Mapping[str, Tensor], narrow: Link, full: Link) -> dict[str, Tensor]:
    """Return a client's factors padded with zeros to the rank of the full link, and in its scale."""
    terms, own = full.low_rank_terms(), narrow.low_rank_terms()
    widened: dict[str, Tensor] = {}
    for key, value in values.items():
        layer, _, name = key.rpartition(".")
        if key not in full.factors:
            widened[key] = value
            continue
        # One of the trained factors carries the difference in scale: lora_b where it trains.
        carrier = "lora_b" if f"{layer}.lora_b" in values else name
        ratio = own[layer].scale / terms[layer].scale if name == carrier else 1.0
        padded = value.new_zeros(tuple(full.factors[key].shape))
        padded[tuple(slice(size) for size in value.shape)] = value if ratio == 1 else value * ratio
        widened[key] = padded
    return widened


# ---- another aggregate, or noise, in place of the clients


def combine(updates: Updates, start: Link, weights: Weights, robust: Robust) -> Updates:
    """Return the updates that enter the method's mean: those that are left, or one that stands for all."""
    if robust.is_plain:
        return updates
    began = _starts(updates, start, weights)
    moved = _moved(updates, began)
    if robust.max_norm > 0:
        moved = clip_norms(moved, max_norm=robust.max_norm)
    if robust.aggregate in ("krum", "multi_krum"):
        count = robust.num_chosen if robust.aggregate == "multi_krum" else 1
        chosen = krum(moved, num_attackers=robust.num_attackers, num_chosen=count)
        moved = {client: moved[client] for client in chosen}
    elif robust.aggregate == "median":
        return _stand_in(updates, began, coordinate_median(moved))
    elif robust.aggregate == "trimmed_mean":
        return _stand_in(updates, began, trimmed_mean(moved, trim=robust.trim))
    return {client: _ended(updates[client], began, tensors) for client, tensors in moved.items()}


def private_mean(  # noqa: PLR0913 - the updates, and all that decides the noise
    updates: Updates,
    start: Link,
    weights: Weights,
    privacy: Privacy,
    *,
    clip: float,
    cohort_size: int,
    generator: np.random.Generator,
) -> Updates:
    """Return one update that stands for all: the uniform mean of the clipped ones, with noise."""
    began = _starts(updates, start, weights)
    # Clipped by the clients already, but for what a compressor added, and for those who do not keep to it.
    clipped = {client: clip_to(tensors, clip)[0] for client, tensors in _moved(updates, began).items()}
    mean = noisy_mean(clipped, privacy, clip=clip, cohort_size=cohort_size, generator=generator)
    return _stand_in(updates, began, mean)


def _starts(updates: Updates, start: Link, weights: Weights) -> dict[str, Tensor]:
    sent, known = next(iter(updates.values())).tensors, with_set(weights, start)
    return {key: start_of(key, start, known, tensor) for key, tensor in sent.items()}


def _moved(updates: Updates, began: Mapping[str, Tensor]) -> dict[int, list[Tensor]]:
    return {client: [update.tensors[key] - began[key] for key in began] for client, update in updates.items()}


def _ended(update: ClientUpdate, began: Mapping[str, Tensor], moved: Sequence[Tensor]) -> ClientUpdate:
    tensors = {key: begin + step for (key, begin), step in zip(began.items(), moved, strict=True)}
    return replace(update, tensors=tensors)


def _stand_in(updates: Updates, began: Mapping[str, Tensor], moved: Sequence[Tensor]) -> Updates:
    first = min(updates)
    return {first: replace(_ended(updates[first], began, moved), weight=1.0)}


# ---- the error of an aggregation


def aggregation_gap(weights: Weights, start: Link, step: Step, updates: Updates) -> float:
    """Return how far what is merged is from the weighted mean of the clients' own changes, relative to that mean.

    Both as changes of the model's weights in float64, by Frobenius norm: 0 (rounding) for an exact method.
    """
    precise = {name: tensor.double() for name, tensor in weights.items()}
    begun = _change(start.terms, precise)
    wanted: Weights = {}
    for client, share in shares(updates).items():
        own = updates[client]
        factors = {key: tensor for key, tensor in own.tensors.items() if key not in weights}
        whole = [Set(key, tensor) for key, tensor in own.tensors.items() if key in weights]
        _add(wanted, _change([*own.link.with_factors(factors).terms, *whole], precise), share)
    merged = _change([*step.merged, *step.open], precise)
    names = wanted.keys() | merged.keys() | begun.keys()
    zero = torch.zeros((), dtype=torch.float64)
    gap, size = 0.0, 0.0
    for name in names:
        mean = wanted.get(name, zero) - begun.get(name, zero)
        gap += float((merged.get(name, zero) - begun.get(name, zero) - mean).square().sum())
        size += float(mean.square().sum())
    return (gap / size) ** 0.5 if size else 0.0


def _change(terms: Sequence[Term], weights: Weights) -> Weights:
    """Return what terms add to the weights, by target; of several that set one the last counts."""
    change: Weights = {}
    for term in terms:
        weight = weights[term.target]
        if isinstance(term, Set):
            change[term.target] = term.value.double() - weight
        elif isinstance(term, Dense):
            _add(change, {term.target: term.delta.double()}, 1.0)
        elif not is_zero(term):
            _add(change, {term.target: product(term, weight).view_as(weight)}, 1.0)
    return change


def _add(total: Weights, change: Weights, share: float) -> None:
    for name, tensor in change.items():
        total[name] = total[name] + share * tensor if name in total else share * tensor


# ---- the last word


@dataclass(frozen=True)
class Finish:
    """What becomes of a method's step: the server's optimiser, and the compressor of the downlink.

    `merges` says that the optimiser works on what links merge, and is replayed; else it works on the open link's
    numbers.
    """

    rule: ServerRule = field(default_factory=ServerRule)
    codec: str = ""
    merges: bool = True

    def apply(self, chain: Chain, step: Step, memory: Memory, *, closes: bool, seed: int) -> tuple[Link, Link | None]:
        """Return the open link's next form, and the link that is merged beside it, where there is one."""
        assert chain.open is not None
        before, index = chain.open, chain.num_links
        replayed = self.rule if self.merges and not self.rule.is_plain else None
        merged = Link(index, tuple(step.merged), rule=replayed) if step.merged else None
        link = Link(index + int(merged is not None), tuple(step.open), rule=replayed if closes else None)
        if not self.merges and not self.rule.is_plain:
            link = self._move(chain, before, link, memory)
        if self.codec:
            link = self._encode(link, before, seed)
            merged = None if merged is None else self._encode(merged, link, seed + 1)
        return link, merged

    def _move(self, chain: Chain, before: Link, link: Link, memory: Memory) -> Link:
        """Return the open link with the optimiser's step in place of the clients', for each tensor that they moved."""
        slots, known = memory.tensors.setdefault(SLOTS, {}), with_set(chain.merged, before)
        memory.links.setdefault(SLOTS, [0, [], []])
        moved: dict[str, Tensor] = {}
        for name, tensor in link.named_tensors.items():
            key = name.removeprefix("set ")
            begin = start_of(key, before, known, tensor) if key in before.factors or key in known else None
            # A link of zeros alone has no numbers to move yet: what comes is where they start.
            is_new = key in before.factors and not _has_numbers(before, key)
            if begin is not None and not is_new and not torch.equal(begin, tensor):
                moved[name] = begin + step_(self.rule, slots, name, tensor - begin)
        return replace_tensors(link, moved, {})

    def _encode(self, link: Link, known: Link, seed: int) -> Link:
        """Return the link with its new numbers as the downlink's compressor leaves them.

        What `known` holds bit for bit travels no more. A sparse compressor leaves whole tensors alone: they are no
        differences.
        """
        held = list(known.explicit_factors.values())
        names = [
            name
            for name, tensor in link.named_tensors.items()
            if not any(tensor.shape == other.shape and torch.equal(tensor, other) for other in held)
            and not (codec_of(self.codec).is_sparse and name.startswith("set "))
        ]
        return encode_link(link, self.codec, seed, names) if names else link


def _has_numbers(link: Link, key: str) -> bool:
    term = link.low_rank_terms()[key.rpartition(".")[0]]
    return not all(isinstance(factor, Zero) for factor in term.factors.values())


def update_variates(
    memory: Memory, changes: Mapping[int, Mapping[str, Tensor]], link: Link, *, num_clients: int, mode: str
) -> None:
    """Move the server's control variates by the clients' changes: SCAFFOLD's `c + (1 / N) sum (c_k+ - c_k)`."""
    known = memory.recall(VARIATES, link, mode=mode)
    total = {key: sum(change[key].double() for change in changes.values()) for key in next(iter(changes.values()))}
    moved = {key: (known[key].double() if key in known else 0) + t / num_clients for key, t in total.items()}
    first = next(iter(changes.values()))
    memory.remember(VARIATES, {key: torch.as_tensor(t).to(first[key]) for key, t in moved.items()}, link)
