"""What the server asks of a client in one round, as plain values.

The links say which factors exist and where the trained ones start (drawn, zero or sent); the plan adds what is
trained, how, from which stored state, and what is sent back. Every method of this project is such a plan, so one client
serves them all.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fedraclora.local_config import LocalConfig

Scalar = int | float | str | bool
Value = Scalar | list[int] | list[float] | list[str]

# What may be trained of a layer: either factor or both, the core between them, or the weight in full.
PARTS = {"a": ("lora_a",), "b": ("lora_b",), "ab": ("lora_a", "lora_b"), "core": ("core",), "w": ("weight",)}
MOMENTS = ("reset", "carry", "transport", "keep")
MEMORIES = ("drop", "carry", "transport")
FEEDBACKS = ("none", "ef", "ef21", "marina")
NO_STATE = -1
# The noise of a deployed client comes from its operating system.
NO_SEED = -1


@dataclass(frozen=True)
class Training:
    """What a method has the clients train, and what they send.

    `parts` maps each layer of the open link to what is trained there (`PARTS`); `dense` names further tensors trained
    in full. `private` are keys (`fc1.lora_b`) that are trained and kept, never sent. With `projects` the gradients of
    weights trained in full are projected on the rows of the layer's drawn factor (the columns of a drawn lora_b); with
    `sends_factor` such a weight's difference is sent as the factor that goes with the drawn one. `blocks` cuts the rank
    into blocks of which one trains at a time, each for `block_steps` steps, in an order of the client's own. `moments`
    says what becomes of the optimiser's state between rounds: all of it is `reset`; the first moments are `carry`-ed as
    they are, or `transport`-ed into the new link's basis, and the second ones start anew; or both go on as they are
    (`keep`), as if the optimiser were never rebuilt.
    """

    parts: Mapping[str, str] = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    private: tuple[str, ...] = ()
    projects: bool = False
    sends_factor: bool = False
    blocks: int = 1
    block_steps: int = 1
    moments: str = "reset"

    def __post_init__(self) -> None:
        """Refuse what no client could carry out."""
        if self.moments not in MOMENTS:
            raise ValueError(f"moments={self.moments!r} is unknown; valid: {', '.join(MOMENTS)}")
        wrong = {layer: part for layer, part in self.parts.items() if part not in PARTS}
        if wrong or not (self.parts or self.dense):
            raise ValueError(
                f"clients train {', '.join(PARTS)} of layers, or dense tensors; found {wrong or 'nothing'}"
            )
        if not set(self.private) <= set(self.keys):
            raise ValueError(f"private={list(self.private)} must be among what trains, {self.keys}")
        if self.blocks < 1 or self.block_steps < 1:
            raise ValueError(f"blocks={self.blocks} and block_steps={self.block_steps} must be at least 1")

    @property
    def keeps_second_moments(self) -> bool:
        """Return whether a client goes on with its optimiser's second moments too."""
        return self.moments == "keep"

    @property
    def keys(self) -> list[str]:
        """Return the keys of what trains in the layers: `fc1.lora_a`, `fc1.lora_b`, `fc1.core`, `fc1.weight`."""
        return [f"{layer}.{name}" for layer, part in self.parts.items() for name in PARTS[part]]

    @property
    def full(self) -> tuple[str, ...]:
        """Return the layers whose weights train in full."""
        return tuple(layer for layer, part in self.parts.items() if part == "w")

    def sent_factors(self, sides: Mapping[str, str]) -> list[str]:
        """Return the keys of the factors that are sent, in the order in which they are.

        `sides` gives the factor (`lora_a`, `lora_b`) as which a weight trained in full is sent, by layer.
        """
        keys = [key for key in self.keys if key not in self.private and not key.endswith(".weight")]
        return keys + ([f"{layer}.{sides[layer]}" for layer in self.full] if self.sends_factor else [])

    @property
    def sent_dense(self) -> list[str]:
        """Return the names of the whole tensors that are sent, in the order in which they are."""
        return ([] if self.sends_factor else [f"{layer}.weight" for layer in self.full]) + list(self.dense)


