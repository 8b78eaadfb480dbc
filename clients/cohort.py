"""Train messages in, replies out: many messages are one cohort, one message is a cohort of one.

A client that cannot train (no data, lost state) answers with an error of its own and does not disturb the others.
"""

import json
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from clients.replica import Replica
from clients.state_store import FEEDBACK, MOMENTS, PRIVATE, SECOND_MOMENTS, VARIATES, ClientState, LostState
from fedraclora.delivery import Delivery, Needs, VersionMismatch, sketch_digest
from fedraclora.link import Link, describe, restore
from fedraclora.local import LocalClient, LocalResult, train_cohort
from fedraclora.optim import Member, Moments
from fedraclora.payload import digest_arrays, flatten, unflatten
from fedraclora.plan import NO_SEED, NO_STATE, RoundPlan
from fedraclora.rebase import rebase
from fedraclora.seeding import derive_seed
from fedraclora.travel import FLAT
from fedraclora.upload import (
    VARIATES_KIND,
    Manifest,
    Outgoing,
    manifest,
    next_variates,
    pack,
    sent_values,
)

CLIENT_APP_RAISED = 2
RECORD_PLAN = "plan"
# What a plan says to one client alone.
OWN_FIELDS = ("start_state", "lr_scale", "is_whole")

log = logging.getLogger("fedraclora")


@dataclass(frozen=True)
class Request:
    """A train message and the partition of the client that it is for."""

    partition: int
    message: Message

    @property
    def record(self) -> Mapping[str, object]:
        """Return the plan as it came."""
        return self.message.content.config_records[RECORD_PLAN]

    @property
    def task(self) -> str:
        """Return what clients that train together have in common: the plan and the version it is for."""
        shared = {name: value for name, value in self.record.items() if name not in (*OWN_FIELDS, "links")}
        return json.dumps([shared, json.loads(str(self.record["links"]))["digest"]])


@dataclass(frozen=True)
class Remembered:
    """What a client starts a round with: its state, in the open link's basis, and what of it was lost on the way.

    `round` is the round whose state this is, NO_STATE for a client that has none.
    """

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    num_steps: int = 0
    round: int = NO_STATE
    lost: Mapping[str, float] = field(default_factory=dict)

    def of(self, purpose: str) -> Mapping[str, Tensor]:
        """Return what is remembered for a purpose, by key; nothing where nothing is."""
        return self.tensors.get(purpose, {})


def train(replica: Replica, requests: Sequence[Request]) -> list[Message]:
    """Return one reply a request, in their order. All requests of a call belong to one round.

    Clients with the same plan and version train together; others, as those of another rank, in a cohort of their own.
    """
    groups: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(request.task, []).append(place)
    replies: dict[int, Message] = {}
    for places in groups.values():
        found = _train_alike(replica, [requests[place] for place in places])
        replies |= dict(zip(places, found, strict=True))
    return [replies[place] for place in range(len(requests))]


def _train_alike(replica: Replica, requests: Sequence[Request]) -> list[Message]:
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


@dataclass(frozen=True)
class _Job:
    """One client's work: its request, the link as it has it, what it remembers, and the server's control variates."""

    request: Request
    link: Link
    remembered: Remembered
    server_variates: Mapping[str, Tensor]

    @property
    def lr_scale(self) -> float:
        """Return the client's own factor on the learning rate."""
        scale = self.request.record["lr_scale"]
        assert isinstance(scale, float)
        return scale

    @property
    def correction(self) -> dict[str, Tensor]:
        """Return what SCAFFOLD adds to each gradient: the server's variates less the client's own."""
        own = self.remembered.of(VARIATES)
        return {key: server - own.get(key, torch.zeros_like(server)) for key, server in self.server_variates.items()}


