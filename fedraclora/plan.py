"""What the server asks of a client in one round, as plain values.

The links say which factors exist and where the trained ones start (drawn, zero or sent); the plan adds what is
trained, how, and from which stored state. Every method of this project is such a plan, so one client serves them all.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from fedraclora.local_config import LocalConfig

Scalar = int | float | str | bool
Value = Scalar | list[int] | list[float] | list[str]

MOMENTS = ("reset", "carry", "transport")
NO_STATE = -1


@dataclass(frozen=True)
class RoundPlan:
    """One round's work.

    `trained` maps each layer of the open link to the factors trained there: `a`, `b` or `ab`. `dense` names the
    tensors trained in full. `moments` says what becomes of the optimiser's first moments between rounds: `reset`,
    `carry` as they are, or `transport` into the new link's basis. `batch_seed` is the seed of this round's batch
    orders.
    """

    round: int
    trained: Mapping[str, str] = field(default_factory=dict)
    dense: tuple[str, ...] = ()
    local: LocalConfig = field(default_factory=LocalConfig)
    moments: str = "reset"
    batch_seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a plan that no client could carry out."""
        if self.moments not in MOMENTS:
            raise ValueError(f"moments={self.moments!r} is unknown; valid: {', '.join(MOMENTS)}")
        wrong = {layer: sides for layer, sides in self.trained.items() if sides not in ("a", "b", "ab")}
        if wrong or not (self.trained or self.dense):
            raise ValueError(
                f"a plan trains the factors a, b or ab of its layers, or dense tensors; found {wrong or 'nothing'}"
            )

    @property
    def factors(self) -> list[str]:
        """Return the keys of the trained factors in the order in which they are sent: `fc1.lora_a`, `fc1.lora_b`."""
        return [f"{layer}.lora_{side}" for layer, sides in self.trained.items() for side in sides]

    def to_record(self) -> dict[str, Value]:
        """Return the plan as scalars and lists of scalars, which is what a Flower config record carries."""
        record: dict[str, Value] = {
            "round": self.round,
            "layers": list(self.trained),
            "sides": list(self.trained.values()),
            "dense": list(self.dense),
            "moments": self.moments,
            "batch_seed": self.batch_seed,
        }
        return record | {f"local.{name}": value for name, value in asdict(self.local).items()}

    @staticmethod
    def from_record(record: Mapping[str, object]) -> "RoundPlan":
        """Return the plan that `to_record` wrote. Raises KeyError for a missing field."""
        values = dict(record)
        local = LocalConfig(**{item.name: values[f"local.{item.name}"] for item in fields(LocalConfig)})  # type: ignore[arg-type]
        return RoundPlan(
            round=values["round"],  # type: ignore[arg-type]
            trained=dict(zip(values["layers"], values["sides"], strict=True)),  # type: ignore[call-overload]
            dense=tuple(values["dense"]),  # type: ignore[arg-type]
            local=local,
            moments=values["moments"],  # type: ignore[arg-type]
            batch_seed=values["batch_seed"],  # type: ignore[arg-type]
        )
