"""What a round asks of a client, and what a usable reply to it holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedraclora.chain import Chain, extend_hash
from fedraclora.delivery import Needs, OpenLink, deliver, sketch_digest
from fedraclora.ledger import LedgerRow
from fedraclora.link import Link, shape_of
from fedraclora.narrowing import narrow
from fedraclora.payload import flatten
from fedraclora.plan import NO_SEED, RoundPlan, Training, Value
from fedraclora.seeding import derive_seed, stream
from fedraclora.travel import FLAT
from fedraclora.upload import VARIATES_KIND, Manifest, manifest
from strategies.replies import Expected
from strategies.rounds import RoundSettings


def plan_round(round: int, training: Training, settings: RoundSettings, clip: float | None) -> RoundPlan:
    """Return the plan of a round in which the clients train `training`; `clip` is the current one where it adapts."""
    privacy, sending = settings.privacy, settings.sending
    plan = RoundPlan(
        round=round,
        training=training,
        local=settings.local,
        sending=sending,
        batch_seed=derive_seed(stream(settings.seed, "batches"), "round", round),
    )
    if privacy is None:
        return plan
    if privacy.level == "client":
        return replace(plan, sending=replace(sending, clip=clip or privacy.clip))
    # The operating system's entropy hides what a seed that others know would give away.
    noise_seed = NO_SEED if settings.is_deployed else derive_seed(stream(settings.seed, "noise"), "round", round)
    return replace(plan, noise_seed=noise_seed, example_clip=privacy.clip, example_noise=privacy.noise)


@dataclass(frozen=True)
class Own:
    """What a plan says to one client alone.

    The round whose state it starts from, its factor on the learning rate, and whether it sends everything (MARINA's
    coin).
    """

    start_state: int
    lr_scale: float = 1.0
    is_whole: bool = False

    def to_record(self) -> dict[str, Value]:
        """Return it as plain values."""
        return {"start_state": self.start_state, "lr_scale": self.lr_scale, "is_whole": self.is_whole}


@dataclass(frozen=True)
class View:
    """The open link as the clients of one rank have it, its version, and what they send back."""

    link: Link
    version: str
    manifest: Manifest
    ranks: Mapping[str, int]


@dataclass
class Asked:
    """A round in progress: what is asked, of whom and how, who was asked twice, and the ledger so far."""

    plan: RoundPlan
    views: Mapping[int, View]
    max_norm: float
    own: dict[int, Own] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    retried: set[int] = field(default_factory=set)
    rows: list[LedgerRow] = field(default_factory=list)

    def view(self, partition: int) -> View:
        """Return the open link as a client has it."""
        return self.views[self.ranks.get(partition, 0)]

    def expected(self, partition: int) -> Expected:
        """Return what a usable reply of a client states and holds."""
        view, plan = self.view(partition), self.plan
        return Expected(
            version=view.version,
            sketches=sketch_digest(view.link.of_client(partition)),
            manifest=view.manifest,
            sending=plan.sending,
            codec_seed=derive_seed(derive_seed(plan.batch_seed, "client", partition), "codec"),
            is_whole=self.own[partition].is_whole,
            max_norm=self.max_norm,
        )


def link_of_rank(link: Link, rank: int, alpha: float | None) -> Link:
    """Return a link as the clients of a rank have it: its first components, in the scale `alpha / rank`.

    0 stands for the link's own rank. Where alpha is not given the scale is the link's.
    """
    if not rank:
        return link
    ranks = {layer: min(rank, shape_of(term.lora_a)[0]) for layer, term in link.low_rank_terms().items()}
    terms = link.low_rank_terms()
    scales = {layer: term.scale if alpha is None else alpha / ranks[layer] for layer, term in terms.items()}
    return narrow(link, ranks, scales)


def view_for(chain: Chain, plan: RoundPlan, *, rank: int, alpha: float | None) -> View:
    """Return the chain's open link for clients of at most `rank` (0: the link's own), and what is expected of them."""
    assert chain.open is not None
    link = link_of_rank(chain.open, rank, alpha)
    ranks = {layer: shape_of(term.lora_a)[0] for layer, term in link.low_rank_terms().items()} if rank else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in chain.merged.items()}
    dtype = next(tensor.dtype for tensor in chain.merged.values() if tensor.is_floating_point())
    return View(link, extend_hash(chain.hash, link.digest), manifest(plan.training, link, shapes, dtype), ranks)


@dataclass(frozen=True)
class Contents:
    """What makes the contents of a round's messages: the chain, what is known of its open link, and the run's rules."""

    chain: Chain
    since: Mapping[str, int]
    chain_id: str
    policy: str
    variates: Mapping[str, Tensor]

    def for_training(self, needs: Needs, plan: RoundPlan, own: Own, view: View) -> RecordDict:
        """Return the links that a client lacks, and its plan."""
        record: dict[str, Value] = {**plan.to_record(), **own.to_record()}
        content = self._content(needs, record, OpenLink(view.link, self.since))
        if plan.sending.variates and self.variates:
            flat = flatten([self.variates[key] for key in view.manifest.keys])
            content[VARIATES_KIND] = ArrayRecord({FLAT: Array(flat)})
        return content

    def of_links(self, needs: Needs) -> RecordDict:
        """Return the closed links that a client lacks; the open one is for those who train."""
        return self._content(needs, {}, None)

    def _content(self, needs: Needs, record: dict[str, Value], opened: OpenLink | None) -> RecordDict:
        delivery = deliver(self.chain, needs, policy=self.policy, opened=opened)
        plan = ConfigRecord({**record, "chain": self.chain_id, "links": delivery.header})
        arrays = {
            kind: ArrayRecord({name: Array(array) for name, array in group.items()})
            for kind, group in delivery.arrays.items()
        }
        return RecordDict({"plan": plan, **arrays})