def _train_together(replica: Replica, requests: dict[int, Request], replies: dict[int, Message]) -> None:
    """Fill `replies` by the requests' keys."""
    plan = RoundPlan.from_record(next(iter(requests.values())).record)
    replica.receive(_distinct_deliveries(requests.values()))
    trainer, start = replica.prepare(plan)
    shapes = {name: tuple(tensor.shape) for name, tensor in replica.chain.merged.items()}
    dtype = next(iter(start.values())).dtype
    expected = manifest(plan.training, replica.link, shapes, dtype)
    jobs: dict[int, _Job] = {}
    clients: dict[int, LocalClient] = {}
    for place, request in requests.items():
        try:
            jobs[place] = _job(replica, plan, request, expected)
            clients[place] = _local_client(replica, plan, jobs[place])
        except ValueError as error:
            replies[place] = failure(request.message, error)
    places = list(clients)
    for result in train_cohort(trainer, start, list(clients.values()), plan.local):
        place = places[result.position]
        begun = {**start, **clients[place].member.own}
        replies[place] = _reply(replica, plan, expected, jobs[place], begun, result)


def _job(replica: Replica, plan: RoundPlan, request: Request, expected: Manifest) -> _Job:
    variates: dict[str, Tensor] = {}
    if plan.sending.variates and VARIATES_KIND in request.message.content.array_records:
        flat = request.message.content.array_records[VARIATES_KIND][FLAT].numpy()
        shapes = [shape for kind in expected.shapes.values() for shape in kind.values()]
        device = replica.data.examples.inputs.device
        variates = dict(zip(expected.keys, [t.to(device) for t in unflatten(flat, shapes)], strict=True))
    link = replica.link.of_client(request.partition)
    return _Job(request, link, _remembered(replica, plan, request, link), variates)


def _remembered(replica: Replica, plan: RoundPlan, request: Request, link: Link) -> Remembered:
    named = request.record["start_state"]
    if not isinstance(named, int) or named == NO_STATE:
        return Remembered()
    try:
        state = replica.store.load(request.partition, named)
    except LostState as error:
        log.warning("round %d: %s; it starts anew", plan.round, error)
        return Remembered()
    modes = {MOMENTS: plan.training.moments, FEEDBACK: plan.sending.memory, VARIATES: plan.sending.memory}
    old, tensors, lost = restore(state.link, []), dict(state.tensors), {}
    for purpose, mode in modes.items():
        if state.tensors.get(purpose):
            tensors[purpose], lost[purpose] = rebase(state.tensors[purpose], old, link, mode=mode)
    return Remembered(tensors, state.num_steps, named, lost)


def _local_client(replica: Replica, plan: RoundPlan, job: _Job) -> LocalClient:
    partition = job.request.partition
    rows = replica.data.partitions.get(partition)
    if rows is None or len(rows) == 0:
        raise ValueError(f"this machine holds no data of partition {partition}")
    own = {**replica.own_factors(partition, plan), **job.remembered.of(PRIVATE)}
    remembered = job.remembered
    moments = Moments(dict(remembered.of(MOMENTS)), remembered.num_steps, dict(remembered.of(SECOND_MOMENTS)))
    member = Member(moments if moments.tensors else None, own, job.lr_scale, job.correction)
    noise_seed = None if plan.noise_seed == NO_SEED else derive_seed(plan.noise_seed, "client", partition)
    held_out = replica.data.held_out.get(partition, rows[:0])
    # A batch that its server can foretell hides no example from it, so privacy draws batches as it draws noise.
    is_secret = plan.example_clip > 0 and noise_seed is None
    seed = secrets.randbits(62) if is_secret else _batch_seed(plan, partition)
    return LocalClient(rows, seed, member, held_out, noise_seed)


def _batch_seed(plan: RoundPlan, partition: int) -> int:
    return derive_seed(plan.batch_seed, "client", partition)