@dataclass(frozen=True)
class Sending:
    """How an update travels: its compressor (as text), what is done about the compressor's error, and clipping.

    `feedback` is one of `FEEDBACKS`. `memory` says what becomes of residuals and control variates in a new link, whose
    basis is another: `drop`, `carry` as they are, or `transport`. `clip` bounds the Euclidean norm of a client's whole
    update; 0 is no bound. `variates`: SCAFFOLD's.
    """

    codec: str = ""
    feedback: str = "none"
    memory: str = "transport"
    clip: float = 0.0
    variates: bool = False

    def __post_init__(self) -> None:
        """Refuse what no client could carry out."""
        for name, valid in (("feedback", FEEDBACKS), ("memory", MEMORIES)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; valid: {', '.join(valid)}")
        if not self.clip >= 0:
            raise ValueError(f"a clip of {self.clip} must not be negative")

    @property
    def sends_differences(self) -> bool:
        """Return whether differences from the start are sent, and not the trained values themselves."""
        return bool(self.codec) or self.feedback != "none" or self.clip > 0


@dataclass(frozen=True)
class RoundPlan:
    """One round's work: what is trained, how, and what is sent.

    `batch_seed` is the seed of this round's batch orders, `noise_seed` that of the noise of private training (NO_SEED:
    the operating system's entropy); `example_clip` bounds the gradient of each example and `example_noise` is the
    noise on their sum in units of it (0, 0: no privacy of examples).
    """

    round: int
    training: Training = field(default_factory=Training)
    local: LocalConfig = field(default_factory=LocalConfig)
    sending: Sending = field(default_factory=Sending)
    batch_seed: int = 0
    noise_seed: int = NO_SEED
    example_clip: float = 0.0
    example_noise: float = 0.0

    @property
    def keeps_state(self) -> bool:
        """Return whether a client has to remember something until its next round."""
        training, sending = self.training, self.sending
        return training.moments != "reset" or bool(training.private) or sending.feedback != "none" or sending.variates

    def to_record(self) -> dict[str, Value]:
        """Return the plan as scalars and lists of scalars, which is what a Flower config record carries."""
        training = asdict(self.training)
        parts = training.pop("parts")
        record: dict[str, Value] = {
            "round": self.round,
            "layers": list(parts),
            "parts": list(parts.values()),
            "batch_seed": self.batch_seed,
            "noise_seed": self.noise_seed,
            "example_clip": self.example_clip,
            "example_noise": self.example_noise,
        }
        nested = {"training": training, "local": asdict(self.local), "sending": asdict(self.sending)}
        for prefix, values in nested.items():
            record |= {f"{prefix}.{name}": _plain(value) for name, value in values.items()}
        return record

    @staticmethod
    def from_record(record: Mapping[str, object]) -> "RoundPlan":
        """Return the plan that `to_record` wrote. Raises KeyError for a missing field."""
        values: dict[str, Any] = dict(record)
        training = _nested(Training, "training", values, but=("parts",))
        parts = dict(zip(values["layers"], values["parts"], strict=True))
        names = ("dense", "private")
        whole = {**training, **{name: tuple(training[name]) for name in names}, "parts": parts}
        plain = ("round", "batch_seed", "noise_seed", "example_clip", "example_noise")
        return RoundPlan(
            training=Training(**whole),
            local=LocalConfig(**_nested(LocalConfig, "local", values)),
            sending=Sending(**_nested(Sending, "sending", values)),
            **{name: values[name] for name in plain},
        )


def _plain(value: Any) -> Value:  # noqa: ANN401
    plain: Value = list(value) if isinstance(value, tuple) else value
    return plain


def _nested(kind: type, prefix: str, values: Mapping[str, Any], *, but: tuple[str, ...] = ()) -> dict[str, Any]:
    return {item.name: values[f"{prefix}.{item.name}"] for item in fields(kind) if item.name not in but}
