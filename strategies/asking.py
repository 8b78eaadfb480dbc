"""What a round asks of a client, and what a usable reply to it holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedraclora.chain import Chain, extend_hash
from fedraclora.delivery import Needs, OpenLink, deliver, sketch_digest
from fedraclora.ledger import LedgerRow
from fedraclora.link import Link, narrow, shape_of
from fedraclora.payload import flatten
from fedraclora.plan import RoundPlan, Value
from fedraclora.seeding import derive_seed
from fedraclora.travel import FLAT
from fedraclora.upload import VARIATES_KIND, Manifest, manifest
from strategies.replies import Expected


@dataclass(frozen=True)
class Own:
    """What a plan says to one client alone: the round whose state it starts from, its factor on the learning rate, and
    whether it sends everything (MARINA's coin).
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


def view_for(chain: Chain, plan: RoundPlan, *, rank: int, alpha: float | None) -> View:
    """Return the chain's open link for clients of at most `rank` (0: the link's own), and what is expected of them.

    A client of a smaller rank has the scale `alpha / rank` of its own, where alpha is given.
    """
    assert chain.open is not None
    terms = chain.open.low_rank_terms()
    full = {layer: shape_of(term.lora_a)[0] for layer, term in terms.items()}
    ranks = {layer: min(full[layer], rank or full[layer]) for layer in terms}
    scales = {layer: term.scale if alpha is None else alpha / ranks[layer] for layer, term in terms.items()}
    link = narrow(chain.open, ranks, scales) if rank else chain.open
    shapes = {name: tuple(tensor.shape) for name, tensor in chain.merged.items()}
    dtype = next(tensor.dtype for tensor in chain.merged.values() if tensor.is_floating_point())
    expected = manifest(plan.training, link, shapes, dtype)
    return View(link, extend_hash(chain.hash, link.digest), expected, ranks if rank else {})


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
