"""Reading a client's reply: what it must hold, and why one is refused."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor

from fedraclora.delivery import DENSE, UPDATE, Needs
from fedraclora.payload import Shape, unflatten
from strategies.method import ClientUpdate

METRIC_KEYS = frozenset({"num-examples", "num-steps", "train-loss"})


class BadReply(ValueError):
    """A reply that cannot be used; `is_divergence` where its numbers are not finite."""

    def __init__(self, reason: str, *, is_divergence: bool = False) -> None:
        super().__init__(reason)
        self.is_divergence = is_divergence


@dataclass(frozen=True)
class Expected:
    """What a usable reply states and holds: digests, and by kind the keys and shapes of its tensors."""

    version: str
    sketches: str
    shapes: Mapping[str, Mapping[str, Shape]]
    dtype: torch.dtype
    max_norm: float = float("inf")

    @property
    def num_bytes(self) -> int:
        """Return the tensor bytes of one reply."""
        sizes = [torch.Size(shape).numel() for kind in self.shapes.values() for shape in kind.values()]
        return sum(sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class Reply:
    """A usable reply."""

    update: ClientUpdate
    num_examples: int
    train_loss: float


def read_reply(message: Message, expected: Expected) -> Reply:
    """Return the reply that a message carries. Raises BadReply with the reason where it cannot be used."""
    if message.has_error():
        raise BadReply(f"client error {message.error.code}: {message.error.reason}")
    lacking = read_needs(message)
    if lacking is not None:
        raise BadReply(f"it could not be brought up to date: {lacking.reason}")
    stated: Mapping[str, object] = message.content.config_records.get("reply", {})
    for name, digest in (("version", expected.version), ("sketches", expected.sketches)):
        if stated.get(name) != digest:
            raise BadReply(f"its {name} digest is {str(stated.get(name))[:12]}, expected {digest[:12]}")
    metrics: Mapping[str, object] = message.content.metric_records.get("metrics", {})
    if metrics.keys() != METRIC_KEYS:
        raise BadReply(f"its metrics are {sorted(metrics)}, expected {sorted(METRIC_KEYS)}")
    num_examples, train_loss = metrics["num-examples"], _number(metrics["train-loss"])
    if not isinstance(num_examples, int) or num_examples < 1:
        raise BadReply(f"it states num-examples={num_examples}, expected a whole number, at least 1")
    tensors = _read_tensors(message, expected)
    if not all(np.isfinite(tensor.numpy()).all() for tensor in tensors.values()):
        raise BadReply("its tensors hold NaN or infinity", is_divergence=True)
    norm = sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5
    if norm > expected.max_norm:
        raise BadReply(f"the norm of its tensors is {norm:.3g}, allowed is {expected.max_norm:.3g}", is_divergence=True)
    if not abs(train_loss) < float("inf"):
        raise BadReply(f"its training loss is {train_loss}", is_divergence=True)
    return Reply(ClientUpdate(tensors, float(num_examples)), num_examples, train_loss)


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise BadReply(f"a metric is {value!r}, expected one number")
    return float(value)


@dataclass(frozen=True)
class Introduction:
    """What a client says of itself in the handshake: its partition, and how many closed links it holds."""

    partition: int
    num_held: int


def read_introduction(message: Message) -> Introduction:
    """Return what a handshake's reply says. Raises BadReply with the reason where it says nothing usable."""
    if message.has_error():
        raise BadReply(f"client error {message.error.code}: {message.error.reason}")
    stated: Mapping[str, object] = message.content.metric_records.get("partition", {})
    partition, held = stated.get("partition-id"), stated.get("held")
    if not isinstance(partition, int) or partition < 0 or not isinstance(held, int):
        raise BadReply(f"it states {dict(stated)}, expected a partition-id, at least 0, and the links it holds")
    return Introduction(partition, held)


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


def read_held(message: Message) -> int | None:
    """Return how many closed links a client says it keeps, None where it does not say."""
    if message.has_error():
        return None
    stated: Mapping[str, object] = message.content.config_records.get("reply", {})
    held = stated.get("held")
    return max(0, held) if isinstance(held, int) else None


def _read_tensors(message: Message, expected: Expected) -> dict[str, Tensor]:
    records = message.content.array_records
    if set(records) != set(expected.shapes):
        raise BadReply(f"it sends {sorted(records)}, expected {sorted(expected.shapes)}")
    tensors: dict[str, Tensor] = {}
    for kind, shapes in expected.shapes.items():
        if list(records[kind]) != ["flat"]:
            raise BadReply(f"its record {kind!r} holds {list(records[kind])}, expected one array named 'flat'")
        try:
            values = unflatten(records[kind]["flat"].numpy(), list(shapes.values()))
        except (ValueError, TypeError, EOFError) as error:
            raise BadReply(f"its record {kind!r}: {error}") from error
        if values[0].dtype != expected.dtype:
            raise BadReply(f"its record {kind!r} is {values[0].dtype}, expected {expected.dtype}")
        tensors |= dict(zip(shapes, values, strict=True))
    return tensors


def expected_shapes(factors: Mapping[str, Shape], dense: Mapping[str, Shape]) -> dict[str, Mapping[str, Shape]]:
    """Return the shapes of a reply by kind, without the kinds that hold nothing."""
    return {kind: shapes for kind, shapes in ((UPDATE, factors), (DENSE, dense)) if shapes}
