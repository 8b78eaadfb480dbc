"""What a client sends of what it trained, and how its server reads it: differences, compression and its error.

Both halves use this file, so they cannot disagree. A plan without compression and clipping has the trained values
sent as they are; otherwise the differences from where the round started are encoded. What the encoding leaves out is
remembered by the client, by the rule of `Sending.feedback`:

- `ef`: the residual is added to the next difference (F. Seide et al., 2014; S. P. Karimireddy et al., 2019, arXiv
  1901.09847);
- `ef21`: an estimate of the difference is kept at both ends, and what is sent moves it (P. Richtarik, I. Sokolov, I.
  Fatkhullin, 2021, arXiv 2106.05203);
- `marina`: the change since the client's last difference is sent, or with a round's coin everything (E. Gorbunov, K.
  Burlachenko, Z. Li, P. Richtarik, 2021, arXiv 2102.07845). Differs from the paper: what is compressed is the change of
  a client's whole round of local steps on fresh batches, not of one gradient at two points.

Differs from the papers in all three: with part of the clients a round, the server averages the estimates of those that
answered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedraclora.codec import codec_of
from fedraclora.compressors import Arrays
from fedraclora.link import Link, LowRank, materialize
from fedraclora.payload import Shape
from fedraclora.plan import RoundPlan, Sending, Training
from fedraclora.privacy import clip_to
from fedraclora.seeding import derive_seed
from fedraclora.travel import DENSE, UPDATE

VARIATES_KIND = "variates"
Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Manifest:
    """What a reply to a plan holds: the shapes of its tensors by kind and key, and their type."""

    shapes: Mapping[str, Mapping[str, Shape]]
    dtype: torch.dtype

    @property
    def keys(self) -> list[str]:
        """Return the keys of all tensors, in the order in which they are sent."""
        return [key for shapes in self.shapes.values() for key in shapes]

    def max_bytes(self, sending: Sending, *, is_whole: bool = False) -> dict[str, int]:
        """Return the bytes of one reply's arrays by kind, no fewer than they take where a compressor's size varies.

        `is_whole` is MARINA's coin, whose whole rounds are sent as they are, as control variates always are.
        """
        codec = codec_of("" if is_whole and sending.feedback == "marina" else sending.codec)
        found = {kind: codec.max_bytes(list(shapes.values()), self.dtype) for kind, shapes in self.shapes.items()}
        return found | ({VARIATES_KIND: self.plain_bytes} if sending.variates else {})

    @property
    def plain_bytes(self) -> int:
        """Return the bytes of the tensors as they are."""
        plain = sum(torch.Size(shape).numel() for shapes in self.shapes.values() for shape in shapes.values())
        return plain * self.dtype.itemsize


def factor_sides(link: Link) -> dict[str, str]:
    """Return the factor, by layer, that goes with the drawn one: what a weight trained in full is sent as."""
    return {layer: "lora_a" if _is_drawn(term, "lora_b") else "lora_b" for layer, term in link.low_rank_terms().items()}


def _is_drawn(term: LowRank, name: str) -> bool:
    return f"{term.layer}.{name}" in Link(0, (term,)).drawn_names


def manifest(training: Training, link: Link, shapes: Mapping[str, Shape], dtype: torch.dtype) -> Manifest:
    """Return what a reply holds, given the open link and the shapes of the model's tensors."""
    factors = link.factors
    update = {key: tuple(factors[key].shape) for key in training.sent_factors(factor_sides(link))}
    dense = {name: shapes[name] for name in training.sent_dense}
    return Manifest({kind: keys for kind, keys in ((UPDATE, update), (DENSE, dense)) if keys}, dtype)


def start_of(key: str, link: Link, weights: Named, like: Tensor) -> Tensor:
    """Return where a tensor's training started: a factor of the link, or a weight with what the link sets."""
    if key in link.factors:
        return materialize(link.factors[key], like)
    return weights[key].to(like)


def as_factor(difference: Tensor, term: LowRank) -> tuple[str, Tensor]:
    """Return a weight's difference `[out, in]` as the factor beside the drawn one, by name: exact in its span."""
    matrix = difference.flatten(1)
    if _is_drawn(term, "lora_b"):
        inverse = torch.linalg.pinv(materialize(term.lora_b, matrix).double()).to(matrix)
        return f"{term.layer}.lora_a", inverse @ matrix / term.scale
    inverse = torch.linalg.pinv(materialize(term.lora_a, matrix).double()).to(matrix)
    return f"{term.layer}.lora_b", matrix @ inverse / term.scale


# ---- the client's side


@dataclass(frozen=True)
class Outgoing:
    """What a client sends, by kind, and what it remembers; `is_within`: its update was no longer than the clip."""

    arrays: Mapping[str, Arrays]
    memory: dict[str, Tensor]
    is_within: bool


