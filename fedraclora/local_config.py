"""How a client trains in one round."""

from dataclasses import dataclass
from math import ceil

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class LocalConfig:
    """How a client trains in one round.

    `steps` local steps, or `epochs` passes over the client's own data where `steps` is 0. `proximal` is FedProx' mu
    (Li et al., 2020, arXiv 1812.06127) on the trained tensors; `clip_norm` bounds the norm of a client's whole
    gradient; 0 turns either off.
    """

    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    steps: int = 20
    epochs: int = 0
    batch_size: int = 32
    proximal: float = 0.0
    clip_norm: float = 0.0

    def num_steps(self, num_examples: int) -> int:
        """Return the local steps of a client with so many examples."""
        return self.steps or self.epochs * ceil(num_examples / min(self.batch_size, num_examples))

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} is unknown; valid: {', '.join(OPTIMIZERS)}")
        if (self.steps > 0) == (self.epochs > 0) or min(self.steps, self.epochs) < 0:
            raise ValueError(
                f"local_steps={self.steps} and local_epochs={self.epochs}: one must be positive and the other 0"
            )
        if not self.lr > 0 or self.batch_size < 1 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"lr={self.lr} must be positive, batch_size={self.batch_size} at least 1, "
                f"momentum={self.momentum} in [0, 1)"
            )
        for name in ("weight_decay", "proximal", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
