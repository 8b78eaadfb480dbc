"""Server rules: what the server's optimiser makes of the update that its clients agree on.

S. Reddi, Z. Charles, M. Zaheer, Z. Garrett, K. Rush, J. Konecny, S. Kumar, B. McMahan, "Adaptive Federated
Optimization", 2021, arXiv 2003.00295, Algorithm 2, with no bias correction, as there; momentum is FedAvgM (T. Hsu, H.
Qi, M. Brown, 2019, arXiv 1909.06335). The update takes the place of the negative gradient.

Every operation is one correctly rounded elementwise step and none is fused, so all machines that replay the same
updates hold the same bits: a rule on merged updates costs no bytes.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RULES = ("sgd", "momentum", "adam", "yogi", "adagrad")


@dataclass(frozen=True)
class ServerRule:
    """A server's optimiser: `lr` is its learning rate, `beta1` and `beta2` the decay of the two moments.

    `tau` keeps the adaptive rules from dividing by zero; it is in units of an update, not of a gradient squared.
    """

    name: str = "sgd"
    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse values that are no optimiser."""
        if self.name not in RULES:
            raise ValueError(f"server.rule={self.name!r} is unknown; valid: {', '.join(RULES)}")
        if not self.lr > 0 or not self.tau > 0:
            raise ValueError(f"server.lr={self.lr} and server.tau={self.tau} must be positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"server.{name}={getattr(self, name)} must lie in [0, 1)")

    @property
    def is_plain(self) -> bool:
        """Return whether the rule takes the clients' update as it is."""
        return self.name == "sgd" and self.lr == 1.0

    @property
    def has_state(self) -> bool:
        """Return whether the rule remembers earlier updates."""
        return bool(self.slots)

    @property
    def slots(self) -> tuple[str, ...]:
        """Return the names of the moments that the rule keeps of each tensor."""
        return {"sgd": (), "momentum": ("first",)}.get(self.name, ("first", "second"))


@torch.no_grad()
def step_(rule: ServerRule, slots: MutableMapping[str, Tensor], name: str, update: Tensor) -> Tensor:
    """Return the step that `rule` takes for `update`; `slots` holds the moments by `name`, and is changed (all on CPU).

    With u the update: sgd `lr u`; momentum `m = beta1 m + u`, step `lr m`; the others `m = beta1 m + (1 - beta1) u`,
    step `lr m / (sqrt(v) + tau)` with v as in `_second_moment`.
    """
    if rule.name == "sgd":
        return update * rule.lr
    first = slots.get(f"{name}/first", torch.zeros_like(update)) * rule.beta1
    first = first + (update if rule.name == "momentum" else update * (1 - rule.beta1))
    slots[f"{name}/first"] = first
    if rule.name == "momentum":
        return first * rule.lr
    second = _second_moment(rule, slots.get(f"{name}/second"), update.square())
    slots[f"{name}/second"] = second
    return first * rule.lr / (_root(second) + rule.tau)


def _root(square: Tensor) -> Tensor:
    """Return the square root, correctly rounded; PyTorch's own is off by the last bit for some numbers."""
    return torch.from_numpy(np.asarray(np.sqrt(square.numpy())))


def _second_moment(rule: ServerRule, before: Tensor | None, square: Tensor) -> Tensor:
    # The paper starts v at tau^2 at least, so that the first steps are not divided by tau alone.
    before = torch.full_like(square, rule.tau**2) if before is None else before
    if rule.name == "adam":
        return before * rule.beta2 + square * (1 - rule.beta2)
    if rule.name == "yogi":
        return before - square * (1 - rule.beta2) * torch.sign(before - square)
    return before + square