def sent_values(
    plan: RoundPlan, trained: Named, start: Named, link: Link
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the values of what is sent by key, and the values where they started, weights as factors where asked."""
    training, terms = plan.training, link.low_rank_terms()
    values = {key: trained[key] for key in training.keys if key not in training.private and not key.endswith(".weight")}
    starts = {key: start[key] for key in values}
    for layer in training.full:
        key = f"{layer}.weight"
        if training.sends_factor:
            name, factor = as_factor(trained[key] - start[key], terms[layer])
            values[name], starts[name] = factor, torch.zeros_like(factor)
        else:
            values[key], starts[key] = trained[key], start[key]
    for name in training.dense:
        values[name], starts[name] = trained[name], start[name]
    return values, starts


def pack(  # noqa: PLR0913 - what trained, what is remembered, and how the round has it sent
    sending: Sending, values: Named, starts: Named, memory: Named, *, seed: int, expected: Manifest, is_whole: bool
) -> Outgoing:
    """Return what a client sends; `memory` is what it remembers, `is_whole` MARINA's coin."""
    if not sending.sends_differences:
        return Outgoing({kind: _encode("", values, keys, seed) for kind, keys in expected.shapes.items()}, {}, True)
    differences = {key: values[key] - starts[key] for key in expected.keys}
    is_within = True
    if sending.clip > 0:
        clipped, is_within = clip_to(list(differences.values()), sending.clip)
        differences = dict(zip(differences, clipped, strict=True))
    remembered = {key: memory.get(key, torch.zeros_like(difference)) for key, difference in differences.items()}
    whole = is_whole and sending.feedback == "marina"
    send = differences if whole else _to_send(sending.feedback, differences, remembered)
    codec = "" if whole else sending.codec
    arrays: dict[str, Arrays] = {}
    decoded: dict[str, Tensor] = {}
    for kind, shapes in expected.shapes.items():
        own = derive_seed(seed, kind)
        arrays[kind] = _encode(codec, send, shapes, own)
        if sending.feedback in ("ef", "ef21"):
            decoded |= decode(codec, arrays[kind], shapes, expected.dtype, own)
    return Outgoing(arrays, _next_memory(sending.feedback, differences, remembered, send, decoded), is_within)


def _encode(codec: str, tensors: Named, keys: Sequence[str] | Mapping[str, Shape], seed: int) -> Arrays:
    return codec_of(codec).encode([tensors[key] for key in keys], seed)


def _to_send(feedback: str, differences: Named, remembered: Named) -> dict[str, Tensor]:
    if feedback == "none":
        return dict(differences)
    sign = 1 if feedback == "ef" else -1
    return {key: difference + sign * remembered[key] for key, difference in differences.items()}


def _next_memory(
    feedback: str, differences: Named, remembered: Named, send: Named, decoded: Named
) -> dict[str, Tensor]:
    if feedback == "ef":
        return {key: tensor - decoded[key] for key, tensor in send.items()}
    if feedback == "ef21":
        return {key: remembered[key] + decoded[key] for key in send}
    return dict(differences) if feedback == "marina" else {}


# ---- the server's side


def decode(codec: str, arrays: Arrays, shapes: Mapping[str, Shape], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Return the tensors that a kind's arrays stand for. Raises ValueError for arrays that cannot be decoded."""
    return dict(zip(shapes, codec_of(codec).decode(arrays, list(shapes.values()), dtype, seed), strict=True))


def unpack(
    sending: Sending, arrays: Mapping[str, Arrays], expected: Manifest, *, seed: int, is_whole: bool
) -> dict[str, Tensor]:
    """Return what a client sent, by key: values, or differences, or what moves an estimate of them."""
    whole = is_whole and sending.feedback == "marina"
    codec = "" if whole or not sending.sends_differences else sending.codec
    found: dict[str, Tensor] = {}
    for kind, shapes in expected.shapes.items():
        found |= decode(codec, arrays[kind], shapes, expected.dtype, derive_seed(seed, kind))
    return found


def estimate(feedback: str, sent: Named, known: Named, *, is_whole: bool) -> dict[str, Tensor]:
    """Return a client's difference as its server knows it; `known` is what it knew before, nothing for a new client."""
    if feedback not in ("ef21", "marina") or (feedback == "marina" and is_whole):
        return dict(sent)
    return {key: known.get(key, torch.zeros_like(tensor)) + tensor for key, tensor in sent.items()}


def next_variates(
    own: Named, server: Named, values: Named, starts: Named, lr_steps: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a client's next control variates and their change.

    SCAFFOLD's option II (S. P. Karimireddy et al., 2020, arXiv 1910.06378): `c_k - c + (start - end) / (steps lr)`.
    """
    zero = {key: torch.zeros_like(value) for key, value in values.items()}
    own, server = {**zero, **own}, {**zero, **server}
    new = {key: own[key] - server[key] + (starts[key] - values[key]) / lr_steps for key in values}
    return new, {key: new[key] - own[key] for key in values}
