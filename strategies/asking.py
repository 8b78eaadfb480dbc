"""What a round asks of a client, and what a usable reply to it holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedraclora.chain import Chain
from fedraclora.delivery import Needs, deliver, sketch_digest
from fedraclora.ledger import LedgerRow
from fedraclora.link import LowRank, shape_of
from fedraclora.plan import RoundPlan, Value
from strategies.replies import Expected, expected_shapes


@dataclass
class Asked:
    """A round in progress: what is asked, of whom, who was asked twice, and the ledger so far."""

    plan: RoundPlan
    expected: Expected
    sent: set[int] = field(default_factory=set)
    retried: set[int] = field(default_factory=set)
    rows: list[LedgerRow] = field(default_factory=list)


def expect(chain: Chain, plan: RoundPlan, *, max_norm: float) -> Expected:
    """Return what a usable reply to a plan holds, for the chain's open link."""
    assert chain.open is not None
    terms = chain.open.low_rank_terms()
    factors = {key: _factor_shape(terms, key) for key in plan.factors}
    dense = {name: tuple(chain.merged[name].shape) for name in plan.dense}
    trained = [terms[layer].target for layer in plan.trained] + list(plan.dense)
    return Expected(
        version=chain.digest,
        sketches=sketch_digest(chain.open),
        shapes=expected_shapes(factors, dense),
        dtype=chain.merged[trained[0]].dtype,
        max_norm=max_norm,
    )


def content_of(
    chain: Chain, needs: Needs, plan: Mapping[str, Value] | None, *, chain_id: str, policy: str
) -> RecordDict:
    """Return a message's content: the links that a client lacks, and the plan of one that trains.

    Without a plan the open link stays out, too: it is for those who train.
    """
    delivery = deliver(chain, needs, policy=policy, with_open=plan is not None)
    record = ConfigRecord({**(plan or {}), "chain": chain_id, "links": delivery.header})
    arrays = {kind: ArrayRecord({"flat": Array(flat)}) for kind, flat in delivery.arrays.items()}
    return RecordDict({"plan": record, **arrays})


def _factor_shape(terms: Mapping[str, LowRank], key: str) -> tuple[int, ...]:
    layer, _, name = key.rpartition(".")
    return shape_of(getattr(terms[layer], name))