def _reply(  # noqa: PLR0913 - the round, the client and what it trained
    replica: Replica,
    plan: RoundPlan,
    expected: Manifest,
    job: _Job,
    begun: Mapping[str, Tensor],
    result: LocalResult,
) -> Message:
    """Return one client's reply, and keep what it has to remember."""
    values, starts = sent_values(plan, result.tensors, begun, job.link)
    is_finite = all(bool(torch.isfinite(value).all()) for value in values.values())
    if not is_finite and plan.sending.sends_differences:
        # Nothing encodes NaN; the loss says what happened.
        values = starts
    outgoing = pack(
        plan.sending,
        values,
        starts,
        job.remembered.of(FEEDBACK),
        seed=derive_seed(_batch_seed(plan, job.request.partition), "codec"),
        expected=expected,
        is_whole=bool(job.request.record["is_whole"]),
    )
    arrays = dict(outgoing.arrays)
    variates: dict[str, Tensor] = {}
    if plan.sending.variates:
        variates, change = next_variates(
            job.remembered.of(VARIATES),
            job.server_variates,
            values,
            starts,
            plan.local.lr * job.lr_scale * result.num_steps,
        )
        arrays[VARIATES_KIND] = {FLAT: flatten([change[key] for key in expected.keys])}
    if plan.keeps_state:
        _keep(replica, plan, job, result, {FEEDBACK: outgoing.memory, VARIATES: variates})
    content = RecordDict({kind: ArrayRecord({n: Array(a) for n, a in group.items()}) for kind, group in arrays.items()})
    content["metrics"] = _metrics(job, outgoing, result, is_finite=is_finite)
    content["reply"] = ConfigRecord({**_stated(replica, job), "arrays": digest_arrays(arrays)})
    return Message(content, reply_to=job.request.message)


def _stated(replica: Replica, job: _Job) -> dict[str, str | int]:
    """Return where a client is: digests that its server compares, and what it keeps."""
    return {
        "version": replica.chain.digest,
        "sketches": sketch_digest(job.link),
        "held": replica.num_kept,
        "open": replica.open_version,
        "state": job.remembered.round,
    }


def _keep(
    replica: Replica, plan: RoundPlan, job: _Job, result: LocalResult, more: Mapping[str, Mapping[str, Tensor]]
) -> None:
    training = plan.training
    moments = result.moments.tensors if training.moments != "reset" else {}
    second = result.moments.second if training.keeps_second_moments else {}
    private = {key: result.tensors[key] for key in training.private}
    found = {MOMENTS: moments, SECOND_MOMENTS: second, PRIVATE: private, **more}
    kept = {purpose: {k: t.clone() for k, t in named.items()} for purpose, named in found.items() if named}
    state = ClientState(kept, result.moments.num_steps, describe(job.link.skeleton()))
    replica.store.save(job.request.partition, plan.round, state)


def delivery_of(message: Message) -> Delivery:
    """Return the delivery that a message carries."""
    content = message.content
    arrays = {
        kind: {name: array.numpy() for name, array in record.items()}
        for kind, record in content.array_records.items()
        if kind != VARIATES_KIND
    }
    return Delivery(str(content.config_records[RECORD_PLAN]["links"]), arrays)


def _distinct_deliveries(requests: Iterable[Request]) -> list[Delivery]:
    """Return the deliveries without repeats: clients that lack the same links are sent the same records."""
    found: dict[str, Delivery] = {}
    for request in requests:
        header = str(request.record["links"])
        if header not in found:
            found[header] = delivery_of(request.message)
    return list(found.values())


def _metrics(job: _Job, outgoing: Outgoing, result: LocalResult, *, is_finite: bool) -> MetricRecord:
    metrics: dict[str, int | float] = {
        "num-examples": result.num_examples,
        "num-steps": result.num_steps,
        "train-loss": result.loss if is_finite else float("nan"),
        "is-within": int(outgoing.is_within),
    }
    if result.num_correct is not None:
        metrics |= {"num-correct": result.num_correct, "num-held-out": result.num_held_out}
    return MetricRecord({**metrics, **{f"lost-{purpose}": share for purpose, share in job.remembered.lost.items()}})


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
