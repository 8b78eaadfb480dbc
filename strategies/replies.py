"""Reading a client's reply: what it must hold, and why one is refused."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import mean

import numpy as np
from flwr.app import ArrayRecord, Message
from torch import Tensor

from fedraclora.compressors import Arrays
from fedraclora.delivery import NOTHING, Needs
from fedraclora.payload import digest_arrays
from fedraclora.plan import NO_STATE, Sending
from fedraclora.upload import VARIATES_KIND, Manifest, decode, unpack

METRIC_KEYS = frozenset({"num-examples", "num-steps", "train-loss", "is-within"})
SCORE_KEYS = frozenset({"num-correct", "num-held-out"})
LOST = "lost-"
# Flower's code for a ClientApp whose mod raised.
MOD_RAISED = 6
NO_MODS = (
    "a mod such as Flower's LocalDpMod does not fit links that are merged; take it out and set privacy.level, "
    "privacy.clip and privacy.noise"
)


class BadReply(ValueError):
    """A reply that cannot be used; `is_divergence` where its numbers are not finite."""

    def __init__(self, reason: str, *, is_divergence: bool = False) -> None:
        super().__init__(reason)
        self.is_divergence = is_divergence


@dataclass(frozen=True)
class Expected:
    """What a usable reply states and holds: digests, tensors, and how these were encoded."""

    version: str
    sketches: str
    manifest: Manifest
    sending: Sending = field(default_factory=Sending)
    codec_seed: int = 0
    is_whole: bool = False
    max_norm: float = float("inf")

    @property
    def num_bytes(self) -> int:
        """Return the tensor bytes of one reply, no fewer than it takes."""
        return sum(self.manifest.max_bytes(self.sending, is_whole=self.is_whole).values())


@dataclass(frozen=True)
class Reply:
    """A usable reply: what was sent, by key, and what the client says of it.

    `sent` are values, differences, or what moves an estimate of them, as the plan asked. `state` is the round whose
    state the client started from. `num_correct` of `num_held_out` examples of its own it got right. `lost` is the share
    of what it remembered that a new basis cost, by purpose. `variates` is the change of its control variates.
    """

    sent: Mapping[str, Tensor]
    num_examples: int
    num_steps: int
    train_loss: float
    is_within: bool
    state: int
    num_correct: int = 0
    num_held_out: int = 0
    lost: Mapping[str, float] = field(default_factory=dict)
    variates: Mapping[str, Tensor] = field(default_factory=dict)


def read_reply(message: Message, expected: Expected) -> Reply:
    """Return the reply that a message carries. Raises BadReply with the reason where it cannot be used."""
    if message.has_error():
        raise BadReply(_reason(message))
    lacking = read_needs(message)
    if lacking is not None:
        raise BadReply(f"it could not be brought up to date: {lacking.reason}")
    stated: Mapping[str, object] = message.content.config_records.get("reply", {})
    for name, digest in (("version", expected.version), ("sketches", expected.sketches)):
        if stated.get(name) != digest:
            raise BadReply(f"its {name} digest is {str(stated.get(name))[:12]}, expected {digest[:12]}")
    metrics: Mapping[str, object] = message.content.metric_records.get("metrics", {})
    _check_metrics(metrics)
    train_loss, state = _number(metrics["train-loss"]), stated.get("state")
    sent, variates = _read_tensors(message, expected)
    if not isfinite(train_loss):
        raise BadReply(f"its training loss is {train_loss}", is_divergence=True)
    return Reply(
        sent=sent,
        num_examples=_count(metrics["num-examples"], "num-examples"),
        num_steps=_count(metrics["num-steps"], "num-steps"),
        train_loss=train_loss,
        is_within=metrics["is-within"] == 1,
        state=state if isinstance(state, int) else NO_STATE,
        **_read_score(metrics),
        lost={key.removeprefix(LOST): _number(value) for key, value in metrics.items() if key.startswith(LOST)},
        variates=variates,
    )


def _reason(message: Message) -> str:
    hint = f" ({NO_MODS})" if message.error.code == MOD_RAISED else ""
    return f"client error {message.error.code}: {message.error.reason}{hint}"


def _check_metrics(metrics: Mapping[str, object]) -> None:
    known = {key for key in metrics if not key.startswith(LOST)}
    if not METRIC_KEYS <= known <= METRIC_KEYS | SCORE_KEYS:
        raise BadReply(f"its metrics are {sorted(metrics)}, expected {sorted(METRIC_KEYS)}")


def _count(value: object, name: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise BadReply(f"it states {name}={value}, expected a whole number, at least 1")
    return value


def _read_score(metrics: Mapping[str, object]) -> dict[str, int]:
    if not metrics.keys() >= SCORE_KEYS:
        return {}
    correct, held_out = metrics["num-correct"], metrics["num-held-out"]
    if not isinstance(correct, int) or not isinstance(held_out, int) or not 0 <= correct <= held_out:
        raise BadReply(f"it states {correct} right answers of {held_out}, expected a whole number of them")
    return {"num_correct": correct, "num_held_out": held_out}


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise BadReply(f"a metric is {value!r}, expected one number")
    return float(value)


@dataclass(frozen=True)
class Introduction:
    """What a client says of itself in the handshake: its partition, and what it holds.

    That is how many closed links, and the version whose open link it still has.
    """

    partition: int
    num_held: int
    open_version: int


def read_introduction(message: Message) -> Introduction:
    """Return what a handshake's reply says. Raises BadReply with the reason where it says nothing usable."""
    if message.has_error():
        raise BadReply(_reason(message))
    stated: Mapping[str, object] = message.content.metric_records.get("partition", {})
    partition, held, opened = stated.get("partition-id"), stated.get("held"), stated.get("open")
    if not isinstance(partition, int) or partition < 0 or not isinstance(held, int) or not isinstance(opened, int):
        raise BadReply(f"it states {dict(stated)}, expected a partition-id, at least 0, and the links it holds")
    return Introduction(partition, held, opened)


