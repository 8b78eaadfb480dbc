"""Train messages in, replies out: many messages are one cohort, one message is a cohort of one.

A client that cannot train (no data, lost state) answers with an error of its own and does not disturb the others.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from clients.replica import Replica
from clients.state_store import ClientState, LostState
from fedraclora.delivery import DENSE, UPDATE, Delivery, Needs, VersionMismatch
from fedraclora.link import describe, restore
from fedraclora.local import LocalClient, LocalResult, train_cohort
from fedraclora.moments import carry_over
from fedraclora.optim import Moments
from fedraclora.payload import flatten
from fedraclora.plan import NO_STATE, RoundPlan
from fedraclora.seeding import derive_seed

CLIENT_APP_RAISED = 2
RECORD_PLAN = "plan"

log = logging.getLogger("fedraclora")


@dataclass(frozen=True)
class Request:
    """A train message and the partition of the client that it is for."""

    partition: int
    message: Message


def train(replica: Replica, requests: Sequence[Request]) -> list[Message]:
    """Return one reply a request, in their order. All requests of a call belong to one round."""
    replies: dict[int, Message] = {}
    try:
        _train_together(replica, dict(enumerate(requests)), replies)
    except Exception as error:  # noqa: BLE001
        if len(requests) == 1:
            return [failure(requests[0].message, error)]
        # One client's trouble must stay its own: find it by training the rest one by one.
        log.warning("training the cohort together failed (%s); its clients are trained one by one", error)
        return [replies.get(place) or train(replica, [request])[0] for place, request in enumerate(requests)]
    return [replies[place] for place in range(len(requests))]


def _train_together(replica: Replica, requests: dict[int, Request], replies: dict[int, Message]) -> None:
    """Fill `replies` by the requests' keys."""
    plan = _read_plan(next(iter(requests.values())).message)
    replica.receive(_distinct_deliveries(requests.values()))
    trainer, start = replica.prepare(plan)
    clients = _local_clients(replica, plan, requests, replies)
    places = list(clients)
    stated: dict[str, str | int] = {
        "version": replica.chain.digest,
        "sketches": replica.sketches,
        "held": replica.num_kept,
    }
    for result in train_cohort(trainer, start, list(clients.values()), plan.local):
        request = requests[places[result.position]]
        if plan.moments != "reset":
            state = ClientState(_copy(result.moments), describe(replica.link.skeleton()))
            replica.store.save(request.partition, plan.round, state)
        content = RecordDict(dict(_arrays(plan, result.tensors)))
        content["metrics"], content["reply"] = _metrics(result), ConfigRecord({**stated})
        replies[places[result.position]] = Message(content, reply_to=request.message)


def _local_clients(
    replica: Replica, plan: RoundPlan, requests: dict[int, Request], replies: dict[int, Message]
) -> dict[int, LocalClient]:
    """Return the clients that can train; the others get their error reply."""
    clients: dict[int, LocalClient] = {}
    for place, request in requests.items():
        try:
            clients[place] = _local_client(replica, plan, request)
        except ValueError as error:
            replies[place] = failure(request.message, error)
    return clients


def _read_plan(message: Message) -> RoundPlan:
    return RoundPlan.from_record(message.content.config_records[RECORD_PLAN])


def delivery_of(message: Message) -> Delivery:
    """Return the delivery that a message carries."""
    content = message.content
    arrays = {kind: record["flat"].numpy() for kind, record in content.array_records.items()}
    return Delivery(str(content.config_records[RECORD_PLAN]["links"]), arrays)


def _distinct_deliveries(requests: Iterable[Request]) -> list[Delivery]:
    """Return the deliveries without repeats: clients that lack the same links are sent the same records."""
    found: dict[str, Delivery] = {}
    for request in requests:
        header = str(request.message.content.config_records[RECORD_PLAN]["links"])
        if header not in found:
            found[header] = delivery_of(request.message)
    return list(found.values())


def _local_client(replica: Replica, plan: RoundPlan, request: Request) -> LocalClient:
    rows = replica.data.partitions.get(request.partition)
    if rows is None or len(rows) == 0:
        raise ValueError(f"this machine holds no data of partition {request.partition}")
    seed = derive_seed(plan.batch_seed, "client", request.partition)
    return LocalClient(rows, seed, _moments(replica, plan, request))


def _moments(replica: Replica, plan: RoundPlan, request: Request) -> Moments | None:
    named = request.message.content.config_records[RECORD_PLAN]["start_state"]
    if not isinstance(named, int) or named == NO_STATE:
        return None
    try:
        state = replica.store.load(request.partition, named)
    except LostState as error:
        log.warning("round %d: %s; its optimiser starts anew", plan.round, error)
        return None
    return carry_over(state.moments, restore(state.link, []), replica.link, mode=plan.moments)


def _copy(moments: Moments) -> Moments:
    return Moments({key: tensor.clone() for key, tensor in moments.tensors.items()}, moments.num_steps)


def _arrays(plan: RoundPlan, tensors: dict[str, Tensor]) -> dict[str, ArrayRecord]:
    by_kind = {UPDATE: [tensors[key] for key in plan.factors], DENSE: [tensors[name] for name in plan.dense]}
    return {kind: ArrayRecord({"flat": Array(flatten(group))}) for kind, group in by_kind.items() if group}


def _metrics(result: LocalResult) -> MetricRecord:
    return MetricRecord({"num-examples": result.num_examples, "num-steps": result.num_steps, "train-loss": result.loss})


def failure(message: Message, error: Exception) -> Message:
    """Return the reply of a client that cannot do what it was asked: what it needs, or the error."""
    log.warning("a client cannot answer: %s", error)
    if isinstance(error, VersionMismatch):
        return needs_reply(message, error.needs, str(error))
    return Message(Error(CLIENT_APP_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)


def needs_reply(message: Message, needs: Needs, reason: str, *, setup: bool = False) -> Message:
    """Return the reply of a client that is not where its server believes it to be; `setup`: it has lost the run."""
    record = ConfigRecord({**asdict(needs), "setup": setup, "reason": reason})
    return Message(RecordDict({"needs": record}), reply_to=message)