@dataclass(frozen=True)
class Lacking:
    """What a client says it needs before it can train; `setup`: it does not know the run."""

    needs: Needs
    setup: bool
    reason: str


def read_needs(message: Message) -> Lacking | None:
    """Return what a client says it needs, None where it says nothing of the kind."""
    if message.has_error() or "needs" not in message.content.config_records:
        return None
    stated: Mapping[str, object] = message.content.config_records["needs"]
    held = stated.get("num_held")
    flags = {name: stated.get(name) is True for name in ("snapshot", "base", "factors")}
    needs = Needs(max(0, held) if isinstance(held, int) else 0, **flags)
    return Lacking(needs, stated.get("setup") is True, str(stated.get("reason", "")))


@dataclass(frozen=True)
class Held:
    """What a client says it keeps: closed links, and the open link of a version."""

    num_links: int
    open_version: int


def read_held(message: Message) -> Held | None:
    """Return what a client says it keeps, None where it does not say."""
    if message.has_error():
        return None
    stated: Mapping[str, object] = message.content.config_records.get("reply", {})
    held, opened = stated.get("held"), stated.get("open")
    if not isinstance(held, int):
        return None
    return Held(max(0, held), opened if isinstance(opened, int) else NOTHING)


def _read_tensors(message: Message, expected: Expected) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what was sent and the change of the control variates, by key."""
    records, wanted = message.content.array_records, list(expected.manifest.shapes)
    wanted += [VARIATES_KIND] if expected.sending.variates else []
    if set(records) != set(wanted):
        raise BadReply(f"it sends {sorted(records)}, expected {sorted(wanted)}")
    arrays = {kind: _arrays_of(kind, record) for kind, record in records.items()}
    if message.content.config_records["reply"].get("arrays") != digest_arrays(arrays):
        raise BadReply(f"its arrays are not those that the client app wrote: {NO_MODS}")
    variates: dict[str, Tensor] = {}
    try:
        sending, seed = expected.sending, expected.codec_seed
        sent = unpack(sending, arrays, expected.manifest, seed=seed, is_whole=expected.is_whole)
        if expected.sending.variates:
            shapes = {key: shape for kind in expected.manifest.shapes.values() for key, shape in kind.items()}
            variates = decode("", arrays[VARIATES_KIND], shapes, expected.manifest.dtype, 0)
    except (ValueError, TypeError, KeyError) as error:
        raise BadReply(f"its tensors cannot be read: {error}") from error
    _check_numbers([*sent.values(), *variates.values()], expected.max_norm)
    return sent, variates


def _arrays_of(kind: str, record: ArrayRecord) -> Arrays:
    try:
        return {name: array.numpy() for name, array in record.items()}
    except (ValueError, TypeError, EOFError) as error:
        raise BadReply(f"its record {kind!r}: {error}") from error


def _check_numbers(tensors: Sequence[Tensor], max_norm: float) -> None:
    if not all(np.isfinite(tensor.numpy()).all() for tensor in tensors):
        raise BadReply("its tensors hold NaN or infinity", is_divergence=True)
    norm = sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5
    if norm > max_norm:
        raise BadReply(f"the norm of its tensors is {norm:.3g}, allowed is {max_norm:.3g}", is_divergence=True)


# ---- what the replies of a round say together


def personal_accuracy(replies: Collection[Reply]) -> float:
    """Return the share of all the examples that clients held out which their own models get right, NaN for none."""
    held_out = sum(reply.num_held_out for reply in replies)
    return sum(reply.num_correct for reply in replies) / held_out if held_out else float("nan")


def mean_lost(replies: Collection[Reply]) -> dict[str, float]:
    """Return, by purpose, the mean share of what clients remembered that a new basis cost."""
    purposes = sorted({purpose for reply in replies for purpose in reply.lost})
    return {purpose: mean(reply.lost[purpose] for reply in replies if purpose in reply.lost) for purpose in purposes}
